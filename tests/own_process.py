"""Something run in a process of its own that need not load everything once more: torch and the rest take seconds."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch


def begin(target: Callable[..., None], *arguments: Any, environment: dict[str, str] | None = None) -> BaseProcess:
    """Fork off a call of a module's function; begin a new process where a card is, which no fork may use."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    child = context.Process(target=_run, args=(target, arguments, environment or {}), daemon=True)
    child.start()
    return child


def _run(target: Callable[..., None], arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    target(*arguments)
