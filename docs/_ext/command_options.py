"""The directive ``command-options``: what a command of ``geneformer-fast`` takes, read from the command itself.

Written as ``{command-options} tokenize`` or ``{command-options} finetune cells``, it becomes the usage, a list of all
arguments with their help, and the example with which the help ends.
"""

from __future__ import annotations

import argparse
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser of a command, or of a command within a command.

    Raises
    ------
    ValueError
        There is no such command.
    """
    from geneformer_fast.cli import COMMANDS, build_parser

    if not words or words[0] not in COMMANDS:
        raise ValueError(f"no command {' '.join(words)!r}; there are {', '.join(COMMANDS)}")
    parser = build_parser([words[0]])
    for word in words:
        (choices,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        if word not in choices:
            raise ValueError(f"no command {' '.join(words)!r}; there are {', '.join(choices)}")
        parser = choices[word]
    return parser


def arguments_of(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """What is written on the command line, and what it means, in the order of the help."""
    formatter = argparse.HelpFormatter(parser.prog)
    found = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        written = formatter._format_action_invocation(action)
        said = formatter._expand_help(action) if action.help else ""
        found.append((written, said))
    return found


class CommandOptions(Directive):
    """See the module."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict] = {}

    def run(self) -> list[nodes.Node]:
        """The nodes of one command."""
        try:
            parser = parser_of(self.arguments[0].split())
        except ValueError as error:
            raise self.error(str(error)) from None
        said = [nodes.paragraph(text=parser.description)] if parser.description else []
        items = nodes.definition_list()
        for written, meaning in arguments_of(parser):
            term = nodes.term("", "", nodes.literal(text=written))
            items += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=meaning)))
        example = [nodes.literal_block(parser.epilog, parser.epilog, language="none")] if parser.epilog else []
        return [*said, items, *example]


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directive known."""
    app.add_directive("command-options", CommandOptions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
