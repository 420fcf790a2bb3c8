"""One training step, loss and every gradient, of an accelerated model against the same model as it was."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, TASKS, assert_same_step, bert, inputs, labels_for, recompute, step
from tolerance import Witness, max_error

import geneformer_fast as gf
from geneformer_fast.drop_in import layers

ACTIVATIONS = ("gelu", "gelu_new", "silu")


def both_steps(model: Any, given: dict[str, torch.Tensor], base: Any = None) -> tuple[Any, Any]:
    labels = labels_for(base or model, given)
    stock = step(model, given, labels)
    handle = gf.accelerate(model)
    ours = step(model, given, labels)
    handle.undo()
    return ours, stock


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_is_the_same(architecture: str) -> None:
    model = bert(architecture).train()
    ours, stock = both_steps(model, inputs())
    assert_same_step(ours, stock)
    assert stock["loss"] > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_is_the_same_in_float64_to_its_last_digits(architecture: str) -> None:
    ours, stock = both_steps(bert(architecture).double().train(), inputs())
    # The kernels' loss of masked rows is float64 there, too.
    assert_same_step(ours, stock, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_step_is_the_same_for_other_activations(activation: str) -> None:
    assert_same_step(*both_steps(bert(hidden_act=activation).train(), inputs()))


@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputing(architecture: str, is_reentrant: bool, has_dropout: bool, monkeypatch: Any) -> None:
    """Recomputing changes nothing, with dropout as without, and it does happen: attention runs twice."""
    changes = dict(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2) if has_dropout else {}
    model, given = bert(architecture, **changes).train(), inputs()
    labels, calls = labels_for(model, given), []
    gf.accelerate(model)
    inner = model if architecture == "BertModel" else model.bert
    # transformers hooks the embeddings along with recomputing: then they draw for padding, too.
    encoder, inner.embeddings.dropout.p = inner.encoder, 0.0
    torch.manual_seed(5)
    plain = step(model, given, labels)
    recompute(model, is_reentrant=is_reentrant)
    real = layers.varlen_attention_qkv
    monkeypatch.setattr(
        layers, "varlen_attention_qkv", lambda *args, **options: calls.append(1) or real(*args, **options)
    )
    torch.manual_seed(5)
    recomputed = step(model, given, labels)
    assert len(calls) == 2 * len(encoder.layer)
    assert_same_step(recomputed, plain, atol=1e-6)
    if not has_dropout:
        gf.accelerate(model).undo()
        assert_same_step(recomputed, step(model, given, labels))


@pytest.mark.parametrize("is_first", [False, True], ids=["adapters-first", "accelerated-first"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora(architecture: str, is_first: bool) -> None:
    peft = pytest.importorskip("peft")

    def adapted(is_accelerated: bool) -> dict[str, torch.Tensor]:
        model = bert(architecture)
        given = inputs()
        labels = labels_for(model, given)
        if is_accelerated and is_first:
            gf.accelerate(model)
        torch.manual_seed(2)
        lora = peft.LoraConfig(
            task_type=TASKS.get(architecture), r=3, lora_dropout=0.0,
            target_modules=["query", "value", "dense"], init_lora_weights=False,
        )  # fmt: skip
        wrapped = peft.get_peft_model(model, lora).train()
        if is_accelerated and not is_first:
            gf.accelerate(wrapped)
        if is_accelerated:
            assert "forward" in vars(model if architecture == "BertModel" else model.bert)
        return step(wrapped, given, labels)

    ours, stock = adapted(True), adapted(False)
    assert sum("lora_" in name for name in ours) >= 20
    assert_same_step(ours, stock)


@pytest.mark.parametrize("is_recomputing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_is_no_worse_than_twice_stock_autocast(architecture: str, is_recomputing: bool) -> None:
    """Loss and gradients in bfloat16, both judged by the stock model in float64."""
    given = inputs()
    truth_model = bert(architecture).double().train()
    labels = labels_for(truth_model, given)
    truth = step(truth_model, given, labels)
    model, stock = bert(architecture).train(), bert(architecture).train()
    if is_recomputing:
        recompute(model, is_reentrant=False)
        recompute(stock, is_reentrant=False)
    gf.accelerate(model)

    def narrow_step(model: Any) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return step(model, given, labels)

    assert_as_good(narrow_step(model), Witness(narrow_step, stock), truth)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bfloat16_model_is_no_worse_than_twice_stock(architecture: str) -> None:
    given = inputs()
    truth_model = bert(architecture).bfloat16().double().train()
    labels = labels_for(truth_model, given)
    truth = step(truth_model, given, labels)
    model, stock = bert(architecture).bfloat16().train(), bert(architecture).bfloat16().train()
    gf.accelerate(model)
    assert_as_good(step(model, given, labels), Witness(step, stock, given, labels), truth)
    with torch.no_grad(), contextlib.suppress(AttributeError):
        assert model(**given).logits.dtype == torch.bfloat16


def assert_as_good(ours: dict[str, torch.Tensor], witness: Witness, truth: dict[str, torch.Tensor]) -> None:
    """Over all gradients together, for a single one's largest error is a matter of luck."""
    assert ours.keys() == witness.here.keys() == truth.keys()
    error, band = max_error(ours["loss"], truth["loss"]), 2**-8 * truth["loss"].item()
    assert error <= witness["loss"].allows(error, lambda loss: max_error(loss, truth["loss"]), band=band)
    names = [name for name in truth if name != "loss"]
    for name in names:
        assert ours[name].dtype == witness.here[name].dtype

    def distance(found: dict[str, torch.Tensor]) -> float:
        return sum((found[name].double() - truth[name]).square().sum().item() for name in names) ** 0.5

    size = sum(truth[name].square().sum().item() for name in names) ** 0.5
    assert distance(ours) <= witness.allows(distance(ours), distance)
    assert 0 < distance(witness.here) < 0.2 * size


