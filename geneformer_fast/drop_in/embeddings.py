"""transformers' BERT embeddings over packed cells."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from geneformer_kernels import residual_layernorm
from torch import nn
from transformers.models.bert import modeling_bert

from geneformer_fast.drop_in.plain import has_global_hooks, is_plain_norm, is_unhooked
from geneformer_fast.layers import QuantizedEmbedding
from geneformer_fast.ragged import Padding


def packed_embeddings(embeddings: Any, arguments: dict[str, Any], padding: Padding) -> tuple[torch.Tensor, torch.dtype]:
    """The first stream [T, C], and the dtype of hidden states in the stock model."""
    names = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    parts = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
    is_known = type(embeddings) is modeling_bert.BertEmbeddings and not has_global_hooks()
    is_known = is_known and all(map(_is_plain_table, parts))
    norm, dropout = embeddings.LayerNorm, embeddings.dropout
    if not (is_known and is_plain_norm(norm, dropout) and all(map(is_unhooked, (embeddings, *parts)))):
        # Hooks on embeddings look at shapes (NEFTune scales its noise by them), and so may tables somebody has put
        # there: they get what they expect.
        out = embeddings(**given)
        return wide(padding.pack(out)), out.dtype
    words, position, token_type = parts
    rows = words(padding.pack(given["input_ids"])) if "input_ids" in given else padding.pack(given["inputs_embeds"])
    shape = padding.n_cells, padding.length
    types, columns = (padding.pack(rows.expand(shape)) for rows in _Asked(embeddings).rows(given))
    total = wide(rows) + token_type(types) + position(columns)
    stream, _ = residual_layernorm(
        total, None, norm.weight, norm.bias, eps=norm.eps, norm="post", out_dtype=total.dtype
    )
    is_raised = rows.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    outer = torch.promote_types(norm.weight.dtype, torch.float32) if is_raised else norm.weight.dtype
    return F.dropout(stream, dropout.p, dropout.training), outer


def _is_plain_table(table: Any) -> bool:
    """Whether rows of a table are looked up and nothing else: the other options count all that is looked up."""
    if isinstance(table, QuantizedEmbedding):
        return True
    return type(table) is nn.Embedding and table.max_norm is None and not table.scale_grad_by_freq


class _Asked:
    """Stands in for BertEmbeddings to learn which rows of its tables the class's own forward looks up.

    That depends on the release, on what was passed, and on two buffers that anybody may replace.
    """

    def __init__(self, embeddings: Any) -> None:
        self.position_embedding_type = "absolute"
        self.position_ids = embeddings.position_ids
        if hasattr(embeddings, "token_type_ids"):
            self.token_type_ids = embeddings.token_type_ids
        self._types = self._columns = torch.empty(0)

    def rows(self, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token types and positions, each [B, L] or what is repeated to it."""
        if "inputs_embeds" in given:
            given = {**given, "inputs_embeds": given["inputs_embeds"][..., :0]}
        modeling_bert.BertEmbeddings.forward(self, **given)  # type: ignore[arg-type]
        return self._types, self._columns

    def word_embeddings(self, ids: torch.Tensor) -> int:
        return 0

    def token_type_embeddings(self, ids: torch.Tensor) -> int:
        self._types = ids
        return 0

    def position_embeddings(self, ids: torch.Tensor) -> int:
        self._columns = ids
        return 0

    def LayerNorm(self, total: Any) -> Any:
        return total

    def dropout(self, total: Any) -> Any:
        return total


def wide(values: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where they are that."""
    return values if values.dtype == torch.float64 else values.float()
