"""Models that somebody has hooked or patched, or whose rows have adapters of their own: the stock result."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from small_berts import assert_same_step, bert, inputs, labels_for, step
from torch import nn

import geneformer_fast as gf
from geneformer_fast.drop_in import reasons

transformers = pytest.importorskip("transformers")
modeling = transformers.models.bert.modeling_bert
pytestmark = pytest.mark.usefixtures("nothing_told")

KINDS = ["Linear", "LayerNorm", "Dropout", "BertSelfOutput", "BertIntermediate", "BertOutput"]
CONTAINERS = ["BertEncoder", "BertLayer", "BertAttention", "BertSelfAttention"]


@pytest.mark.parametrize("kind", [*CONTAINERS, *KINDS])
@pytest.mark.parametrize("when", ["pre", "post", "backward"])
def test_hooks_inside_of_the_encoder_see_what_they_see_in_the_stock_model(kind: str, when: str) -> None:
    """Padded batches, in every position, whatever the hook reads of them; and undo nothing."""
    model = bert("BertForMaskedLM").train()
    given, seen = inputs(), []
    labels = labels_for(model, given)

    def shapes(values: Any) -> list[Any]:
        if isinstance(values, torch.Tensor):
            return [*values.shape]
        return [shapes(each) for each in values] if isinstance(values, list | tuple) else [type(values).__name__]

    def before(module: nn.Module, args: Any) -> None:
        seen.append(shapes(args))

    def after(module: nn.Module, args: Any, out: Any) -> None:
        seen.append([shapes(args), shapes(out)])

    handles = []
    kinds = {kind, "BertSdpaSelfAttention"} if kind == "BertSelfAttention" else {kind}
    for module in model.bert.encoder.modules():
        if type(module).__name__ in kinds:
            register = {
                "pre": functools.partial(module.register_forward_pre_hook, before),
                "post": functools.partial(module.register_forward_hook, after),
                "backward": functools.partial(module.register_full_backward_hook, after),
            }[when]
            handles.append(register())
    stock = step(model, given, labels)
    expected = seen.copy()
    seen.clear()
    gf.accelerate(model)
    with pytest.warns(UserWarning, match="is hooked"):
        assert_same_step(step(model, given, labels), stock)
    assert seen == expected
    # torch calls no backward hook of a module that returns an object.
    assert expected or (kind, when) == ("BertEncoder", "backward")
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reasons._told.clear()
        model(**given, **labels)


def test_foreign_hooks_for_all_modules_run_as_in_the_stock_model() -> None:
    model, given = bert("BertForMaskedLM").train(), inputs()
    labels, seen = labels_for(model, given), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(out).__name__))
    try:
        stock = step(model, given, labels)
        expected = seen.copy()
        seen.clear()
        gf.accelerate(model)
        with pytest.warns(UserWarning, match="hooks for all modules"):
            assert_same_step(step(model, given, labels), stock)
    finally:
        hook.remove()
    assert seen == expected


def test_counting_tools_of_torch_see_packed_cells(attending: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, given = bert("BertModel").eval(), inputs([40, 1, 1, 1])

    def flops() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**given)
        return counter.get_total_flops()

    stock = flops()
    gf.accelerate(model)
    # Attention of ours is no operation that the counter knows.
    assert flops() < 0.5 * stock
    assert len(attending) == 2


@pytest.mark.parametrize(
    "kind", [modeling.BertLayer, modeling.BertSelfOutput, nn.Linear], ids=lambda kind: kind.__name__
)
def test_a_patched_class_is_noticed(kind: Any, monkeypatch: Any) -> None:
    real, calls = kind.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(self, *args, **kwargs)

    model, given = bert("BertForMaskedLM").eval(), inputs()
    gf.accelerate(model)
    monkeypatch.setattr(kind, "forward", forward)
    with torch.no_grad(), pytest.warns(UserWarning, match=rf"{kind.__name__}\.forward has been replaced"):
        model(**given)
    assert calls


def test_adapters_for_each_row_of_a_batch(attending: list[int]) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(3)
        options = dict(r=3, target_modules=["query", "value", "dense"], init_lora_weights=False)
        model = peft.get_peft_model(bert("BertModel"), peft.LoraConfig(**options), "a")
        model.add_adapter("b", peft.LoraConfig(**options))
        return model.eval()

    model, given = adapted(), inputs()
    names = ["a", "b", "__base__", "a"]
    with torch.no_grad():
        stock = model(**given, adapter_names=names).pooler_output
        alone = model(**given).pooler_output
        gf.accelerate(model)
        with pytest.warns(UserWarning, match="adapters for each row"):
            ours = model(**given, adapter_names=names).pooler_output
        assert not attending
        torch.testing.assert_close(model(**given).pooler_output, alone, atol=1e-5, rtol=1e-5)
    assert len(attending) == 2
    assert torch.equal(ours, stock)
    assert (ours - alone).abs().max() > 1e-2
