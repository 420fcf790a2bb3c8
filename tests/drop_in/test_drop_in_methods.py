"""Methods, attributes and functions that somebody has put into a model or its classes: the stock result, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_berts import assert_same_step, bert, inputs, labels_for, step
from torch import nn

import geneformer_fast as gf
from geneformer_fast.drop_in import reasons

transformers = pytest.importorskip("transformers")
modeling = transformers.models.bert.modeling_bert


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    reasons._told.clear()


def assert_stock(
    change: Callable[[Any], None], reason: str, *, architecture: str = "BertForMaskedLM", is_first: bool = False
) -> None:
    """One step of a changed model, with a reason where it is accelerated, before or after the change."""
    stock = bert(architecture).train()
    given = inputs()
    labels = labels_for(stock, given)
    ours = bert(architecture).train()
    if not is_first:
        gf.accelerate(ours)
    change(stock)
    change(ours)
    if is_first:
        gf.accelerate(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = step(stock, given, labels)
    with pytest.warns(UserWarning, match=reason):
        found = step(ours, given, labels)
    assert_same_step(found, expected)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForTokenClassification"])
def test_a_forward_put_into_a_models_class_runs(architecture: str, monkeypatch: Any) -> None:
    kind = getattr(modeling, architecture)
    inner = kind.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        output.loss = 2 * output.loss
        return output

    monkeypatch.setattr(kind, "forward", doubled)
    assert_stock(lambda model: None, rf"{architecture}\.forward has been replaced", architecture=architecture)


def test_a_method_put_into_the_class_of_layers_runs(monkeypatch: Any) -> None:
    inner = modeling.BertLayer.feed_forward_chunk
    monkeypatch.setattr(modeling.BertLayer, "feed_forward_chunk", lambda self, x: 0.5 * inner(self, x))
    assert_stock(lambda model: None, r"BertLayer\.feed_forward_chunk has been replaced")


def chunk_of_ones_own(model: Any) -> None:
    layer = model.bert.encoder.layer[0]
    inner = layer.feed_forward_chunk
    layer.feed_forward_chunk = lambda x: 0.5 * inner(x)


def set_in_self_attention(name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.bert.encoder.layer[1].attention.self
        if not hasattr(module, name):
            pytest.skip(f"this release of transformers has no {name}")
        setattr(module, name, value)

    return change


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (chunk_of_ones_own, r"changed the feed_forward_chunk of encoder\.layer\.0"),
        (set_in_self_attention("scaling", 0.9), r"changed the scaling of encoder\.layer\.1\.attention\.self"),
        (set_in_self_attention("is_causal", True), r"changed the is_causal of encoder\.layer\.1\.attention\.self"),
    ],
)
def test_attributes_that_packed_cells_would_not_see(change: Callable[[Any], None], reason: str, is_first: bool) -> None:
    assert_stock(change, reason, is_first=is_first)


def nearby(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: Any = None, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention with a bias by distance, as people register it."""
    columns = torch.arange(q.shape[2])
    bias = -0.3 * (columns[:, None] - columns).abs().to(q.dtype)
    if mask is not None:
        bias = bias.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else bias + mask
    return nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scaling).transpose(1, 2), None


@pytest.mark.skipif(not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"), reason="BERT takes no attention by name here")
@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("name", ["nearby", "sdpa"])
def test_attention_that_somebody_has_registered_runs(name: str, is_first: bool, monkeypatch: Any) -> None:
    functions = modeling.ALL_ATTENTION_FUNCTIONS
    masks = transformers.AttentionMaskInterface
    monkeypatch.setattr(type(functions), "_global_mapping", {**functions._global_mapping, name: nearby})
    monkeypatch.setattr(masks, "_global_mapping", {**masks._global_mapping, "nearby": masks._global_mapping["sdpa"]})
    assert_stock(
        lambda model: model.set_attn_implementation(name),
        rf"its attention '{name}' is a function of somebody's own",
        is_first=is_first,
    )


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_of_transformers_own_stays_packed(name: str) -> None:
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels = labels_for(model, given)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)
    stock = step(model, given, labels)
    gf.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_step(step(model, given, labels), stock)


def test_observers_of_quantization_see_padded_batches() -> None:
    """They note the largest values there are, padding included."""
    quantization = torch.ao.quantization

    def observed(is_accelerated: bool) -> list[torch.Tensor]:
        model = bert("BertModel").eval()
        model.qconfig = quantization.default_qconfig
        model.embeddings.qconfig = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantization.prepare(model, inplace=True)
        if is_accelerated:
            gf.accelerate(model)
        with torch.no_grad():
            model(**inputs())
        return [each.max_val for each in model.modules() if isinstance(each, quantization.MinMaxObserver)]

    stock = observed(False)
    with pytest.warns(UserWarning, match="is hooked"):
        ours = observed(True)
    assert stock
    for value, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "max_norm"])
def test_tables_that_count_what_is_looked_up_see_padding(option: str) -> None:
    def after_step(is_accelerated: bool) -> dict[str, torch.Tensor]:
        model, given = bert("BertForMaskedLM").train(), inputs()
        for table in model.bert.embeddings.modules():
            if isinstance(table, nn.Embedding):
                setattr(table, option, 0.5 if option == "max_norm" else True)
        if is_accelerated:
            gf.accelerate(model)
        found = step(model, given, labels_for(model, given))
        return {**found, **{f"new {name}": p.detach().clone() for name, p in model.named_parameters()}}

    assert_same_step(after_step(True), after_step(False))


def test_a_dropout_of_ones_own_may_read_padding() -> None:
    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.mean(1, keepdim=True)

    def change(model: Any) -> None:
        model.dropout = Mixing()

    assert_stock(
        change, r"its dropout is a .*Mixing, which may read padding", architecture="BertForTokenClassification"
    )


def test_labels_that_cannot_be_viewed_fail_as_in_torch() -> None:
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels = labels_for(model, given)["labels"].T.contiguous().T
    gf.accelerate(model)
    with pytest.raises(RuntimeError, match="view"), pytest.warns(UserWarning, match="not contiguous"):
        model(**given, labels=labels)
