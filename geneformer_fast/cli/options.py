"""The parser of commands: help that says defaults, options that all have, and options by their old names."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

# Of what was parsed: option -> (its old name, what it was given by that name).
_TAKEN = "taken_by_old_name"


class Refused(SystemExit):
    """Wrong arguments, which usage and error were printed for."""

    def __init__(self, said: str) -> None:
        super().__init__(2)
        self.said = said


class Help(argparse.RawDescriptionHelpFormatter):
    """Says of every option whether it is required, or what its default is."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or "default" in text or isinstance(action, _WITHOUT_VALUE):
            return text
        if action.required:
            return f"{text} (required)"
        if action.nargs == 0:
            return f"{text} (default: no)"
        return text if action.default in (None, []) else f"{text} (default: %(default)s)"


_WITHOUT_VALUE = (argparse._HelpAction, argparse._VersionAction)


class Parser(argparse.ArgumentParser):
    """A parser with such help, whose errors can be caught with what they say."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, **options})

    def error(self, message: str) -> NoReturn:
        """Print usage and what is wrong, and exit with 2."""
        self.print_usage(sys.stderr)
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise Refused(message)


def add_common(parser: argparse.ArgumentParser, *, is_checking: bool) -> None:
    """The options that all commands have; ``is_checking``: one that reads what carries checksums has another."""
    for each in (parser, *inner(parser)):
        # Those of an inner parser must not undo with their defaults what was said before its name.
        default: Any = False if each is parser else argparse.SUPPRESS
        if is_checking:
            each.add_argument(
                "--no-verify", action="store_true", default=default,
                help="read tokens, models and vocabularies without their checksums",
            )  # fmt: skip
        said = each.add_argument_group("output")
        pair = said.add_mutually_exclusive_group()
        pair.add_argument(
            "--quiet", action="store_true", default=default, help="only warnings and errors: no progress, no report"
        )
        pair.add_argument(
            "--verbose", action="store_true", default=default, help="more of what is done, with the names of modules"
        )
        said.add_argument(
            "--json", action="store_true", default=default, help="the result, or the error, as one JSON object"
        )


def inner(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of a command's own commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


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
