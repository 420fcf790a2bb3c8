"""What cannot be packed: models that are refused, and calls that go to the stock forward pass, each with its reason."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.models.bert import modeling_bert

from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.ragged import Padding

MODELS = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification")
# Arguments that packing serves, or that change nothing in an encoder (use_cache, and the loss's token count that
# transformers' Trainer hands to every model which takes keywords).
_SERVED = {
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    *("output_hidden_states", "output_attentions", "return_dict", "use_cache", "num_items_in_batch"),
}
_WHY = {
    "encoder_hidden_states": "cross attention reads another sequence",
    "encoder_attention_mask": "cross attention reads another sequence",
    "past_key_values": "cached keys and values are padded",
    "head_mask": "attention kernels know no head_mask",
    "is_causal": "a causal mask was asked for",
}
_told: set[str] = set()


def check_model(model: nn.Module) -> None:
    """Refuse a model that packing cannot serve at all.

    Raises
    ------
    UnsupportedError
        Names the class, option or module that is in the way.
    """
    kind = type(model).__name__
    if kind not in MODELS or not _is_stock(model):
        raise UnsupportedError(f"accelerate() serves transformers' {', '.join(MODELS)}, {_advice(model)}")
    bert: Any = model if kind == "BertModel" else model.bert
    config = bert.config
    for option in ("is_decoder", "add_cross_attention"):
        if getattr(config, option, False):
            raise UnsupportedError(f"{kind} with config.{option}=True is a decoder; accelerate() serves encoders only")
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    if positions != "absolute":
        raise UnsupportedError(
            f"{kind} with config.position_embedding_type={positions!r} adds a bias to attention scores, which packed "
            "attention has not; only 'absolute' is served"
        )
    for name, module in [("", model), ("bert", bert), *((f"bert.{n}", m) for n, m in containers(bert))]:
        if not _is_stock(module):
            raise UnsupportedError(f"{name} of {kind} is a {type(module).__qualname__}, not transformers' own class")
        if "forward" in vars(module):
            raise UnsupportedError(
                f"{name or 'this'} {kind} has a forward of its own already, put there by another tool (accelerate's "
                "Accelerator.prepare does so); call geneformer_fast.accelerate before it"
            )


def containers(bert: Any) -> list[tuple[str, nn.Module]]:
    """Modules of a BertModel whose stock forward needs padded batches, with their names."""
    found = [("encoder", bert.encoder)]
    for index, layer in enumerate(bert.encoder.layer):
        name = f"encoder.layer.{index}"
        found += [
            (name, layer),
            (f"{name}.attention", layer.attention),
            (f"{name}.attention.self", layer.attention.self),
        ]
    return found


def _is_stock(module: nn.Module) -> bool:
    return type(module).__module__ == modeling_bert.__name__


def _advice(model: Any) -> str:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(inner, nn.Module):
        return f"not {kind}: accelerate the model inside first, then compile or wrap it"
    if isinstance(getattr(model, "bert", None), nn.Module):
        return f"not {kind}; its encoder alone can be accelerated: accelerate(model.bert)"
    return f"not {kind}"


def why_not_packed(bert: Any, arguments: dict[str, Any]) -> str | None:
    """Why a call of BertModel goes to its stock forward pass, judged by its arguments; None where it need not."""
    for name, value in arguments.items():
        if name not in _SERVED and value is not None and value is not False:
            return f"{name} was passed: " + _WHY.get(name, "the packed forward pass does not know it")
    if any("forward" not in vars(module) for _, module in containers(bert)):
        return "modules of its encoder have been exchanged since accelerate()"
    config = bert.config
    if getattr(config, "is_decoder", False) or getattr(config, "is_causal", False):
        return "the configuration makes the model a decoder"
    states, mask = arguments.get("output_hidden_states"), arguments.get("attention_mask")
    if states is not None and not isinstance(states, bool):
        return "output_hidden_states selects layers by index"
    if mask is not None and mask.ndim != 2:
        return f"attention_mask has {mask.ndim} axes: only one value for each token [B, L] can be packed"
    wants_weights = arguments.get("output_attentions")
    if wants_weights is None:
        wants_weights = getattr(config, "output_attentions", False)
    if wants_weights and bert.training and any(x.attention.self.dropout.p for x in bert.encoder.layer):
        return "output_attentions in training returns weights after dropout, which packed attention never holds"
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "a traced or exported graph cannot depend on where padding is"
    return _why_not_shapes(arguments)


def _why_not_shapes(arguments: dict[str, Any]) -> str | None:
    ids, embedded, mask = arguments.get("input_ids"), arguments.get("inputs_embeds"), arguments.get("attention_mask")
    shapes = [*([] if ids is None else [ids.shape]), *([] if embedded is None else [embedded.shape[:2]])]
    if len(shapes) != 1:
        return "exactly one of input_ids and inputs_embeds is needed"
    (shape,) = shapes
    if len(shape) != 2 or (mask is not None and mask.shape != shape):
        return "input and attention_mask are not [B, L] both"
    return None


def why_not_these_cells(bert: Any, padding: Padding) -> str | None:
    """Why a call goes to the stock forward pass, judged by where padding is."""
    if bert.pooler is not None and not padding.has_first:
        return "the pooler reads the first column, which is padding for some cells (left padding, or an empty cell)"
    return None


def check_tokens(bert: Any, ids: torch.Tensor, positions: torch.Tensor | None) -> None:
    """Refuse what a table would only answer with an index error, or on a card with a dead process.

    Raises
    ------
    InputError
        The batch is longer than the position table.
    VocabularyError
        On the CPU, a token id is outside the model's table.
    """
    tables = bert.embeddings.position_embeddings, bert.embeddings.word_embeddings
    # A table that has been wrapped may not tell; then it answers for itself.
    n_positions, n_tokens = (getattr(table, "num_embeddings", None) for table in tables)
    if positions is None and n_positions is not None and ids.shape[1] > n_positions:
        raise InputError(
            f"a batch of {ids.shape[1]:,} columns does not fit the model's {n_positions:,} positions; use "
            f"tokenize --max-len {n_positions} (max_len={n_positions}), or truncate"
        )
    if n_tokens is None or ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= n_tokens:
        raise VocabularyError(
            f"token id {low if low < 0 else high} is outside the model's {n_tokens:,} tokens; these tokens were made "
            "with another dictionary"
        )


@torch.compiler.disable
def tell_once(kind: str, reason: str) -> None:
    """Warn, once for each reason, that a call is not accelerated."""
    message = f"{kind}: this call runs the stock forward pass, padded and not accelerated, because {reason}"
    if message not in _told:
        _told.add(message)
        warnings.warn(message, UserWarning, stacklevel=5)
