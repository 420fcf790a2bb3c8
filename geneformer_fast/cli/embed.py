"""geneformer-fast embed: embeddings of cells or genes from counts or tokens."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.options import renamed
from geneformer_fast.cli.selection import add_selection_options, selection_options
from geneformer_fast.cli.tokenize import add_count_options, add_counts_layer, count_options

NAME = "embed"
HELP = "embed cells or genes with an encoder"
EXAMPLE = "geneformer-fast embed cells.h5ad --model quickstart/model --pool mean --layer last --out embedded.h5ad"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="counts (.h5ad, .zarr, 10x .h5 or folder, .loom), several of them, or a folder of tokens",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder (config.json and weights)")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help=".npy (NAME.cells.parquet beside it names its rows), .parquet, .arrow or .csv (tables), or .h5ad (a "
        "copy of an .h5ad input with obsm added)",
    )
    parser.add_argument(
        "--pool",
        metavar="cls|mean|gene|RULE",
        help="cls token, mean over a cell's genes, mean per gene over cells, or a rule of the model's family (default: "
        "the family's; Geneformer: cls where the model has one, else mean)",
    )
    parser.add_argument(
        "--layer",
        metavar="last|penultimate|N",
        help="which block's output, N counts from 0 (default: as the authors of the model's family; Geneformer: "
        "penultimate)",
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
        help="column of obs that goes into the table; --obs cell_type=celltype. The names of cells always do, as "
        "obs_names, or --obs barcode=obs_names (default: no column)",
    )
    add_selection_options(parser)
    key = parser.add_argument(
        "--key-added", metavar="NAME", help="key in obsm and uns of an .h5ad output (default: X_geneformer)"
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
    _add_pictures(parser)


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE", help="write the UMAP of the cells as a picture (default: none)")
    parser.add_argument(
        "--heatmap",
        metavar="FILE",
        help="write a heatmap as a picture: cells in the order of --color, by dimensions (default: none)",
    )
    parser.add_argument(
        "--color", metavar="COLUMN", help="column of obs that the pictures show cells by (default: none)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, and the picture, if they exist")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.cli.places import (
        check_counts_or_tokens,
        check_device,
        check_dictionary,
        check_layer,
        check_model,
    )
    from geneformer_fast.cli.tokenize import carried_columns
    from geneformer_fast.extract.options import (
        EMBED,
        SUFFIXES,
        Request,
        check_h5ad,
        check_options,
        check_pictures_asked,
    )
    from geneformer_fast.extract.outputs import Output, check_free
    from geneformer_fast.extract.sizes import size_in_bytes

    check_device(args.device)
    check_model(args.model)
    check_dictionary(args.dictionary)
    selection_options(args)
    is_tokens = check_counts_or_tokens(args.inputs)
    out = Output(args.out, overwrite=args.overwrite, suffixes=SUFFIXES, is_genes=args.pool == "gene")
    has_plot = args.plot is not None or args.heatmap is not None
    request = Request(False, is_tokens, out.path.suffix, args.pool == "gene", has_plot)
    others = {"obs": carried_columns(args.obs), "key_added": args.key_added, "color": args.color, "plot": args.plot}
    more = {"heatmap": args.heatmap, "memory_budget": args.memory_budget, "counts_layer": args.counts_layer}
    check_options(EMBED, request, {**count_options(args), **others, **more})
    if out.path.suffix == ".h5ad":
        check_h5ad(args.inputs[0] if len(args.inputs) == 1 else args.inputs, request.is_genes)
    check_layer(args.layer, args.model)
    if args.memory_budget is not None:
        size_in_bytes(args.memory_budget)
    check_pictures_asked(args.plot, args.heatmap, args.color)
    for picture in (args.plot, args.heatmap):
        if picture is not None:
            check_free(Path(picture), overwrite=args.overwrite)


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from time import perf_counter

    from geneformer_fast.cli.tokenize import carried_columns
    from geneformer_fast.extract import embed

    args.before = state_of(args.out)
    begin = perf_counter()
    path = embed(
        args.inputs[0] if len(args.inputs) == 1 else args.inputs,
        args.model,
        args.out,
        pool=args.pool,
        layer=args.layer,
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
        plot=args.plot,
        heatmap=args.heatmap,
        color=args.color,
        progress=False if args.quiet else None,
    )
    text = f"{path} in {perf_counter() - begin:.1f} s; settings and versions: {path}.json"
    pictures = {name: place for name, place in (("plot", args.plot), ("heatmap", args.heatmap)) if place}
    return Answer(text, values_of(Path(str(path))) | pictures)


def values_of(path: Path) -> dict[str, Any]:
    """A file that was written, and what its JSON says of it."""
    import json

    about = path.with_name(f"{path.name}.json")
    said = json.loads(about.read_text(encoding="utf-8")) if about.exists() else {}
    return {**said, "out": path, "about": about}


def interrupted(args: argparse.Namespace) -> str:
    """What is there after Ctrl-C, and how to go on."""
    if state_of(args.out) != getattr(args, "before", None):
        pictures = " and ".join(filter(None, (args.plot, args.heatmap)))
        return f"{args.out} is complete; {pictures} is not written" if pictures else f"{args.out} is complete"
    return not_written(args.out)


def state_of(path: str) -> tuple[int, int] | None:
    """Which file is there: another one, once a new one has taken its name."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def not_written(path: str) -> str:
    """Nothing came of it."""
    kept = "is as it was before" if Path(path).exists() else "is not written"
    return f"{path} {kept}, and nothing half-written is left; run the same command again to begin anew"
