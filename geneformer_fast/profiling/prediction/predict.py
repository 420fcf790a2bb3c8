"""What many cells would take on a card or machine that was measured: time, memory and energy, and how sure that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.config import PRESETS, EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract.budget import batch_bytes, token_bytes
from geneformer_fast.extract.encoding import MOST_WORKERS, TOKEN_BUDGET
from geneformer_fast.profiling.figures import Figure, Missing, divided
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.lengths import Lengths
from geneformer_fast.profiling.prediction.fitted import GOOD_ENOUGH, MemorySample, Sample, Work, fit, fit_memory
from geneformer_fast.profiling.prediction.measurements import Machine, Measurement, machine_named

#: Of the JSON that :meth:`Prediction.to_dict` gives.
SCHEMA_VERSION = 1
# Masked genes, as share of all tokens, for the head in training.
_MASKED = 0.15
# So many made-up cells show what many are like.
_CELLS_LOOKED_AT = 4096
_ONE = Missing("one problem was measured there, so that nothing was left to compare a prediction with")


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
        Of what.
    cells, n_cells, n_tokens
        Which cells.
    batch_tokens
        Most tokens computed at once.
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
    joules
        Energy.
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
    dtype: str
    threads: int | None
    cells: str
    n_cells: int
    n_tokens: int
    batch_tokens: int
    seconds: Figure
    cells_per_s: Figure
    seconds_least: Figure
    seconds_most: Figure
    error: Figure
    is_good: bool
    peak_bytes: Figure
    memory_error: Figure
    joules: Figure
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
            f"on {self.machine}, {self.dtype}"
            + (f", {_several(self.threads, 'thread')}" if self.threads else "")
            + f", at most {self.batch_tokens:,} tokens at once",
            f"  time    {_written(self.seconds, _time)}" + self._interval(),
            f"  rate    {_written(self.cells_per_s, _rate)}",
            f"  memory  {_written(self.peak_bytes, lambda n: f'{n / 1e9:.2f} GB')}"
            + ("" if isinstance(self.memory_error, Missing) else f", off by up to {self.memory_error:.0%}"),
            f"  energy  {_written(self.joules, lambda joules: f'{joules / 3.6e6:.3g} kWh')}",
            f"  from    {_several(self.n_measurements, 'measurement')}: {', '.join(self.sources)}",
        ]
        return "\n".join([*lines, *(f"  note    {note}" for note in self.notes)])

    def _interval(self) -> str:
        if isinstance(self.error, Missing):
            return ", error not known"
        least, most = (_written(each, _time) for each in (self.seconds_least, self.seconds_most))
        return f" ({least} to {most}: off by up to {self.error:.0%} on problems that were left out)"


def predict(
    card: str,
    cells: Cells,
    model: str,
    config: EncoderConfig,
    *,
    mode: str = "embed",
    layer: str | int = "penultimate",
    dtype: str | None = None,
    threads: int | None = None,
    batch_tokens: int | None = None,
) -> Prediction:
    """Predict from measurements.

    Parameters
    ----------
    card
        Name of a card or machine that was measured.
    cells
        How many, and how long.
    model, config
        Its name, and its geometry.
    mode
        ``"embed"`` or ``"train"``.
    layer
        Where embedding stops.
    dtype, threads
        Precision of products, and threads on a CPU; None: what was measured most.
    batch_tokens
        Most tokens computed at once; None as ``embed`` has it, and in training as measured.

    Raises
    ------
    UnsupportedError
        Nothing like that was measured there.
    """
    machine = machine_named(card)
    if threads is not None and machine.kind != "cpu":
        raise UnsupportedError(f"--threads is about processors, and {machine.name} is a card")
    chosen = _chosen(machine, mode, dtype, threads)
    blocks = config.layer_index(layer) if mode == "embed" else config.n_layers
    if batch_tokens is None:
        measured_batch = max(each.batch_tokens for each in chosen)
        batch_tokens = TOKEN_BUDGET[machine.kind] if mode == "embed" else measured_batch
    batch_tokens = max(batch_tokens, int(cells.lengths.max()))
    asked = Work(
        _flops(config, blocks, cells.n_tokens, cells.sum_of_squares, mode, _MASKED * cells.n_tokens),
        *_traffic(config, blocks, cells.n_tokens, math.ceil(cells.n_tokens / batch_tokens), mode, machine.kind),
    )
    found = fit([_sample(each, machine.kind) for each in chosen])
    seconds = found.seconds(asked)
    bounds = found.interval(seconds)
    peak, memory_error = _memory(machine, chosen, config, batch_tokens)
    return Prediction(
        machine.name, mode, model, chosen[0].dtype, chosen[0].threads, cells.what, cells.n, round(cells.n_tokens),
        batch_tokens, seconds, divided(cells.n, seconds, "the time"),
        _ONE if bounds is None else bounds[0], _ONE if bounds is None else bounds[1],
        _ONE if found.error is None else found.error, found.error is not None and found.error <= GOOD_ENOUGH,
        peak, memory_error, _energy(machine, chosen), len(chosen), sorted({each.source for each in chosen}),
        _notes(machine, chosen, config, cells, found.error),
    )  # fmt: skip


def cells_like(n: int, lengths: np.ndarray | Lengths, config: EncoderConfig, what: str = "") -> Cells:
    """Cells as long as some are, or as made-up ones would be."""
    if isinstance(lengths, Lengths):
        return Cells(n, lengths.of(min(n, _CELLS_LOOKED_AT), config.max_len), str(lengths))
    return Cells(n, lengths, what)


def _chosen(machine: Machine, mode: str, dtype: str | None, threads: int | None) -> list[Measurement]:
    """Measurements of one kind: of those asked for, the kind of which most problems were measured."""
    kinds: dict[tuple[str, int | None], list[Measurement]] = {}
    for each in machine.measurements:
        if each.mode == mode:
            kinds.setdefault((each.dtype, each.threads), []).append(each)
    fitting = {
        kind: found
        for kind, found in kinds.items()
        if (dtype in (None, "auto") or kind[0] == dtype) and (threads is None or kind[1] == threads)
    }
    if not fitting:
        there = ", ".join(name + (f" with {_several(n, 'thread')}" if n else "") for name, n in kinds) or "nothing"
        asked = " ".join(filter(None, (mode, dtype, f"with {threads} threads" if threads else "")))
        raise UnsupportedError(f"{machine.name}: {asked} was not measured there; of {mode} there is {there}")
    # Of kinds with as many problems, the one of more threads, and then the first: results begin with the fastest dtype.
    return max(fitting.values(), key=lambda found: (len({each.problem for each in found}), found[0].threads or 0))


def _sample(each: Measurement, kind: str) -> Sample:
    config = PRESETS[each.model]
    flops = _flops(config, each.blocks, each.n_tokens, each.sum_of_squares, each.mode, each.head_rows)
    traffic = _traffic(config, each.blocks, each.n_tokens, each.n_batches, each.mode, kind)
    return Sample(each.problem, Work(flops, *traffic), each.seconds, each.is_device_alone)


def _flops(
    config: EncoderConfig, blocks: int, n_tokens: float, sum_of_squares: float, mode: str, head_rows: float
) -> float:
    flops = encoder_flops(config, n_tokens, sum_of_squares, n_layers=blocks)
    return 3 * (flops + head_flops(config, head_rows)) if mode == "train" else flops


def _traffic(
    config: EncoderConfig, blocks: int, n_tokens: float, n_batches: float, mode: str, kind: str
) -> tuple[float, float]:
    """(numbers, launches); a CPU launches nothing."""
    passes = 3 if mode == "train" else 1
    return passes * n_tokens * blocks * config.width, passes * blocks * n_batches if kind == "cuda" else 0.0


def _memory(
    machine: Machine, chosen: Sequence[Measurement], config: EncoderConfig, batch_tokens: int
) -> tuple[Figure, Figure]:
    """Peak memory, and its error; on a CPU by the formulas that keep ``--memory-budget``."""
    samples = [
        MemorySample(
            each.problem, *_known_bytes(machine, each, PRESETS[each.model], each.batch_tokens), each.peak_bytes
        )
        for each in chosen
        if each.peak_bytes is not None and not each.is_device_alone
    ]
    if not samples or (machine.kind == "cpu" and chosen[0].mode == "train"):
        reason = Missing(f"memory of {chosen[0].mode} in {chosen[0].dtype} cannot be told from what was measured there")
        return reason, reason
    per_unit, error = fit_memory(samples)
    fixed, units = _known_bytes(machine, chosen[0], config, batch_tokens)
    return fixed + per_unit * units, _ONE if error is None else error


def _known_bytes(machine: Machine, like: Measurement, config: EncoderConfig, batch_tokens: int) -> tuple[float, float]:
    """(bytes that are known, units of what is not)."""
    encoder = _shapes(config, like.dtype, "mlm" if like.mode == "train" else None)
    if like.mode == "train":  # float32 weights and their gradients; what blocks keep for the backward pass
        return 8.0 * sum(each.numel() for each in encoder.parameters()), batch_tokens * config.width * config.n_layers
    weights = sum(each.numel() * each.element_size() for each in encoder.parameters())
    if machine.kind == "cuda":
        return weights, batch_tokens * config.width
    workers, cpu = min(like.threads or 1, MOST_WORKERS), torch.device("cpu")
    # The file of the weights, in float32, counts as well: it is mapped while they are loaded.
    file = 4.0 * sum(each.numel() for each in encoder.parameters())
    return weights + file + workers * (batch_tokens * token_bytes(encoder) + batch_bytes(encoder, cpu)), 1.0


def _shapes(config: EncoderConfig, dtype: str, head: str | None) -> Encoder:
    """An encoder without numbers, its products in a dtype."""
    encoder = skeleton(config, head)
    if head is None:
        encoder.blocks.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32))
    return encoder


def _energy(machine: Machine, chosen: Sequence[Measurement]) -> Figure:
    if any(each.joules is not None for each in chosen):
        return Missing(f"energy was measured on {machine.name}, but not of enough problems to predict from")
    return Missing(f"no energy was measured on {machine.name}; geneformer-fast profile measures it there")


def _notes(
    machine: Machine, chosen: Sequence[Measurement], config: EncoderConfig, cells: Cells, error: float | None
) -> list[str]:
    first = chosen[0]
    dates, commits = (sorted({getattr(each, name) for each in chosen}) for name in ("date", "commit"))
    notes = [f"measured {' and '.join(dates)}, commit {', '.join(commits)}"]
    if error is None:
        notes.append("the error is not known: " + _ONE.not_available)
    elif error > GOOD_ENOUGH:
        notes.append(
            f"this is not known to 15 %: predictions of what was left out were off by up to {error:.0%}; take the "
            "interval, or measure with geneformer-fast profile"
        )
    known = [PRESETS[each.model] for each in chosen]
    if not any((c.n_layers, c.width, c.ff_width) == (config.n_layers, config.width, config.ff_width) for c in known):
        notes.append(
            f"no model of this size was measured there ({', '.join(sorted({each.model for each in chosen}))} were), so "
            "the error may be larger"
        )
    longest = max(each.sum_of_squares / each.n_tokens for each in chosen)
    if cells.sum_of_squares / cells.n_tokens > 1.05 * longest:
        notes.append("no cells as long as these were measured there, so the error may be larger")
    if machine.kind == "cuda":
        notes.append("time of the encoder alone, on batches that are on the card; reading and copying may come on top")
    else:
        what = "reading tokens and pooling included" if first.mode == "embed" else "reading and masking included"
        notes.append(f"{what}; starting Python and loading the model come on top")
    return notes


def _written(figure: Figure, form: Callable[[float], str]) -> str:
    return str(figure) if isinstance(figure, Missing) else form(figure)


def _rate(cells_per_s: float) -> str:
    return f"{cells_per_s:,.0f} cells/s" if cells_per_s >= 100 else f"{cells_per_s:.3g} cells/s"


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
