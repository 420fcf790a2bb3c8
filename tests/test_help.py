"""Help says of every option its default, or that it is required, and its unit; and ends with a command that works."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from geneformer_fast import cli

#: What options of numbers count or measure; one of these words stands in the help of each.
UNITS = re.compile(
    r"\b(cells?|tokens?|genes?|steps?|epoch|passes|threads?|seconds?|share|dB|cosine|blocks?|trials?|folds?|rank|"
    r"evaluations?|validations?|checkpoints?|whole number)\b"
)


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command, those within a command too."""
    yield from _leaves("", cli.build_parser())


def _leaves(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in inner:
        for each, child in action.choices.items():
            yield from _leaves(f"{name} {each}".strip(), child)
    if not inner:
        yield name, parser


def options() -> Iterator[tuple[str, str, argparse.Action, str]]:
    """(command, option, its action, its help) of all that help shows."""
    for name, parser in commands():
        for action in parser._actions:
            if action.option_strings and action.help != argparse.SUPPRESS and action.option_strings[-1] != "--help":
                text = parser.formatter_class(prog="")._get_help_string(action) or ""
                yield name, action.option_strings[-1], action, text


@pytest.mark.parametrize("command", [name for name, _ in commands()])
def test_every_option_has_a_default_or_is_required(command: str) -> None:
    found = [(option, action, text) for name, option, action, text in options() if name == command]
    assert len(found) >= 3
    for option, action, text in found:
        assert re.search(r"default[^)]*: |\(required", text), f"{option}: {text}"
        assert action.required == text.endswith("(required)"), option
        if action.nargs == 0:
            assert "(default: no)" in text, option
        elif action.default not in (None, False, [], argparse.SUPPRESS):
            assert f"default: {action.default}" in text or "%(default)s" in text, f"{option}: {text}"
        assert "default: None" not in text


@pytest.mark.parametrize("command", [name for name, _ in commands()])
def test_every_number_has_a_unit(command: str) -> None:
    for name, option, action, text in options():
        if name == command and action.type in (int, float):
            assert UNITS.search(text), f"{option}: {text}"


@pytest.mark.parametrize("command", [name for name, _ in commands()])
def test_every_command_ends_with_an_example_that_is_one(command: str) -> None:
    said = dict(commands())[command].format_help()
    found = re.search(r"\nexample:\n  (geneformer-fast (.*))\n\Z", said)
    assert found is not None, said[-200:]
    assert found[2].startswith(command)
    words = shlex.split(found[1])[1:]
    args = cli.parsed(words)
    assert args.command == command.split()[0]
    if command not in ("doctor",):
        assert args.out


def test_defaults_of_recipes_are_those_that_help_says() -> None:
    from geneformer_fast.finetuning import recipes
    from geneformer_fast.training.recipe import RECIPES

    n_seen = 0
    for command, recipe, pattern in (
        ("pretrain", RECIPES["geneformer-v1-10m"], r"default: the recipe's; geneformer-v1-10m: (.*)\)"),
        ("finetune cells", recipes.CELLS, r"\(default: (.*)\)"),
        ("finetune genes", recipes.GENES, r"\(default: (.*)\)"),
    ):
        for name, option, _, text in options():
            field = option[2:].replace("-", "_")
            found = re.search(pattern, text)
            if name != command or field not in vars(recipe) or found is None:
                continue
            value = getattr(recipe, field)
            if field == "warmup_share" and recipe.warmup_steps is not None:
                value = None  # the number of steps decides
            said = found[1]
            assert (value is None) == (said in ("none", "never")), (command, option, said, value)
            if value is not None:
                assert type(value)(said) == value, (command, option, said, value)
            n_seen += 1
    assert n_seen >= 13 + 2 * 11
