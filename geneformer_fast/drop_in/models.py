"""The forward passes that stand in for those of transformers' BertModel and BertForMaskedLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from geneformer_kernels import attention_cells
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.ranges import within
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput

from geneformer_fast.drop_in.embeddings import packed_embeddings
from geneformer_fast.drop_in.head import Head, loss_of_logits, loss_of_rows
from geneformer_fast.drop_in.layers import Encoded, Packed
from geneformer_fast.drop_in.outputs import LogitsOnDemand, MaskedOutput
from geneformer_fast.drop_in.parts import why_not_classifier
from geneformer_fast.drop_in.plain import packed_forward_of
from geneformer_fast.drop_in.readers import Watch
from geneformer_fast.drop_in.reasons import (
    check_tokens,
    tell_once,
    why_not_masked_lm,
    why_not_packed,
    why_not_these_cells,
    why_not_traced,
)
from geneformer_fast.ragged import Padding


@dataclass(frozen=True)
class Call:
    """One call of a model as transformers' users make it."""

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: All arguments by name.
    arguments: dict[str, Any]
    #: Whether the stock forward names return_dict itself; until release 5 it does, and then its tuples differ.
    names_return_dict: bool

    def stock(self, reason: str) -> Any:
        """Run the class's own forward pass, and say why."""
        tell_once(type(self.module).__name__, reason)
        inner = getattr(self.module, "bert", None)
        forward = None if inner is None else packed_forward_of(inner)
        if forward is None:
            return self.own()
        # Zeros at padding are no input for what could not be packed.
        forward.n_stock += 1
        try:
            return self.own()
        finally:
            forward.n_stock -= 1

    def own(self) -> Any:
        """Run the class's own forward pass around whatever stands in its parts."""
        return type(self.module).forward(self.module, *self.args, **self.kwargs)


def packed_bert(call: Call, *, padding: str, watch: Watch) -> Any:
    """BertModel: packs its input, encodes, pads its output.

    ``padding`` says what stands there: ``"zeros"``, or with ``"stock"`` what the stock model computes.
    """
    bert, arguments = call.module, call.arguments
    ids = arguments.get("input_ids")
    source = arguments.get("inputs_embeds") if ids is None else ids
    reason = why_not_traced(source)
    if reason is not None:
        return call.stock(reason)
    reason, places, keys = _looked_at(bert, arguments, padding == "stock", watch)
    if reason is not None:
        return call.stock(reason)
    stream, outer = within("embeddings", packed_embeddings, bert.embeddings, arguments, places)
    wants_states = _flag(bert, arguments, "output_hidden_states")
    wants_weights = _flag(bert, arguments, "output_attentions")
    dtype = _products_dtype(stream, outer)
    cells = None if wants_weights or keys is not None else _cells(bert, places, stream, dtype)
    packed = Packed(places, cells, dtype, outer, keys, wants_weights, wants_states)
    encoded = bert.encoder(stream, packed)
    return _bert_output(call, encoded, packed, watch)


# Values decide shapes here and the device is asked for them: a compiler has to stop, and go on with what it got.
@torch.compiler.disable
def _looked_at(
    bert: Any, arguments: dict[str, Any], is_padding_read: bool, watch: Watch
) -> tuple[str | None, Any, torch.Tensor | None]:
    """(why the call cannot be packed, which places are, which of them are keys where padding is among them)."""
    reason = why_not_packed(bert, arguments)
    if reason is not None:
        return reason, None, None
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    source = arguments["inputs_embeds"] if ids is None else ids
    n_cells, length = source.shape[:2]
    places = Padding.of(mask, n_cells, length, source.device)
    reason = why_not_these_cells(bert, places, is_padding_read=is_padding_read)
    if reason is not None:
        return reason, None, None
    if ids is not None:
        check_tokens(bert, ids, arguments.get("position_ids"))
    if not is_padding_read:
        watch.caller(bert, places)
        return None, places, None
    if places.index is None or mask is None:
        return None, places, None
    return None, Padding.of(None, n_cells, length, source.device), mask.to(source.device) != 0


