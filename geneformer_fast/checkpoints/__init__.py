"""Checkpoints of published models, in and out.

Loaded on first use, so that what is light below can be had without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_HOME = {"load": "geneformer_fast.checkpoints.folders", "save": "geneformer_fast.checkpoints.folders"}
__all__ = ["load", "save"]

if TYPE_CHECKING:
    from geneformer_fast.checkpoints.folders import load, save


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
