"""scGPT as its authors compute it, in plain torch, written to be compared with: padded batches, a key padding mask.

``torch.nn.TransformerEncoder`` is what their code takes where FlashAttention is absent, as it is on every CPU. Batches,
padding and normalisation are those of their ``embed_data``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

#: What ``embed_data`` takes if nobody says otherwise.
BATCH_SIZE = 64
PAD_VALUE, LARGEST = -2.0, 512.0


class PlainScGPT(nn.Module):
    """The encoder, with the names of its checkpoints."""

    def __init__(self, n_tokens: int, width: int, n_heads: int, ff_width: int, n_layers: int, pad_id: int) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.encoder = nn.ModuleDict(
            {"embedding": nn.Embedding(n_tokens, width, padding_idx=pad_id), "enc_norm": nn.LayerNorm(width)}
        )
        self.value_encoder = nn.ModuleDict(
            {"linear1": nn.Linear(1, width), "linear2": nn.Linear(width, width), "norm": nn.LayerNorm(width)}
        )
        layer = nn.TransformerEncoderLayer(width, n_heads, ff_width, dropout=0.2, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, n_layers)

    def forward(self, genes: torch.Tensor, values: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
        """[B, L] gene ids, values and padding -> [B, L, C]."""
        gene = self.encoder["enc_norm"](self.encoder["embedding"](genes))
        parts = self.value_encoder
        value = parts["linear2"](F.relu(parts["linear1"](values.clamp(max=LARGEST)[..., None])))
        return self.transformer_encoder(gene + parts["norm"](value), src_key_padding_mask=is_padding)


def plain_scgpt(folder: Path, n_heads: int, pad_id: int) -> PlainScGPT:
    """The weights of a folder, in evaluation mode."""
    stored = torch.load(folder / "best_model.pt", weights_only=True)
    stored = {name.replace("self_attn.Wqkv.", "self_attn.in_proj_"): tensor for name, tensor in stored.items()}
    n_layers = 1 + max(int(name.split(".")[2]) for name in stored if name.startswith("transformer_encoder."))
    ff_width, width = stored["transformer_encoder.layers.0.linear1.weight"].shape
    n_tokens = len(stored["encoder.embedding.weight"])
    model = PlainScGPT(n_tokens, width, n_heads, ff_width, n_layers, pad_id)
    starts = ("encoder.", "value_encoder.", "transformer_encoder.")
    model.load_state_dict({name: tensor for name, tensor in stored.items() if name.startswith(starts)})
    return model.eval()


def embeddings(
    model: PlainScGPT, cells: Sequence[np.ndarray], *, batch_size: int = BATCH_SIZE, is_sorted: bool = False
) -> np.ndarray:
    """[cells, C] float32: CLS after the last layer, divided by its length.

    Parameters
    ----------
    model
        In any dtype.
    cells
        [n, 2] genes and values of each, ``<cls>`` first.
    batch_size
        Cells per batch, each padded to its longest one.
    is_sorted
        Longest cells first, so that little is padded; the original takes them as they come.
    """
    order = np.argsort([-len(cell) for cell in cells], kind="stable") if is_sorted else np.arange(len(cells))
    rows, dtype = (
        np.empty((len(cells), model.encoder["enc_norm"].weight.shape[0]), np.float32),
        next(model.parameters()).dtype,
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nested tensors are a prototype
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            longest = max(len(cells[i]) for i in part)
            genes = torch.full((len(part), longest), model.pad_id)
            values = torch.full((len(part), longest), PAD_VALUE)
            for row, i in enumerate(part):
                genes[row, : len(cells[i])] = torch.from_numpy(cells[i][:, 0].astype(np.int64))
                values[row, : len(cells[i])] = torch.from_numpy(cells[i][:, 1])
            hidden = model(genes, values.to(dtype), genes == model.pad_id)
            rows[part] = F.normalize(hidden[:, 0].float(), dim=1).numpy()
    return rows
