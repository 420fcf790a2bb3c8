"""``geneformer-fast medians``: a corpus to a vocabulary."""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_fast import families
from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.options import renamed
from geneformer_fast.cli.tokenize import add_inputs, count_options

NAME = "medians"
HELP = "compute corpus medians and make a vocabulary of them, for an own corpus or species"
EXAMPLE = "geneformer-fast medians corpus/*.h5ad --family v2 --name mouse --out vocabulary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_inputs(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to save the vocabulary in")
    parser.add_argument(
        "--family", choices=tuple(families.layouts()), default=families.DEFAULT_LAYOUT, help="special tokens and length"
    )
    parser.add_argument("--name", default="custom", help="what the vocabulary is called")
    dictionary = parser.add_argument(
        "--dictionary",
        metavar="DIR",
        help="gene dictionaries whose aliases turn the files' ids into gene ids (default: ids are taken as they are)",
    )
    renamed(parser, "--mapping", dictionary)
    preset = parser.add_argument(
        "--preset", choices=tuple(families.layouts()), help="which dictionaries (default: the only ones in DIR)"
    )
    renamed(parser, "--mapping-preset", preset)
    parser.add_argument("--min-cells", type=int, default=1, metavar="N", help="leave out genes found in fewer cells")
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: all cores)")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.cli.places import check_counts, check_dictionary
    from geneformer_fast.tokenization.vocabulary import check_vocabulary_folder

    check_dictionary(args.dictionary)
    check_counts(args.inputs)
    check_vocabulary_folder(Path(args.out), args.overwrite)


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from geneformer_fast.tokenization.medians import medians

    vocabulary = medians(
        args.inputs,
        args.out,
        family=args.family,
        name=args.name,
        dictionary=args.dictionary,
        preset=args.preset,
        counts_layer=args.counts_layer,
        filter_pass=not args.no_filter_pass,
        **count_options(args),
        min_cells=args.min_cells,
        workers=args.workers,
        overwrite=args.overwrite,
        progress=False if args.quiet else None,
    )
    text = (
        f"vocabulary {vocabulary.name!r}: {len(vocabulary.token_ids):,} genes, written to {args.out}\n"
        f"next: geneformer-fast tokenize INPUT... --dictionary {args.out} --out DIR"
    )
    values = {"out": args.out, "genes": len(vocabulary.token_ids), **vocabulary.identity()}
    return Answer(text, values)
