"""The most memory that this process had resident within a while, as Linux tells."""

from __future__ import annotations

import threading
from pathlib import Path

from geneformer_fast.profiling.figures import Figure, Missing

_PROCESS = Path("/proc/self")
# What makes Linux forget the most that was resident (proc_pid_clear_refs(5)).
_FORGET_PEAK = "5"
_INTERVAL_S = 0.002


class ResidentPeak:
    """``start()``, something, ``stop()``: then what was resident at most meanwhile.

    The system's own record (VmHWM) is made to forget what was before. Where it does not let itself be, resident memory
    is looked at every 2 ms instead, unless a new record shows what the most was.

    Attributes
    ----------
    folder
        Of the process, ``/proc/self``.
    """

    def __init__(self, folder: Path = _PROCESS) -> None:
        self.folder = folder
        self._before = self._after = self._seen = 0
        self._is_forgotten = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on."""
        self._before = self._read("VmHWM")
        try:
            (self.folder / "clear_refs").write_text(_FORGET_PEAK, encoding="ascii")
            self._is_forgotten = True
        except OSError:
            self._is_forgotten = False
        if not self._is_forgotten and self._before:
            self._end.clear()
            self._thread = threading.Thread(target=self._look, name="resident memory", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Until now."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
        self._after = self._read("VmHWM")

    def peak(self) -> Figure:
        """Bytes resident at most between start and stop."""
        if not self._after:
            return Missing(f"{self.folder / 'status'} does not say what is resident")
        if self._is_forgotten or self._after > self._before:
            return float(self._after)
        return float(max(self._seen, self._read("VmRSS")))

    def most(self) -> Figure:
        """Bytes resident at most since the process began."""
        most = max(self._before, self._after)
        return float(most) if most else Missing(f"{self.folder / 'status'} does not say what is resident")

    def _look(self) -> None:
        while not self._end.wait(_INTERVAL_S):
            self._seen = max(self._seen, self._read("VmRSS"))

    def _read(self, name: str) -> int:
        return resident(name, self.folder)


def resident(name: str = "VmRSS", folder: Path = _PROCESS) -> int:
    """Bytes that the system states of this process under a name; 0 where it says nothing."""
    try:
        lines = (folder / "status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
