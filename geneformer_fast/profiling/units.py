"""How figures are written for people: a unit from a name, three digits, bytes in powers of ten."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from geneformer_fast.profiling.figures import Missing, Spread

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# What the last word of a name says. Shares are kept as numbers from 0 to 1 and written in percent.
_UNITS = {
    **{"share": "share", "mfu": "share", "hfu": "share", "fragmentation": "share", "percent": "%"},
    **{"s": "s", "ms": "ms", "bytes": "bytes", "gbps": "GB/s", "flops": "op", "tflops": "T op/s"},
    **{"watts": "W", "joules": "J", "kwh": "kWh", "gib": "GiB", "mib": "MiB", "mhz": "MHz", "celsius": "°C"},
}
_SHORT = {"joules": "J", "watts": "W", "flops": "op", "kwh": "kWh"}


# What may stand behind the unit: of cells_per_s_now, sm_mhz_at_most, length_p50.
_BEHIND = re.compile(r"_(now|before|at_most|at_least|mean|p\d\d)$")


def unit_of(name: str) -> str:
    """The unit that a name ends with: ``"s"`` of ``"wall_s"``, ``"J/cell"`` of ``"joules_per_cell"``; else ``""``."""
    parts = _BEHIND.sub("", name.lower()).split("_")
    if "per" in parts[1:-1]:
        at = len(parts) - 1 - parts[::-1].index("per")
        above, below = parts[at - 1], " ".join(parts[at + 1 :])
        return f"{_SHORT.get(above, above)}/{_SHORT.get(below, below)}"
    return _UNITS.get(parts[-1], "")


def words(name: str) -> str:
    """A name for people: ``"host gaps"`` of ``"host_gaps"``, ``"power"`` of ``"power_watts"``, all of it to be seen."""
    text = visible(name).removeprefix("n_")
    behind = _BEHIND.search(text)
    parts = _BEHIND.sub("", text).split("_")
    if len(parts) > 1 and "per" not in parts and parts[-1].lower() in _UNITS and unit_of(name) != "share":
        parts = parts[:-1]
    return " ".join([*parts, *(behind[1].split("_") if behind else [])])


def digits(value: float) -> str:
    """Three digits, all of those before the point, and all of a whole number: ``"51,234"``, ``"40.9"``, ``"0.139"``."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "-∞" if value < 0 else "∞"
    size = abs(value)
    if size and not 1e-6 <= size < 1e15:
        return f"{value:.2e}"
    decimals = 0 if size >= 100 else 2 if not size else max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def written(value: Any, unit: str = "") -> str:
    """A figure with its unit, or what stands in its place.

    Parameters
    ----------
    value
        Number, :class:`Spread` (median and, in brackets, the 10th and 90th percentile), :class:`Missing`, text, or a
        list or mapping of those.
    unit
        As :func:`unit_of` gives it. Of ``"share"`` percent are written, of ``"bytes"`` kB, MB, GB (powers of 1,000),
        of ``"op"`` M, G, T.
    """
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Missing):
        return str(value)
    if isinstance(value, Spread):
        low, high = (written(each, unit).removesuffix(f" {unit}") for each in (value.p10, value.p90))
        return f"{written(value.p50, unit)} ({low} to {high})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {written(each)}" for name, each in value.items()) or "none"
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(written(each, unit) for each in value) or "none"
    if not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return digits(value)
    if unit == "share":
        return f"{digits(100.0 * value)} %"
    if unit in ("bytes", "op"):
        return _scaled(float(value), "B" if unit == "bytes" else unit)
    return f"{digits(value)} {unit}".rstrip()


def _scaled(value: float, unit: str) -> str:
    glue = "" if unit == "B" else " "
    for factor, prefix in _PREFIXES:
        if abs(value) >= 0.9995 * factor:
            return f"{digits(value / factor)} {prefix}{glue}{unit}"
    return f"{digits(value)} {'bytes' if unit == 'B' else unit}"


def visible(text: str) -> str:
    """Text with nothing in it that is not seen or changes how the rest is read.

    Control characters, directional overrides and halves of surrogate pairs (of file names that are no UTF-8) come out
    as escapes: they are no part of HTML and of XML, and names come from anywhere.
    """
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "".join(
        " "
        if each in "\n\t"
        else each.encode("unicode_escape").decode()
        if unicodedata.category(each) in hidden
        else each
        for each in text
    )
