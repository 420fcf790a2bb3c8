"""What cannot be packed: models that are refused, and calls that go to the stock forward pass, each with its reason."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.models.bert import modeling_bert

from geneformer_fast.drop_in.head import why_not_labels
from geneformer_fast.drop_in.parts import (
    REPLACED,
    patched_class,
    patched_model,
    stock_name,
    why_not_attention,
    why_not_encoder,
    why_not_head,
)
from geneformer_fast.drop_in.plain import has_foreign_global_hooks
from geneformer_fast.drop_in.readers import PAST_PADDING, unmasked_pooling
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
        if not _is_stock(module) or (name.startswith("bert.") and type(module).__name__ not in REPLACED):
            raise UnsupportedError(f"{name} of {kind} is a {type(module).__qualname__}, not transformers' own class")
        if "forward" in vars(module):
            raise UnsupportedError(
                f"{name or 'this'} {kind} has a forward of its own already, put there by another tool (accelerate's "
                "Accelerator.prepare does so); call geneformer_fast.accelerate before it"
            )


def containers(bert: Any) -> list[tuple[str, nn.Module]]:
    """Modules of a BertModel whose stock forward needs padded batches, with their names.

    Where somebody's own module stands in place of one, it is listed, and what would be inside of it is not.
    """
    found = [("encoder", bert.encoder)]
    for index, layer in enumerate(getattr(bert.encoder, "layer", ())):
        name, module = f"encoder.layer.{index}", layer
        for part in ("", ".attention", ".attention.self"):
            module = getattr(module, part.rpartition(".")[2]) if part else module
            found.append((name + part, module))
            if stock_name(type(module)) not in REPLACED:
                break
    return found


def _is_stock(module: nn.Module) -> bool:
    return type(module).__module__ == modeling_bert.__name__


def _advice(model: Any) -> str:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    inner = getattr(model, "_orig_mod", getattr(model, "module", None))
    if isinstance(inner, nn.Module):
        return f"not {kind}: accelerate the model inside first, then compile or wrap it"
    if isinstance(getattr(model, "bert", None), nn.Module):
        pooling = unmasked_pooling(model, model.bert)
        how = "model.bert" if pooling is None else f"model.bert, {PAST_PADDING}), because {pooling} reads padding, too"
        return f"not {kind}; its encoder alone can be accelerated: accelerate({how}" + (")" if pooling is None else "")
    return f"not {kind}"


def why_not_traced(tensor: Any) -> str | None:
    """Why a call goes to the stock forward pass, judged by who runs it: whoever needs a graph that looks at no value.

    This comes before anything that looks at values, and no compiler has to stop for it.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "a traced or exported graph cannot depend on where padding is"
    if torch.compiler.is_compiling():
        return None
    return _why_not_values(tensor)


def _why_not_values(tensor: Any) -> str | None:
    # Private in torch, all three; without them the operations say themselves what they cannot do.
    is_transformed = getattr(torch._C, "_are_functorch_transforms_active", None)
    if is_transformed is not None and is_transformed():
        return "torch.func transforms it, and packed operations have backward passes of their own"
    if getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        return "packed operations have no forward-mode derivatives"
    if tensor is not None and (type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type == "meta"):
        return f"a {type(tensor).__name__} on {getattr(tensor, 'device', 'no device')} has no values to look at"
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    if modes is not None and modes():
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

        for mode in _get_current_dispatch_mode_stack():
            if getattr(mode, "_mode_key", None) is not None:
                return f"there are no values to look at under {type(mode).__name__}"
    return None


def why_not_masked_lm(model: Any, arguments: dict[str, Any]) -> str | None:
    """Why a call of BertForMaskedLM goes to its stock forward pass as a whole; its encoder is asked separately."""
    labels, source = arguments.get("labels"), arguments.get("input_ids")
    reason = patched_class() or patched_model(model) or why_not_head(model.cls)
    if reason is None and has_foreign_global_hooks():
        reason = "hooks for all modules are set, and they expect padded batches"
    if reason is not None or labels is None:
        return reason
    source = arguments.get("inputs_embeds") if source is None else source
    # Without an input there is no loss either: the encoder says so.
    return None if source is None else why_not_labels(model, labels, source.shape[:2].numel())


def why_not_packed(bert: Any, arguments: dict[str, Any]) -> str | None:
    """Why a call of BertModel goes to its stock forward pass, judged by its arguments; None where it need not."""
    for name, value in arguments.items():
        if name not in _SERVED and value is not None and value is not False:
            return f"{name} was passed: " + _WHY.get(name, "the packed forward pass does not know it")
    reason = patched_class() or why_not_attention(bert.config) or why_not_encoder(bert)
    if reason is None and has_foreign_global_hooks():
        reason = "hooks for all modules are set, and they expect padded batches"
    if reason is not None:
        return reason
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
    return _why_not_shapes(arguments)


def _why_not_shapes(arguments: dict[str, Any]) -> str | None:
    ids, embedded, mask = arguments.get("input_ids"), arguments.get("inputs_embeds"), arguments.get("attention_mask")
    shapes = [*([] if ids is None else [ids.shape]), *([] if embedded is None else [embedded.shape[:2]])]
    if len(shapes) != 1:
        return "exactly one of input_ids and inputs_embeds is needed"
    (shape,) = shapes
    if len(shape) != 2 or (mask is not None and mask.shape != shape):
        return "input and attention_mask are not [B, L] both"
    for name in ("token_type_ids", "position_ids"):
        value = arguments.get(name)
        if value is not None and not _is_one_for_each(value.shape, shape):
            return f"{name} {[*value.shape]} are not one for each of {[*shape]} tokens"
    return None


def _is_one_for_each(given: torch.Size, wanted: torch.Size) -> bool:
    """Whether a shape is [B, L] or what transformers repeats to it, such as [1, L] and [L]."""
    padded = (1,) * (len(wanted) - len(given)) + tuple(given)
    return len(padded) == len(wanted) and all(a in (1, b) for a, b in zip(padded, wanted, strict=True))


def why_not_these_cells(bert: Any, padding: Padding, *, is_padding_read: bool) -> str | None:
    """Why a call goes to the stock forward pass, judged by where padding is."""
    if is_padding_read:
        # What attends to nothing at all is a matter of the attention implementation.
        if padding.index is not None and not bool((padding.cu_seqlens.diff() > 0).all()):
            return f"{PAST_PADDING} was asked for, and a cell without a single token has no values but the stock ones"
        return None
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


def tell_once(kind: str, reason: str) -> None:
    """Warn, once for each reason, that a call is not accelerated."""
    # An exporter stops at what a compiler may step over; it is told by documentation.
    if not torch.compiler.is_exporting():
        _tell_once(kind, reason)


@torch.compiler.disable
def _tell_once(kind: str, reason: str) -> None:
    message = f"{kind}: this call runs the stock forward pass, padded and not accelerated, because {reason}"
    if message not in _told:
        _told.add(message)
        warnings.warn(message, UserWarning, stacklevel=6)
