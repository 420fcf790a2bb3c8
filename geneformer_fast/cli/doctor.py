"""``geneformer-fast doctor``: what is installed, what the machine has, and what would run here."""

from __future__ import annotations

import argparse

from geneformer_fast.cli.answer import Answer

NAME = "doctor"
HELP = "show versions, devices, and which implementation of every operation runs here and why"
EXAMPLE = "geneformer-fast doctor --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none but those that all commands have."""


def run(args: argparse.Namespace) -> Answer:
    """Examine; exits with 1 if something needed is missing."""
    from geneformer_fast.doctor import as_text, examine

    report = examine()
    return Answer(as_text(report), report.to_dict(), 1 if report.problems else 0)
