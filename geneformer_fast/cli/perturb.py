"""geneformer-fast perturb: what becomes of cells when genes are deleted, switched on or moved."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.selection import add_selection_options, selection_options
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.kinds import COUNTS, KINDS, MODES, SCREENS

if TYPE_CHECKING:
    from geneformer_fast.perturbation.plan import Plan

NAME = "perturb"
HELP = "delete genes, switch them on or move them in rank, and measure what becomes of the cells"
EXAMPLE = "geneformer-fast perturb tokens --model quickstart/model --max-cells 20 --out perturbed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("tokens", metavar="TOKENS", help="folder of tokens")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder (config.json and weights)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder to write: Parquet files with a row for every perturbed cell, and state and gene where there are "
        "several (default: none, which --dry-run alone allows)",
    )
    _add_edits(parser)
    _add_comparison(parser)
    _add_cells(parser)
    parser.add_argument(
        "--dictionary",
        metavar="DIR",
        help="gene dictionaries, for names and ids of genes (default: the model folder's vocabulary.json, else tokens "
        "are their names)",
    )
    parser.add_argument(
        "--obs",
        action="append",
        default=[],
        metavar="NEW=OLD",
        help="column of the tokens that goes into the rows (default: all that they carry)",
    )
    parser.add_argument("--dtype", default="auto", help="auto (the fastest here), float32, bfloat16 or float16")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--token-budget", type=int, metavar="N", help="tokens per batch (default: by device)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="most batches at a time on a CPU, in threads (default: all cores)"
    )
    _add_run(parser)


def _add_edits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="delete",
        help="what is done: a gene deleted, put in front of all others, moved down or up by --doses, exchanged with "
        "another, or its counts multiplied by --doses and the cell ranked again",
    )
    parser.add_argument(
        "--genes",
        default="all",
        metavar="GENE[,GENE]",
        help="ids, symbols or tokens, each on its own unless --together or --pairs; or a .txt file with a gene in each "
        "line (default: all genes of each cell)",
    )
    parser.add_argument("--together", action="store_true", help="perturb all of --genes at once")
    parser.add_argument("--pairs", action="store_true", help="perturb two genes at once: every pair of --genes")
    parser.add_argument(
        "--anchor", metavar="GENE", help="perturb this gene together with each of the others (default: no gene)"
    )
    parser.add_argument(
        "--sets",
        metavar="FILE",
        help="perturb the genes of each set at once: a .gmt or .json file, or one with a set in each line (default: no "
        "sets)",
    )
    parser.add_argument(
        "--doses",
        metavar="X[,X]",
        help="shares of a cell's ranks that genes move by, above 0 and up to 1, or with --kind counts factors; one "
        "perturbed cell for each (default: none)",
    )
    parser.add_argument(
        "--screen",
        choices=SCREENS,
        help="estimate every gene of every cell, or pairs of them with --pairs or --anchor, from its gradients first, "
        "and compute the --best alone (default: compute all)",
    )
    parser.add_argument(
        "--best",
        type=int,
        metavar="N",
        help="genes, or pairs with --pairs, that --screen leaves, those with the largest effects (default: 100)",
    )
    parser.add_argument(
        "--counts",
        action="append",
        metavar="FILE",
        help="counts that the tokens were made of, for --kind counts (default: the files that the tokens name)",
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="what is compared: cells by their genes or their CLS token, and all other genes as well (default: cls "
        "where the model has one, else cell)",
    )
    parser.add_argument(
        "--layer",
        default="penultimate",
        metavar="last|penultimate|N",
        help="which block's output, N counts from 0 (default: penultimate, as Geneformer's own tool)",
    )
    parser.add_argument(
        "--states",
        metavar="COLUMN=START,GOAL[,OTHER]",
        help="perturb cells of one state, and measure whether they move towards another: values of a column; a value "
        "with a comma stands in double quotes (default: cells are compared with themselves)",
    )
    parser.add_argument(
        "--state-embeddings",
        metavar="FILE",
        help="embeddings of --states that were saved (default: made of the same tokens)",
    )


def _add_cells(parser: argparse.ArgumentParser) -> None:
    add_selection_options(parser, has_seed=False)
    parser.add_argument(
        "--seed", type=int, metavar="N", help="whole number that --max-cells are drawn by (default: 42)"
    )
    parser.add_argument(
        "--window", metavar="START:STOP", help="take these of the cells, the longest first (default: all of them)"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard", metavar="I/N", help="compute one of N parts, such as 2/8, into a folder of its own (default: all)"
    )
    parser.add_argument(
        "--official", action="store_true", help="write what Geneformer's own tool writes, also where it is wrong"
    )
    parser.add_argument(
        "--compare",
        metavar="float32|DIR",
        help="say how effects agree with the same model in float32, or with another checkpoint (default: nothing)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what the run will be, and do nothing of it")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.cli.places import (
        check_device,
        check_dictionary,
        check_file,
        check_layer,
        check_model,
        check_tokens,
    )
    from geneformer_fast.cli.tokenize import carried_columns
    from geneformer_fast.perturbation.folder import check_state
    from geneformer_fast.perturbation.kinds import check_genes, check_screen
    from geneformer_fast.perturbation.sets import read_sets
    from geneformer_fast.perturbation.shards import Shard

    check_device(args.device)
    asked = _edits(args)
    if args.sets is not None:
        check_file(args.sets, "--sets")
        asked["sets"] = list(read_sets(args.sets).values())
    check_genes(asked.pop("kind"), **{**asked, "genes": None if asked["genes"] == "all" else asked["genes"]})
    check_screen(args.screen, args.best, args.kind, _genes(args.genes), together=args.together, sets=args.sets)
    if args.counts is not None and args.kind != COUNTS:
        raise UnsupportedError(f"--counts is about --kind counts; {args.kind} needs none")
    selection_options(args)
    _window(args.window)
    if args.state_embeddings is not None:
        if args.states is None:
            raise UnsupportedError("--state-embeddings are of states: say which with --states")
        check_file(args.state_embeddings, "--state-embeddings")
    _states(args.states)
    carried_columns(args.obs)
    Shard.of(args.shard)
    check_tokens(args.tokens)
    check_model(args.model)
    check_dictionary(args.dictionary)
    for counts in args.counts or ():
        _check_counts(counts)
    if args.out is not None:
        check_state(Path(args.out), resume=args.resume, overwrite=args.overwrite)
    elif not args.dry_run:
        raise UnsupportedError("say with --out where the values go; without it there is --dry-run")
    check_layer(args.layer, args.model)


def _check_counts(path: str) -> None:
    from geneformer_fast.cli.places import check_counts

    check_counts([path])


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from time import perf_counter

    from geneformer_fast.cli.tokenize import carried_columns
    from geneformer_fast.perturbation.perturb import perturb

    begin = perf_counter()
    edits = _edits(args)
    made: Any = perturb(
        args.tokens,
        args.model,
        args.out,
        **{**edits, "doses": edits["doses"] or None, "sets": args.sets},
        **({} if args.counts is None else {"counts": args.counts}),
        screen=args.screen,
        best=args.best,
        mode=args.mode,
        layer=args.layer,
        states=_states(args.states),
        state_embeddings=args.state_embeddings,
        **selection_options(args),
        window=_window(args.window),
        dictionary=args.dictionary,
        obs=carried_columns(args.obs) or None,
        dtype=args.dtype,
        device=args.device,
        token_budget=args.token_budget,
        workers=args.workers,
        shard=args.shard,
        resume=args.resume,
        overwrite=args.overwrite,
        official=args.official,
        dry_run=args.dry_run,
        compare=args.compare,
        progress=False if args.quiet else None,
    )
    return _planned(made) if args.dry_run else _done(Path(made), perf_counter() - begin)


def _planned(plan: Plan) -> Answer:
    return Answer(plan.text(), plan.to_dict())


def _done(out: Path, seconds: float) -> Answer:
    """What is in a folder that is finished."""
    from geneformer_fast.perturbation.reading import open_perturbations
    from geneformer_fast.perturbation.running import said_of

    found = open_perturbations(out, partial=True)
    report = found.manifest.get("report") or {}
    said = f"\n{said_of(report)}" if report else ""
    text = (
        f"{out}: perturbations of {found.n_cells:,} cells in {seconds:.1f} s; {out}/_manifest.json says of what{said}"
    )
    return Answer(text, {**report, "out": out, "n_cells": found.n_cells, "states": list(found.states)})


def interrupted(args: argparse.Namespace) -> str:
    """What is there after Ctrl-C, and how to go on."""
    if args.out is None:
        return "nothing is written"
    from geneformer_fast.perturbation.folder import state_of

    state = state_of(Path(args.out))
    if state == "finished":
        return f"{args.out} is complete"
    if state == "unfinished":
        return f"{args.out} keeps the cells that are complete; the same command with --resume goes on"
    return f"{args.out} is not written; run the same command again to begin"


def _edits(args: argparse.Namespace) -> dict[str, Any]:
    """What is done to cells, as arguments of the function behind the command."""
    return {
        "kind": args.kind,
        "genes": _genes(args.genes),
        "together": args.together,
        "pairs": args.pairs,
        "anchor": args.anchor,
        "doses": _numbers(args.doses),
    }


def _genes(text: str) -> str | list[str]:
    """``"all"``, or names of genes, from a file where one is named."""
    if text == "all":
        return text
    if not text.endswith(".txt"):
        return [gene.strip() for gene in text.split(",") if gene.strip()]
    from geneformer_fast.cli.places import check_file

    check_file(text, "--genes")
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedError(f"--genes {text}: cannot be read: {error}; write a gene in each line") from None
    return [gene for gene in (line.partition("#")[0].strip() for line in lines) if gene]


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return () if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise UnsupportedError(f"--doses {text}: write numbers between commas, such as 0.1,0.5") from None


def _window(text: str | None) -> tuple[int | None, int | None] | None:
    """``"0:100"``, ``"100:"`` or ``":100"`` as (start, stop)."""
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not any(parts) or not all(not part or (part.isascii() and part.isdigit()) for part in parts):
        raise UnsupportedError(f"--window {text}: write START:STOP, such as 0:100, 100: or :100")
    start, stop = (int(part) if part else None for part in parts)
    if stop is not None and stop <= (start or 0):
        raise UnsupportedError(f"--window {text}: the window holds no cell; STOP is the first that is not in it")
    return start, stop


def _states(text: str | None) -> dict[str, Any] | None:
    """``"cell_type=NK,B,Mono"`` as the states that a run is about."""
    if text is None:
        return None
    column, equals, values = text.partition("=")
    names = next(csv.reader([values])) if values else []
    if not (column and equals and len(names) > 1 and all(names)):
        raise UnsupportedError(f"--states {text}: write COLUMN=START,GOAL, or COLUMN=START,GOAL,OTHER")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UnsupportedError(f"--states {text}: {twice!r} is named twice")
    return {"column": column, "start": names[0], "goal": names[1], "alternatives": names[2:]}
