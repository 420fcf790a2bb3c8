"""Energy per cell: a window of at least two seconds over whatever counter there is, with the state of the device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from geneformer_fast.profiling.figures import Energy, Figure, Missing, Series, divided, times
from geneformer_fast.profiling.meters.cards import Card, find_card, in_words, reading
from geneformer_fast.profiling.meters.counters import Counter, CounterError, find_card_counter, find_rapl
from geneformer_fast.profiling.meters.resident import resident
from geneformer_fast.profiling.meters.sampling import Sampler

#: Counters are renewed every 20 to 100 ms, power every second: a shorter window says little.
LEAST_WINDOW_S = 2.0
_JOULES_PER_KWH = 3.6e6
_THROTTLE_COUNTS = Path("/sys/devices/system/cpu")

State = dict[str, float | str | Missing]


def energy_meter(device: torch.device | str) -> Meter:
    """What measures a device's energy; where nothing does, its figures are missing, with the reason."""
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        card = find_card(torch.device("cuda", index))
        if isinstance(card, Missing):
            return Meter(card, _CardState(None, card, index))
        return Meter(find_card_counter(card, index), _CardState(card, None, index))
    if device.type == "cpu":
        return Meter(find_rapl(), _ProcessorState())
    return Meter(Missing(f"no counter of energy is known for {device.type}"), _ProcessorState())


class Meter:
    """``idle()`` before anything runs, then ``start()``, the work, ``stop(n_cells)``.

    Parameters
    ----------
    counter
        Or why there is none.
    state
        What else is looked at meanwhile.
    """

    def __init__(self, counter: Counter | Missing, state: _CardState | _ProcessorState) -> None:
        self.counter, self.state = counter, state
        #: Power, memory and the rest over the last window; empty before the first.
        self.series = Series()
        self._idle: Figure = Missing("idle power was not measured")
        readers: dict[str, Callable[[], float | None]] = dict(state.readers())
        if not isinstance(counter, Missing):
            readers = {"power_watts": counter.watts, **readers}
        self._sampler = Sampler(readers)
        self._began: tuple[float, Figure] | None = None

    def idle(self, seconds: float = LEAST_WINDOW_S) -> Figure:
        """Measure the power while nothing of ours runs.

        Parameters
        ----------
        seconds
            How long to wait for it; at least 2. Where there is no counter nobody waits.
        """
        if isinstance(self.counter, Missing):
            self._idle = self.counter
        else:
            self._begin()
            time.sleep(seconds)
            window, joules = self._end()
            self._idle = divided(joules, window)
        return self._idle

    def start(self) -> None:
        """The window begins. What a card still has to do should be done."""
        self._begin()
        self.state.begin()

    def stop(self, n_cells: int) -> Energy:
        """The window ends, with so many cells; what was given to a card should be done.

        Raises
        ------
        RuntimeError
            It never began.
        """
        window, joules = self._end()
        per_cell = divided(joules, float(n_cells), "the number of cells")
        return Energy(
            counter="" if isinstance(self.counter, Missing) else self.counter.name,
            window_s=window,
            joules=joules,
            watts=divided(joules, window),
            idle_watts=self._idle,
            joules_per_cell=per_cell,
            cells_per_kwh=divided(_JOULES_PER_KWH, per_cell, "the energy"),
            kwh_per_million_cells=times(per_cell, 1e6 / _JOULES_PER_KWH),
            state=self.state.end(self.series),
        )

    def close(self) -> None:
        """End what goes on, and let the driver go."""
        self._sampler.stop()
        self.state.close()

    def _begin(self) -> None:
        self._sampler.start()
        self._began = time.perf_counter(), self._read()

    def _end(self) -> tuple[float, Figure]:
        """Seconds, and joules in them."""
        if self._began is None:
            raise RuntimeError("the meter was stopped before it was started")
        (then, before), self._began = self._began, None
        # Before the counter is asked for the last time: it is not made for two threads.
        self.series = self._sampler.stop()
        now, after = time.perf_counter(), self._read()
        window = now - then
        return window, _difference(before, after, window)

    def _read(self) -> Figure:
        if isinstance(self.counter, Missing):
            return self.counter
        try:
            return self.counter.joules()
        except CounterError as error:
            return Missing(str(error))


def _difference(before: Figure, after: Figure, window: float) -> Figure:
    """Joules of a window; missing where the counter cannot be right."""
    for each in (before, after):
        if isinstance(each, Missing):
            return each
    assert not isinstance(before, Missing)
    assert not isinstance(after, Missing)
    if window < LEAST_WINDOW_S:
        return Missing(f"the window was {window:.1f} s; counters need {LEAST_WINDOW_S:.0f} s")
    if after < before:
        return Missing("the counter of energy went back")
    if after == before:
        return Missing(f"the counter of energy stood still for {window:.1f} s")
    return after - before


