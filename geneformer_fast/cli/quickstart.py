"""``geneformer-fast quickstart``: the whole way from counts to cell types, offline, in a minute or two."""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_fast.cli.answer import Answer

NAME = "quickstart"
HELP = "see everything work on synthetic cells, offline: tokens, a small trained model, embeddings, cell types"
EXAMPLE = "geneformer-fast quickstart --out quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument("--cells", type=int, default=3000, metavar="N", help="cells to make (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=90.0, metavar="S", help="seconds of training, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="whole number that cells, weights and held-out donors are drawn by"
    )


def run(args: argparse.Namespace) -> Answer:
    """Run the tour."""
    from geneformer_fast.quickstart.run import quickstart

    def say(line: str) -> None:
        if not args.quiet:
            print(line, flush=True)

    summary = quickstart(args.out, n_cells=args.cells, max_seconds=args.seconds, seed=args.seed, say=say)
    return Answer(values=summary)
