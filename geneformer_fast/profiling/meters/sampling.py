"""Values that are looked at ten times a second while something else runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from geneformer_fast.profiling.figures import Series

#: Most moments that are kept; where there would be more, every second one goes and the next are twice as far apart.
MOST_POINTS = 2000
INTERVAL_S = 0.1


class Sampler:
    """Looks at values in a thread of its own, from :meth:`start` to :meth:`stop`.

    Parameters
    ----------
    readers
        Name -> a function that returns the value, or None; one that raises has no value at that moment.
    interval_s
        Seconds between two looks.
    most_points
        See :data:`MOST_POINTS`.
    """

    def __init__(
        self,
        readers: Mapping[str, Callable[[], float | None]],
        *,
        interval_s: float = INTERVAL_S,
        most_points: int = MOST_POINTS,
    ) -> None:
        self.readers, self.interval_s, self.most_points = dict(readers), interval_s, most_points
        self._every = 1
        self._times: list[float] = []
        self._values: dict[str, list[float | None]] = {name: [] for name in readers}
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0

    def start(self) -> Sampler:
        """Begin; what was seen before is forgotten. Time counts from here."""
        self.stop()
        self._times.clear()
        self._every = 1
        for values in self._values.values():
            values.clear()
        self._end.clear()
        self._began = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="profiling sampler", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> Series:
        """End, and what was seen. The thread is gone when this returns."""
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
        return Series(list(self._times), {name: list(values) for name, values in self._values.items()})

    def _run(self) -> None:
        looks = 0
        while True:
            self._look(is_kept=looks % self._every == 0)
            looks += 1
            # On a grid, so that slow readers do not stretch it.
            due = self._began + looks * self.interval_s
            if self._end.wait(max(0.0, due - time.perf_counter())):
                return

    def _look(self, *, is_kept: bool) -> None:
        """Ask every reader, some of which keep books; the answers are kept as far as there is room."""
        now = time.perf_counter() - self._began
        found = {name: _asked(read) for name, read in self.readers.items()}
        if not is_kept:
            return
        self._times.append(now)
        for name, value in found.items():
            self._values[name].append(value)
        if len(self._times) >= self.most_points:
            del self._times[1::2]
            for values in self._values.values():
                del values[1::2]
            self._every *= 2


def _asked(read: Callable[[], float | None]) -> float | None:
    """What a reader says; whatever it fails with, others go on."""
    try:
        value = read()
    except Exception:
        return None
    return None if value is None or value != value else float(value)
