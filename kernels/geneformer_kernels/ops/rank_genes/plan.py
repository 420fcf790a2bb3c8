"""How ranking is launched on a target."""

from __future__ import annotations

from dataclasses import dataclass

from geneformer_kernels.dispatch import Candidate, Impl
from geneformer_kernels.target import Target

#: The compiled loop keeps an entry's position in the 22 low bits of a word.
MAX_ENTRIES_PER_ROW = 1 << 22


@dataclass(frozen=True)
class RankPlan:
    """Attributes
    ----------
    block_rows
        Cells a caller should hand over at once: enough to make the call's fixed cost vanish, few enough that blocks on
        their way between threads stay small.
    widest_row
        Entries of the widest row, which sizes a thread's workspace (28 bytes per entry).
    keep
        Most genes kept per cell.
    """

    block_rows: int
    widest_row: int
    keep: int


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    is_cpu = target.kind == "cpu"
    return (
        Candidate(
            Impl.NUMBA,
            is_cpu and dtype == "float64",
            "compiled loop per cell, radix sort with exact float64 settlement"
            if is_cpu
            else "the compiled loop runs on the CPU only",
        ),
        Candidate(Impl.REFERENCE, True, "stable sorts in plain torch, any device"),
    )


def plan(*, widest_row: int, keep: int) -> RankPlan:
    """The sizes of one launch.

    Blocks of 1,024 cells: a call's fixed cost of about 0.1 ms is 2 % of ranking 1,024 cells of 700 entries (2026-11-21,
    EPYC), and such a block of CSR is 6 MB, 120 MB if every cell had 10,000 entries.

    Raises
    ------
    ValueError
        A row is too wide, or nothing is to be kept.
    """
    if widest_row > MAX_ENTRIES_PER_ROW:
        raise ValueError(f"a row has {widest_row} entries; ranking takes at most {MAX_ENTRIES_PER_ROW}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    return RankPlan(block_rows=1024, widest_row=widest_row, keep=keep)
