"""What attention has to know of a batch's cells: made once per forward pass, and handed to every layer.

Nothing is remembered by tensor. A tensor cannot tell that it changed when a replayed graph, another kernel or another
library writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from geneformer_kernels.on_device import DTYPE_NAMES, constant_for_compiler, is_capturing
from geneformer_kernels.ops.varlen_attention.plan import HEAD_DIM_STEP, plan
from geneformer_kernels.target import target_of


@dataclass(frozen=True)
class AttentionCells:
    """The cells of one forward pass; :func:`geneformer_kernels.attention_cells` makes them.

    They hold for as long as nobody writes to ``cu_seqlens``.

    Attributes
    ----------
    cu_seqlens
        [B + 1] integers on the device of the tokens.
    n_tokens
        T.
    longest
        No cell has more tokens; None where the host does not know.
    tiles
        The lists of tiles of the Triton kernels: one for the forward pass, two more where there may be a backward
        pass; empty where another implementation runs.
    """

    cu_seqlens: torch.Tensor
    n_tokens: int
    longest: int | None = None
    tiles: tuple[torch.Tensor, ...] = ()

    @property
    def equal_length(self) -> int:
        """Tokens of every cell where the host knows that all are equally long, else 0."""
        longest = self.longest
        return longest if longest and longest * (len(self.cu_seqlens) - 1) == self.n_tokens else 0

    def bound(self) -> int:
        """No cell has more tokens.

        The device is asked where the host does not know. While a graph is compiled or captured nothing can be asked,
        and a replay may have other cells: then it is all tokens, which is right but starts programs that find no work.
        """
        if torch.compiler.is_compiling() or is_capturing(self.cu_seqlens):
            return self.n_tokens
        return int(self.cu_seqlens.diff().max().item()) if self.longest is None else self.longest

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """What the operators take: cu_seqlens, and the lists of the three kernels as far as they are there."""
        lists = *self.tiles, None, None, None
        return self.cu_seqlens, lists[0], lists[1], lists[2]

    def to(self, device: torch.device) -> AttentionCells:
        """The same where the tokens are, in one piece."""
        bounds = self.cu_seqlens
        if bounds.device == device and bounds.is_contiguous():
            return self
        return replace(self, cu_seqlens=bounds.to(device).contiguous())

    def with_tiles(self, dtype: torch.dtype, head_dim: int, *, has_dropout: bool, needs_grad: bool) -> AttentionCells:
        """The same with the lists that the kernels read, of which equal ones are one."""
        from geneformer_kernels.ops.varlen_attention.launches import varlen_attention_tiles

        device = self.cu_seqlens.device
        # In a tuple numbers become known to the compiler, by themselves they would have to be.
        rows = _tile_rows(DTYPE_NAMES[dtype], device.type, device.index, (int(head_dim), int(has_dropout)))
        rows = rows if needs_grad else rows[:1]
        made = {each: varlen_attention_tiles(self.cu_seqlens, self.n_tokens, each) for each in dict.fromkeys(rows)}
        return replace(self, tiles=tuple(made[each] for each in rows))


# Constant for the compiler, which cannot look at devices. Operators make another list where one does not fit.
@constant_for_compiler
def _tile_rows(dtype: str, device_type: str, device_index: int | None, shape: tuple[int, int]) -> tuple[int, ...]:
    """Rows per tile of the three kernels; shape is the head dimension, and 1 where there is dropout."""
    head_dim, has_dropout = shape
    target = target_of(device_type if device_index is None else f"{device_type}:{device_index}")
    whole = plan(dtype, head_dim + -head_dim % HEAD_DIM_STEP, target, has_dropout=bool(has_dropout))
    return whole.fwd.block_m, whole.dq.block_m, whole.dkdv.block_n
