"""The procedure of every GPU measurement: make, compare, and only then time, in turns, what computes the same."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.gpu.timer import MOST_PER_TURN, time_in_turns
from geneformer_fast.profiling.clock import Clock, Run

# What takes longer than that is warm after one run.
LONG_S = 0.5
#: Why a candidate is left out that a longer run would have; the first makes a result incomplete.
NO_TIME, NOT_QUICK = "no time left to compile it", "not part of a quick run"


class Unavailable(Exception):
    """A candidate cannot run here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A candidate that is ready.

    Attributes
    ----------
    run
        What is timed.
    result
        What is compared: values by name, in the layout all candidates share, small enough to be held for each.
    notes
        What else the table should know, such as cells per batch.
    """

    run: Run
    result: Callable[[], Mapping[str, torch.Tensor]]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """One way to compute what a variant asks for.

    Attributes
    ----------
    name, what
        In results; one line for people.
    make
        Gives what is timed; may raise :class:`Unavailable`.
    is_ours
        Whether it is this project's.
    is_same
        False for a rival that computes something else of the same size, timed for scale only, never compared.
    compile_s
        Seconds that torch.compile may take to make it, out of a budget of its own. 0 if nothing is compiled so.
    is_slow
        Left out of quick runs.
    """

    name: str
    what: str
    make: Callable[[], Prepared]
    is_ours: bool = False
    is_same: bool = True
    compile_s: float = 0.0
    is_slow: bool = False


@dataclass(frozen=True)
class Work:
    """What the result needs at least: operations, bytes through memory, and what users count.

    ``unit`` names the ceiling of the operations (:func:`bench.gpu.card.ceilings`).
    """

    flops: float = 0.0
    n_bytes: float = 0.0
    counts: Mapping[str, float] = field(default_factory=dict)
    unit: str = "product_tflops"

    def floor_ms(self, at_most: Mapping[str, float]) -> float:
        """Milliseconds below which the card cannot go, by its measured ceilings."""
        fastest = at_most.get(self.unit, at_most["product_tflops"])
        return max(self.flops / fastest / 1e9, self.n_bytes / at_most["copy_gbps"] / 1e6)

    def rates(self, ms: float, at_most: Mapping[str, float]) -> dict[str, float]:
        """What was reached in so many milliseconds."""
        found = {f"{name}_per_s": count / ms * 1e3 for name, count in self.counts.items()}
        if self.flops:
            found["tflops"] = self.flops / ms / 1e9
        if self.n_bytes:
            found["gbps"] = self.n_bytes / ms / 1e6
        found["share_of_floor"] = self.floor_ms(at_most) / ms
        return {name: float(f"{value:.5g}") for name, value in found.items()}


@dataclass(frozen=True)
class Variant:
    """One problem of a case.

    Attributes
    ----------
    name
        Such as ``"2048"``.
    what
        The problem in words.
    work
        What it needs at least.
    build
        Makes the inputs and gives the candidates; ours come first.
    truth
        Float32 or better values that results are compared with, asked for after ``build``.
    tolerance
        Largest relative error (Frobenius norm) per name in ``truth``.
    has_lead
        Whether short work is timed with the device busy beforehand, see ``EventClock``.
    has_energy
        Whether energy of ours, and of the fastest that computes the same, is measured as well.
    question
        What ``choose`` is asked here (:class:`bench.gpu.impls.Question`), as JSON values; None for encoders.
    """

    name: str
    what: str
    work: Work
    build: Callable[[], Sequence[Candidate]]
    truth: Callable[[], Mapping[str, torch.Tensor]]
    tolerance: Mapping[str, float]
    has_lead: bool = True
    has_energy: bool = False
    question: Mapping[str, Any] | None = None


@dataclass
class Compiling:
    """Time for torch.compile, kept apart: what is compiled comes last and would find nothing left.

    Attributes
    ----------
    seconds
        For all of a case.
    until
        ``time.monotonic()`` at which the process is ended.
    spent
        Seconds so far.
    """

    seconds: float = float("inf")
    until: float = float("inf")
    spent: float = 0.0

    def has_time(self, seconds: float) -> bool:
        """Whether something that takes about so long may begin; estimates may be wrong, the last one's too."""
        return self.spent < self.seconds and time.monotonic() + seconds < self.until


