"""``geneformer-fast quickstart``: real cells, stock transformers beside us, and a fine-tuning, offline."""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_fast.cli.answer import Answer

NAME = "quickstart"
HELP = "see everything work on real cells, offline: tokens, embeddings and fine-tuning beside stock transformers"
EXAMPLE = "geneformer-fast quickstart --out quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), metavar="DIR", help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--cells",
        type=int,
        default=500,
        metavar="N",
        help="cells of the example to take, 50 to 500 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights and the order of cells (default: %(default)s)"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.quickstart.ready import check_folder, check_ready

    check_ready(args.cells, args.seed)
    check_folder(args.out)


def run(args: argparse.Namespace) -> Answer:
    """Run the tour."""
    from geneformer_fast.quickstart.run import quickstart

    def say(line: str) -> None:
        if not args.quiet:
            print(line, flush=True)

    report = quickstart(args.out, n_cells=args.cells, seed=args.seed, say=say)
    return Answer(values=report)
