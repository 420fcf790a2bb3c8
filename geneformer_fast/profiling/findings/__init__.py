"""What a report says should be changed: rules, each with its threshold, the numbers it rests on and what it may gain.

A rule looks at figures and finds something or nothing; where a figure is missing that it needs, it finds nothing. Gains
are how many times as fast the whole run would be (Amdahl: what a change does not touch stays), and are left out where
they cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable

from geneformer_fast.profiling.figures import Finding
from geneformer_fast.profiling.findings import computing, memory, waiting
from geneformer_fast.profiling.findings.shares import is_known, percent
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.units import written

__all__ = ["RULES", "findings"]

Rule = Callable[[Report], Finding | None]

RULES: tuple[Rule, ...] = (
    computing.padding, waiting.data, waiting.gaps, waiting.copies, waiting.communication, computing.batch,
    computing.small_batches, computing.dtype, computing.eight_bits, memory.logits, computing.unasked,
    memory.recomputation, memory.memory, waiting.idle_power, waiting.throttling, waiting.threads,
    computing.attention, computing.engine,
)  # fmt: skip


def findings(report: Report) -> list[Finding]:
    """What to change, that with the largest gain first; one that says so where there is nothing."""
    found = [each for rule in RULES if (each := rule(report)) is not None]
    found.sort(key=lambda each: -(each.gain or 1.0))
    return found or [_nothing(report)]


def _nothing(report: Report) -> Finding:
    numbers = {"mfu": report.flops.mfu, "useful_share": report.tokens.useful_share, "cells_per_s": report.cells.per_s}
    known = {name: value for name, value in numbers.items() if is_known(value)}
    words = {"mfu": "MFU {}", "useful_share": "{} of computed positions were tokens", "cells_per_s": "{} cells/s"}
    said = ", ".join(
        words[name].format(written(value) if name == "cells_per_s" else percent(value)) for name, value in known.items()
    )
    return Finding("nothing", f"nothing to change was found{f': {said}' if said else ''}", known)
