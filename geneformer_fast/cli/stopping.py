"""Ctrl-C, wherever it lands."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# So long a library has to come back from where it dropped an interrupt, before it is told again.
_AGAIN_S = 0.2


@contextlib.contextmanager
def one_interrupt_is_enough() -> Iterator[None]:
    """Within the block Ctrl-C ends in KeyboardInterrupt, whatever a library makes of it.

    What calls Python from C (numba's compiler does) cannot pass an exception on: Python drops the KeyboardInterrupt
    that comes there with a traceback, and the library goes on, or fails for want of what the call was to give.

    Raises
    ------
    KeyboardInterrupt
        In place of what a library raises once Ctrl-C was pressed, too.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else decides what Ctrl-C does
        return
    is_pressed = False
    timers: list[threading.Timer] = []
    before = sys.unraisablehook

    def noted(number: int, frame: Any) -> None:
        nonlocal is_pressed
        is_pressed = True
        signal.default_int_handler(number, frame)

    def dropped(found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            before(found)
            return
        again = threading.Timer(_AGAIN_S, _thread.interrupt_main)
        again.daemon = True
        again.start()
        timers.append(again)

    signal.signal(signal.SIGINT, noted)
    sys.unraisablehook = dropped
    try:
        yield
    except Exception as error:
        if is_pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = before
        signal.signal(signal.SIGINT, signal.default_int_handler)
