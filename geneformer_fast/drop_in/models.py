"""The forward passes that stand in for those of transformers' BertModel and BertForMaskedLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from geneformer_kernels import attention_cells, mlm_cross_entropy, residual_layernorm
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, MaskedLMOutput
from transformers.models.bert import modeling_bert

from geneformer_fast.drop_in.layers import Encoded, Packed
from geneformer_fast.drop_in.outputs import LogitsOnDemand, MaskedOutput
from geneformer_fast.drop_in.plain import has_global_hooks, is_plain_linear, is_plain_norm, is_unhooked
from geneformer_fast.drop_in.reasons import check_tokens, tell_once, why_not_packed, why_not_these_cells
from geneformer_fast.ragged import Padding

# What torch.nn.CrossEntropyLoss leaves out, as transformers calls it.
IGNORED = -100
# Values decide shapes here and the device is asked for them: a compiler has to stop, and go on with what it got.
_padding_of = torch.compiler.disable(Padding.of)


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
        kind = type(self.module)
        tell_once(kind.__name__, reason)
        return kind.forward(self.module, *self.args, **self.kwargs)


def packed_bert(call: Call) -> Any:
    """BertModel: packs its input, encodes, pads its output."""
    bert, arguments = call.module, call.arguments
    reason = why_not_packed(bert, arguments)
    if reason is not None:
        return call.stock(reason)
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    source = arguments["inputs_embeds"] if ids is None else ids
    padding = _padding_of(mask, source.shape[0], source.shape[1], source.device)
    reason = why_not_these_cells(bert, padding)
    if reason is not None:
        return call.stock(reason)
    if ids is not None:
        check_tokens(bert, ids, arguments.get("position_ids"))
    stream, outer = _embed(bert.embeddings, arguments, padding)
    wants_states = _flag(bert, arguments, "output_hidden_states")
    wants_weights = _flag(bert, arguments, "output_attentions")
    dtype = _products_dtype(stream, outer)
    packed = Packed(padding, _cells(bert, padding, stream, dtype), dtype, outer, wants_weights, wants_states)
    encoded = bert.encoder(stream, packed)
    return _bert_output(call, encoded, packed)


def packed_masked_lm(call: Call, *, has_training_logits: bool) -> Any:
    """BertForMaskedLM: the loss of masked rows, and logits when they are asked for."""
    model, arguments = call.module, call.arguments
    inner = {name: value for name, value in arguments.items() if name not in ("labels", "return_dict")}
    reason = why_not_packed(model.bert, inner)
    if reason is not None:
        return call.stock(reason)
    labels = arguments.get("labels")
    outputs = model.bert(**inner, return_dict=True)
    hidden = outputs.last_hidden_state
    loss = None if labels is None else _masked_loss(model.cls, hidden, labels)
    states = dict(hidden_states=outputs.hidden_states, attentions=outputs.attentions)
    is_step, is_dict = loss is not None and model.training, _returns_dict(model, arguments)
    # Replicas of nn.DataParallel gather every tensor of their outputs on one card.
    has_logits = not is_step or (has_training_logits and not getattr(model, "_is_replica", False))
    if has_logits and is_dict:
        return _on_demand(model, hidden, loss, is_step, states)
    output = MaskedLMOutput(loss=loss, logits=model.cls(hidden) if has_logits else None, **states)
    return output if is_dict else output.to_tuple()


# An output that computes when asked is no business of a compiler's.
@torch.compiler.disable
def _on_demand(
    model: Any, hidden: torch.Tensor, loss: torch.Tensor | None, is_quiet: bool, states: Any
) -> MaskedOutput:
    dtype = model.get_output_embeddings().weight.dtype
    logits: Any = LogitsOnDemand(model.cls, hidden, dtype, is_quiet=is_quiet)
    return MaskedOutput(loss=loss, logits=logits, **states)


def _embed(embeddings: Any, arguments: dict[str, Any], padding: Padding) -> tuple[torch.Tensor, torch.dtype]:
    """The first stream [T, C], and the dtype of hidden states in the stock model."""
    names = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    parts = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    is_known = type(embeddings) is modeling_bert.BertEmbeddings and not has_global_hooks()
    norm, dropout = embeddings.LayerNorm, embeddings.dropout
    if not (is_known and is_plain_norm(norm, dropout) and all(map(is_unhooked, (embeddings, *parts)))):
        # Hooks on embeddings look at shapes (NEFTune scales its noise by them): they get what they expect.
        out = embeddings(**given)
        return _wide(padding.pack(out)), out.dtype
    words, position, token_type = parts
    rows = words(padding.pack(given["input_ids"])) if "input_ids" in given else padding.pack(given["inputs_embeds"])
    types, columns = torch.zeros(1, dtype=torch.int64, device=rows.device), padding.columns()
    if "token_type_ids" in given:
        types = padding.pack(given["token_type_ids"])
    if "position_ids" in given:
        columns = padding.pack(given["position_ids"].expand(padding.n_cells, padding.length))
    total = _wide(rows) + token_type(types) + position(columns)
    stream, _ = residual_layernorm(
        total, None, norm.weight, norm.bias, eps=norm.eps, norm="post", out_dtype=total.dtype
    )
    is_raised = rows.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    outer = torch.promote_types(norm.weight.dtype, torch.float32) if is_raised else norm.weight.dtype
    return F.dropout(stream, dropout.p, dropout.training), outer


def _cells(bert: Any, padding: Padding, stream: torch.Tensor, dtype: torch.dtype) -> AttentionCells:
    """The cells of this pass, with what the attention of its layers has in common; a layer may need something else."""
    config = bert.config
    dropout_p = config.attention_probs_dropout_prob if bert.training else 0.0
    head_dim = config.hidden_size // config.num_attention_heads
    return attention_cells(
        padding.cu_seqlens, stream, head_dim=head_dim, longest=padding.length, dropout_p=dropout_p, dtype=dtype
    )


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _products_dtype(stream: torch.Tensor, outer: torch.dtype) -> torch.dtype:
    """Autocast's dtype where autocast is on, else that of the model."""
    kind = stream.device.type
    if outer != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return outer


