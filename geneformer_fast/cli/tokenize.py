"""``geneformer-fast tokenize``: counts to a folder of ranked tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast import families
from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.options import renamed

if TYPE_CHECKING:
    from geneformer_fast.tokenization.arrow import TokenFolder

NAME = "tokenize"
HELP = "turn count matrices (.h5ad, .zarr, 10x, .loom) into ranked gene tokens"

EXAMPLE = "geneformer-fast tokenize cells.h5ad --dictionary quickstart/vocabulary --obs cell_type --out tokens"

_MOST_SHOWN = 5


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is read and how; ``medians`` has them too."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or globs; taken in sorted order")
    renamed(parser, "--layer", add_counts_layer(parser))
    add_count_options(parser)
    parser.add_argument("--no-filter-pass", action="store_true", help="also take cells whose filter_pass is not 1")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")


def add_counts_layer(parser: argparse.ArgumentParser) -> argparse.Action:
    """Which matrix of the file is read."""
    return parser.add_argument(
        "--counts-layer",
        metavar="NAME",
        help="layer that holds the counts (default: raw.X where it holds counts, else X)",
    )


def add_count_options(parser: argparse.ArgumentParser) -> None:
    """How counts are read: the arguments of every command that reads them; see ``count_options``."""
    parser.add_argument(
        "--gene-column",
        metavar="NAME",
        help="column of var with gene ids; var_names for its row names (default: ensembl_id, gene_ids, gene_id, "
        "feature_id or ensembl, where var has one, else its row names)",
    )
    parser.add_argument("--allow-float", action="store_true", help="let TPM-like values that are no integers pass")
    parser.add_argument("--allow-duplicate-cells", action="store_true", help="let cells of equal names pass")
    parser.add_argument("--allow-few-genes", action="store_true", help="go on where most gene ids match nothing")
    parser.add_argument(
        "--n-counts",
        default="auto",
        metavar="COLUMN",
        help="total counts per cell: an obs column, 'computed', or 'auto', which is n_counts where obs has it, else "
        "computed (default: auto)",
    )


def count_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of ``add_count_options`` as arguments of the functions behind the commands."""
    return {
        "gene_column": args.gene_column,
        "allow_float": args.allow_float,
        "allow_duplicate_cells": args.allow_duplicate_cells,
        "allow_few_genes": args.allow_few_genes,
        "n_counts": args.n_counts,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_inputs(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; datasets.load_from_disk opens it")
    parser.add_argument(
        "--dictionary",
        required=True,
        metavar="FOLDER",
        help="folder with the gene dictionaries; of a family that reads values the file with its genes, or its folder",
    )
    parser.add_argument(
        "--preset", choices=tuple(families.layouts()), help="which dictionaries (default: the only ones in FOLDER)"
    )
    of_values = tuple(found.name for found in families.all_families() if found.preparation is not None)
    parser.add_argument(
        "--family", choices=of_values, help="write the values that this family reads (default: ranked tokens)"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a choice about the values of --family, see the guide to values (default: as its authors have it)",
    )
    parser.add_argument(
        "--obs",
        action="append",
        default=[],
        metavar="NEW=OLD",
        help="carry an obs column along; --obs cell_type=celltype. The names of cells always are, as obs_names, or "
        "--obs barcode=obs_names (default: no column)",
    )
    parser.add_argument(
        "--max-len", type=int, metavar="N", help="most tokens per cell, CLS and EOS included (default: the model's)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="ranking threads (default: all cores)")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished folder")


def carried_columns(entries: list[str]) -> dict[str, str]:
    """``["celltype", "donor=donor_id"]`` as {column of obs: name in the result}."""
    from geneformer_fast.errors import InputError

    carried: dict[str, str] = {}
    for entry in entries:
        new, equals, old = entry.partition("=")
        old = old if equals else new
        if not new or not old:
            raise InputError(f"--obs {entry}: write --obs NAME, or --obs NEW=OLD with OLD a column of obs")
        if old in carried:
            raise InputError(f"--obs {entry}: the column {old} is carried already, as {carried[old]}")
        carried[old] = new
    return carried


def chosen_options(args: argparse.Namespace) -> dict[str, str]:
    """``["ties=random", "seed=1"]`` as {name: value}, of which the family is asked whether it has them."""
    from geneformer_fast.errors import InputError, UnsupportedError

    chosen: dict[str, str] = {}
    for entry in args.option:
        name, equals, value = entry.partition("=")
        if not name or not equals or not value:
            raise InputError(f"--option {entry}: write --option NAME=VALUE")
        if name in chosen:
            raise InputError(f"--option {entry}: {name} is chosen already, as {chosen[name]}")
        chosen[name] = value
    if args.family is None:
        if chosen:
            raise UnsupportedError("--option is about the values of a family; name it with --family")
        return {}
    from geneformer_fast.tokenization.values import value_preparation

    value_preparation(args.family).chosen(args.family, chosen)
    return chosen


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.cli.places import check_counts, check_dictionary
    from geneformer_fast.tokenization import manifest

    carried_columns(args.obs)
    chosen_options(args)
    manifest.refuse_both(args.resume, args.overwrite)
    check_dictionary(args.dictionary, may_be_file=args.family is not None)
    check_counts(args.inputs)
    out = Path(args.out)
    manifest.check_state(out, manifest.state_of(out), resume=args.resume, overwrite=args.overwrite)


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from geneformer_fast.tokenization import manifest
    from geneformer_fast.tokenization.run import tokenize

    tokens = tokenize(
        args.inputs,
        args.out,
        dictionary=args.dictionary,
        preset=args.preset,
        family=args.family,
        options=chosen_options(args),
        counts_layer=args.counts_layer,
        obs=carried_columns(args.obs),
        max_len=args.max_len,
        filter_pass=not args.no_filter_pass,
        **count_options(args),
        workers=args.workers,
        resume=args.resume,
        overwrite=args.overwrite,
        progress=False if args.quiet else None,
    )
    assert not isinstance(tokens, tuple)
    content = tokens.manifest
    assert content is not None
    values: dict[str, Any] = {
        "out": tokens.path, "cells": totals_of(content["cells"]), "tokens": tokens.n_tokens,
        "vocabulary": content["vocabulary"]["name"],
        **({} if manifest.PREPARATION not in content else {"preparation": content[manifest.PREPARATION]}),
        "inputs": [{name: entry[name] for name in ("path", "genes", "warnings")} for entry in content["inputs"]],
    }  # fmt: skip
    return Answer(summary(tokens), values)


def interrupted(args: argparse.Namespace) -> str:
    """How far it is after Ctrl-C, and how to go on."""
    from geneformer_fast.tokenization import manifest

    folder = Path(args.out)
    return manifest.unfinished_message(folder) if manifest.state_of(folder) == "unfinished" else "nothing is written"


def summary(tokens: TokenFolder) -> str:
    """What became of genes and cells, as text."""
    from geneformer_fast.tokenization import manifest

    content = tokens.manifest
    assert content is not None
    lines = []
    for entry, tally in zip(content["inputs"][:_MOST_SHOWN], content["cells"], strict=False):
        lines += _gene_lines(entry) + _totals_line(entry, tally)
    if len(content["inputs"]) > _MOST_SHOWN:
        lines.append(f"... {len(content['inputs']) - _MOST_SHOWN} more inputs, see manifest.json")
    cells = content["cells"]
    total = totals_of(cells)
    lines.append(
        f"cells: {total['read']:,} read, {total['written']:,} written ({tokens.n_tokens:,} tokens; {total['full']:,} "
        "cells reach the maximal length)"
    )
    if total["filtered"]:
        lines.append(f"  {total['filtered']:,} left out by filter_pass")
    if total["empty"]:
        first = next(tally for tally in cells if tally["empty"])
        rows = ", ".join(map(str, first["empty_rows"][:_MOST_SHOWN]))
        lines.append(
            f"  {total['empty']:,} left out as empty (no counts in any gene of the vocabulary), e.g. row {rows} of"
        )
        lines[-1] += f" {first['source']}"
    few = sum(tally.get("few_genes", 0) for tally in cells)
    if few:
        least = content[manifest.PREPARATION]["options"].get("min_genes", 1)
        lines.append(f"  {few:,} left out since they express fewer than {least:,} genes of the list (option min_genes)")
    zeros = sum(tally["stored_zeros"] for tally in cells)
    if zeros:
        lines.append(f"  {zeros:,} stored zeros ignored (the official tokenizer makes tokens of them)")
    if (rule := content.get(manifest.PREPARATION)) is not None:
        said = ", ".join(f"{name} {value}" for name, value in rule["options"].items())
        lines.append(f"values of {rule['family']}, {rule['n_genes']:,} genes{f' ({said})' if said else ''}")
    lines.append(f"vocabulary: {content['vocabulary']['name']}; written to {tokens.path}")
    return "\n".join(lines)


def totals_of(tallies: list[dict[str, Any]]) -> dict[str, int]:
    """Cells that were read, written, left out by filter_pass, empty, and of the full length, over all inputs."""
    return {key: sum(tally[key] for tally in tallies) for key in ("read", "written", "filtered", "empty", "full")}


def _totals_line(entry: dict[str, Any], tally: dict[str, Any]) -> list[str]:
    from geneformer_fast.tokenization.doubts import about_totals

    message = about_totals(entry["path"], entry["n_counts_from"], tally)
    return [] if message is None else [f"  warning: {message}"]


def _gene_lines(entry: dict[str, Any]) -> list[str]:
    from geneformer_fast.tokenization.genes import GeneReport

    origin = (
        f"  counts from {entry['counts_from']}, gene ids from {entry['gene_ids_from']}, totals {entry['n_counts_from']}"
    )
    lines = [str(GeneReport(**entry["genes"])), origin]
    if entry["left_out"]:
        said = ", ".join(f"{count:,} {kind}" for kind, count in entry["left_out"].items())
        lines.append(f"  left out, since only gene expression counts: {said}")
    lines += [f"  warning: {message}" for message in entry["warnings"]]
    if entry["is_dense"]:
        note = ", whose columns of one gene the official tokenizer cannot sum" if entry["genes"]["collapsed"] else ""
        lines.append(f"  stored densely{note}: scores are divisions, as the official tokenizer computes them there")
    if entry["n_counts_dtype"] == "float32":
        lines.append("  totals are float32, and ranks follow their rounding, as the official tokenizer's do")
    return lines
