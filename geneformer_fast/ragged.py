"""Cells of different lengths as one packed batch. The only file that knows about padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Ragged:
    """Values of all cells one after another.

    Attributes
    ----------
    values
        [T, ...]: tokens (integers), continuous inputs, or hidden states.
    cu_seqlens
        [B + 1] int32, cumulative cell lengths from 0 to T.
    max_len
        Length of the longest cell, known on the host so that no kernel has to ask the device for it.
    """

    values: torch.Tensor
    cu_seqlens: torch.Tensor
    max_len: int

    @classmethod
    def from_cells(cls, cells: Sequence[torch.Tensor | Sequence[int]]) -> Ragged:
        """Pack a list of cells, each [L_i, ...]; an empty list gives an empty batch of tokens."""
        # An empty Python list would become float32: tokens are integers.
        tensors = [torch.as_tensor(cell) if len(cell) else torch.zeros(0, dtype=torch.int64) for cell in cells]
        lengths = [len(cell) for cell in tensors]
        values = torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.int64)
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_lengths(cls, values: torch.Tensor, lengths: Sequence[int] | torch.Tensor) -> Ragged:
        """Pack values that lie one cell after another, given each cell's length."""
        counts = torch.as_tensor(lengths, dtype=torch.int64)
        cu_seqlens = torch.zeros(len(counts) + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=cu_seqlens[1:])
        if int(cu_seqlens[-1]) != len(values):
            raise ValueError(f"lengths add up to {int(cu_seqlens[-1])} but there are {len(values)} values")
        longest = int(counts.max()) if len(counts) else 0
        return cls(values, cu_seqlens.to(values.device), longest)

    @classmethod
    def from_padded(cls, padded: torch.Tensor, mask: torch.Tensor) -> Ragged:
        """Pack a padded batch [B, L, ...] given its mask [B, L] (non-zero where a value counts)."""
        if padded.shape[:2] != mask.shape:
            raise ValueError(f"padded batch {[*padded.shape]} and mask {[*mask.shape]} do not agree")
        keep = mask.bool()
        return cls.from_lengths(padded[keep], keep.sum(1).cpu())

    def to_padded(self, fill: float = 0, *, length: int | None = None) -> torch.Tensor:
        """[B, length, ...] with ``fill`` behind each cell; length None is the longest cell."""
        length = self.max_len if length is None else length
        if length < self.max_len:
            raise ValueError(f"cannot pad to {length}: the longest cell has {self.max_len}")
        out = self.values.new_full((self.n_cells, length, *self.values.shape[1:]), fill)
        out[self.mask(length)] = self.values
        return out

    def mask(self, length: int | None = None) -> torch.Tensor:
        """[B, length] booleans, True where a padded batch would hold a value."""
        columns = torch.arange(self.max_len if length is None else length, device=self.cu_seqlens.device)
        return columns < self.lengths[:, None]

    @property
    def n_cells(self) -> int:
        """Cells in the batch."""
        return len(self.cu_seqlens) - 1

    @property
    def n_tokens(self) -> int:
        """Values in the batch, over all cells."""
        return len(self.values)

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int32, the length of each cell."""
        return self.cu_seqlens.diff()

    @property
    def starts(self) -> torch.Tensor:
        """[B] int32, the index of each cell's first value."""
        return self.cu_seqlens[:-1]

    def positions(self) -> torch.Tensor:
        """[T] int64, each value's index within its own cell."""
        offsets = torch.repeat_interleave(self.starts.long(), self.lengths.long(), output_size=self.n_tokens)
        return torch.arange(self.n_tokens, device=self.values.device) - offsets

    def cell_index(self) -> torch.Tensor:
        """[T] int64, the cell each value belongs to."""
        cells = torch.arange(self.n_cells, device=self.values.device)
        return torch.repeat_interleave(cells, self.lengths.long(), output_size=self.n_tokens)

    def cells(self) -> list[torch.Tensor]:
        """The cells one by one, as views."""
        return list(torch.split(self.values, self.lengths.tolist()))

    def with_values(self, values: torch.Tensor) -> Ragged:
        """The same cells with other values, such as hidden states in place of tokens."""
        if len(values) != self.n_tokens:
            raise ValueError(f"{len(values)} values do not fit {self.n_tokens} tokens")
        return replace(self, values=values)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Ragged:
        """Apply a function that keeps the first axis to the values."""
        return self.with_values(function(self.values))

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Ragged:
        """The same batch on another device."""
        values, cu_seqlens = (x.to(device, non_blocking=non_blocking) for x in (self.values, self.cu_seqlens))
        return replace(self, values=values, cu_seqlens=cu_seqlens)

    def pin_memory(self) -> Ragged:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return replace(self, values=self.values.pin_memory(), cu_seqlens=self.cu_seqlens.pin_memory())


@dataclass(frozen=True)
class Padding:
    """Which places of a padded batch [B, L] hold values: takes padding out, and puts values back where they were.

    Unlike :class:`Ragged`, it keeps the places, so padding may lie on either side or between values.

    Attributes
    ----------
    index
        [T] int64, places in the flattened batch; None where every place holds a value, so that nothing is copied.
    cu_seqlens
        [B + 1] int32, cumulative cell lengths from 0 to T.
    n_cells, length
        B and L.
    has_first
        Every row holds a value in its first column.
    """

    index: torch.Tensor | None
    cu_seqlens: torch.Tensor
    n_cells: int
    length: int
    has_first: bool

    @classmethod
    def of(cls, mask: torch.Tensor | None, n_cells: int, length: int, device: torch.device) -> Padding:
        """From a mask [B, L], non-zero where there is a value; None means everywhere."""
        if mask is not None:
            keep = mask.to(device) != 0
            counts = keep.sum(1)
            # One question to the device for both answers.
            n_tokens, has_first = torch.stack((counts.sum(), keep[:, :1].all())).tolist()
            if n_tokens < n_cells * length:
                bounds = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
                index = keep.flatten().nonzero().squeeze(1)
                return cls(index, bounds, n_cells, length, bool(has_first))
        bounds = torch.arange(n_cells + 1, dtype=torch.int32, device=device) * length
        return cls(None, bounds, n_cells, length, True)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [T, ...]."""
        flat = padded.flatten(0, 1)
        # Not flat[index]: places are unique, which only index_select makes use of in the backward pass.
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [B, L, ...], zeros in the other places."""
        if self.index is not None:
            flat = values.new_zeros((self.n_cells * self.length, *values.shape[1:]))
            values = flat.index_copy(0, self.index, values)
        return values.view(self.n_cells, self.length, *values.shape[1:])

    def columns(self) -> torch.Tensor:
        """[T] int64, the column each value stands in."""
        if self.index is None:
            return torch.arange(self.length, device=self.cu_seqlens.device).repeat(self.n_cells)
        return self.index % self.length