def _bert_output(call: Call, encoded: Encoded, packed: Packed) -> Any:
    bert, padding = call.module, packed.padding
    last = padding.unpack(encoded.stream.to(packed.outer))
    pooled = None if bert.pooler is None else bert.pooler(last)
    states = attentions = None
    if encoded.states is not None:
        states = (*(padding.unpack(state.to(packed.outer)) for state in encoded.states[:-1]), last)
    if encoded.weights is not None:
        attentions = tuple(_padded_weights(cells, padding) for cells in encoded.weights)
    output = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=last, pooler_output=pooled, hidden_states=states, attentions=attentions
    )
    if _returns_dict(bert, call.arguments):
        return output
    # Releases before 5 have the pooler's place in the tuple even where there is no pooler, and count on it.
    if call.names_return_dict:
        return (last, pooled, *(each for each in (states, attentions) if each is not None))
    return output.to_tuple()


def _padded_weights(cells: list[torch.Tensor], padding: Padding) -> torch.Tensor:
    """One [H, L_i, L_i] of each cell -> [B, H, L, L], zeros from and to padding."""
    n_heads, length = (cells[0].shape[0] if cells else 0), padding.length
    out = cells[0].new_zeros(padding.n_cells, n_heads, length, length)
    columns = padding.columns().split([weights.shape[-1] for weights in cells])
    for i_cell, (weights, places) in enumerate(zip(cells, columns, strict=True)):
        out[i_cell, :, places[:, None], places] = weights
    return out


def _masked_loss(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the places that have a label; nothing is computed for the others."""
    targets = labels.to(hidden.device).flatten()
    places = _places_of(targets)
    rows, targets = hidden.flatten(0, 1).index_select(0, places), targets.index_select(0, places)
    predictions = head.predictions
    if not (
        type(head) is modeling_bert.BertOnlyMLMHead
        and type(predictions) is modeling_bert.BertLMPredictionHead
        and is_unhooked(head)
        and is_unhooked(predictions)
        and is_plain_linear(predictions.decoder)
        and not has_global_hooks()
    ):
        # Float32 sums, and 0 rather than NaN over no rows, as in the branch below.
        losses = F.cross_entropy(_wide(head(rows)), targets, reduction="sum")
        return losses / max(len(targets), 1)
    decoder, read = predictions.decoder, predictions.transform(rows)
    if read.dtype != torch.float64 and torch.is_autocast_enabled(read.device.type):
        read = read.to(torch.get_autocast_dtype(read.device.type))
    return mlm_cross_entropy(read, decoder.weight, decoder.bias, targets, ignore_index=IGNORED)


@torch.compiler.disable
def _places_of(targets: torch.Tensor) -> torch.Tensor:
    return (targets != IGNORED).nonzero().squeeze(1)


def _flag(module: Any, arguments: dict[str, Any], name: str) -> bool:
    """An output option: as it was passed, else as the configuration has it."""
    value = arguments.get(name)
    return bool(getattr(module.config, name, False) if value is None else value)


def _returns_dict(module: Any, arguments: dict[str, Any]) -> bool:
    value = arguments.get("return_dict")
    if value is not None:
        return bool(value)
    return bool(getattr(module.config, "return_dict", True)) and not getattr(module.config, "torchscript", False)
