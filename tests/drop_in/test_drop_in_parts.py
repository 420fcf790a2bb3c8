"""Models whose parts somebody has wrapped, exchanged or quantized: the stock result, and why where stock."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_berts import bert, inputs, labels_for
from torch import nn
from torch.nn.utils import parametrize, prune

import geneformer_fast as gf
from geneformer_fast.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("nothing_told")


class Passing(nn.Module):
    """A wrapper as people write them: counts, and hands everything on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.n_calls = inner, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.n_calls += 1
        return self.inner(*args, **kwargs)


class Half(Passing):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5


class Mixing(nn.Module):
    """Not position-wise: adds the mean over the second axis."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        out = self.inner(x, *args)
        return out + out.mean(1, keepdim=True)


class MeanPooler(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mean(1)


class Int8(nn.Module):
    """A quantized layer of a library that nobody here knows: no floating weight, and a scale of the whole batch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().max() / 127
        x = (x / step).round() * step
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class WeightOnly(nn.Linear):
    """A quantized layer as bitsandbytes and quanto make them: a kind of Linear, position by position."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def replace(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child) is kind:
                setattr(parent, name, make(child))


def quantized_dynamically(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def put(path: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        parent = model.get_submodule(owner)
        setattr(parent, name, make(getattr(parent, name)))

    return change


def patched(path: str) -> Callable[[Any], None]:
    """A forward of one's own in front of a module's, as tracing tools put it there."""

    def change(model: Any) -> None:
        module = model.get_submodule(path)
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert all(arg.ndim != 2 for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point())
            return inner(*args, **kwargs)

        module.forward = forward

    return change


def act(name: str) -> str:
    return f"bert.encoder.layer.0.{name}"


CHANGES: dict[str, Callable[[Any], None]] = {
    "a wrapped encoder": put("bert.encoder", Passing),
    "a wrapped layer": put("bert.encoder.layer.1", Half),
    "a wrapped attention": put(act("attention"), Half),
    "a wrapped self-attention": put(act("attention.self"), Half),
    "a wrapped BertSelfOutput": put(act("attention.output"), Half),
    "a wrapped BertIntermediate": put(act("intermediate"), Half),
    "a wrapped BertOutput": put(act("output"), Half),
    "another layer": put("bert.encoder.layer.1", lambda layer: copy.deepcopy(bert(seed=5).bert.encoder.layer[0])),
    "wrapped embeddings": put("bert.embeddings", Half),
    "a wrapped head": put("cls", Half),
    "wrapped predictions": put("cls.predictions", Half),
    "a wrapped transform": put("cls.predictions.transform", Half),
    "a head that mixes positions": put("cls", Mixing),
    "a linear layer that mixes positions": put(act("attention.self.value"), Mixing),
    "a norm that mixes positions": put(act("output.LayerNorm"), Mixing),
    "an activation that mixes positions": put(act("intermediate.intermediate_act_fn"), Mixing),
    "another library's int8 layers": lambda model: replace(model.bert.encoder, nn.Linear, Int8),
    "another library's int8 layers in the head": lambda model: replace(
        model.cls.predictions.transform, nn.Linear, Int8
    ),
    "dynamic quantization": quantized_dynamically,
    "a replaced forward of a layer": patched("bert.encoder.layer.0"),
    "a replaced forward of a linear layer": patched(act("intermediate.dense")),
    "a replaced forward of a container": patched(act("output")),
}


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_parts_that_packed_cells_cannot_be_handed_to_run_as_stock_and_say_so(what: str, is_training: bool) -> None:
    def results(is_accelerated: bool) -> list[torch.Tensor]:
        model, given = bert("BertForMaskedLM").train(is_training), inputs()
        labels = labels_for(model, given)
        if is_accelerated:
            gf.accelerate(model)
        CHANGES[what](model)
        output = model(**given, **labels)
        if output.loss.requires_grad and what != "dynamic quantization":
            output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [output.loss.detach(), output.logits.detach(), *gradients]

    stock = results(False)
    with pytest.warns(UserWarning, match="this call runs the stock forward pass, padded and not accelerated"):
        ours = results(True)
    assert len(ours) == len(stock)
    for value, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_reasons_name_the_part() -> None:
    reasons_given = {
        "a wrapped layer": r"encoder\.layer\.1 is a .*Half, not transformers' own BertLayer",
        "another layer": r"encoder\.layer\.1 has been exchanged since accelerate",
        "wrapped embeddings": r"its embeddings are a .*Half",
        "a linear layer that mixes positions": r"layer\.0\.attention\.self\.value is a .*Mixing, which is not known",
        "dynamic quantization": r"(query|decoder|dense) is a .*dynamic.*Linear, which is not known",
        "a replaced forward of a linear layer": r"replaced the forward of encoder\.layer\.0\.intermediate\.dense",
    }
    for what, reason in reasons_given.items():
        model, given = bert("BertForMaskedLM").eval(), inputs()
        gf.accelerate(model)
        CHANGES[what](model)
        with torch.no_grad(), pytest.warns(UserWarning, match=reason):
            model(**given)


@pytest.mark.parametrize("is_first", [False, True])
def test_a_quantized_model_runs_as_before_and_says_why(is_first: bool) -> None:
    """Scales of dynamic quantization are those of the whole padded batch."""
    model, given = bert("BertForSequenceClassification").eval(), inputs()
    if is_first:
        gf.accelerate(model)
    quantized_dynamically(model)
    if not is_first:
        with torch.no_grad():
            stock = model(**given).logits
        gf.accelerate(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="not known to work token by token"):
        ours = model(**given).logits
    gf.accelerate(model).undo()
    with torch.no_grad():
        stock = model(**given).logits
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("what", ["embeddings", "encoder", "encoder.layer.0", "encoder.layer.0.attention"])
def test_accelerate_refuses_what_it_cannot_stand_in_for(what: str) -> None:
    model = bert("BertModel")
    put(what, Passing)(model)
    if what == "embeddings":
        gf.accelerate(model)
        with pytest.warns(UserWarning, match="its embeddings are a .*Passing"):
            model(**inputs())
        return
    with pytest.raises(UnsupportedError, match=rf"bert\.{what} of BertModel is a Passing"):
        gf.accelerate(model)


def test_a_pooler_of_ones_own_may_read_padding() -> None:
    model, given = bert("BertForSequenceClassification").eval(), inputs()
    model.bert.pooler = MeanPooler()
    with torch.no_grad():
        stock = model(**given).logits
        gf.accelerate(model)
        with pytest.warns(UserWarning, match="its pooler is a .*MeanPooler, which may read padding"):
            ours = model(**given).logits
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_a_classifier_of_ones_own_may_read_padding(architecture: str) -> None:
    model, given = bert(architecture).eval(), inputs()
    model.classifier = (Half if "Sequence" in architecture else Mixing)(model.classifier)
    reads_padding = "Token" in architecture
    with torch.no_grad():
        stock = model(**given).logits
        gf.accelerate(model)
        with warnings.catch_warnings(record=True) as told:
            ours = model(**given).logits
        gf.accelerate(model, padding="stock")
        again = model(**given).logits
    assert [str(each.message).endswith("Mixing, which may read padding") for each in told] == [True] * reads_padding
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, stock, atol=1e-5, rtol=1e-5)


def test_linear_layers_of_other_kinds_are_called_on_packed_cells(attending: list[int]) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model, given = bert("BertModel").eval(), inputs()
    replace(model.encoder.layer[0], nn.Linear, WeightOnly)
    key = model.encoder.layer[1].attention.self.key
    parametrize.register_parametrization(key, "weight", Doubled())
    prune.l1_unstructured(model.encoder.layer[1].output.dense, "weight", amount=0.3)
    model.encoder.layer[1].intermediate.intermediate_act_fn = nn.ELU()
    model.encoder.layer[1].output.dropout = nn.Identity()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = model(**given).pooler_output
        gf.accelerate(model)
        ours = model(**given).pooler_output
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert attending == [int(given["attention_mask"].sum())] * 2


def test_a_model_of_weight_only_linear_layers_is_packed(attending: list[int]) -> None:
    """As 8-bit and 4-bit models of transformers are, decoder included."""
    model, given = bert("BertForMaskedLM").train(), inputs()
    replace(model, nn.Linear, WeightOnly)
    labels = labels_for(model, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = model(**given, **labels)
        gf.accelerate(model)
        ours = model(**given, **labels)
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(ours.loss, stock.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.logits[keep], stock.logits[keep], atol=1e-5, rtol=1e-5)
    assert attending
