"""Ctrl-C ends a command with one line, wherever it lands."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from geneformer_fast import cli

CALLED = ctypes.CFUNCTYPE(None)


def called_from_c() -> None:
    """Ctrl-C within Python that C has called, as numba's compiler calls it: nobody gets the exception."""
    CALLED(lambda: signal.raise_signal(signal.SIGINT))()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], int]]:
    """Runs a command that does nothing but call something."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(what: Callable[[], Any]) -> int:
        module = types.ModuleType("command_of_a_test")
        module.NAME, module.HELP = "say", "say a word"  # type: ignore[attr-defined]
        module.add_arguments = lambda parser: None  # type: ignore[attr-defined]
        module.run = lambda args: what() or 0  # type: ignore[attr-defined]
        module.interrupted = lambda args: "half of it is there"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "COMMANDS", {"say": module.__name__})
        return cli.main(["say"])

    yield run
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is hook
    signal.signal(signal.SIGINT, handler)


def fails_then() -> None:
    called_from_c()
    raise RuntimeError("no compiled object yet")


def goes_on() -> None:
    called_from_c()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(0.01)
    raise AssertionError("it was never interrupted")


def is_pressed() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("what", [is_pressed, fails_then, goes_on])
def test_ctrl_c_is_one_line_and_what_is_there(what: Callable[[], None], run: Any, capsys: Any) -> None:
    assert run(what) == cli.EXIT_INTERRUPTED
    captured = capsys.readouterr()
    assert captured.err == "\ninterrupted: half of it is there\n"
    assert captured.out == ""


def test_errors_without_ctrl_c_pass_and_so_does_what_others_drop(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: dropped.append(found.exc_type))

    def fail() -> None:
        CALLED(lambda: 1 / 0)()
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(fail)
    assert dropped == [ZeroDivisionError]
    monkeypatch.undo()


def test_who_has_a_handler_of_their_own_keeps_it(run: Any) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    assert run(is_pressed) == 0
    assert seen == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_in_another_thread_nothing_is_changed(run: Any) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]
