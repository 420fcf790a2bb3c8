"""Sizes in words, such as ``"2GB"``; nothing heavy is loaded to read one."""

from __future__ import annotations

import re
from decimal import Decimal

from geneformer_fast.errors import UnsupportedError

_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power for power, prefix in enumerate("KMGT", 1) for unit, base in (("B", 1000), ("iB", 1024))
}
_BY_NAME = {name.upper(): n_bytes for name, n_bytes in _UNITS.items()}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def size_in_bytes(size: str | int) -> int:
    """Bytes that a number, or a text such as ``"2GB"`` (10**9), ``"1.5GiB"`` (2**30) or ``"500 MB"``, stands for.

    Raises
    ------
    UnsupportedError
        It is no size.
    """
    match = _SIZE.fullmatch(str(size))
    unit = None if match is None else _BY_NAME.get(match[2].upper())
    if match is None or unit is None or not (n_bytes := int(Decimal(match[1]) * unit)):
        raise UnsupportedError(
            f"memory_budget (--memory-budget) must be a size such as 2GB, 1.5GiB or 500MB, or a number of bytes, not "
            f"{size!r}"
        )
    return n_bytes


def in_mb(n_bytes: int) -> str:
    """A size in whole megabytes, rounded up, as :func:`size_in_bytes` reads it."""
    return f"{-(-n_bytes // 10**6)} MB"
