"""Measurements take as long as they take: the limit of a test (``pyproject.toml``) is none of theirs.

The clock of pytest-benchmark is the profiler's on a CPU (:class:`geneformer_fast.profiling.clock.WallClock`), and so
are the ceilings.
"""

from __future__ import annotations

import faulthandler
from dataclasses import asdict
from typing import Any

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The clock that pytest has just started is stopped."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def ceilings() -> dict[str, Any]:
    """What this CPU reaches with the threads that torch has now, as JSON values of the profiler's record."""
    from geneformer_fast.profiling.ceilings import measure_ceilings

    return asdict(measure_ceilings("cpu", ["float32", "bfloat16"]))
