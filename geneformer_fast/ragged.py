"""Cells of different lengths as one packed batch. The only file that knows about padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from geneformer_kernels.arguments import (
    COUNTS,
    FLOATS,
    INTEGERS,
    check_bounds,
    check_tensor,
    check_whole,
)


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

    def __repr__(self) -> str:
        what = f"values {[*self.values.shape]} {self.values.dtype} on {self.values.device}"
        return f"Ragged({self.n_cells:,} cells, {what}, max_len={self.max_len})"

    @classmethod
    def from_cells(cls, cells: Sequence[torch.Tensor | Sequence[int]]) -> Ragged:
        """Pack a list of cells, each [L_i, ...]; an empty list gives an empty batch of tokens."""
        if isinstance(cells, torch.Tensor | str) or not all(map(_is_row, cells)):
            raise TypeError("cells must be a list of tensors or of lists of numbers, one for each cell")
        # An empty Python list would become float32: tokens are integers.
        tensors = [torch.as_tensor(cell) if len(cell) else torch.zeros(0, dtype=torch.int64) for cell in cells]
        for number, cell in enumerate(tensors):
            check_tensor(f"cell {number}", cell, COUNTS)
        if len({(cell.dtype, cell.device) for cell in tensors if len(cell)}) > 1:
            kinds = sorted({f"{cell.dtype} on {cell.device}" for cell in tensors if len(cell)})
            raise ValueError(f"cells must have one dtype and device, not {', '.join(kinds)}")
        if len({cell.shape[1:] for cell in tensors if len(cell)}) > 1:
            shapes = ", ".join(str([*cell.shape]) for cell in tensors)
            raise ValueError(f"cells must agree in all axes but the first, and are {shapes}")
        lengths = [len(cell) for cell in tensors]
        values = torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.int64)
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_lengths(cls, values: torch.Tensor, lengths: Sequence[int] | torch.Tensor) -> Ragged:
        """Pack values that lie one cell after another, given each cell's length.

        Raises
        ------
        TypeError
            ``values`` are no tensor.
        ValueError
            Lengths are no integers, negative, or do not add up to the number of values.
        """
        _check_values("values", values)
        counts = _whole_lengths(lengths)
        if int(counts.sum()) != len(values):
            raise ValueError(f"lengths add up to {int(counts.sum())} but there are {len(values)} values")
        cu_seqlens = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        longest = int(counts.max()) if len(counts) else 0
        return cls(values, cu_seqlens.to(values.device), longest)

    @classmethod
    def from_padded(cls, padded: torch.Tensor, mask: torch.Tensor) -> Ragged:
        """Pack a padded batch [B, L, ...] given its mask [B, L] (non-zero where a value counts)."""
        check_tensor("padded", padded, COUNTS)
        check_tensor("mask", mask, COUNTS, n_axes=2, device=padded.device)
        if padded.shape[:2] != mask.shape:
            raise ValueError(f"padded batch {[*padded.shape]} and mask {[*mask.shape]} do not agree")
        keep = mask.bool()
        return cls.from_lengths(padded[keep], keep.sum(1).cpu())

    def to_padded(self, fill: float = 0, *, length: int | None = None) -> torch.Tensor:
        """[B, length, ...] with ``fill`` behind each cell; length None is the longest cell."""
        length = self.max_len if length is None else length
        check_whole("length", length, 0, 2**31 - 1)
        if not _is_held(fill, self.values.dtype):
            raise ValueError(f"fill must be a number that {self.values.dtype} holds, not {fill!r}")
        if length < self.max_len:
            raise ValueError(f"cannot pad to {length}: the longest cell has {self.max_len}")
        out = self.values.new_full((self.n_cells, length, *self.values.shape[1:]), fill)
        out[self.mask(length)] = self.values
        return out

    def mask(self, length: int | None = None) -> torch.Tensor:
        """[B, length] booleans, True where a padded batch would hold a value."""
        length = self.max_len if length is None else length
        check_whole("length", length, 0, 2**31 - 1)
        columns = torch.arange(length, device=self.cu_seqlens.device)
        return columns < self.lengths[:, None]

    def check(self) -> None:
        """Refuse parts that do not fit together; on the CPU also by value, so that no change goes unnoticed.

        Raises
        ------
        TypeError
            A part is no tensor, or ``max_len`` no integer.
        ValueError
            ``cu_seqlens`` do not run from 0 to T, or a cell has more than ``max_len`` values.
        """
        _check_values("values", self.values)
        check_tensor("cu_seqlens", self.cu_seqlens, (torch.int32, torch.int64), device=self.values.device)
        longest = check_bounds("cu_seqlens", self.cu_seqlens, len(self.values))
        check_whole("max_len", self.max_len, longest)

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
        _check_values("values", values)
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


def _is_row(cell: object) -> bool:
    return hasattr(cell, "__len__") and getattr(cell, "ndim", 1) > 0


def _is_held(fill: object, dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype can hold a number as it is."""
    if not isinstance(fill, int | float):
        return False
    if dtype in FLOATS:
        return isinstance(fill, float) or abs(fill) <= torch.finfo(dtype).max
    if not isinstance(fill, int) and not fill.is_integer():
        return False
    return fill in (0, 1) if dtype == torch.bool else torch.iinfo(dtype).min <= fill <= torch.iinfo(dtype).max


def _check_values(name: str, values: torch.Tensor) -> None:
    check_tensor(name, values, COUNTS)
    if values.ndim == 0:
        raise ValueError(f"{name} must be one after another, not a single number")


def _whole_lengths(lengths: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """[B] int64 on the host; ValueError for what would have to be changed to be lengths."""
    try:
        counts = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"lengths must be integers, one for each cell, not {type(lengths).__name__}") from None
    if counts.numel() == 0 and counts.ndim == 1:
        return torch.zeros(0, dtype=torch.int64)
    check_tensor("lengths", counts, INTEGERS, n_axes=1)
    counts = counts.to("cpu", torch.int64)
    if int(counts.min()) < 0:
        raise ValueError(f"lengths must not be negative: cell {int(counts.argmin())} has {int(counts.min())}")
    if float(counts.double().sum()) >= 2**31:
        raise ValueError("lengths must add up to less than 2**31: make smaller batches")
    return counts


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
            check_tensor("mask", mask, COUNTS, n_axes=2)
            if mask.shape not in ((n_cells, length), (1, length)):
                raise ValueError(f"mask {[*mask.shape]} must be [{n_cells}, {length}]")
            mask = mask.expand(n_cells, length)  # one row is for all cells, as everywhere in torch
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
