"""The log of a command: one handler on standard error, which tells progress, warnings and, if asked for, details."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from geneformer_fast.progress import write_above_bars

# The kernels say at INFO which implementation they chose: a detail here.
_LOGGERS = {"geneformer_fast": logging.INFO, "geneformer_kernels": logging.WARNING}


@contextlib.contextmanager
def log_on_stderr(*, is_quiet: bool, is_verbose: bool) -> Iterator[None]:
    """Show the log of both packages: what is done; of a quiet command warnings only, of a verbose one all there is."""
    handler = _OnStderr()
    handler.setFormatter(_Plain(has_names=is_verbose))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger, usual in zip(loggers, _LOGGERS.values(), strict=True):
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if is_quiet else logging.DEBUG if is_verbose else usual)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(before)


class _OnStderr(logging.Handler):
    """Writes lines to what standard error is at the time, above bars that are shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            write_above_bars(self.format(record), sys.stderr)
        except Exception:
            self.handleError(record)


class _Plain(logging.Formatter):
    """What is said, with the level of warnings and worse, and with the module where that is asked for."""

    def __init__(self, *, has_names: bool) -> None:
        super().__init__()
        self._has_names = has_names

    def format(self, record: logging.LogRecord) -> str:
        """One record as text."""
        text = super().format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        return f"{record.name}: {text}" if self._has_names else text
