"""``geneformer-fast predict``: labels for new cells or genes from a fine-tuned model."""

from __future__ import annotations

import argparse
from pathlib import Path

from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.embed import not_written, state_of, values_of
from geneformer_fast.cli.options import renamed
from geneformer_fast.cli.selection import add_selection_options, selection_options
from geneformer_fast.cli.tokenize import add_count_options, add_counts_layer, count_options

NAME = "predict"
HELP = "tell classes of cells or genes with a fine-tuned model"
EXAMPLE = "geneformer-fast predict new.h5ad --model finetuned/final --out labels.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="counts (.h5ad, .zarr, 10x .h5 or folder, .loom), several of them, or a folder of tokens",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="what finetune made: its folder final")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help=".parquet or .csv (tables), or .h5ad (a copy of an .h5ad input with labels added)",
    )
    parser.add_argument(
        "--dictionary", metavar="DIR", help="gene dictionaries for counts (default: the model folder's vocabulary.json)"
    )
    add_counts_layer(parser)
    add_count_options(parser)
    parser.add_argument(
        "--obs",
        action="append",
        default=[],
        metavar="NEW=OLD",
        help="column of obs that goes into the table; --obs cell_type=celltype. The names of cells always do "
        "(default: no column)",
    )
    add_selection_options(parser)
    key = parser.add_argument(
        "--key-added", metavar="NAME", help="what the columns are called (default: as the label column)"
    )
    renamed(parser, "--key", key)
    parser.add_argument("--dtype", default="auto", help="auto (the fastest here), float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--token-budget", type=int, metavar="N", help="tokens per batch (default: by device)")
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="most memory to take, libraries and weights included, such as 2GB, 1.5GiB or 500MB (default: no limit)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once; what depends on the model's classes comes when it is loaded."""
    from geneformer_fast.cli.places import check_counts_or_tokens, check_device, check_dictionary, check_model
    from geneformer_fast.cli.tokenize import carried_columns
    from geneformer_fast.extract.options import PREDICT, PREDICTED, Request, check_h5ad, check_options
    from geneformer_fast.extract.outputs import Output
    from geneformer_fast.extract.sizes import size_in_bytes

    check_device(args.device)
    check_model(args.model)
    check_dictionary(args.dictionary)
    selection_options(args)
    is_tokens = check_counts_or_tokens(args.inputs)
    out = Output(args.out, overwrite=args.overwrite, suffixes=PREDICTED)
    request = Request(False, is_tokens, out.path.suffix, is_genes=False)
    more = {"obs": carried_columns(args.obs), "counts_layer": args.counts_layer, "memory_budget": args.memory_budget}
    check_options(PREDICT, request, {**count_options(args), **more})
    if out.path.suffix == ".h5ad":
        check_h5ad(args.inputs[0] if len(args.inputs) == 1 else args.inputs, is_genes=False)
    if args.memory_budget is not None:
        size_in_bytes(args.memory_budget)


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from geneformer_fast.cli.tokenize import carried_columns
    from geneformer_fast.finetuning.predict import predict

    args.before = state_of(args.out)
    path = predict(
        args.inputs[0] if len(args.inputs) == 1 else args.inputs,
        args.model,
        args.out,
        dictionary=args.dictionary,
        counts_layer=args.counts_layer,
        **count_options(args),
        obs=carried_columns(args.obs),
        **selection_options(args),
        key_added=args.key_added,
        dtype=args.dtype,
        device=args.device,
        token_budget=args.token_budget,
        memory_budget=args.memory_budget,
        overwrite=args.overwrite,
        progress=False if args.quiet else None,
    )
    return Answer(f"{path}; settings and versions: {path}.json", values_of(Path(str(path))))


def interrupted(args: argparse.Namespace) -> str:
    """What is there after Ctrl-C, and how to go on."""
    is_there = state_of(args.out) != getattr(args, "before", None)
    return f"{args.out} is complete" if is_there else not_written(args.out)
