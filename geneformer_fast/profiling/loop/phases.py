"""What the steps of a loop are for: left out, measured, or looked at closely."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Of torch's profiler itself, before the steps that are watched: it starts within the first.
WATCH_WARMUP = 1
#: Steps measured before torch's profiler watches some, in a loop whose end nobody knows.
FIRST_STEPS = 5
#: What a run may say that it does.
MODES = ("embed", "train", "tokenize", "loop")


class Phase(enum.Enum):
    """What a step is for."""

    WARMUP = "warm-up"
    WINDOW = "window"
    MEMORY = "memory"
    WATCH = "watch"
    COUNT = "count"
    AFTER = "after"


@dataclass(frozen=True)
class Options:
    """What :func:`profile` was asked for."""

    name: str | None
    mode: str
    engine: str | None
    dtype: str | None
    tokens: str
    settings: Mapping[str, Any]
    n_layers: int | None
    n_warmup: int
    n_steps: int | None
    n_active: int
    trace: Path | None
    out: Path | None
    has_energy: bool
    has_ceilings: bool
    is_replacing: bool = False


def phases(options: Options, *, has_count: bool) -> Iterator[tuple[Phase, int]]:
    """Every phase and how many steps it has."""
    yield Phase.WARMUP, options.n_warmup
    yield Phase.WINDOW, options.n_steps or FIRST_STEPS
    yield Phase.MEMORY, 1
    yield Phase.WATCH, options.n_active + WATCH_WARMUP if options.n_active else 0
    yield Phase.COUNT, int(has_count)
    if options.n_steps is None:
        yield Phase.WINDOW, -1  # never over
    yield Phase.AFTER, -1
