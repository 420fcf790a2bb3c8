"""Counters of energy, each of them joules that only grow: NVML's, power integrated, zeus's, RAPL's."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.meters.cards import Card

_POWERCAP = Path("/sys/class/powercap")


class CounterError(Exception):
    """A counter cannot be read; the message says why."""


class Counter(Protocol):
    """Energy since some moment.

    Attributes
    ----------
    name
        As the report calls it.
    """

    name: str

    def joules(self) -> float:
        """Energy so far.

        Raises
        ------
        CounterError
            It cannot be read.
        """

    def watts(self) -> float | None:
        """Power now; None where nobody can tell. Asked ten times a second, and some counters live by that."""


class CardCounter:
    """NVML's counter of energy, which cards from Volta on have."""

    name = "NVML energy counter"

    def __init__(self, card: Card) -> None:
        self.card = card

    def joules(self) -> float:
        """Since the driver was loaded."""
        try:
            return self.card.millijoules() / 1e3
        except self.card.nvml.NVMLError as error:
            raise CounterError(f"NVML: {error}") from None

    def watts(self) -> float | None:
        """As the driver says."""
        return self.card.watts()


class CardPower:
    """Power as NVML says it, integrated by trapezoids between moments at which it is asked."""

    name = "NVML power, integrated"

    def __init__(self, card: Card) -> None:
        self.card = card
        self._joules = 0.0
        self._last: tuple[float, float] | None = None

    def joules(self) -> float:
        """Since the first time that somebody asked."""
        try:
            self.watts()
        except self.card.nvml.NVMLError as error:
            raise CounterError(f"NVML: {error}") from None
        return self._joules

    def watts(self) -> float:
        """Power now, entered into the books."""
        power, now = self.card.watts(), time.perf_counter()
        if self._last is not None:
            before, then = self._last
            self._joules += (before + power) / 2 * max(now - then, 0.0)
        self._last = power, now
        return power


class ZeusCounter:
    """A window of zeus's (ml.energy) for one card."""

    name = "zeus"
    _WINDOW = "geneformer_fast"

    def __init__(self, monitor: Any, card: Card) -> None:
        self.monitor, self.card = monitor, card
        self._joules, self._is_open = 0.0, False

    def joules(self) -> float:
        """Since the first time that somebody asked: one window after the other."""
        try:
            if self._is_open:
                self._joules += float(sum(self.monitor.end_window(self._WINDOW).gpu_energy.values()))
                self._is_open = False
            self.monitor.begin_window(self._WINDOW)
            self._is_open = True
        except Exception as error:  # whatever a library of somebody else's raises
            raise CounterError(f"zeus: {error}") from None
        return self._joules

    def watts(self) -> float | None:
        """As the driver says: zeus has windows only."""
        return self.card.watts()


class Rapl:
    """The counters of a processor's packages (RAPL), as Linux shows them; of all who compute on it.

    Parameters
    ----------
    zones
        Folders with ``energy_uj`` and ``max_energy_range_uj``.
    """

    name = "RAPL"

    def __init__(self, zones: list[Path]) -> None:
        self.zones = {zone: self._range(zone) for zone in zones}
        self._last: dict[Path, int] = {}
        self._joules = 0.0
        self._power: tuple[float, float] | None = None

    def joules(self) -> float:
        """Since the first time that somebody asked. A counter that begins again at 0 has counted to its end."""
        for zone, most in self.zones.items():
            now = _number(zone / "energy_uj")
            gone = now - self._last.get(zone, now)
            self._joules += (gone if gone >= 0 else gone + most) / 1e6
            self._last[zone] = now
        return self._joules

    def watts(self) -> float | None:
        """On an average since it was last asked."""
        joules, now = self.joules(), time.perf_counter()
        before, self._power = self._power, (joules, now)
        if before is None or now <= before[1]:
            return None
        return (joules - before[0]) / (now - before[1])

    @staticmethod
    def _range(zone: Path) -> int:
        return _number(zone / "max_energy_range_uj")


def _number(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii"))
    except PermissionError:
        raise CounterError(f"only root may read {path}") from None
    except (OSError, ValueError) as error:
        raise CounterError(f"{path} cannot be read: {error}") from None


def find_rapl(folder: Path = _POWERCAP) -> Rapl | Missing:
    """The counters of this machine's processors, or why there are none."""
    names = {}
    for zone in sorted(folder.glob("*-rapl:*")):
        try:
            names[zone] = (zone / "name").read_text(encoding="ascii").strip()
        except OSError:
            continue
    packages = [zone for zone, name in names.items() if name.startswith("package")]
    if not packages:
        return Missing(f"{folder} has no counter of a processor's energy; virtual machines seldom have one")
    try:
        found = Rapl(packages)
        found.joules()
    except CounterError as error:
        return Missing(str(error))
    return found


def find_card_counter(card: Card, gpu_index: int) -> Counter | Missing:
    """The best counter of a card: zeus's where that is installed, NVML's, or its power."""
    if card.is_slice:
        return Missing("the card is divided into slices (MIG), and its counters are those of all who compute on it")
    zeus = _zeus(card, gpu_index)
    if zeus is not None:
        return zeus
    reasons = []
    for kind in (CardCounter, CardPower):
        try:
            counter = kind(card)
            counter.joules()
            counter.watts()
        except (CounterError, card.nvml.NVMLError) as error:
            reasons.append(str(error).removeprefix("NVML: "))
            if kind is CardCounter and isinstance(error, card.nvml.NVMLError):
                return CardCounter(card)  # it counts, though nobody says what is drawn right now
        else:
            return counter
    return Missing(f"NVML tells neither energy ({reasons[0]}) nor power ({reasons[-1]}) of this card")


def _zeus(card: Card, gpu_index: int) -> ZeusCounter | None:
    """Zeus's monitor, which numbers cards as torch does; None where it is not installed or does not start."""
    try:
        from zeus.monitor import ZeusMonitor

        counter = ZeusCounter(ZeusMonitor(gpu_indices=[gpu_index], cpu_indices=[]), card)
        counter.joules()
    except Exception:  # it looks for hardware of many kinds when it starts
        return None
    return counter
