"""What is said of many cells on a card or machine: how long, how much memory and energy, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from geneformer_fast.profiling.figures import Figure, Missing
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.prediction.fitted import GOOD_ENOUGH

#: Of the JSON that :meth:`Prediction.to_dict` gives.
SCHEMA_VERSION = 1
# So many made-up cells show what many are like.
_CELLS_LOOKED_AT = 4096
#: Why there is no error.
ONE = Missing("one problem was measured there, so that nothing was left to compare a prediction with")


@dataclass(frozen=True)
class Cells:
    """Cells to predict for.

    Attributes
    ----------
    n
        How many.
    lengths
        Of some of them, spread as all are.
    what
        In words.
    """

    n: int
    lengths: np.ndarray
    what: str

    @property
    def n_tokens(self) -> float:
        """Tokens of all."""
        return self.n * float(self.lengths.mean())

    @property
    def sum_of_squares(self) -> float:
        """Of the lengths of all."""
        return self.n * float((self.lengths.astype(np.float64) ** 2).mean())


@dataclass(frozen=True)
class Prediction:
    """What many cells would take.

    Attributes
    ----------
    machine, mode, model, dtype, threads
        Of what; of tokenizing ``model`` says whose dictionaries, and there is no dtype.
    cells, n_cells, n_tokens
        Which cells.
    batch_tokens
        Most tokens computed at once; None of tokenizing.
    seconds, cells_per_s
        Time.
    seconds_least, seconds_most
        What the error allows.
    error
        The largest relative error of time over measured problems that the model had not seen.
    is_good
        Whether that is within 15 %.
    peak_bytes, memory_error
        Memory of the card, or of the process, and the same error of it.
    joules, energy_error
        Energy, and the same error of it, that of time included.
    n_measurements, sources
        What it rests on.
    notes
        What else is to be known.
    schema_version
        :data:`SCHEMA_VERSION`.
    """

    machine: str
    mode: str
    model: str
    dtype: str | None
    threads: int | None
    cells: str
    n_cells: int
    n_tokens: int
    batch_tokens: int | None
    seconds: Figure
    cells_per_s: Figure
    seconds_least: Figure
    seconds_most: Figure
    error: Figure
    is_good: bool
    peak_bytes: Figure
    memory_error: Figure
    joules: Figure
    energy_error: Figure
    n_measurements: int
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """For the terminal."""
        mean = self.n_tokens / self.n_cells
        lines = [
            f"{self.n_cells:,} cells ({self.cells}, {mean:,.0f} tokens on average), {self.mode} with {self.model}",
            ", ".join(filter(None, (f"on {self.machine}", self.dtype, self._threads(), self._batch()))),
            f"  time    {_written(self.seconds, _time)}" + self._interval(),
            f"  rate    {_written(self.cells_per_s, _rate)}",
            f"  memory  {_written(self.peak_bytes, lambda n: f'{n / 1e9:.2f} GB')}"
            + ("" if isinstance(self.memory_error, Missing) else f", off by up to {self.memory_error:.0%}"),
            f"  energy  {_written(self.joules, kwh)}"
            + ("" if isinstance(self.energy_error, Missing) else f", off by up to {self.energy_error:.0%}"),
            f"  from    {several(self.n_measurements, 'measurement')}: {', '.join(self.sources)}",
        ]
        return "\n".join([*lines, *(f"  note    {note}" for note in self.notes)])

    def _threads(self) -> str:
        return several(self.threads, "thread") if self.threads else ""

    def _batch(self) -> str:
        return f"at most {self.batch_tokens:,} tokens at once" if self.batch_tokens else ""

    def _interval(self) -> str:
        if isinstance(self.error, Missing):
            return ", error not known"
        least, most = (_written(each, _time) for each in (self.seconds_least, self.seconds_most))
        return f" ({least} to {most}: off by up to {self.error:.0%} on problems that were left out)"


def cells_like(n: int, lengths: Lengths, max_len: int, *, what: str = "positions of the model") -> Cells:
    """Cells as long as made-up ones would be; ``max_len`` in words is ``what``."""
    return Cells(n, lengths.of(min(n, _CELLS_LOOKED_AT), max_len, what=what), str(lengths))


def notes_of_error(error: float | None) -> list[str]:
    """What is to be known where an error is not, or is large."""
    if error is None:
        return ["the error is not known: " + ONE.not_available]
    if error <= GOOD_ENOUGH:
        return []
    return [
        f"this is not known to {GOOD_ENOUGH * 100:.0f} %: predictions of what was left out were off by up to "
        f"{error:.0%}; take the interval, or measure with geneformer-fast profile"
    ]


def _written(figure: Figure, form: Callable[[float], str]) -> str:
    return str(figure) if isinstance(figure, Missing) else form(figure)


def _rate(cells_per_s: float) -> str:
    return f"{cells_per_s:,.0f} cells/s" if cells_per_s >= 100 else f"{cells_per_s:.3g} cells/s"


def kwh(joules: float) -> str:
    return f"{joules / 3.6e6:.3g} kWh"


def several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
