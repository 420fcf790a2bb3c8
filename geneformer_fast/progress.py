"""How far something long is: a bar on a terminal, lines of the log elsewhere.

The lines are of the logger ``geneformer_fast.progress``, at INFO: the first after some seconds, then one every half a
minute, and one at the end of what took that long. The command line shows them; in Python
``logging.basicConfig(level="INFO")`` does.
"""

from __future__ import annotations

import logging
import sys
from time import monotonic
from types import TracebackType
from typing import Any, TextIO

#: Seconds until the first line, and between lines.
FIRST_S, EVERY_S = 5.0, 30.0
logger = logging.getLogger(__name__)
_n_bars = 0


class Progress:
    """How much of something is done; left by ``with``, or closed.

    Parameters
    ----------
    total
        Of the units; None where nobody knows.
    description
        What is done, such as ``"embedding"``.
    unit
        What is counted, in the plural: ``"cells"``.
    show
        True shows a bar, False nothing. None: a bar on a terminal, lines of the log elsewhere.
    initial
        Units that were done before.

    Attributes
    ----------
    n
        Units that are done.
    is_active
        Whether anybody looks.
    """

    def __init__(
        self, total: int | None, description: str, unit: str, show: bool | None = None, *, initial: int = 0
    ) -> None:
        self.total, self.description, self.unit, self.n = total, description, unit, initial
        self._initial, self._begin, self._shown = initial, monotonic(), dict[str, str]()
        self._next = self._begin + FIRST_S
        has_bar = sys.stderr.isatty() if show is None else show
        self._bar = _bar(total, description, unit, initial) if has_bar else None
        self._is_logged = show is None and not has_bar
        self._is_open = True

    @property
    def is_active(self) -> bool:
        """Whether anybody looks."""
        return self._bar is not None or (self._is_logged and logger.isEnabledFor(logging.INFO))

    def update(self, n: int, **shown: str) -> None:
        """So many more units are done; ``shown`` is said beside: names and values."""
        self.n += n
        self._shown |= shown
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(n)
        elif self._is_logged and self.n != self.total and (now := monotonic()) >= self._next:
            self._next = now + EVERY_S
            logger.info("%s", self._line(now - self._begin))

    def write(self, line: str) -> None:
        """A line above the bar, or one of the log."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif self._is_logged:
            logger.info("%s", line)

    def close(self) -> None:
        """Nothing comes any more."""
        global _n_bars
        if not self._is_open:
            return
        self._is_open = False
        if self._bar is not None:
            self._bar.close()
            _n_bars -= 1
        elif self._is_logged and (seconds := monotonic() - self._begin) >= FIRST_S:
            logger.info("%s", self._last_line(seconds))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, seconds: float) -> str:
        """``embedding: 12,000 of 100,000 cells, 83.1 cells/s, 17 min left``."""
        done = self.n - self._initial
        of = "" if self.total is None else f" of {self.total:,}"
        left = "" if self.total is None or not done else f", {duration((self.total - self.n) * seconds / done)} left"
        return f"{self.description}: {self.n:,}{of} {self.unit}{self._beside()}, {self._rate(seconds)}{left}"

    def _last_line(self, seconds: float) -> str:
        is_whole = self.total is None or self.n >= self.total
        done = f"{self.n:,} {self.unit}" if is_whole else f"stopped at {self.n:,} of {self.total:,} {self.unit}"
        return f"{self.description}: {done}{self._beside()}, {self._rate(seconds)}, after {duration(seconds)}"

    def _beside(self) -> str:
        return "".join(f", {name} {value}" for name, value in self._shown.items())

    def _rate(self, seconds: float) -> str:
        rate = (self.n - self._initial) / seconds if seconds > 0 else 0.0
        return f"{rate:,.0f} {self.unit}/s" if rate >= 100 else f"{rate:.3g} {self.unit}/s"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``45 s``, ``17 min``, ``3 h 20 min``, ``2 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 90:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def write_above_bars(text: str, file: TextIO) -> None:
    """Write a line to a stream on which bars may be shown, without tearing them."""
    if _n_bars:
        from tqdm import tqdm

        tqdm.write(text, file=file)
    else:
        file.write(f"{text}\n")


def _bar(total: int | None, description: str, unit: str, initial: int) -> Any:
    from tqdm import tqdm

    global _n_bars
    _n_bars += 1
    return tqdm(
        total=total, initial=initial, desc=description, unit=f" {unit}", unit_scale=(total or 0) > 99_999,
        dynamic_ncols=True, file=sys.stderr,
    )  # fmt: skip