def packed_masked_lm(call: Call, *, has_training_logits: bool) -> Any:
    """BertForMaskedLM: the loss of masked rows, and logits when they are asked for."""
    model, arguments = call.module, call.arguments
    ids = arguments.get("input_ids")
    reason = why_not_traced(arguments.get("inputs_embeds") if ids is None else ids)
    if reason is None:
        reason = _why_not_masked_lm(model, arguments)
    if reason is not None:
        return call.stock(reason)
    labels, head = arguments.get("labels"), Head.of(model.cls)
    inner = {name: value for name, value in arguments.items() if name not in ("labels", "return_dict")}
    outputs = model.bert(**inner, return_dict=True)
    hidden = outputs.last_hidden_state
    is_step, is_dict = labels is not None and model.training, _returns_dict(model, arguments)
    # Replicas of nn.DataParallel gather every tensor of their outputs on one card.
    has_logits = not is_step or (has_training_logits and not getattr(model, "_is_replica", False))
    # What hooks or wraps the head is called once, with everything, as in the stock model.
    is_late = has_logits and is_dict and head is not None
    logits: Any = within("head", model.cls, hidden) if has_logits and not is_late else None
    loss = None
    if labels is not None:
        is_called = logits is not None and head is None
        if is_called:
            loss = within("head", loss_of_logits, logits, labels)
        else:
            loss = within("head", loss_of_rows, model.cls, head, hidden, labels)
    states = dict(hidden_states=outputs.hidden_states, attentions=outputs.attentions)
    if is_late:
        return _on_demand(head, hidden, loss, is_step, states)
    output = MaskedLMOutput(loss=loss, logits=logits, **states)
    return output if is_dict else output.to_tuple()


def packed_token_classifier(call: Call, *, padding: str) -> Any:
    """BertForTokenClassification: its own forward pass, unless its classifier may read padding."""
    reason = None if padding == "stock" else why_not_classifier(call.module)
    if reason is not None:
        return call.stock(reason)
    if not torch.compiler.is_compiling() and why_not_traced(call.arguments.get("input_ids")) is None:
        _watch_labels(call.module, call.arguments)
    return call.own()


def _watch_labels(model: Any, arguments: dict[str, Any]) -> None:
    options = getattr(packed_forward_of(model.bert), "options", {})
    labels, mask = arguments.get("labels"), arguments.get("attention_mask")
    if options.get("padding") == "zeros" and isinstance(labels, torch.Tensor) and isinstance(mask, torch.Tensor):
        options["watch"].labels(labels, mask)


@torch.compiler.disable
def _why_not_masked_lm(model: Any, arguments: dict[str, Any]) -> str | None:
    reason = why_not_masked_lm(model, arguments)
    if reason is None:
        _watch_labels(model, arguments)
    return reason


# An output that computes when asked is no business of a compiler's.
@torch.compiler.disable
def _on_demand(head: Any, hidden: torch.Tensor, loss: torch.Tensor | None, is_quiet: bool, states: Any) -> MaskedOutput:
    logits: Any = LogitsOnDemand(head, hidden, is_quiet=is_quiet)
    return MaskedOutput(loss=loss, logits=logits, **states)


def _cells(bert: Any, padding: Padding, stream: torch.Tensor, dtype: torch.dtype) -> AttentionCells:
    """The cells of this pass, with what the attention of its layers has in common; a layer may need something else."""
    config = bert.config
    dropout_p = config.attention_probs_dropout_prob if bert.training else 0.0
    head_dim = config.hidden_size // config.num_attention_heads
    return attention_cells(
        padding.cu_seqlens, stream, head_dim=head_dim, longest=padding.length, dropout_p=dropout_p, dtype=dtype
    )


def _products_dtype(stream: torch.Tensor, outer: torch.dtype) -> torch.dtype:
    """Autocast's dtype where autocast is on, else that of the model."""
    kind = stream.device.type
    if outer != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return outer


def _bert_output(call: Call, encoded: Encoded, packed: Packed, watch: Watch) -> Any:
    bert = call.module
    last = packed.padding.unpack(encoded.stream.to(packed.outer))
    pooled = None if bert.pooler is None else bert.pooler(last)
    if not torch.compiler.is_compiling():
        watch.gradient(last, packed.padding)
    states, attentions = encoded.states, encoded.weights
    if states is not None:
        states = (*states, last)
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=last,
        pooler_output=pooled,
        hidden_states=states,
        attentions=attentions,
        # From release 5 on the place is there, and empty.
        cross_attentions=None if attentions is None or call.names_return_dict else (),
    )
    if _returns_dict(bert, call.arguments):
        return output
    # Releases before 5 have the pooler's place in the tuple even where there is no pooler, and count on it.
    if call.names_return_dict:
        return (last, pooled, *(each for each in (states, attentions) if each is not None))
    return output.to_tuple()


def _flag(module: Any, arguments: dict[str, Any], name: str) -> bool:
    """An output option: as it was passed, else as the configuration has it."""
    value = arguments.get(name)
    return bool(getattr(module.config, name, False) if value is None else value)


def _returns_dict(module: Any, arguments: dict[str, Any]) -> bool:
    value = arguments.get("return_dict")
    if value is not None:
        return bool(value)
    return bool(getattr(module.config, "return_dict", True)) and not getattr(module.config, "torchscript", False)
