"""Options that several commands have, and options by their old names."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

# Of what was parsed: option -> (its old name, what it was given by that name).
_TAKEN = "taken_by_old_name"


def renamed(parser: argparse.ArgumentParser, old: str, new: argparse.Action) -> None:
    """Take an option by its old name too, with a warning; help does not show it.

    Parameters
    ----------
    parser
        That has the option.
    old
        Its old name, such as ``"--lr"``.
    new
        What ``add_argument`` gave for it under its name of today.
    """
    values: dict[str, Any] = {"nargs": new.nargs, "type": new.type, "choices": new.choices}
    parser.add_argument(
        old, action=_OldName, now=new, dest=new.dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **values
    )


class _OldName(argparse.Action):
    """Stores a value for an option that has another name now."""

    def __init__(self, option_strings: Sequence[str], dest: str, now: argparse.Action, **options: Any) -> None:
        super().__init__(option_strings, dest, **options)
        self.now = now

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        old, new = self.option_strings[0], self.now.option_strings[0]
        # argparse puts the very object of the default into the namespace, so that another one has been given.
        if getattr(namespace, self.dest, self.now.default) is not self.now.default:
            raise argparse.ArgumentError(None, _both(old, new))
        if self.nargs == 0:  # a flag
            values = self.now.const
        warnings.warn(f"{old} is called {new} now", FutureWarning, stacklevel=2)
        setattr(namespace, self.dest, values)
        setattr(namespace, _TAKEN, {**getattr(namespace, _TAKEN, {}), new: (old, self.dest, values)})


def twice_given(args: argparse.Namespace) -> str | None:
    """What to say where an option was given by both names; the old one came first. None where none was."""
    for new, (old, dest, value) in getattr(args, _TAKEN, {}).items():
        if getattr(args, dest) is not value:
            return _both(old, new)
    return None


def _both(old: str, new: str) -> str:
    return f"{old} is the old name of {new}, and both are given; leave {old} out"