@dataclass(frozen=True)
class Place:
    """Where and how it is measured.

    Attributes
    ----------
    device, clock
        And how time is told there.
    at_most
        The card's ceilings, measured in this process.
    deadline
        ``time.monotonic()`` at which the case should be done, but for what compiling takes.
    is_tiny
        Sizes that test the procedure on a CPU; no measurement.
    is_quick
        Fewer candidates, fewer rounds.
    backend
        Of ``torch.compile``; ``""`` leaves candidates as they are, so that tests of the procedure take seconds.
    compiling
        Time for that.
    """

    device: torch.device
    clock: Clock
    at_most: Mapping[str, float]
    deadline: float
    is_tiny: bool = False
    is_quick: bool = False
    backend: str = "inductor"
    compiling: Compiling = field(default_factory=Compiling)

    def compiled(self, function: Any, *, n_shapes: int = 1) -> Any:
        """``function`` through torch.compile, for one shape or for several."""
        if not self.backend:
            return function
        import torch._functorch.config as config

        # Keeps the graph of a compiled backward, so that it can be timed alone and repeatedly.
        config.donated_buffer = False
        return torch.compile(function, dynamic=True if n_shapes > 1 else None, backend=self.backend)

    @property
    def seconds_left(self) -> float:
        """Until the deadline, which compiling puts off."""
        return self.deadline + self.compiling.spent - time.monotonic()


def measure(variant: Variant, place: Place, *, seconds: float) -> dict[str, Any]:
    """One variant: all its candidates made, compared and timed.

    Parameters
    ----------
    variant
        The problem.
    place
        Device, clock and ceilings.
    seconds
        Time for timing.

    Returns
    -------
    dict
        ``work``, ``rows`` (per candidate: times, rates, error, peak memory) and ``left_out`` (per candidate: why).
    """
    with torch.random.fork_rng(devices=[place.device] if place.device.type == "cuda" else []):
        torch.manual_seed(0)
        candidates = list(variant.build())
        truth = {name: value.detach().double() for name, value in variant.truth().items()}
    ready: dict[str, tuple[Candidate, Prepared]] = {}
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for candidate in candidates:
        begin = time.monotonic()
        made = _prepare(candidate, variant, truth, place)
        if candidate.compile_s:
            place.compiling.spent += time.monotonic() - begin
        if isinstance(made, str):
            left_out[candidate.name] = made
            print(f"  {variant.name}: {candidate.name} left out: {made}", flush=True)
            release(place)
            continue
        prepared, rows[candidate.name] = made
        ready[candidate.name] = (candidate, prepared)
    times = time_in_turns(
        {name: prepared.run for name, (_, prepared) in ready.items()},
        place.clock,
        seconds=seconds,
        has_lead=variant.has_lead,
        least_rounds=2 if place.is_tiny else 3,
        most_rounds=2 if place.is_tiny else 10 if place.is_quick else 40,
        most_per_turn=1 if place.is_tiny else MOST_PER_TURN,
    )
    for name, found in times.items():
        rows[name] |= {**found, **variant.work.rates(found["ms"]["p50"], place.at_most)}
    if variant.has_energy and not place.is_tiny:
        for name, found in _energy(ready, {name: row["ms"]["p50"] for name, row in rows.items()}, place).items():
            rows[name] |= found
    return {**described(variant, place), "rows": rows, "left_out": left_out}


def _energy(
    ready: Mapping[str, tuple[Candidate, Prepared]], ms: Mapping[str, float], place: Place
) -> dict[str, dict[str, Any]]:
    """Of ours, and of the fastest rival that computes the same."""
    from bench.gpu.energy import with_energy

    rivals = [name for name, (each, _) in ready.items() if not each.is_ours and each.is_same]
    chosen = [name for name, (each, _) in ready.items() if each.is_ours] + sorted(rivals, key=ms.__getitem__)[:1]
    return with_energy({name: ready[name][1] for name in chosen}, ms, place)


