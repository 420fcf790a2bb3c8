"""``python -m bench cost``: cost against size, measured where it can be, drawn, and stated as exponents.

Six kinds of curve: tokenization by cells; embedding by cells, by tokens per cell (all cells alike, as many tokens
altogether) and by tokens per batch (the same cells); perturbing by tokens per perturbed cell (as many tokens
altogether) and by genes that are deleted one by one in a cell. Sizes grow tenfold or twofold until the next would take
longer than ``--seconds``; what lies beyond is predicted by the fitted curve and says so. A cost should be linear in
cells; in tokens per cell it should grow as the model's operations do, and not at all with the size of a batch. A
perturbed cell should cost the same however many there are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import ROOT, save_result
from bench.scaling import FEWEST, curve_unit, draw, fitted
from geneformer_fast.profiling.clock import Clock, WallClock

SECONDS, ROUNDS = 60.0, 3
CELLS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
TOKENIZED = (100, 1_000, 10_000, 100_000, 1_000_000)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
#: Tokens of all cells together where cells grow longer, and where batches grow.
N_TOKENS = 16_384
KINDS = ("tokenize", "cells", "length", "batch", "perturb-length", "perturb-genes")
#: Genes that are deleted in each cell where cells grow longer; and how many where their number grows, in what cell.
N_GENES = 4
GENES, GENES_OF = (32, 64, 128, 256, 504), 512
#: Twice the cells, twice the time.
_LINEAR = 1.0


@dataclass(frozen=True)
class Job:
    """One curve to measure.

    Attributes
    ----------
    case
        The result's name.
    name, size
        ``"embed geneformer-v1-10m"``, and what grows: ``"cells"``, ``"tokens per cell"``, ``"tokens per batch"``.
    sizes
        Smallest first.
    prepare
        Gives what is timed at a size; its own time does not count.
    expected
        The exponent it should have.
    per_cell
        Cells of a run, by which its time is divided; None for whole runs.
    has_fixed
        Whether a part of the cost may not grow at all; without it the curve may also fall.
    """

    case: str
    name: str
    size: str
    sizes: Sequence[int]
    prepare: Callable[[int], Callable[[], object]]
    expected: float
    per_cell: Callable[[int], int] | None = None
    has_fixed: bool = True


def measured(job: Job, *, seconds: float = SECONDS, rounds: int = ROUNDS, clock: Clock | None = None) -> dict[str, Any]:
    """A curve: its points, what is predicted beyond them, the growth, and whether that is as it should be.

    Parameters
    ----------
    job
        What is measured.
    seconds
        A size is left out when ``rounds`` runs of it would take longer, by those before it.
    rounds
        Runs of each size; one before them does not count.
    clock
        None is the host's: everything timed here ends on the host.
    """
    clock = clock or WallClock()
    points: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for size in job.sizes:
        needed = _next(points, size, job) * (rounds + 1)
        if needed > seconds:
            left_out[str(size)] = f"{rounds + 1} runs would take {needed:,.0f} s"
            continue
        try:
            run = job.prepare(size)
        except NoRoom as why:
            left_out[str(size)] = str(why)
            continue
        run()
        n_cells = job.per_cell(size) if job.per_cell else 1
        ordered = sorted(ms / 1e3 / n_cells for ms in clock.samples(run, rounds))
        spread = {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]}
        points.append({"at": size, "seconds": {name: float(f"{value:.5g}") for name, value in spread.items()}})
        print(f"  {job.name}: {size:,} {job.size}: {spread['median']:.4g} {curve_unit(job.size)}", flush=True)
    medians = [point["seconds"]["median"] for point in points]
    growth = fitted([point["at"] for point in points], medians, has_fixed=job.has_fixed)
    return {
        "name": job.name,
        "size": job.size,
        "points": points,
        "growth": growth and growth.as_json(),
        "expected_exponent": job.expected,
        "is_as_expected": growth and growth.is_near(job.expected),
        "predicted": [{"at": int(size), "seconds": float(f"{growth.seconds(int(size)):.4g}")} for size in left_out]
        if growth
        else [],
        "left_out": left_out,
    }


def _next(points: Sequence[Mapping[str, Any]], size: int, job: Job) -> float:
    """About how many seconds a run of a size takes, by the largest before it."""
    if not points:
        return 0.0
    last = points[-1]
    n_cells = job.per_cell(size) if job.per_cell else 1
    return float(last["seconds"]["median"] * n_cells * (size / last["at"]) ** job.expected)


class NoRoom(Exception):
    """A size that this machine cannot hold, and why."""


def tokenizing(work: Path, *, sizes: Sequence[int] | None = None) -> Job:
    """Counts to token folder by cells: cells of pbmc_facs, repeated."""
    from bench.tile import tile_h5ad
    from geneformer_fast.tokenization.run import tokenize
    from geneformer_fast.tokenization.vocabulary import Vocabulary

    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        raise FileNotFoundError("tokenization takes its cells from shared/data beside the checkout, which is absent")
    source, vocabulary = data / "pbmc_facs" / "pbmc_facs.h5ad", Vocabulary.from_folder(data / "dicts", "v2")

    def prepare(n_cells: int) -> Callable[[], object]:
        needed, free = n_cells * _BYTES_PER_CELL, _free_bytes(work)
        if needed > free:
            raise NoRoom(f"its files take about {needed / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free in {work}")
        for path in work.glob("cells_*.h5ad"):
            path.unlink()
        path = tile_h5ad(source, work / f"cells_{n_cells}.h5ad", n_cells=n_cells, is_exact=True)
        return lambda: tokenize(path, work / "tokenized", dictionary=vocabulary, overwrite=True, progress=False)

    return Job("cost_tokenize", "tokenize, Geneformer V2", "cells", sizes or TOKENIZED, prepare, _LINEAR)


# An uncompressed cell of pbmc_facs and its tokens, rounded up.
_BYTES_PER_CELL = 12_000


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def embedding(
    kind: str,
    model: Path,
    work: Path,
    *,
    device: str = "cpu",
    sizes: Sequence[int] | None = None,
    n_tokens: int = N_TOKENS,
) -> Job:
    """Embedding by cells of real lengths, by tokens per cell, or by tokens per batch.

    Parameters
    ----------
    kind
        ``"cells"``, ``"length"`` or ``"batch"``.
    model
        A folder; loaded as ``geneformer_fast.load`` does by itself.
    work
        For token folders.
    device
        Where.
    sizes
        Others than :data:`CELLS`, :data:`LENGTHS` or :data:`BUDGETS`.
    n_tokens
        Of all cells together, where cells or batches grow.
    """
    from bench.lengths import BLOOD, real_lengths
    from bench.token_folders import token_folder
    from geneformer_fast import embed, load
    from geneformer_fast.profiling.flops.work import encoder_flops

    encoder = load(model, device=device).eval()
    config = encoder.config
    mean = float(np.minimum(BLOOD, config.max_len).mean())

    def of(name: str, lengths: Sequence[int], **options: Any) -> Callable[[], object]:
        folder = work / "tokens" / f"{model.name}_{name}"
        if not folder.exists():
            token_folder(folder, lengths, config)
        return lambda: embed(folder, encoder, progress=False, **options)

    def real(n_cells: int) -> list[int]:
        return real_lengths(n_cells, mean=mean, max_len=config.max_len)

    what = f"embed, {model.name}, {device}"
    case = f"cost_{kind}_{model.name.removeprefix('geneformer-')}_{device.partition(':')[0]}"
    if kind == "cells":
        return Job(case, what, "cells", sizes or CELLS, lambda n: of(f"cells_{n}", real(n)), _LINEAR)
    if kind == "batch":
        cells = real(max(1, round(n_tokens / mean)))
        run = lambda n: of("batch", cells, token_budget=n)  # noqa: E731
        return Job(case, what, "tokens per batch", sizes or BUDGETS, run, 0.0, has_fixed=False)
    lengths = [length for length in sizes or LENGTHS if length <= min(config.max_len, n_tokens)]
    operations = fitted(lengths, [encoder_flops(config, n, n**2) for n in lengths], has_fixed=False)
    return Job(
        case,
        what,
        "tokens per cell",
        lengths,
        lambda length: of(f"length_{length}", [length] * (n_tokens // length)),
        operations.exponent if operations else _LINEAR,
        per_cell=lambda length: n_tokens // length,
        has_fixed=False,
    )


def perturbing(
    kind: str,
    model: Path,
    work: Path,
    *,
    device: str = "cpu",
    sizes: Sequence[int] | None = None,
    n_tokens: int = N_TOKENS,
) -> Job:
    """Deleting genes one by one, by tokens per perturbed cell or by genes; the rest as in :func:`embedding`.

    Parameters
    ----------
    kind
        ``"perturb-length"`` or ``"perturb-genes"``.
    model, work, device, sizes, n_tokens
        As in :func:`embedding`; ``n_tokens`` are those of all perturbed cells.
    """
    from bench.token_folders import perturbable_folder
    from geneformer_fast import load, perturb
    from geneformer_fast.profiling.flops.work import encoder_flops

    encoder = load(model, device=device).eval()
    config = encoder.config
    n_blocks = config.layer_index("penultimate")

    def of(name: str, lengths: Sequence[int], n_genes: int) -> Callable[[], object]:
        folder, genes = perturbable_folder(work / "tokens" / f"{model.name}_{name}", lengths, config, n_genes)
        return lambda: perturb(folder, encoder, genes=genes, progress=False)

    what = f"delete genes one by one, {model.name}, {device}"
    case = f"cost_{kind}_{model.name.removeprefix('geneformer-')}_{device.partition(':')[0]}"
    if kind == "perturb-genes":
        longest = min(config.max_len, GENES_OF)
        run = lambda n: of(f"genes_{n}", [longest], n)  # noqa: E731
        return Job(case, what, "genes", sizes or GENES, run, _LINEAR)
    lengths = [length for length in sizes or LENGTHS if length <= min(config.max_len, n_tokens // N_GENES)]
    operations = fitted(lengths, [encoder_flops(config, n, n**2, n_blocks) for n in lengths], has_fixed=False)
    n_cells: Callable[[int], int] = lambda length: n_tokens // length // N_GENES  # noqa: E731
    return Job(
        case,
        what,
        "tokens per perturbed cell",
        lengths,
        lambda length: of(f"perturbed_{length}", [length] * n_cells(length), N_GENES),
        operations.exponent if operations else _LINEAR,
        per_cell=lambda length: n_cells(length) * N_GENES,
        has_fixed=False,
    )


def jobs(
    kinds: Sequence[str],
    presets: Sequence[str],
    work: Path,
    device: str,
    sizes: Sequence[int] | None = None,
    n_tokens: int = N_TOKENS,
) -> Iterator[Job]:
    """The curves, one after another, with models of random weights made in ``work``."""
    import torch

    from geneformer_fast import Encoder, EncoderConfig, save

    if "tokenize" in kinds:
        yield tokenizing(work, sizes=sizes)
    for preset in presets if {*kinds} - {"tokenize"} else ():
        torch.manual_seed(0)
        model = save(Encoder(EncoderConfig.preset(preset)).eval(), work / preset)
        for kind in (kind for kind in kinds if kind != "tokenize"):
            of_kind = perturbing if kind.startswith("perturb-") else embedding
            yield of_kind(kind, Path(model), work, device=device, sizes=sizes, n_tokens=n_tokens)


def said(curve: Mapping[str, Any]) -> str:
    """A curve in a sentence."""
    growth, which = curve["growth"], f"{curve['name']}, by {curve['size']}"
    if growth is None:
        return f"{which}: {len(curve['points'])} sizes measured; fewer than {FEWEST} say nothing of exponents"
    ends = f"{growth['exponent_low']:.2f} to {growth['exponent_high']:.2f}"
    verdict = "as it should be" if curve["is_as_expected"] else f"should be {curve['expected_exponent']:.2f}"
    return (
        f"{which}: exponent {growth['exponent']:.2f} ({ends} without one of the sizes), {verdict}; fixed part "
        f"{growth['fixed_s']:.3g} s; the curve is off by {growth['largest_error']:.0%} at most"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, fit, draw and save."""
    parser = argparse.ArgumentParser(prog="python -m bench cost", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--preset", action="append", help="model, repeatable (default: geneformer-v1-10m)")
    parser.add_argument("--device", default="cpu", help="of the model (default: cpu)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"per size (default: {SECONDS:g})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"runs of each size (default: {ROUNDS})")
    parser.add_argument("--tokens", type=int, default=N_TOKENS, help="of all cells, where cells or batches grow")
    parser.add_argument("--sizes", metavar="N,N,...", help="others, of one kind of curve")
    parser.add_argument("--work", type=Path, help="folder for files of cells (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="folder of this machine (default: bench/results/<machine or card>)")
    args = parser.parse_args(argv)
    kinds = args.kinds or [*KINDS]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"there is no curve called {unknown[0]!r}; there are {', '.join(KINDS)}")
    if args.rounds < 1 or args.seconds <= 0 or args.tokens < 1:
        parser.error("--rounds, --seconds and --tokens must be more than 0")
    if args.sizes and len(kinds) != 1:
        parser.error("--sizes are those of one kind of curve; name it")
    sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else None
    folders: set[Path] = set()
    with tempfile.TemporaryDirectory(prefix="cost_", dir=args.work) as folder:
        for job in jobs(kinds, args.preset or ["geneformer-v1-10m"], Path(folder), args.device, sizes, args.tokens):
            print(f"{job.case} ...", flush=True)
            curve = measured(job, seconds=args.seconds, rounds=args.rounds)
            device = "cpu" if job.case == "cost_tokenize" else args.device
            path = save_result(job.case, {"rounds": args.rounds, **curve}, folder=args.out, device=device)
            print(f"{said(curve)}\n{path}")
            folders.add(path.parent)
    for place in sorted(folders):
        print(draw([json.loads(path.read_text()) for path in sorted(place.glob("cost_*.json"))], place / "cost.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