def test_every_dropout_is_alive_in_training_and_no_other_time() -> None:
    """One at a time: it changes the result, and in the mean over many draws changes it as the stock one does."""
    model, given = bert("BertModel").eval(), inputs([9, 6])
    keep = given["attention_mask"].bool()
    dropouts = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Dropout}
    assert len(dropouts) == 1 + 2 * 3

    def drawn(n_draws: int) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.stack([model(**given).last_hidden_state[keep] for _ in range(n_draws)])

    with torch.no_grad():
        for name, dropout in dropouts.items():
            dropout.p = 0.3
            owner = model.get_submodule(name.rpartition(".")[0])
            if hasattr(owner, "dropout_prob"):  # where the first releases served keep attention's
                owner.dropout_prob = 0.3
            model.train()
            stock = drawn(40)
            handle = gf.accelerate(model)
            ours = drawn(40)
            model.eval()
            assert torch.equal(*drawn(2)), name
            handle.undo()
            for each in (ours, stock):
                assert (each[0] - each[1]).abs().max() > 1e-3, name
            error = ((ours.var(0) + stock.var(0)) / 40).sqrt()
            distance = ((ours.mean(0) - stock.mean(0)) / error.clamp(min=1e-6)).square().mean()
            assert 0.4 < distance < 2.0, name
            assert 0.7 < ours.var(0).mean() / stock.var(0).mean() < 1.4, name
            dropout.p = owner.dropout_prob = 0.0


def test_frozen_layers_get_no_gradient_and_the_others_the_same() -> None:
    model = bert("BertForSequenceClassification").train()
    for parameter in (*model.bert.embeddings.parameters(), *model.bert.encoder.layer[0].parameters()):
        parameter.requires_grad_(False)
    ours, stock = both_steps(model, inputs())
    assert not any("embeddings" in name or "layer.0" in name for name in ours)
    assert_same_step(ours, stock)


def test_padding_tokens_get_no_gradient() -> None:
    """Without a mask padding tokens are ordinary tokens, except that transformers does not train their embedding."""
    model = bert("BertForMaskedLM", tie_word_embeddings=False).train()
    given = inputs()
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    ours, stock = both_steps(model, given)
    assert_same_step(ours, stock)
    assert not ours["bert.embeddings.word_embeddings.weight"][0].any()