def described(variant: Variant, place: Place) -> dict[str, Any]:
    """The problem in a result."""
    work = {"flops": variant.work.flops, "n_bytes": variant.work.n_bytes, **variant.work.counts}
    floor = {"floor_ms": float(f"{variant.work.floor_ms(place.at_most):.5g}")}
    asked = {} if variant.question is None else {"question": dict(variant.question)}
    return {"what": variant.what, "work": work | floor, **asked}


def measure_or_say_why(variant: Variant, place: Place, *, seconds: float) -> dict[str, Any]:
    """:func:`measure`, or, where making the inputs, the truth or the clock fails, no rows and the ``error``."""
    try:
        return measure(variant, place, seconds=seconds)
    except Exception as error:
        raise_if_dead(error, place)
        why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else said(error)
    return {**described(variant, place), "rows": {}, "left_out": {}, "error": why}


def _prepare(
    candidate: Candidate, variant: Variant, truth: Mapping[str, torch.Tensor], place: Place
) -> tuple[Prepared, dict[str, Any]] | str:
    """The candidate ready and warm, with its error and memory, or the reason why not."""
    if place.is_quick and (candidate.is_slow or candidate.compile_s):
        return NOT_QUICK
    if candidate.compile_s and not place.is_tiny and not place.compiling.has_time(candidate.compile_s):
        return NO_TIME
    before = _allocated(place)  # the inputs all share, and what other candidates hold
    try:
        prepared = candidate.make()
        errors = {}
        if candidate.is_same:
            result = prepared.result()
            errors = {name: relative_error(value, truth[name]) for name, value in result.items() if name in truth}
        if _host_seconds(prepared.run, place) < LONG_S:
            prepared.run()
        peak_bytes = _peak(prepared.run, place) - before
    except Unavailable as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        # A rival that breaks loses itself only. Ours is missing from the rows then, which fails the case.
        raise_if_dead(error, place)
        return said(error)
    wrong = {name: error for name, error in errors.items() if not error <= variant.tolerance[name]}
    if wrong or (candidate.is_same and not errors):
        return f"computes something else: relative errors {wrong or 'of nothing'}"
    row = {"what": candidate.what, "is_ours": candidate.is_ours, "is_same": candidate.is_same}
    return prepared, {**row, **prepared.notes, "relative_error": errors, "peak_bytes": peak_bytes}


def said(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _host_seconds(run: Run, place: Place) -> float:
    begin = time.monotonic()
    run()
    place.clock.wait()
    return time.monotonic() - begin


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value - truth‖ / ‖truth‖ in float64; infinite for other shapes and for what is not finite."""
    if value.shape != truth.shape:
        return float("inf")
    error = (value.detach().double() - truth).norm() / truth.norm().clamp_min(1e-30)
    return float(f"{error.item():.3g}") if torch.isfinite(error) else float("inf")


def _allocated(place: Place) -> int:
    if place.device.type != "cuda":
        return 0
    release(place)
    return torch.cuda.memory_allocated(place.device)


def _peak(run: Run, place: Place) -> int:
    """The most memory that was allocated during one run."""
    if place.device.type != "cuda":
        run()
        return 0
    torch.cuda.synchronize(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    run()
    torch.cuda.synchronize(place.device)
    return torch.cuda.max_memory_allocated(place.device)


def release(place: Place) -> None:
    """Give a card's memory back that nobody holds any more."""
    if place.device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(place.device)
        torch.cuda.empty_cache()


def raise_if_dead(error: Exception, place: Place) -> None:
    """After a fault on the card nothing in this process can be trusted: give up."""
    if place.device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(place.device)
        torch.zeros(8, device=place.device).add_(1).sum().item()
    except RuntimeError:
        raise error from None
