"""``geneformer-fast doctor``: what is installed, what the machine has, and what would run here."""

from __future__ import annotations

import argparse

NAME = "doctor"
HELP = "show versions, devices, and which implementation of every operation runs here and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if something needed is missing."""
    from geneformer_fast.doctor import as_text, examine

    report = examine()
    if args.json:
        import json

        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(as_text(report))
    return 1 if report.problems else 0
