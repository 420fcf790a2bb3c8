"""Runs something in a process of its own and asks the operating system how much memory it took."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple


class ChildRun(NamedTuple):
    """Wall time in seconds, CPU time in seconds, and peak resident memory in bytes."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def run_child(arguments: Sequence[str]) -> ChildRun:
    """Run a command to its end; what it used is what ``wait4`` says of this very process.

    Raises
    ------
    RuntimeError
        The command failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")
    # Linux counts in KiB.
    return ChildRun(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