class _CardState:
    """Clocks, temperature, what holds the clocks down, and utilisation of a card."""

    def __init__(self, card: Card | None, why_not: Missing | None, index: int) -> None:
        self.card, self.index = card, index
        self.why_not = why_not or Missing("NVML does not know the card")
        self._bits: set[int] = set()

    def readers(self) -> dict[str, Callable[[], float | None]]:
        """What is looked at over time."""
        memory: dict[str, Callable[[], float | None]] = {
            "memory_bytes": lambda: float(torch.cuda.memory_allocated(self.index))
        }
        if self.card is None:
            return memory
        return {
            **memory,
            "time_with_kernels_percent": self.card.kernels_percent,
            "sm_mhz": self.card.sm_mhz,
            "temperature_celsius": self.card.celsius,
            "throttle_bits": self._throttle,
        }

    def begin(self) -> None:
        """A window begins."""
        self._bits.clear()

    def end(self, series: Series) -> State:
        """Averages over the window, and the rest as it is now; bits are no value to be drawn."""
        bits = series.values.pop("throttle_bits", [])
        names = ("sm_mhz", "sm_mhz_at_most", "memory_mhz", "temperature_celsius", "power_limit_watts")
        if self.card is None:
            return dict.fromkeys((*names, "throttle_reasons", "time_with_kernels_percent"), self.why_not)
        card = self.card
        state: State = {
            "sm_mhz": _mean(series, "sm_mhz") or reading(card, card.sm_mhz),
            "sm_mhz_at_most": reading(card, card.sm_mhz_at_most),
            "memory_mhz": reading(card, card.memory_mhz),
            "temperature_celsius": _mean(series, "temperature_celsius", max) or reading(card, card.celsius),
            "power_limit_watts": reading(card, card.limit_watts),
            "time_with_kernels_percent": _mean(series, "time_with_kernels_percent")
            or reading(card, card.kernels_percent),
            "time_with_memory_traffic_percent": reading(card, card.memory_traffic_percent),
        }
        seen = [each for each in bits if each is not None]
        now = reading(card, lambda: float(card.throttle_bits()))
        if not seen and isinstance(now, Missing):
            return {**state, "throttle_reasons": now}
        total = 0
        for each in (*self._bits, 0 if isinstance(now, Missing) else int(now)):
            total |= each
        return {**state, "throttle_reasons": in_words(total)}

    def close(self) -> None:
        """Let the driver go."""
        if self.card is not None:
            self.card.close()

    def _throttle(self) -> float | None:
        if self.card is None:
            return None
        self._bits.add(self.card.throttle_bits())
        return 0.0


class _ProcessorState:
    """How busy the processor's cores were with this process, their clock, and whether heat held them down."""

    def __init__(self, folder: Path = _THROTTLE_COUNTS) -> None:
        self.folder = folder
        self._throttled = self._events()
        self._cpu = time.process_time(), time.perf_counter()
        self._began = self._cpu

    def readers(self) -> dict[str, Callable[[], float | None]]:
        """What is looked at over time."""
        return {"memory_bytes": lambda: float(resident()) or None, "cores_busy_percent": self._busy}

    def begin(self) -> None:
        """A window begins."""
        self._throttled = self._events()
        self._began = time.process_time(), time.perf_counter()

    def end(self, series: Series) -> State:
        """Over the window, and as it is now."""
        cpu, wall = time.process_time() - self._began[0], time.perf_counter() - self._began[1]
        now = self._events()
        throttled: str | Missing = Missing(f"{self.folder} does not tell how often heat slowed the processor down")
        if now is not None and self._throttled is not None:
            throttled = "temperature, by the hardware" if now > self._throttled else "none"
        return {
            "cores_busy_percent": 100 * cpu / wall / _n_cores() if wall else Missing("no time went by"),
            "processor_mhz": _processor_mhz(),
            "throttle_reasons": throttled,
        }

    def close(self) -> None:
        """Nothing is open."""

    def _busy(self) -> float | None:
        before, self._cpu = self._cpu, (time.process_time(), time.perf_counter())
        wall = self._cpu[1] - before[1]
        return 100 * (self._cpu[0] - before[0]) / wall / _n_cores() if wall > 0 else None

    def _events(self) -> int | None:
        counts = []
        for path in self.folder.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"):
            try:
                counts.append(int(path.read_text(encoding="ascii")))
            except (OSError, ValueError):
                continue
        return sum(counts) if counts else None


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_mhz() -> Figure:
    try:
        import psutil

        found = psutil.cpu_freq()
    except (ImportError, OSError, NotImplementedError, AttributeError):
        found = None
    return float(found.current) if found else Missing("the system does not tell the processor's clock")


def _mean(series: Series, name: str, how: Callable[[list[float]], float] | None = None) -> float | None:
    """Over the window; None where nothing was read."""
    values = [each for each in series.values.get(name, []) if each is not None]
    if not values:
        return None
    return how(values) if how is not None else sum(values) / len(values)
