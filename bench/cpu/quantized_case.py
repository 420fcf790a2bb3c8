"""Speed, memory and agreement of quantized models, beside the same model unquantized and torch's own quantization.

``python -m bench.cpu.quantized_case FOLDER --geometry v1-10m --threads 2`` times every candidate in turns and prints
JSON. It is a process of its own since torch and oneDNN read from the environment, once, which instructions they use:
``bench/cpu/test_bench_quantized.py`` starts it, also held to AVX2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.child import run_child
from bench.cpu.embed_candidates import GEOMETRIES, Run, Workplace
from bench.cpu.embed_case import CLOCK, centred_cosine
from bench.cpu.embed_rival import stock_embeddings
from geneformer_fast.profiling.clock import percentiles

#: Environment that holds everything to AVX2; numba's compiler, too, so that loops have sixteen registers and no masks.
HELD = {
    **{"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",  # what quantize_dynamic multiplies with chooses by itself
    **{"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""},
}
#: Random weights, so that no layer has outliers: what is left is rounding. The mean over layers is what counts.
LEAST_COSINE = 0.99
#: Of rows of eight bits: 0.988 was measured in twelve layers of random weights (V2-104M, 12 cells).
LEAST_COSINE_ROWS = 0.98
#: Cells per batch that the rival is tried with; longer batches are slower on every CPU seen.
RIVAL_BATCHES = (1, 2, 4)


@dataclass(frozen=True)
class Candidate:
    """One way to embed: a line for the tables, and what loads the model."""

    what: str
    load: Callable[[Workplace], Run]
    is_ours: bool = True


def quantized_folder(place: Workplace, scheme: str) -> Path:
    """The checkpoint quantized by the project; made once."""
    from geneformer_fast import quantize

    folder = place.folder / f"model-{place.geometry.name}-{scheme}"
    if not folder.exists():
        quantize(place.model, folder, scheme=scheme)
    return folder


def _ours(dtype: str, scheme: str | None = None) -> Callable[[Workplace], Run]:
    def load_ours(place: Workplace) -> Run:
        from geneformer_fast import embed, load

        model = load(quantized_folder(place, scheme) if scheme else place.model, dtype=dtype, device="cpu")
        return lambda cells, batch_size: embed(place.tokens, model, pool="mean", layer="last", progress=False)

    return load_ours


def _dynamic(place: Workplace) -> Run:
    from transformers import BertModel

    model = BertModel.from_pretrained(place.model, attn_implementation="sdpa", add_pooling_layer=False).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is about to be removed
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    has_cls = place.geometry.has_cls
    return lambda cells, batch_size: stock_embeddings(model, cells, has_cls=has_cls, batch_size=batch_size)


CANDIDATES = {
    "int8": Candidate('this project, scheme "int8"', _ours("auto", "int8")),
    "int8-weights": Candidate('this project, scheme "int8-weights"', _ours("auto", "int8-weights")),
    "auto": Candidate("this project, not quantized, fastest dtype", _ours("auto")),
    "float32": Candidate("this project, not quantized, float32", _ours("float32")),
    "quantize-dynamic": Candidate(
        "torch's quantize_dynamic on transformers' BertModel, SDPA, padded", _dynamic, is_ours=False
    ),
}


def side_by_side(
    place: Workplace, names: Sequence[str], rounds: int, candidates: Mapping[str, Candidate] | None = None
) -> dict[str, dict[str, Any]]:
    """Every candidate once per round, in another order every time; what was measured, per candidate.

    ``candidates`` are :data:`CANDIDATES` unless others are given; one of them is ``float32``.

    Raises
    ------
    RuntimeError
        Two candidates do not compute the same.
    """
    candidates, cells = candidates or CANDIDATES, place.token_lists()
    runs = {name: candidates[name].load(place) for name in names}
    batch_sizes = {name: 0 if candidates[name].is_ours else _tuned(runs[name], cells) for name in names}
    results = {name: runs[name](cells, batch_sizes[name]) for name in names}
    cosines = {name: centred_cosine(result, results["float32"]) for name, result in results.items()}
    for name, cosine in cosines.items():
        if candidates[name].is_ours and not cosine >= (LEAST_COSINE_ROWS if name == "int8" else LEAST_COSINE):
            raise RuntimeError(f"{name} and float32 disagree (cosine {cosine:.6f}): their times mean nothing")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            (ms,) = CLOCK.samples(lambda name=name: runs[name](cells, batch_sizes[name]), 1)
            seconds[name].append(ms / 1e3)
    return {
        name: {
            "what": candidates[name].what,
            "is_ours": candidates[name].is_ours,
            "batch_size": batch_sizes[name],
            "cells_per_s": percentiles(len(cells) / np.array(seconds[name])),
            "seconds": percentiles(np.array(seconds[name])),
            "least_centred_cosine": round(cosines[name], 6),
        }
        for name in names
    }


def _tuned(run: Run, cells: Sequence[np.ndarray]) -> int:
    """The rival's fastest number of cells at once, on a part of the cells."""
    part, taken = cells[:12], {}
    run(part[:1], 1)
    for size in RIVAL_BATCHES:
        (taken[size],) = CLOCK.samples(lambda size=size: run(part, size), 1)
    return min(taken, key=taken.__getitem__)


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times as fast int8 is, by the medians: ``"int8 / <other>"``."""
    at = {name: row["seconds"]["p50"] for name, row in rows.items()}
    return {f"int8 / {other}": round(at[other] / at["int8"], 2) for other in at if other != "int8"}


def peak_bytes(place: Workplace, name: str, batch_size: int, threads: int) -> int:
    """Peak resident memory of one run in a process of its own, imports and loading included."""
    command = [sys.executable, "-m", "bench.cpu.quantized_case", str(place.folder), "--only", name]
    options = ["--geometry", place.geometry.name, "--threads", str(threads), "--batch-size", str(batch_size)]
    return run_child([*command, *options]).peak_bytes


def main() -> None:
    """Time candidates side by side, or (``--only``) run one once, as `peak_bytes` does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=CANDIDATES)
    parser.add_argument("--batch-size", type=int, default=0)
    args = parser.parse_args()
    import numba

    torch.set_num_threads(args.threads)
    numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))
    place = Workplace(args.folder, GEOMETRIES[args.geometry])
    if args.only:
        cells = [] if CANDIDATES[args.only].is_ours else place.token_lists()
        CANDIDATES[args.only].load(place)(cells, args.batch_size)
        return
    for scheme in ("int8", "int8-weights"):
        quantized_folder(place, scheme)
    rows = side_by_side(place, list(CANDIDATES), args.rounds)
    for name, row in rows.items():
        row["peak_bytes"] = peak_bytes(place, name, row["batch_size"], args.threads)
    found = {
        "candidates": rows,
        "ratios": ratios(rows),
        "held_to": "AVX2" if HELD.items() <= os.environ.items() else "",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
