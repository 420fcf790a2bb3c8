"""Small Hugging Face BERTs, ragged batches for them, and one training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

ARCHITECTURES = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification")
TASKS = {"BertForSequenceClassification": "SEQ_CLS", "BertForTokenClassification": "TOKEN_CLS"}
LENGTHS = [40, 1, 17, 33]
N_TOKENS, N_LABELS = 61, 3


def bert(architecture: str = "BertForMaskedLM", *, seed: int = 0, **changes: Any) -> Any:
    """A model without dropout, whose biases and norms are away from their trivial start."""
    config = transformers.BertConfig(
        **{
            **dict(vocab_size=N_TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
            **dict(intermediate_size=48, max_position_embeddings=48, hidden_act="relu", pad_token_id=0),
            **dict(num_labels=N_LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 + (0.05 if parameter.ndim == 1 else 0.0))
    return model


def inputs(lengths: list[int] = LENGTHS, *, side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    """Token ids and mask [B, L] with padding on one side."""
    generator, longest = torch.Generator().manual_seed(seed), max(lengths)
    columns = torch.arange(longest)
    sizes = torch.tensor(lengths)[:, None]
    mask = columns < sizes if side == "right" else columns >= longest - sizes
    ids = torch.randint(1, N_TOKENS, mask.shape, generator=generator) * mask
    return dict(input_ids=ids, attention_mask=mask.long())


def labels_for(model: Any, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The labels an architecture takes, -100 at padding."""
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    kind = type(model).__name__
    if kind == "BertModel":
        return {}
    if kind == "BertForSequenceClassification":
        return dict(labels=torch.arange(len(ids)) % N_LABELS)
    if kind == "BertForTokenClassification":
        return dict(labels=torch.where(mask, ids % N_LABELS, -100))
    chosen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    return dict(labels=torch.where(chosen & mask, ids, -100))


def loss_of(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """The model's own loss, or one that reads everything a BertModel says about real tokens."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    states = torch.where(mask[..., None].bool(), output.last_hidden_state, 0.0)
    return states.square().mean() + output.pooler_output.mean()


def step(model: Any, given: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, under that name, and every gradient of one training step."""
    model.zero_grad()
    loss = loss_of(model(**given, **labels), given["attention_mask"])
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same_step(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        torch.testing.assert_close(ours[name], value, atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def count_head_rows(model: Any) -> list[int]:
    """A list that gets the number of rows the masked head sees, each time it runs; without a hook."""
    transform, sizes = model.cls.predictions.transform, []
    activation = transform.transform_act_fn

    def counted(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(rows.shape[:-1].numel())
        return activation(rows)

    # A plain function, as a configuration may give one.
    del transform.transform_act_fn
    transform.transform_act_fn = counted
    return sizes


def recompute(model: Any, *, is_reentrant: bool) -> None:
    """Switch recomputing of activations on, by the name this release has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": is_reentrant})
