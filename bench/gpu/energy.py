"""Energy of one run of a candidate: as many runs as fill a window that counters of energy can tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from bench.gpu.measure import Place, Prepared
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.meters.energy import LEAST_WINDOW_S, Meter, energy_meter

# A little more than the shortest window: the last run must not end before it.
_WINDOW_S = 1.1 * LEAST_WINDOW_S


def joules_per_run(run: Callable[[], Any], wait: Callable[[], Any], ms: float, meter: Meter) -> dict[str, Any]:
    """Energy of one run, from a window over many.

    Parameters
    ----------
    run, wait
        What is measured, warm; what waits for the device.
    ms
        How long one run takes.
    meter
        Of the device.

    Returns
    -------
    dict
        ``joules`` of one run and ``watts``; or ``no_energy``, the reason.
    """
    n_runs = math.ceil(_WINDOW_S * 1e3 / ms)
    wait()
    meter.start()
    for i in range(n_runs):
        run()
        if i % 8 == 7:  # a queue that runs ahead would let the window end before the device does
            wait()
    wait()
    found = meter.stop(n_runs)
    if isinstance(found.joules, Missing):
        return {"no_energy": found.joules.not_available}
    return {"joules": float(f"{found.joules / n_runs:.5g}"), "watts": float(f"{found.watts:.4g}")}


def with_energy(ready: Mapping[str, Prepared], ms: Mapping[str, float], place: Place) -> dict[str, dict[str, Any]]:
    """:func:`joules_per_run` of some candidates, by name, as long as there is time."""
    meter = energy_meter(place.device)
    try:
        if isinstance(meter.counter, Missing):
            return {name: {"no_energy": meter.counter.not_available} for name in ready}
        return {
            name: joules_per_run(prepared.run, place.clock.wait, ms[name], meter)
            if place.seconds_left > _WINDOW_S
            else {"no_energy": "no time was left"}
            for name, prepared in ready.items()
        }
    finally:
        meter.close()
