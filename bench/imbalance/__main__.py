"""``python -m bench.imbalance --work DIR``: three models on unequal classes, what is finished in DIR is kept."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.child import ChildRun, run_child
from bench.finetune_real import SHARED
from bench.imbalance.findings import TITLES
from bench.imbalance.picture import draw
from bench.imbalance.report import VERDICTS
from bench.imbalance.result import content
from bench.imbalance.study import BASELINE, MODELS, Asked, Study
from bench.machine import save_result
from geneformer_fast.files.writing import write_json
from geneformer_fast.tokenization.manifest import read_json

# Fields of Asked that have options of their own below.
_APART = ("cells", "label", "rare", "unlabelled", "weights")


def run(study: Study, seconds: float | None = None) -> None:
    """Compute what is missing, every model in processes of its own; after ``seconds`` no further row is begun."""
    end = None if seconds is None else time.monotonic() + seconds
    waiting = [name for name in (BASELINE, *MODELS) if study.missing(name)]
    for name in MODELS:
        if name in waiting:
            print(f"{TITLES[name]}: cells, and an encoder", flush=True)
            _child(study, name, "prepare", 0.0)
    for number, name in enumerate(waiting):
        # What is left is shared among those that wait, so that no model stays without rows.
        share = 1e9 if end is None else max(0.0, end - time.monotonic()) / (len(waiting) - number)
        print(f"{TITLES[name]}: {len(study.missing(name))} trainings to do", flush=True)
        begun = len(study.missing(name))
        peak = _child(study, name, "rows", share).peak_bytes
        print(f"{TITLES[name]}: {begun - len(study.missing(name))} done", flush=True)
        path = study.work / name / "memory.json"
        before = read_json(path)["peak_bytes"] if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"peak_bytes": max(peak, before)})


def _child(study: Study, name: str, what: str, seconds: float) -> ChildRun:
    """Run :func:`bench.imbalance.process.main` in a process that finds what this one finds."""
    arguments = (str(study.work), name, what, seconds)
    code = f"import sys; sys.path[:0] = {sys.path!r}; from bench.imbalance.process import main; main(*{arguments!r})"
    return run_child([sys.executable, "-c", code])


def _asked(args: argparse.Namespace) -> Asked:
    weights = {name: str(place.resolve()) for name in MODELS if (place := getattr(args, name)) is not None}
    others = {field.name: getattr(args, field.name) for field in dataclasses.fields(Asked) if field.name not in _APART}
    unlabelled = tuple(str(file.resolve()) for file in args.unlabelled)
    for file in (args.cells, *args.unlabelled, *map(Path, weights.values())):
        if not Path(file).exists():
            raise SystemExit(f"{file}: no such file or folder")
    return Asked(str(args.cells.resolve()), args.label, args.rare, unlabelled, weights, **others)


def build_parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.imbalance", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is computed")
    for name, what in (
        ("scgpt", "folder with args.json, vocab.json and weights"),
        ("scbert", "checkpoint file, with the list of its genes (panglao_10000.h5ad) in the same folder"),
        ("geneformer", "checkpoint folder, with its dictionaries"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=f"real weights: {what}; without, a small one is pretrained")
    facs = SHARED / "pbmc_facs/pbmc_facs.h5ad"
    others = [SHARED / "pbmc3k/pbmc3k.h5ad", SHARED / "mix_celseq2_5cl/mix_celseq2_5cl.h5ad"]
    parser.add_argument("--cells", type=Path, default=facs, help="labelled cells, .h5ad (default: sorted blood cells)")
    parser.add_argument("--label", default="celltype", help="column of obs to tell")
    parser.add_argument("--rare", default="CD56+ NK", help="class that is cut")
    parser.add_argument("--unlabelled", type=Path, nargs="+", default=others, help="cells that small models learn from")
    parser.add_argument(
        "--seconds", type=float, help="begin no further training after this time; the next call goes on"
    )
    for field in dataclasses.fields(Asked):
        if field.name not in _APART:
            kind = float if field.name == "learning_rate" else int
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compute what is missing, write the result and its picture, and say what became of what was published."""
    args = build_parser().parse_args(argv)
    study = Study(args.work, _asked(args))
    run(study, args.seconds)
    result = content(study)
    for finding in result["findings"]:
        print(f"{finding['published']}: {VERDICTS[finding['verdict']]} ({finding['ours']})")
    path = save_result("imbalance", result)
    print(draw(result, path.with_suffix(".svg")))
    print(f"{path}: {result['n_rows']} of {result['n_rows_asked']} trainings")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
