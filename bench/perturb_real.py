"""What fewer bits change of the effects of genes: cells perturbed by a trained model in float32, bfloat16 and int8.

``python -m bench.perturb_real --work DIR`` takes the encoder of Geneformer V1-10M's shape that ``quantize_real`` trains
(in the same folder, if it is there), deletes every gene of a few sorted blood cells by itself, and compares effects
with those in float32: how near each cell stays to what it was, and how far it moves towards other cell types. Noise is
what comes out differently in another order and in other batches. Writes ``bench/results/<machine>/perturb_real.json``;
the exit code is 1 where effects in bfloat16 rank differently (below 0.98).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geneformer_fast as gf
from bench.machine import save_result
from bench.quantize_real import LABEL, SHARED, Study, training_of
from bench.quantize_real import arguments_of as arguments_of_study

#: Spearman's, of effects in bfloat16 with those in float32; all cells together.
LEAST = 0.98
EXACT, START, OTHERS = "float32", "T cell", ("B cell", "NK cell")
#: Of the draw of cells; and how many of each state make its embedding, in float32 for all.
SEED, OF_STATE = 0, 40

Load = Callable[[Path], gf.Encoder]


def _quantized(scheme: str) -> Load:
    return lambda model: gf.quantize(gf.load(model, dtype="float32", device="cpu"), scheme=scheme)


#: Row -> what loads the model; the first is what all others are compared with.
MODELS: dict[str, Load] = {
    EXACT: lambda model: gf.load(model, dtype="float32", device="cpu"),
    "bfloat16": lambda model: gf.load(model, dtype="bfloat16", device="cpu"),
    "int8": _quantized("int8"),
    "int8-weights": _quantized("int8-weights"),
}
#: Question -> options of ``perturb``.
QUESTIONS: dict[str, dict[str, Any]] = {
    "similarity": {"where": {LABEL: [START]}},
    "shift": {"states": {"column": LABEL, "start": START, "goal": OTHERS[0], "alternatives": [*OTHERS[1:]]}},
}


def effects_of(
    tokens: Path, encoder: gf.Encoder, out: Path, options: Mapping[str, Any], n_cells: int
) -> tuple[Any, dict[str, Any]]:
    """Rows of a run, and its report."""
    gf.perturb(tokens, encoder, out, max_cells=n_cells, seed=SEED, obs=[], overwrite=True, progress=False, **options)
    found = gf.open_perturbations(out)
    return found.to_frame(), dict(found.manifest["report"])


def compared(frame: Any, exact: Any) -> dict[str, Any]:
    """How effects agree with the exact ones: pooled, in each cell, and as genes' means over cells; the least of states.

    Raises
    ------
    RuntimeError
        The rows are not of the same variants.
    """
    from scipy.stats import spearmanr

    columns = ["cell", "state"]
    if len(frame) != len(exact) or not frame[columns].equals(exact[columns]):
        raise RuntimeError("two runs perturbed other cells, or in another order")
    gene = np.array([int(tokens[0]) for tokens in exact["tokens"]])
    if not np.array_equal(gene, [int(tokens[0]) for tokens in frame["tokens"]]):
        raise RuntimeError("two runs deleted other genes, or in another order")
    both = exact[["cell"]].assign(
        gene=gene, state=exact["state"].fillna("").astype(str), exact=exact["value"], value=frame["value"]
    )
    rank: Callable[[Any], float] = lambda rows: float(spearmanr(rows["value"], rows["exact"]).statistic)  # noqa: E731
    by_state = [rows for _, rows in both.groupby("state")]
    means = [rows.groupby("gene")[["exact", "value"]].mean() for rows in by_state]
    of_cells = [rank(rows) for _, rows in both.groupby(["cell", "state"])]
    return {
        "rank_correlation": {
            "pooled": min(rank(rows) for rows in by_state),
            "least_of_a_cell": min(of_cells),
            "of_gene_means": min(rank(rows) for rows in means),
        },
        "largest_difference": float((both["value"] - both["exact"]).abs().max()),
    }


def rows_of(model: Path, tokens: Path, work: Path, n_cells: int) -> dict[str, dict[str, Any]]:
    """``"question, dtype"`` -> effects, noise, and agreement with float32 where it is another."""
    found: dict[str, dict[str, Any]] = {}
    exact_model = MODELS[EXACT](model)
    states = gf.state_embeddings(
        tokens, exact_model, LABEL, [START, *OTHERS], max_cells=OF_STATE, seed=SEED, progress=False
    )
    for question, options in QUESTIONS.items():
        exact = None
        if "states" in options:
            options = {**options, "state_embeddings": states}
        for name, load in MODELS.items():
            frame, report = effects_of(tokens, load(model), work / f"{question}_{name}", options, n_cells)
            row = {each: report[each] for each in ("n_variants", "seconds", "noise", "effects")}
            if exact is None:
                exact = frame
            else:
                row |= compared(frame, exact)
            found[f"{question}, {name}"] = row
            print(said(f"{question}, {name}", row), flush=True)
    return found


def said(name: str, row: Mapping[str, Any]) -> str:
    """A row in a line."""
    parts = [f"{name:<26}", f"effects {row['effects']['root_mean_square']:.2e}", f"noise {row['noise']['largest']:.1e}"]
    if "rank_correlation" in row:
        ranks = row["rank_correlation"]
        of_parts = f"least of a cell {ranks['least_of_a_cell']:.4f}, of genes' means {ranks['of_gene_means']:.4f}"
        parts += [f"rank correlation {ranks['pooled']:.4f} ({of_parts})"]
        parts += [f"largest difference {row['largest_difference']:.1e}"]
    return "  ".join(parts)


def arguments_of(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, or ``given`` in its place."""
    parser = argparse.ArgumentParser(prog="python -m bench.perturb_real", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything; that of quantize_real will do")
    parser.add_argument("--model", type=Path, help="an encoder of Geneformer V1, trained elsewhere")
    parser.add_argument("--note", default="", help="goes into the result: how --model was trained")
    parser.add_argument("--seconds", type=int, default=2700, help="of pretraining, where there is no model yet")
    parser.add_argument("--cells", type=int, default=4, help=f"{START}s whose genes are deleted")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Run everything and write the result."""
    args = arguments_of(given)
    if not SHARED.is_dir():
        raise SystemExit("the real cells are not here (shared/ beside the checkout is absent)")
    torch.set_num_threads(args.threads)
    asked = ["--work", str(args.work), "--seconds", str(args.seconds), "--note", args.note]
    study = Study(args.work, arguments_of_study([*asked, *(["--model", str(args.model)] if args.model else [])]))
    rows = rows_of(study.model(), study.tokens("test"), args.work / "perturbed", args.cells)
    content = {
        "what": __doc__.splitlines()[0],
        "asked": {"cells": args.cells, "threads": args.threads},
        "training": training_of(study),
        "least_rank_correlation": LEAST,
        "rows": rows,
    }
    print(save_result("perturb_real", content))
    found = {name: row["rank_correlation"]["pooled"] for name, row in rows.items() if name.endswith(", bfloat16")}
    missed = {name: value for name, value in found.items() if not value >= LEAST}
    if missed:
        print(f"ranked differently: {missed}")
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
