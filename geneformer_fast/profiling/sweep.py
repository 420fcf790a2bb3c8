"""Which token budget is the fastest, and how much memory each leaves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import Figure, Finding, Missing, Setting
from geneformer_fast.profiling.meters.resident import ResidentPeak, resident

#: The smallest budget that is tried, and the largest: a batch of so many tokens fills any card.
LEAST, MOST = 1024, 2**22
# A budget that would take more than this share of what is free is not tried: nobody wants to be killed.
_SHARE = 0.8
# Rates within this of the fastest are as good: the smaller budget takes less memory.
_AS_GOOD = 0.98
# Of so many budgets in a row none was faster than those before by this much: larger ones are not tried.
_GAIN, _N_WITHOUT = 1.02, 3
BEST = "best"


class Swept(Protocol):
    """What is tried with several budgets."""

    encoder: Any
    cells: Any

    def with_budget(self, token_budget: int) -> Any:
        """The same with other batches."""

    def cells_per_s(self) -> float:
        """Of a few batches."""


class Watch(Protocol):
    """Bytes of the memory that batches fill."""

    def reset(self) -> None:
        """Forget the peak."""

    def peak(self) -> Figure:
        """The most since."""

    def total(self) -> int:
        """All that this process may fill: what it has, and what is free."""


class ProcessWatch:
    """Resident memory of this process."""

    def __init__(self) -> None:
        self._resident = ResidentPeak()

    def reset(self) -> None:
        """Count the peak anew."""
        gc.collect()
        self._resident.start()

    def peak(self) -> Figure:
        """The most that was resident; ends the watch."""
        self._resident.stop()
        return self._resident.peak()

    def total(self) -> int:
        """What is available by /proc/meminfo, with what this process has."""
        import psutil

        return int(psutil.virtual_memory().available) + resident()


class CardWatch:
    """Memory of a card, as torch's allocator reserves it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        """Give back what was kept, and count anew."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> Figure:
        """The most that was reserved."""
        return float(torch.cuda.max_memory_reserved(self._device))

    def total(self) -> int:
        """What is free, with what the allocator has."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free) + int(torch.cuda.memory_reserved(self._device))


def watch_of(device: torch.device) -> Watch:
    """The memory of a device."""
    return CardWatch(device) if device.type == "cuda" else ProcessWatch()


def sweep(
    swept: Swept, *, watch: Watch | None = None, least: int = LEAST, tell: Callable[[Setting], None] | None = None
) -> list[Setting]:
    """Try token budgets in powers of two, up to what memory allows, or until larger ones are no faster.

    Parameters
    ----------
    swept
        What is tried.
    watch
        Of the memory it fills; None: that of the encoder's device.
    least
        The smallest budget.
    tell
        Told each setting.

    Returns
    -------
    list of Setting
        In the order they were tried. The ``note`` of one begins with ``"best"``: the smallest budget whose rate is
        within 2 % of the fastest.

    Raises
    ------
    UnsupportedError
        Not even the smallest fits.
    """
    watch = watch or watch_of(swept.encoder.device)
    found: list[Setting] = []
    for token_budget in _budgets(least, int(swept.cells.lengths().sum())):
        if found and (why := _too_much(found, watch.total())):
            found.append(Setting(token_budget, Missing(why), Missing(why), Missing(why)))
            break
        found.append(_tried(swept, token_budget, watch))
        if tell is not None:
            tell(found[-1])
        if isinstance(found[-1].cells_per_s, Missing) or _is_settled(found):
            break
    return _marked(found)


def best_of(settings: list[Setting]) -> Setting:
    """The one that is marked."""
    return next(each for each in settings if each.note.startswith(BEST))


def finding_of(settings: list[Setting], default: int) -> Finding | None:
    """That the best setting, which was measured, is faster than the usual one; None where it is not, or the same."""
    best = best_of(settings)
    usual = next((each.cells_per_s for each in settings if each.token_budget == default), None)
    if best.token_budget == default or usual is None or isinstance(usual, Missing):
        return None
    assert not isinstance(best.cells_per_s, Missing)
    gain = best.cells_per_s / usual
    if gain < _GAIN:
        return None
    free = "" if isinstance(best.free_bytes, Missing) else f", and leave {best.free_bytes / 1e9:.1f} GB of memory free"
    return Finding(
        "batch",
        f"batches of {best.token_budget:,} tokens, which were measured here, are {gain:.2f} times as fast as the usual "
        f"ones of {default:,}{free}: set the token budget to {best.token_budget}",
        {"token_budget": float(best.token_budget), "cells_per_s": best.cells_per_s, "usual_cells_per_s": usual},
        gain,
    )


def _budgets(least: int, n_tokens: int) -> Iterator[int]:
    """Powers of two, to the first that holds all tokens at once: with larger ones nothing changes."""
    token_budget = least
    while token_budget <= MOST:
        yield token_budget
        if token_budget >= n_tokens:
            return
        token_budget *= 2


def _tried(swept: Swept, token_budget: int, watch: Watch) -> Setting:
    watch.reset()
    try:
        rate: Figure = swept.with_budget(token_budget).cells_per_s()
    except torch.OutOfMemoryError:
        rate = Missing("out of memory")
        return Setting(token_budget, rate, rate, rate)
    finally:
        if swept.encoder.device.type == "cuda":
            torch.cuda.empty_cache()
    peak = watch.peak()
    assert not isinstance(peak, Missing)
    return Setting(token_budget, rate, peak, max(0.0, watch.total() - peak))


def _too_much(found: list[Setting], total: int) -> str:
    """Why the next budget, twice the last one, is not tried; "" where it is. Memory grows with the budget."""
    peaks = [each.peak_bytes for each in found[-2:] if not isinstance(each.peak_bytes, Missing)]
    if len(peaks) < 2:
        return ""
    expected = peaks[1] + 2 * max(0.0, peaks[1] - peaks[0])
    if expected <= _SHARE * total:
        return ""
    return f"not tried: it would take about {expected / 1e9:.1f} of {total / 1e9:.1f} GB"


def _is_settled(found: list[Setting]) -> bool:
    """Whether larger budgets have been no faster for some time."""
    rates = [each.cells_per_s for each in found if not isinstance(each.cells_per_s, Missing)]
    before, last = rates[:-_N_WITHOUT], rates[-_N_WITHOUT:]
    return bool(before) and max(last) < _GAIN * max(before)


def _marked(found: list[Setting]) -> list[Setting]:
    rates = [each.cells_per_s for each in found if not isinstance(each.cells_per_s, Missing)]
    if not rates:
        raise UnsupportedError(
            f"batches of {found[0].token_budget:,} tokens do not fit: {found[0].cells_per_s}; take a smaller model, "
            "another dtype, or another device"
        )
    for place, each in enumerate(found):
        if not isinstance(each.cells_per_s, Missing) and each.cells_per_s >= _AS_GOOD * max(rates):
            is_fastest = each.cells_per_s == max(rates)
            note = BEST if is_fastest else f"{BEST}: within 2 % of the fastest, in less memory"
            return [*found[:place], replace(each, note=note), *found[place + 1 :]]
    raise AssertionError
