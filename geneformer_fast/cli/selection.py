"""``--where``, ``--max-cells`` and ``--seed``: which cells are taken, in every command that can take some of them."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from typing import Any

from geneformer_fast.errors import UnsupportedError


def add_selection_options(parser: argparse.ArgumentParser, *, has_seed: bool = True) -> None:
    """Declare them; without ``has_seed`` the command has a --seed of its own, which the draw is of, too."""
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=VALUE[,VALUE]",
        help="take cells with one of these values in a column only; of several --where all must hold; a value with a "
        "comma stands in double quotes (default: all cells)",
    )
    parser.add_argument(
        "--max-cells", type=int, metavar="N", help="take so many cells, drawn by --seed (default: all cells)"
    )
    if has_seed:
        parser.add_argument(
            "--seed", type=int, metavar="N", help="whole number that --max-cells are drawn by (default: 0)"
        )


def selection_options(args: argparse.Namespace, *, has_seed: bool = True) -> dict[str, Any]:
    """Their values, as arguments of the functions behind the commands.

    Raises
    ------
    UnsupportedError
        They name no cells, or a seed of no draw.
    """
    if args.max_cells is not None and args.max_cells < 1:
        raise UnsupportedError(f"--max-cells must be at least 1, not {args.max_cells}")
    if has_seed and args.seed is not None and args.max_cells is None:
        raise UnsupportedError("--seed is of the draw of cells: say how many with --max-cells")
    found = {"where": parsed_where(args.where) or None, "max_cells": args.max_cells}
    return found | {"seed": args.seed} if has_seed else found


def parsed_where(entries: Sequence[str]) -> dict[str, list[str]]:
    """``["cell_type=B,NK", "donor=d1"]`` as {column: values}; a value that holds a comma stands in double quotes.

    Raises
    ------
    UnsupportedError
        An entry names no column, or no value, or a column for the second time.
    """
    found: dict[str, list[str]] = {}
    for entry in entries:
        name, equals, values = entry.partition("=")
        if not (name and equals and values):
            raise UnsupportedError(f"--where {entry}: write COLUMN=VALUE, or COLUMN=VALUE,VALUE")
        if name in found:
            raise UnsupportedError(f"--where {entry}: the column {name} is given twice; write {name}=VALUE,VALUE")
        found[name] = next(csv.reader([values]))
    return found
