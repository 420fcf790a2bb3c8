"""geneformer-fast perturb-stats: what perturbations say of genes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from geneformer_fast.cli.answer import Answer
from geneformer_fast.cli.embed import not_written, state_of

NAME = "perturb-stats"
HELP = "say of perturbations what each gene does, how sure that is, and how unusual"
EXAMPLE = "geneformer-fast perturb-stats perturbed --out statistics --group donor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    from geneformer_fast.perturbation.statistics.asked import CORRECTIONS, FAULTS, MODES

    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder that perturb wrote, those of all shards of a run, or a folder of official pickles",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for tables (CSV), pictures, and what the numbers mean"
    )
    modes = "; ".join(f"{name}: {what}" for name, what in MODES.items())
    parser.add_argument(
        "--mode", choices=tuple(MODES), metavar="NAME", help=f"official table: {modes} (default: by what the run has)"
    )
    parser.add_argument("--goal", metavar="STATE", help="state that shifts are towards (default: the run's)")
    parser.add_argument(
        "--alternative",
        action="append",
        metavar="STATE",
        help="another state to compare with (default: all of the run but its start)",
    )
    parser.add_argument(
        "--null",
        metavar="RUN",
        help="run of other cells: what vs_null compares with, elsewhere a control (default: none)",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="RUN",
        help="run of the same genes by another layer or model: in how far they agree (default: none)",
    )
    parser.add_argument(
        "--singles",
        metavar="RUN",
        help="for a run of pairs that of single genes in the same cells: what pairs do beyond the sum of their genes "
        "(default: the run itself, where it has them)",
    )
    parser.add_argument(
        "--genes",
        nargs="+",
        metavar="GENE",
        help="rows of these genes, ids or symbols, in aggregate_data and aggregate_gene_shifts (default: all)",
    )
    parser.add_argument(
        "--anchor",
        metavar="GENE",
        help="in mixture_model the gene whose effects on others are judged, in aggregate_gene_shifts pairs with it "
        "(default: none)",
    )
    parser.add_argument(
        "--dose",
        type=float,
        metavar="X",
        help="of a run with several doses, which: a share of ranks, or what counts were multiplied by "
        "(default: the only one)",
    )
    parser.add_argument(
        "--dictionary", metavar="DIR", help="gene dictionaries, for symbols (default: ids as the run has them)"
    )
    faults = "; ".join(f"{name}: {what}" for name, what in FAULTS.items())
    parser.add_argument(
        "--mend",
        action="append",
        default=[],
        choices=(*FAULTS, "all"),
        metavar="FAULT",
        help=f"mend a fault of the official table. {faults}; all (default: official numbers)",
    )
    _add_judging(parser, CORRECTIONS)
    _add_pictures(parser)


def _add_judging(parser: argparse.ArgumentParser, corrections: tuple[str, ...]) -> None:
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="carried column whose cells stay together, such as the donor, which is then the unit (default: cells are)",
    )
    parser.add_argument(
        "--min-cells", type=int, default=10, metavar="N", help="genes in fewer cells are listed and not tested"
    )
    parser.add_argument(
        "--draws", type=int, default=1000, metavar="N", help="whole number of resamples of the bootstrap"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="X", help="share of intervals that hold the mean, 0 to 1"
    )
    parser.add_argument(
        "--fdr", type=float, default=0.05, metavar="X", help="false discovery rate of what counts, a share, 0 to 1"
    )
    parser.add_argument(
        "--correction",
        choices=corrections,
        default="bh",
        help="how p-values are adjusted: Benjamini-Hochberg or Benjamini-Yekutieli (default: bh)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="whole number that resamples are drawn by (default: 0)"
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embeddings",
        metavar="FILE",
        help="embeddings of the token folder's cells (.npy or .parquet of embed), to show shifts on their UMAP "
        "(default: none)",
    )
    parser.add_argument(
        "--color",
        metavar="COLUMN",
        help="column beside the embeddings, such as the states, shown there (default: none)",
    )
    parser.add_argument("--no-pictures", action="store_true", help="write tables only")
    parser.add_argument("--overwrite", action="store_true", help="replace statistics that are in DIR")


def check(args: argparse.Namespace) -> None:
    """Refuse what can be refused at once."""
    from geneformer_fast.cli.places import check_dictionary, check_file
    from geneformer_fast.perturbation.statistics.asked import (
        check_asked,
        check_others,
        check_pictures_asked,
        check_place,
        check_run,
    )

    for run in (*args.runs, *args.compare, args.null, args.singles):
        if run is not None:
            check_run(run)
    check_dictionary(args.dictionary)
    check_asked(
        mode=args.mode,
        mend=args.mend,
        has_null=args.null is not None,
        given={"anchor": args.anchor, "genes": args.genes},
        min_cells=args.min_cells,
        draws=args.draws,
        confidence=args.confidence,
        fdr=args.fdr,
        correction=args.correction,
        seed=args.seed,
    )
    check_others(args.runs, null=args.null, compare=args.compare)
    check_pictures_asked(args.embeddings, args.color, has_pictures=not args.no_pictures, has_out=True)
    check_file(args.embeddings, "--embeddings")
    check_place(Path(args.out), overwrite=args.overwrite)


def run(args: argparse.Namespace) -> Answer:
    """Run the command."""
    from geneformer_fast.perturbation.statistics.run import perturbation_stats

    args.before = state_of(args.out)
    found = perturbation_stats(
        args.runs[0] if len(args.runs) == 1 else args.runs,
        args.out,
        mode=args.mode,
        goal=args.goal,
        alternative=args.alternative,
        null=args.null,
        compare=args.compare or None,
        singles=args.singles,
        genes=args.genes,
        anchor=args.anchor,
        dose=args.dose,
        dictionary=args.dictionary,
        mend=args.mend,
        group=args.group,
        min_cells=args.min_cells,
        draws=args.draws,
        confidence=args.confidence,
        fdr=args.fdr,
        correction=args.correction,
        seed=args.seed,
        pictures=not args.no_pictures,
        embeddings=args.embeddings,
        color=args.color,
        overwrite=args.overwrite,
        progress=False if args.quiet else None,
    )
    said: dict[str, Any] = found.about
    lines = [f"{said['mode']}: {said['genes']:,} genes in {said['cells']:,} cells"]
    if said["tested"]:
        lines[0] += (
            f"; {said['significant']:,} of {said['tested']:,} that were tested are unusual among genes like them, "
            f"{said['universal']:,} are strong in every cell"
        )
    else:
        lines[0] += "; too few genes are in enough cells (--min-cells) to be compared with genes like them"
    if found.agreement is not None:
        lines += [
            f"{pair.first} and {pair.second}: the same sign in {pair.same_sign:.0%} of {pair.n_genes:,} genes"
            for pair in found.agreement.itertuples()
        ]
    lines.append(f"{args.out}: {', '.join(found.files)}; about.md says what the numbers mean")
    return Answer("\n".join(lines), {**said, "out": Path(args.out), "files": found.files})


def interrupted(args: argparse.Namespace) -> str:
    """What is there after Ctrl-C, and how to go on."""
    is_there = state_of(args.out) != getattr(args, "before", None)
    return f"{args.out} is complete" if is_there else not_written(args.out)
