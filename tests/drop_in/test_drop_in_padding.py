"""What stands at padding: zeros, or with padding="stock" what the stock model computes there; and who is warned."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, N_LABELS, assert_same_step, bert, inputs, labels_for, recompute, step
from torch import nn

import geneformer_fast as gf
from geneformer_fast.drop_in import readers, reasons
from geneformer_fast.errors import UnsupportedError

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    reasons._told.clear()
    readers._told.clear()


class AttentionPool(nn.Module):
    """A softmax over all positions of a score of each, as in Geneformer's multi-task package."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_weights = nn.Parameter(torch.randn(width, 1, generator=torch.Generator().manual_seed(0)) * 0.3)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(hidden_states @ self.attention_weights, dim=1)
        return (hidden_states * weights).sum(dim=1)


class MaskedAttentionPool(AttentionPool):
    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        scores = (hidden_states @ self.attention_weights).masked_fill(attention_mask[..., None] == 0, -1e9)
        return (hidden_states * torch.softmax(scores, dim=1)).sum(dim=1)


class MultiTask(nn.Module):
    """Geneformer's multi-task classifier by its call pattern: encoder, pooling or first token, a linear layer each."""

    def __init__(self, pool: str = "attention", **changes: Any) -> None:
        super().__init__()
        self.bert = bert("BertModel", **changes)
        kinds = {"attention": AttentionPool, "masked": MaskedAttentionPool}
        self.attention_pool = kinds[pool](32) if pool in kinds else None
        self.pool = pool
        generator = torch.Generator().manual_seed(2)
        self.classification_heads = nn.ModuleList(nn.Linear(32, n_classes) for n_classes in (N_LABELS, 2))
        for parameter in self.classification_heads.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pool == "attention":
            pooled = self.attention_pool(hidden)
        elif self.pool == "masked":
            pooled = self.attention_pool(hidden, attention_mask)
        elif self.pool == "mean":
            pooled = (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        else:
            pooled = hidden[:, 0, :]
        logits = [head(pooled) for head in self.classification_heads]
        losses = [nn.functional.cross_entropy(*pair) for pair in zip(logits, labels, strict=True)]
        return torch.stack(losses).sum(), logits


def tasks() -> list[torch.Tensor]:
    return [torch.arange(4) % N_LABELS, torch.arange(4) % 2]


def multi_step(model: MultiTask, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss, logits = model(**given, labels=tasks())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": logits[0].detach(), **found}


@pytest.mark.parametrize("is_recomputing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_multi_task_classifier_with_attention_pooling_needs_the_stock_values(side: str, is_recomputing: bool) -> None:
    model, given = MultiTask().double().train(), inputs(side=side)
    if is_recomputing:
        recompute(model.bert, is_reentrant=False)
    stock = multi_step(model, given)
    gf.accelerate(model.bert, padding="stock")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_step(multi_step(model, given), stock, atol=1e-11)
    gf.accelerate(model.bert, padding="zeros")
    if side == "right":
        with pytest.warns(UserWarning, match='padding="stock"'):
            wrong = multi_step(model, given)
        assert (wrong["loss"] - stock["loss"]).abs() > 1e-3


def test_without_padding_in_a_batch_nothing_is_computed_twice(monkeypatch: Any) -> None:
    from geneformer_fast.drop_in import layers

    calls: list[int] = []
    real = layers.varlen_attention_qkv
    monkeypatch.setattr(layers, "varlen_attention_qkv", lambda x, **options: calls.append(len(x)) or real(x, **options))
    model, given = MultiTask().eval(), inputs([9, 9, 9, 9])
    gf.accelerate(model.bert, padding="stock")
    model(**given, labels=tasks())
    assert calls == [36, 36]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["right", "left", "holes"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_at_padding_is_stock(architecture: str, how: str, implementation: str) -> None:
    """Hidden states, attentions, logits and pooled values; a padding place attends to the tokens of its cell."""
    model = bert(architecture, attn_implementation=implementation).double().eval()
    given = inputs(side="left" if how == "left" else "right")
    if how == "holes":
        given["attention_mask"][:, 3:30:4] = 0
    wants = dict(output_hidden_states=True, output_attentions=implementation == "eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = model(**given, **wants)
        gf.accelerate(model, padding="stock")
        ours = model(**given, **wants)
    assert list(ours.keys()) == list(stock.keys())
    for name, expected in stock.items():
        value, expected = (each if isinstance(each, tuple) else (each,) for each in (ours[name], expected))
        for mine, theirs in zip(value, expected, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    if architecture != "BertForSequenceClassification":
        assert all(stock[0][given["attention_mask"] == 0].abs().amax(-1) > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_step_is_the_same_with_stock_padding(architecture: str) -> None:
    model, given = bert(architecture).double().train(), inputs()
    labels = labels_for(model, given)
    stock = step(model, given, labels)
    gf.accelerate(model, padding="stock")
    assert_same_step(step(model, given, labels), stock, atol=1e-12)


def test_dropout_is_drawn_at_padding_too() -> None:
    """In the mean over many draws what the stock model gives, at padding as well."""
    model = bert("BertModel", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).train()
    given = inputs([9, 4])

    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        return torch.stack([model(**given).last_hidden_state for _ in range(200)])

    with torch.no_grad():
        stock = drawn()
        gf.accelerate(model, padding="stock")
        ours = drawn()
    error = ((ours.var(0) + stock.var(0)) / 200).sqrt()
    distance = ((ours.mean(0) - stock.mean(0)) / error).square().mean(-1)
    assert distance.max() < 2.5
    assert (ours.var(0).mean(-1) / stock.var(0).mean(-1) - 1).abs().max() < 0.4


def test_autocast_at_padding_is_no_worse_than_twice_stock() -> None:
    given = inputs()
    truth_model = bert("BertModel").double().eval()
    model = bert("BertModel").eval()
    with torch.no_grad():
        truth = truth_model(**given).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            witness = model(**given).last_hidden_state
            gf.accelerate(model, padding="stock")
            ours = model(**given).last_hidden_state
    assert ours.dtype == witness.dtype
    error, allowed = (each.double().sub(truth).square().mean().sqrt() for each in (ours, witness))
    assert error <= 2 * allowed


def test_a_cell_without_tokens_has_the_stock_values() -> None:
    model, given = bert("BertModel").eval(), inputs()
    given["attention_mask"][1] = 0
    with torch.no_grad():
        stock = model(**given).last_hidden_state
        gf.accelerate(model, padding="stock")
        with pytest.warns(UserWarning, match="a cell without a single token"):
            assert torch.equal(model(**given).last_hidden_state, stock)


def test_other_values_are_refused_and_change_nothing() -> None:
    model = bert("BertModel")
    with pytest.raises(ValueError, match=r"padding must be one of .*zeros.*stock.*, not 'repeat'"):
        gf.accelerate(model, padding="repeat")
    assert "forward" not in vars(model)


def test_accelerating_again_changes_what_stands_at_padding() -> None:
    model, given = bert("BertModel").eval(), inputs()
    is_padding = given["attention_mask"] == 0
    with torch.no_grad():
        for padding in ("zeros", "stock", "zeros"):
            gf.accelerate(model, padding=padding)
            values = model(**given).last_hidden_state[is_padding]
            assert bool(values.any()) == (padding == "stock")


def test_the_refused_classifier_is_told_what_to_use() -> None:
    with pytest.raises(UnsupportedError, match=r'accelerate\(model\.bert, padding="stock"\), because attention_pool'):
        gf.accelerate(MultiTask())
    with pytest.raises(UnsupportedError, match=r"accelerate\(model\.bert\)$"):
        gf.accelerate(MultiTask("cls"))


@pytest.mark.parametrize("is_training", [False, True])
def test_attention_pooling_without_a_mask_is_recognised(is_training: bool) -> None:
    model, given = MultiTask().train(is_training), inputs()
    gf.accelerate(model.bert)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**inputs([9, 9, 9, 9]), labels=tasks())
    with torch.no_grad(), pytest.warns(UserWarning, match=r"MultiTask\.attention_pool pools over all positions"):
        model(**given, labels=tasks())


@pytest.mark.parametrize("reader", ["mean", "labels"])
def test_a_loss_that_reads_padding_is_recognised(reader: str) -> None:
    if reader == "mean":
        model, given = bert("BertModel").train(), inputs()
        gf.accelerate(model)
        loss = model(**given).last_hidden_state.mean(1).square().mean()
    else:
        model, given = bert("BertForTokenClassification").train(), inputs()
        gf.accelerate(model)
        loss = model(**given, labels=given["input_ids"] % N_LABELS).loss
    with pytest.warns(UserWarning, match="the loss reads hidden states at padding"):
        loss.backward()


@pytest.mark.parametrize("pool", ["masked", "cls", "mean"])
def test_poolings_that_know_padding_warn_nobody(pool: str) -> None:
    model, given = MultiTask(pool).double().train(), inputs()
    stock = multi_step(model, given)
    gf.accelerate(model.bert)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_step(multi_step(model, given), stock, atol=1e-11)


@pytest.mark.parametrize("is_peft", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_of_transformers_warn_nobody(architecture: str, is_peft: bool) -> None:
    model, given = bert(architecture).train(), inputs()
    labels = labels_for(model, given)
    gf.accelerate(model)
    if is_peft:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        step(model, given, labels)


def test_an_overflowing_loss_warns_nobody() -> None:
    """What overflows makes NaN of the zeros at padding; a scaler of gradients skips such a step."""
    model, given = bert("BertForMaskedLM").train(), inputs()
    gf.accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        (model(**given, **labels_for(model, given)).loss * float("inf")).backward()


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_at_padding_are_told_of_where_no_gradient_is(architecture: str) -> None:
    model, given = bert(architecture).eval(), inputs()
    readers._told.clear()
    gf.accelerate(model)
    right = labels_for(model, given)["labels"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**given, labels=right)
    gf.accelerate(model).undo()
    gf.accelerate(model)
    with torch.no_grad(), pytest.warns(UserWarning, match="reads hidden states at padding .there are labels"):
        model(**given, labels=right.clamp(min=0))
