"""Cells as batches on a device: packed for ours, padded and sorted for rivals, with the same genes masked."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from bench.lengths import real_lengths, uniform_lengths
from geneformer_fast.config import EncoderConfig
from geneformer_fast.ragged import Ragged

MASKED_SHARE = 0.15
IGNORED = -100


@dataclass(frozen=True)
class Mix:
    """Which cells.

    Attributes
    ----------
    name
        ``"full"``: all as long as the model takes. ``"uniform"``: evenly from ``low`` to ``high``. ``"real"``: as real
        cells, mean ``mean`` (:func:`bench.lengths.real_lengths`).
    n_cells
        How many in one repetition.
    n_tokens
        Tokens per batch; rivals get the same, padding counted, or half as often as they run out of memory.
    """

    name: str
    n_cells: int
    n_tokens: int
    length: int = 0
    low: int = 0
    high: int = 0
    mean: float = 0.0

    def lengths(self, max_len: int) -> list[int]:
        """Lengths of the cells."""
        if self.name == "full":
            return [self.length or max_len] * self.n_cells
        if self.name == "uniform":
            return uniform_lengths(self.n_cells, self.low, self.high)
        return real_lengths(self.n_cells, mean=self.mean, max_len=max_len)

    @property
    def what(self) -> str:
        """In words."""
        sort = {
            "full": f"{self.length:,} tokens" if self.length else "full length",
            "uniform": f"uniform from {self.low} to {self.high:,} tokens",
            "real": f"real lengths, mean {self.mean:,.0f}",
        }[self.name]
        return f"{self.n_cells} cells, {sort}, batches of {self.n_tokens:,} tokens"


@dataclass(frozen=True)
class Workload:
    """Cells on the CPU: tokens (or values) of each, and which are masked.

    Attributes
    ----------
    cells, masked
        Per cell [L] inputs and [L] booleans.
    """

    cells: tuple[torch.Tensor, ...]
    masked: tuple[torch.Tensor, ...]
    n_tokens: int

    @classmethod
    def of(cls, config: EncoderConfig, mix: Mix, *, is_tiny: bool = False) -> Workload:
        """The cells of a mix, by a seed; with ``is_tiny`` few and short."""
        lengths = mix.lengths(4096 if is_tiny else config.max_len)
        if is_tiny:
            longest = max(lengths)
            lengths = [max(1, round(length * 20 / longest)) for length in sorted(lengths)[:: max(1, len(lengths) // 5)]]
        generator = torch.Generator().manual_seed(0)
        # Values as AIDO.Cell reads them: normalised, logarithmic, never negative.
        draw: Callable[[int], torch.Tensor] = (
            (lambda n: torch.rand(n, generator=generator) * 5)
            if config.inputs == "values"
            else lambda n: torch.randint(5, config.vocab_size, (n,), generator=generator)
        )
        cells = tuple(draw(length) for length in lengths)
        masked = []
        for length in lengths:
            mask = torch.rand(length, generator=generator) < MASKED_SHARE
            mask[0] = True  # at least one
            masked.append(mask)
        return cls(cells, tuple(masked), 40 if is_tiny else mix.n_tokens)

    @property
    def lengths(self) -> list[int]:
        """Tokens per cell."""
        return [len(cell) for cell in self.cells]

    @property
    def n_masked(self) -> int:
        """Masked tokens of all cells."""
        return sum(int(mask.sum()) for mask in self.masked)

    def checked(self, length: int) -> Workload:
        """The few cells whose results are compared: shortest, longest, and two between, all cut to ``length``."""
        order = sorted(range(len(self.cells)), key=lambda i: len(self.cells[i]))
        chosen = sorted({order[0], order[len(order) // 3], order[2 * len(order) // 3], order[-1]})
        cut = lambda parts: tuple(parts[i][:length] for i in chosen)  # noqa: E731
        return replace(self, cells=cut(self.cells), masked=cut(self.masked), n_tokens=1 << 30)

    def packed(self, n_tokens: int, device: torch.device) -> list[Packed]:
        """Batches of at most ``n_tokens`` in the order of the cells, nothing padded."""
        batches, first, size = [], 0, 0
        for i, length in enumerate(self.lengths):
            if i > first and size + length > n_tokens:
                batches.append(self._packed(first, i, device))
                first, size = i, 0
            size += length
        return [*batches, self._packed(first, len(self.cells), device)]

    def _packed(self, first: int, last: int, device: torch.device) -> Packed:
        tokens = Ragged.from_cells(self.cells[first:last])
        rows = torch.cat(self.masked[first:last]).nonzero().squeeze(1)
        return Packed(tokens.to(device), rows.to(device), tokens.values[rows].to(device))

    def padded(self, n_tokens: int, device: torch.device) -> list[Padded]:
        """Batches of at most ``n_tokens`` with padding, longest cells first, so that little is padded."""
        order = sorted(range(len(self.cells)), key=lambda i: -len(self.cells[i]))
        batches, first = [], 0
        while first < len(order):
            length = len(self.cells[order[first]])
            chosen = order[first : first + max(1, n_tokens // length)]
            batches.append(self._padded(chosen, length, device))
            first += len(chosen)
        return batches

    def _padded(self, chosen: Sequence[int], length: int, device: torch.device) -> Padded:
        ids = torch.zeros(len(chosen), length, dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            cell, n = self.cells[i], len(self.cells[i])
            ids[row, :n] = cell
            mask[row, :n] = 1
            labels[row, :n] = torch.where(self.masked[i], cell, IGNORED)
        rows = (labels.flatten() != IGNORED).nonzero().squeeze(1)
        targets = labels.flatten()[rows]
        # A mask makes attention slower, so none is passed where nothing is padded.
        kept = None if bool(mask.all()) else mask.to(device)
        return Padded(ids.to(device), kept, labels.to(device), rows.to(device), targets.to(device), tuple(chosen))


@dataclass(frozen=True)
class Packed:
    """A batch for ours, with the masked rows and what stands there."""

    tokens: Ragged
    rows: torch.Tensor
    targets: torch.Tensor

    @property
    def size(self) -> int:
        """Tokens."""
        return self.tokens.n_tokens


@dataclass(frozen=True)
class Padded:
    """A batch for rivals: [B, L] ids, mask (None where nothing is padded) and labels; rows of the flattened batch."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    chosen: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens, padding counted."""
        return self.ids.numel()


Batch = TypeVar("Batch", Packed, Padded)


def fitted(make: Callable[[int], list[Batch]], run: Callable[[Batch], Any], n_tokens: int) -> tuple[list[Batch], int]:
    """Batches small enough for the card, halved as often as needed, and the tokens per batch that fit.

    Raises
    ------
    torch.OutOfMemoryError
        Not even one cell fits.
    """
    while True:
        batches = make(n_tokens)
        largest = max(batches, key=lambda batch: batch.size)
        if _fits(run, largest):
            return batches, n_tokens
        n_cells = max(len(batch.ids) if isinstance(batch, Padded) else batch.tokens.n_cells for batch in batches)
        if n_cells == 1:
            raise torch.OutOfMemoryError("not even one cell fits")
        del batches, largest
        gc.collect()
        torch.cuda.empty_cache()
        n_tokens //= 2


def _fits(run: Callable[[Batch], Any], batch: Batch) -> bool:
    try:
        run(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    return True
