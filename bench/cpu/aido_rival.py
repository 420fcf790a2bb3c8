"""AIDO.Cell as its authors publish it, in plain torch, written to be compared with: one dense row per cell.

Soft bins of all values, separate projections, scaled_dot_product_attention over the heads of one cell (which is what
their corrected copy does without flash-attn), SwiGLU in three products; the mean over all positions of the last hidden
states, depth tokens among them, in float32. Weights by the names of their checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

Tensors = Mapping[str, torch.Tensor]


def embeddings(weights: Tensors, values: torch.Tensor, *, n_layers: int, n_heads: int, eps: float) -> torch.Tensor:
    """[B, G] values -> [B, C], the mean of the last hidden states of every cell."""
    with torch.inference_mode():
        hidden = _soft_bins(weights, values) + weights["bert.position_embedding.weight"][: values.shape[1]]
        for i in range(n_layers):
            hidden = _layer(weights, f"bert.encoder.layer.{i}.", hidden, n_heads, eps)
        return _norm(weights, "bert.encoder.ln", hidden, eps).mean(1)


def _soft_bins(weights: Tensors, values: torch.Tensor) -> torch.Tensor:
    name = "bert.gene_embedding."
    scores = F.leaky_relu(_linear(weights, f"{name}linear1", values[..., None]), 0.1)
    bins = torch.softmax(_linear(weights, f"{name}linear2", scores) + scores, dim=-1)
    hidden = bins @ weights[f"{name}lookup_table.weight"]
    for special, table in ((-1, "mask_embedding"), (-2, "pad_embedding")):
        hidden[values == special] = weights[f"{name}{table}.weight"]
    return hidden


def _layer(weights: Tensors, name: str, hidden: torch.Tensor, n_heads: int, eps: float) -> torch.Tensor:
    x = _norm(weights, f"{name}attention.ln", hidden, eps)
    q, k, v = (
        _linear(weights, f"{name}attention.self.{part}", x).unflatten(-1, (n_heads, -1)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    context = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    hidden = hidden + _linear(weights, f"{name}attention.output.dense", context)
    x = _norm(weights, f"{name}ln", hidden, eps)
    gate, up = (_linear(weights, f"{name}mlp.{part}_proj", x) for part in ("gate", "up"))
    return hidden + _linear(weights, f"{name}mlp.down_proj", F.silu(gate) * up)


def _linear(weights: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Tensors, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)
