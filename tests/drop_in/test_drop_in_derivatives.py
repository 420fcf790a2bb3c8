"""Derivatives of other kinds than a training step's: by hidden states, by torch.func, forward, and without values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, N_TOKENS, assert_same_step, bert, inputs, labels_for, loss_of, recompute, step

import geneformer_fast as gf
from geneformer_fast.drop_in import reasons

EAGER = dict(attn_implementation="eager")


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    reasons._told.clear()


@pytest.mark.parametrize("padding", ["zeros", "stock"])
@pytest.mark.parametrize("how", ["plain", "recomputing", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_can_be_derived_by_hidden_states_and_attentions(architecture: str, how: str, padding: str) -> None:
    model = bert(architecture, **EAGER).double().train()
    given = inputs(side="left" if how == "left" and architecture in ("BertForMaskedLM", ARCHITECTURES[3]) else "right")
    labels, keep = labels_for(model, given), given["attention_mask"].bool()
    # The embeddings too, which a loss may be derived by in a saliency map.
    if how == "recomputing":
        recompute(model, is_reentrant=False)

    def derived() -> list[torch.Tensor]:
        output = model(**given, **labels, output_hidden_states=True, output_attentions=how != "recomputing")
        parts = [*output.hidden_states, *(output.attentions or ())]
        found = torch.autograd.grad(loss_of(output, given["attention_mask"]), parts)
        return [*(part.detach() for part in parts), *found]

    stock = derived()
    gf.accelerate(model, padding=padding)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = derived()
    assert len(ours) == len(stock) == 2 * (3 + 2 * (how != "recomputing"))
    pairs = (keep[:, :, None] & keep[:, None, :])[:, None].expand(-1, 2, -1, -1)
    for value, expected in zip(ours, stock, strict=True):
        where = keep if value.ndim == 3 else pairs
        torch.testing.assert_close(value[where], expected[where], atol=1e-12, rtol=1e-9)
        if padding == "stock":
            torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-9)
    assert all(expected[keep if expected.ndim == 3 else pairs].abs().max() > 1e-7 for expected in stock)


def test_hidden_states_of_a_bfloat16_step_have_gradients() -> None:
    model, given = bert("BertForMaskedLM").bfloat16().train(), inputs()
    gf.accelerate(model)
    output = model(**given, **labels_for(model, given), output_hidden_states=True)
    found = torch.autograd.grad(output.loss, output.hidden_states)
    assert all(each.dtype == torch.bfloat16 and each.abs().max() > 0 for each in found)


def test_a_step_that_also_returns_states_and_weights_is_the_same_step() -> None:
    model, given = bert("BertForMaskedLM", **EAGER).double().train(), inputs()
    labels = labels_for(model, given)
    stock = step(model, given, labels)
    model.config.output_hidden_states = model.config.output_attentions = True
    gf.accelerate(model)
    assert_same_step(step(model, given, labels), stock, atol=1e-12)


def weights_and_loss(model: Any, given: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    labels = labels_for(model, given)

    def loss(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        asked = {**given, "input_ids": ids}
        return loss_of(torch.func.functional_call(model, weights, (), {**asked, **labels}), given["attention_mask"])

    return weights, loss


def by_grad(model: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    weights, loss = weights_and_loss(model, given)
    return [*torch.func.grad(loss)(weights, given["input_ids"]).values()]


def by_vmap(model: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """An ensemble: one set of weights for each member."""
    weights, loss = weights_and_loss(model, given)
    stacked = {name: torch.stack([value, value * 1.1]) for name, value in weights.items()}
    return [torch.func.vmap(loss, in_dims=(0, None))(stacked, given["input_ids"])]


def by_jvp(model: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    weights, loss = weights_and_loss(model, given)
    return [*torch.func.jvp(lambda weights: loss(weights, given["input_ids"]), (weights,), (weights,))]


def by_dual_numbers(model: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    forward_ad = torch.autograd.forward_ad
    weights, loss = weights_and_loss(model, given)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, value) for name, value in weights.items()}
        return [each.clone() for each in forward_ad.unpack_dual(loss(dual, given["input_ids"]))]


@pytest.mark.parametrize("how", [by_grad, by_vmap, by_jvp, by_dual_numbers], ids=lambda how: how.__name__)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transforms_get_the_stock_model_and_say_so(architecture: str, how: Any) -> None:
    model, given = bert(architecture, **EAGER).double().eval(), inputs([9, 4])
    stock = how(model, given)
    gf.accelerate(model)
    with pytest.warns(UserWarning, match="stock forward pass.*(torch.func|forward-mode)"):
        ours = how(model, given)
    assert len(ours) == len(stock)
    assert all(torch.equal(value, expected) for value, expected in zip(ours, stock, strict=True))
    # Outside of the transform the model is packed again.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reasons._told.clear()
        model(**given)


def test_second_derivatives_are_refused() -> None:
    """Packed operations have first derivatives; a gradient penalty must never miss a part of its graph."""
    model, given = bert("BertForMaskedLM", **EAGER).double().train(), inputs()
    gf.accelerate(model)
    loss = model(**given, **labels_for(model, given)).loss
    parameters = list(model.parameters())

    def penalty() -> Any:
        found = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in found), parameters)

    with pytest.raises(RuntimeError):
        penalty()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fake_tensors_have_the_stock_shapes(architecture: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, given = bert(architecture, **EAGER).eval(), inputs()
    stock = model(**given)
    gf.accelerate(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.warns(UserWarning, match="values"):
        fake = model(**{name: mode.from_tensor(value) for name, value in given.items()})
    assert [each.shape for each in fake.values()] == [each.shape for each in stock.values()]


def test_a_model_without_values_has_the_stock_shapes() -> None:
    model = bert("BertForMaskedLM", **EAGER).to("meta").eval()
    gf.accelerate(model)
    with pytest.warns(UserWarning, match="a Tensor on meta has no values"):
        output = model(inputs_embeds=torch.empty(4, 40, 32, device="meta"))
    assert output.logits.shape == (4, 40, N_TOKENS)


@pytest.mark.parametrize("is_strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_exported_model_is_the_stock_one(architecture: str, is_strict: bool) -> None:
    model, given = bert(architecture).eval(), inputs()
    with torch.no_grad():
        stock = model(**given)[0]
    gf.accelerate(model)
    exported = torch.export.export(model, (), given, strict=is_strict).module()
    other = inputs(seed=2)
    with torch.no_grad():
        torch.testing.assert_close(exported(**given)[0], stock, atol=1e-6, rtol=1e-5)
        gf.accelerate(model).undo()
        torch.testing.assert_close(exported(**other)[0], model(**other)[0], atol=1e-6, rtol=1e-5)
