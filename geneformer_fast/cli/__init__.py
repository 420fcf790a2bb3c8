"""The ``geneformer-fast`` command line: one module per command, loaded only when that command is asked for.

A command module offers ``NAME``, ``HELP``, ``EXAMPLE`` (a command, with which help ends), ``add_arguments(parser)`` and
``run(args)``, which returns an :class:`~geneformer_fast.cli.answer.Answer`, or an exit code where it says nothing.
Where there is more to say after Ctrl-C than that, also ``interrupted(args) -> str``: what is there now, and how to go
on; and where arguments can be wrong in ways that are seen without anything heavy, ``check(args)``, which is called
first. It imports what is heavy inside ``run``, so that help and argument errors appear at once.

Results go to standard output, all else (progress, warnings, errors) to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from time import perf_counter
from typing import Any

from geneformer_fast import __version__
from geneformer_fast.cli.answer import Answer, as_json
from geneformer_fast.cli.logs import log_on_stderr
from geneformer_fast.cli.options import Parser, Refused, add_common, inner, twice_given
from geneformer_fast.cli.stopping import one_interrupt_is_enough
from geneformer_fast.errors import ArgumentError, GeneformerFastError
from geneformer_fast.files.checksums import unverified

#: Command name -> the module that implements it, in the order help lists them.
COMMANDS = {
    "tokenize": "geneformer_fast.cli.tokenize",
    "medians": "geneformer_fast.cli.medians",
    "embed": "geneformer_fast.cli.embed",
    "pretrain": "geneformer_fast.cli.pretrain",
    "finetune": "geneformer_fast.cli.finetune",
    "predict": "geneformer_fast.cli.predict",
    "perturb": "geneformer_fast.cli.perturb",
    "perturb-stats": "geneformer_fast.cli.perturb_stats",
    "quantize": "geneformer_fast.cli.quantize",
    "profile": "geneformer_fast.cli.profile",
    "doctor": "geneformer_fast.cli.doctor",
    "quickstart": "geneformer_fast.cli.quickstart",
}

# Commands that read what carries checksums: tokens, models, vocabularies.
_CHECKING = (
    *("tokenize", "medians", "embed", "pretrain", "finetune", "predict", "perturb", "quantize", "profile"),
    "perturb-stats",
)

EXIT_ERROR = 2
EXIT_BROKEN_PIPE = 141
EXIT_INTERRUPTED = 130


def build_parser(names: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """The argument parser with all commands, or with some.

    Parameters
    ----------
    names
        The commands to load; None loads every command module, which help needs.
    """
    parser = Parser(
        prog="geneformer-fast",
        description="Counts to ranked tokens to embeddings, for Geneformer and related models.",
        epilog="geneformer-fast COMMAND --help explains one command.",
    )
    parser.add_argument("--version", action="version", version=f"geneformer-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS if names is None else names:
        module = import_module(COMMANDS[name])
        command = subparsers.add_parser(
            module.NAME, help=module.HELP, description=module.HELP, epilog=_epilog(getattr(module, "EXAMPLE", ""))
        )
        module.add_arguments(command)
        add_common(command, is_checking=name in _CHECKING)
        command.set_defaults(
            run=module.run, check=getattr(module, "check", None), interrupted=getattr(module, "interrupted", None)
        )
        for each in (command, *inner(command)):
            each.set_defaults(parser=each)
    return parser


def _epilog(example: str) -> str:
    return f"example:\n  {example}" if example else ""


def _needed(arguments: Sequence[str]) -> Iterable[str] | None:
    """The commands whose modules these arguments need; None for all of them."""
    if arguments[:1] == ["--version"]:
        return ()
    return arguments[:1] if arguments and arguments[0] in COMMANDS else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Parameters
    ----------
    argv
        Arguments without the program's name; None means ``sys.argv[1:]``.

    Returns
    -------
    int
        What the command returned; 2 after an error that this package raised on purpose, or that the operating system
        named (a full disk), with ``error: ...`` on standard error and no traceback; 130 after Ctrl-C. Any other
        exception is a bug and passes through. With ``--json`` standard output is one JSON object, after an error
        ``{"error": ..., "kind": ...}``.

    Raises
    ------
    SystemExit
        By argparse, for ``--help``, ``--version`` and wrong arguments (code 2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_python_shows_them, warnings.formatwarning = warnings.formatwarning, _OneLine()
    try:
        args = parsed(arguments)
        with log_on_stderr(is_quiet=args.quiet, is_verbose=args.verbose):
            return _run(args)
    except Refused as stop:
        if "--json" in arguments:
            print(as_json({"error": stop.said, "kind": ArgumentError.__name__}))
        raise
    finally:
        warnings.formatwarning = as_python_shows_them


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, which exist and do not contradict each other."""
    args, unknown = build_parser(_needed(arguments)).parse_known_args(arguments)
    # What is wrong is said with the usage of the command, which has the options.
    if unknown:
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if (said := twice_given(args)) is not None:
        args.parser.error(said)
    return args


def _run(args: argparse.Namespace) -> int:
    """Run a command, say what came of it, and return its exit code."""
    try:
        begin = perf_counter()
        with one_interrupt_is_enough():
            answer = _answer(args)
        if isinstance(answer, int):
            return answer
        if args.json:
            told = {"command": args.command, **answer.values}
            print(as_json({**told, "seconds": round(perf_counter() - begin, 3)}))
        elif answer.text and not args.quiet:
            print(answer.text)
        return answer.code
    except GeneformerFastError as error:
        return _failed(args, str(error), kind=type(error).__name__)
    except KeyboardInterrupt:
        said = f"interrupted: {args.interrupted(args)}" if args.interrupted else "interrupted"
        print(f"\n{said}", file=sys.stderr)
        if args.json:
            print(as_json({"error": said, "kind": "KeyboardInterrupt"}))
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: Python would complain again while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        # The system's own refusals: a disk that is full, a file that may not be written.
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _failed(args, f"{where}{error.strerror or error}", kind=type(error).__name__)


def _answer(args: argparse.Namespace) -> Answer | int:
    """What a command answers. Whatever a library prints meanwhile is no part of an answer in JSON."""
    is_checked = not getattr(args, "no_verify", False)
    with contextlib.nullcontext() if is_checked else unverified():
        if args.check is not None:
            args.check(args)
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            answer: Answer | int = args.run(args)
    return answer


def _failed(args: argparse.Namespace, said: str, *, kind: str) -> int:
    print(f"error: {said}", file=sys.stderr)
    if args.json:
        print(as_json({"error": said, "kind": kind}))
    return EXIT_ERROR


class _OneLine:
    """Formats warnings as one line each, and one that was shown as nothing: files are opened more than once.

    Python itself forgets what it has shown whenever a library changes its filters.
    """

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, *_: Any, **__: Any) -> str:
        line = f"warning: {message}\n"
        if line in self._shown:
            return ""
        self._shown.add(line)
        return line
