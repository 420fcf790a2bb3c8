"""Memory that an implementation takes for itself while it runs, as it says."""

from __future__ import annotations

from typing import NamedTuple


class Workspace(NamedTuple):
    """Bytes beside arguments and results.

    Attributes
    ----------
    row
        For every row, or token, of a call.
    call
        For a call, however many rows it has: weights laid out anew, copies of parameters.
    thread
        For every thread that computes.
    """

    row: int = 0
    call: int = 0
    thread: int = 0


def together(*parts: Workspace) -> Workspace:
    """What is in use at the same time."""
    return Workspace(*map(sum, zip(*parts, strict=True)))


def one_by_one(*parts: Workspace) -> Workspace:
    """The most of what is in use one after the other."""
    return Workspace(*map(max, zip(*parts, strict=True)))
