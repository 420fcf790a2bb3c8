"""What many cells would take on a card or machine that was measured: time, memory and energy, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from geneformer_kernels.dispatch import use_impl

from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.config import PRESETS, EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract.batch_memory import batch_memory
from geneformer_fast.extract.encoding import MOST_WORKERS, TOKEN_BUDGET
from geneformer_fast.profiling.figures import Figure, Missing, divided
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.prediction.answer import ONE, Cells, Prediction, notes_of_error, several
from geneformer_fast.profiling.prediction.energy import EnergySample, energy_of, note_of_limit
from geneformer_fast.profiling.prediction.fitted import (
    GOOD_ENOUGH,
    MemorySample,
    Sample,
    Work,
    fit,
    fit_memory,
    interval,
)
from geneformer_fast.profiling.prediction.measurements import Machine, Measurement, Timed, machine_named
from geneformer_fast.profiling.prediction.training import Step, fit_steps, is_like, operations_s

# Masked genes, as share of all tokens, for the head in training.
_MASKED = 0.15


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
    head_rows = _MASKED * cells.n_tokens if mode == "train" else 0.0
    asked = Work(
        _flops(config, blocks, cells.n_tokens, cells.sum_of_squares, mode, head_rows),
        *_traffic(config, blocks, cells.n_tokens, math.ceil(cells.n_tokens / batch_tokens), mode, machine.kind),
    )
    time = _time_of(machine, chosen, config, cells, asked, head_rows)
    seconds, error = time.seconds, time.error
    bounds = interval(seconds, error)
    rests_on: list[Measurement | Timed] = [*chosen, *time.operations]
    peak, memory_error = _memory(machine, chosen, config, batch_tokens)
    joules, energy_error = energy_of(_with_energy(chosen), machine.name, seconds, asked.flops, error)
    return Prediction(
        machine.name, mode, model, chosen[0].dtype, chosen[0].threads, cells.what, cells.n, round(cells.n_tokens),
        batch_tokens, seconds, divided(cells.n, seconds, "the time"),
        ONE if bounds is None else bounds[0], ONE if bounds is None else bounds[1],
        ONE if error is None else error, error is not None and error <= GOOD_ENOUGH,
        peak, memory_error, joules, energy_error, len(rests_on), sorted({each.source for each in rests_on}),
        [
            *_notes(machine, chosen, config, cells, error), *filter(None, [time.note]),
            *note_of_limit(machine.power_limit_w, seconds, joules),
        ],
    )  # fmt: skip


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
        there = ", ".join(name + (f" with {several(n, 'thread')}" if n else "") for name, n in kinds) or "nothing"
        asked = " ".join(filter(None, (mode, dtype, f"with {threads} threads" if threads else "")))
        raise UnsupportedError(f"{machine.name}: {asked} was not measured there; of {mode} there is {there}")
    # Of kinds with as many problems, the one of more threads, and then the first: results begin with the fastest dtype.
    return max(fitting.values(), key=lambda found: (len({each.problem for each in found}), found[0].threads or 0))


@dataclass(frozen=True)
class _Time:
    """A time, its error, what it rests on besides whole runs, and what is to be known of it."""

    seconds: float
    error: float | None
    operations: Sequence[Timed] = ()
    note: str = ""


def _time_of(
    machine: Machine, chosen: Sequence[Measurement], config: EncoderConfig, cells: Cells, asked: Work, head_rows: float
) -> _Time:
    """Of training on a card from its operations where they were measured, else from whole runs alone."""
    alone = operations_s(machine, config, cells.n_tokens, cells.sum_of_squares, head_rows)
    steps = [_step(machine, each) for each in chosen]
    if chosen[0].mode == "train" and alone is not None and None not in steps:
        found = fit_steps([step for step in steps if step is not None])
        if found is not None:
            seconds = found.seconds(alone, asked.numbers, asked.launches)
            note = (
                f"attention, LayerNorm and loss as measured one by one, products at the ceiling: {alone / seconds:.0%} "
                f"of the time; the rest is fitted to {several(len(steps), 'run')} of whole steps, of cells of "
                f"{' and '.join(sorted({f'{each.n_tokens / each.n_cells:,.0f}' for each in chosen}))} tokens"
            )
            return _Time(seconds, found.error, [each for each in machine.operations if is_like(each, config)], note)
    whole = fit([_sample(each, machine.kind) for each in chosen])
    return _Time(whole.seconds(asked), whole.error)


def _step(machine: Machine, each: Measurement) -> Step | None:
    """A measurement of training, and what its operations take by themselves; None where that is not known."""
    config = PRESETS[each.model]
    alone = operations_s(machine, config, each.n_tokens, each.sum_of_squares, each.head_rows)
    if alone is None or each.host_seconds is None:
        return None
    traffic = _traffic(config, each.blocks, each.n_tokens, each.n_batches, each.mode, machine.kind)
    return Step(each.problem, alone, *traffic, each.seconds, each.host_seconds)


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
    return fixed + per_unit * units, ONE if error is None else error


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
    # By torch: what this machine's own loops would take says nothing of that one.
    with use_impl("torch"):
        row, call, thread = batch_memory(encoder, min(batch_tokens, config.max_len), cpu)
    return weights + file + workers * (batch_tokens * row + call + thread), 1.0


def _shapes(config: EncoderConfig, dtype: str, head: str | None) -> Encoder:
    """An encoder without numbers, its products in a dtype."""
    encoder = skeleton(config, head)
    if head is None:
        encoder.blocks.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32))
    return encoder


def _with_energy(chosen: Sequence[Measurement]) -> list[EnergySample]:
    samples = []
    for each in chosen:
        if each.joules is not None:
            config = PRESETS[each.model]
            flops = _flops(config, each.blocks, each.n_tokens, each.sum_of_squares, each.mode, each.head_rows)
            samples.append(EnergySample(each.problem, each.seconds, flops, each.joules))
    return samples


def _notes(
    machine: Machine, chosen: Sequence[Measurement], config: EncoderConfig, cells: Cells, error: float | None
) -> list[str]:
    first = chosen[0]
    dates, commits = (sorted({getattr(each, name) for each in chosen}) for name in ("date", "commit"))
    notes = [f"measured {' and '.join(dates)}, commit {', '.join(commits)}"]
    notes += notes_of_error(error)
    known = [PRESETS[each.model] for each in chosen]
    if not any((c.n_layers, c.width, c.ff_width) == (config.n_layers, config.width, config.ff_width) for c in known):
        notes.append(
            f"no model of this size was measured there ({', '.join(sorted({each.model for each in chosen}))} were), so "
            "the error may be larger"
        )
    longest = max(each.sum_of_squares / each.n_tokens for each in chosen)
    if cells.sum_of_squares / cells.n_tokens > 1.05 * longest:
        notes.append("no cells as long as these were measured there, so the error may be larger")
    if machine.kind == "cuda" and first.mode == "train":
        notes.append("forward and backward pass, on batches that are on the card; the optimizer's step comes on top")
    elif machine.kind == "cuda":
        notes.append("time of the encoder alone, on batches that are on the card; reading and copying may come on top")
    else:
        what = "reading tokens and pooling included" if first.mode == "embed" else "reading and masking included"
        notes.append(f"{what}; starting Python and loading the model come on top")
    return notes
