"""Torch's profiler without the lines that its libraries write to stderr of their own."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

# Of Kineto, which torch's profiler is made of; errors are 4, and what begins and ends is one more.
_OF_KINETO, _SILENT = "KINETO_LOG_LEVEL", "6"
# Of torch's C++ part.
_OF_TORCH, _ERRORS = "TORCH_CPP_LOG_LEVEL", "ERROR"


def import_torch_quietly() -> None:
    """Load torch so that its allocator says nothing of memory that was there before the profiler followed it.

    Torch looks at its variable while it is loaded, and offers no other way; who has set it, or loaded torch before,
    sees that line once.
    """
    if _OF_TORCH in os.environ or "torch" in sys.modules:
        return
    os.environ[_OF_TORCH] = _ERRORS
    try:
        importlib.import_module("torch")
    finally:
        del os.environ[_OF_TORCH]


def start_quietly(profiler: Any) -> None:
    """Start ``torch.profiler``, whose library otherwise writes a line to stderr whenever it begins and ends.

    It looks at its variable once, when it is first used. Who has set it wants what it says.
    """
    if _OF_KINETO in os.environ:
        profiler.start()
        return
    os.environ[_OF_KINETO] = _SILENT
    try:
        profiler.start()
    finally:
        del os.environ[_OF_KINETO]
