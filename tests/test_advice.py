"""Every option that a message advises exists on the command where the message appears."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from pathlib import Path

import pytest

import geneformer_fast
from geneformer_fast.cli import COMMANDS, build_parser

PACKAGE = Path(geneformer_fast.__file__).parent
_READ_COUNTS = ("tokenize", "medians", "embed", "predict")
_WRITE_TOKENS = ("tokenize",)
#: Module -> the commands that show its messages; the longest name that fits decides. What other modules advise has to
#: be an option of some command.
COMMANDS_OF = {
    "counts": _READ_COUNTS,
    "tokenization/genes.py": _READ_COUNTS,
    "tokenization/inputs.py": _READ_COUNTS,
    "tokenization/doubts.py": _READ_COUNTS,
    "tokenization/totals.py": _READ_COUNTS,
    "tokenization/medians.py": ("medians",),
    "tokenization": _WRITE_TOKENS,
    "extract": ("embed", "predict"),
    "finetuning/predict.py": ("predict",),
    "finetuning": ("finetune",),
    "training": ("pretrain",),
    "quickstart": ("quickstart",),
    "cli/tokenize.py": _WRITE_TOKENS,
    "perturbation/statistics": ("perturb-stats",),
    "perturbation/pictures.py": ("perturb-stats",),
    **{f"cli/{name.replace('-', '_')}.py": (name,) for name in COMMANDS},
}
#: Options that the module's messages name to some of these commands only.
ONLY_FOR = {
    ("tokenization/inputs.py", "--obs"): ("tokenize", "embed"),
    ("finetuning/names.py", "--key-added"): ("predict",),
    ("training/occupied.py", "--overwrite"): ("finetune",),
    ("extract/options.py", "--heatmap"): ("embed",),
    ("extract/options.py", "--color"): ("embed",),
}
OF_THE_PROGRAM = {"--version", "--help"}
#: Arguments of other programs that a module starts; no user reads them.
OF_OTHERS = {
    "profiling/machine.py": {"--id", "--query-gpu", "--format", "--porcelain", "--untracked-files", "--short"},
}
_OPTION = re.compile(r"(?:\b(?P<command>[a-z]+) )?(?P<option>--[a-z][a-z-]*)")
_PROGRAM = re.compile(r"geneformer-fast ([a-z]+(?:-[a-z]+)*)")
#: An option and its argument in Python: ``--max-len 512 (max_len=512)``, ``gene_column= (--gene-column)``.
_PYTHON = (
    re.compile(r"(?P<option>--[a-z][a-z-]*)[^()]{0,12} \((?P<argument>[a-z_]+)="),
    re.compile(r"\b(?P<argument>[a-z_]+)=[^()]{0,12} \((?P<option>--[a-z][a-z-]*)\)"),
)


def texts(path):
    """Every string of a module except docstrings, f-strings joined, with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings | inside:
            yield node.lineno, node.value


def advised(patterns=(_OPTION,)):
    """(where, commands, match) of every option that a text names."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for line, text in texts(path):
            for found in (found for pattern in patterns for found in pattern.finditer(text)):
                if found["option"] in OF_OTHERS.get(name, ()):
                    continue
                before = _PROGRAM.findall(text[: found.start()].rpartition("\n")[2])
                named = [
                    *before[-1:],
                    *([found.groupdict().get("command")] if found.groupdict().get("command") else []),
                ]
                commands = [command for command in named if command in COMMANDS][-1:]
                commands = commands or ONLY_FOR.get((name, found["option"])) or commands_of(name)
                yield f"{name}:{line}", tuple(commands), found


def commands_of(name):
    fitting = [start for start in COMMANDS_OF if name.startswith(start)]
    return COMMANDS_OF[max(fitting, key=len)] if fitting else ()


def _options(parser):
    found = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {option for inner in action.choices.values() for option in _options(inner)}
    return found


@pytest.fixture(scope="module")
def options():
    """Command -> its options, those of its own commands among them."""
    (subparsers,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {name: _options(parser) for name, parser in subparsers.choices.items()}


def test_every_advised_option_exists(options):
    wrong = []
    for where, commands, found in advised():
        if not commands and not any(found["option"] in known for known in (*options.values(), OF_THE_PROGRAM)):
            wrong.append(f"{where}: {found['option']} is no option of any command")
        wrong += [
            f"{where}: {found['option']} is no option of {command}"
            for command in commands
            if found["option"] not in options[command]
        ]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_every_advised_argument_exists():
    from geneformer_fast.extract import embed
    from geneformer_fast.finetuning.predict import predict
    from geneformer_fast.tokenization.medians import medians
    from geneformer_fast.tokenization.run import tokenize

    functions = {"tokenize": tokenize, "medians": medians, "embed": embed, "predict": predict}
    arguments = {name: set(inspect.signature(function).parameters) for name, function in functions.items()}
    wrong, n_found = [], 0
    for where, commands, found in advised(_PYTHON):
        for command in (command for command in commands if command in functions):
            n_found += 1
            if found["argument"] not in arguments[command]:
                wrong.append(f"{where}: {found['argument']} is no argument of {command}")
    assert not wrong, "\n".join(sorted(set(wrong)))
    assert n_found > 10


def test_advice_is_found_at_all():
    found = {(command, match["option"]) for _, commands, match in advised() for command in commands}
    assert {("tokenize", "--counts-layer"), ("embed", "--counts-layer"), ("medians", "--allow-float")} <= found
    assert len(found) > 40
