"""Random features of linear attention: how they are drawn, and attention by them over packed cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from geneformer_kernels import favor_attention
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells


@torch.no_grad()
def draw_(projection: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Fill a projection [m, D] with features that are orthogonal in groups of D, each as long as a normal vector.

    Drawn as in the Performer (Choromanski et al., arXiv:2009.14794, section 2.4): within a group estimates of attention
    vary less than with independent features. In float64, so that a seed gives the same ones in every dtype.
    """
    n_features, head_dim = projection.shape
    if projection.is_meta:
        return projection

    def normal(n_rows: int) -> torch.Tensor:
        return torch.randn(n_rows, head_dim, dtype=torch.float64, device="cpu", generator=generator)

    groups = [torch.linalg.qr(normal(head_dim))[0].T for _ in range(-(-n_features // head_dim))]
    lengths = normal(n_features).norm(dim=1, keepdim=True)
    return projection.copy_(lengths * torch.cat(groups)[:n_features])


def attend(qkv: torch.Tensor, projection: torch.Tensor, cells: AttentionCells, stabiliser: str) -> torch.Tensor:
    """[T, 3, H, D] -> [T, H, D], within each cell; ``stabiliser`` as in :func:`geneformer_kernels.favor_attention`."""
    q, k, v = qkv.unbind(1)
    return favor_attention(
        q, k, v, projection, cu_seqlens=cells.cu_seqlens, stabiliser=stabiliser, longest=cells.longest
    )


def cells_of_lengths(lengths: torch.Tensor, n_tokens: int) -> AttentionCells:
    """Cells of which only the lengths [B] are known."""
    return AttentionCells(F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), n_tokens)
