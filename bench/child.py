"""Runs something in a process of its own and asks the operating system how much memory it took."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple


class ChildRun(NamedTuple):
    """Wall time in seconds, CPU time in seconds, and peak resident memory in bytes."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


# A process inherits its parent's peak when it is forked, before it becomes another program. So a small process starts
# the one that is measured, and not this one, which may have grown to any size.
_STARTER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
wall_s = time.perf_counter() - start
print(json.dumps([process.returncode, wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""


def run_child(arguments: Sequence[str]) -> ChildRun:
    """Run a command to its end; what it used is what ``wait4`` says of that very process (Linux counts in KiB).

    Raises
    ------
    RuntimeError
        The command failed.
    """
    starter = [sys.executable, "-I", "-S", "-c", _STARTER, *arguments]
    said = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True).stdout
    code, wall_s, cpu_s, peak_bytes = json.loads(said)
    if code != 0:
        raise RuntimeError(f"{' '.join(arguments)} ended with {code}")
    return ChildRun(wall_s, cpu_s, peak_bytes)
