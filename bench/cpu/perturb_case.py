"""Speed, memory and agreement of ``perturb``, beside a plain implementation that works as the official tool does.

``python -m bench.cpu.perturb_case FOLDER --geometry v1-10m --threads 2`` times every candidate in turns on a prepared
folder and prints JSON. A process of its own for the reasons of ``quantized_case.py``;
``bench/cpu/test_bench_perturb.py`` starts it, also held to AVX2.

All get the same cells, weights and genes. Deleting every gene of a cell of 700 tokens takes the plain implementation
minutes, so that all delete the same few genes, which every cell has; one variant costs what another does. The cell
itself is computed once by all, as ever, which counts more here than among 700 variants.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bench.child import run_child
from bench.cpu.embed_candidates import GEOMETRIES, Geometry, Workplace, all_real_cells
from bench.cpu.embed_case import CLOCK
from bench.cpu.perturb_rival import deletion_values
from bench.cpu.quantized_case import HELD
from geneformer_fast.profiling.clock import percentiles

#: Tokens of the cells, about.
LENGTH = 700
#: Variants at once that the rivals are tried with; where more are slower than fewer, still more are not tried.
RIVAL_BATCHES = (1, 2, 4, 8, 16, 32)
#: Genes of the run whose memory is measured, at least; for rivals a batch. More genes are more batches, no larger ones.
GENES_OF_PEAK = 10
#: What all others are compared with.
WITNESS = "plain"
#: Cosines in float32 and bfloat16 may be so far apart; effects of one gene are 1e-4 to 0.3.
MOST_APART = {"float32": 1e-5, "bfloat16": 1e-3}
#: Of effects in bfloat16, gene by gene, with those in float32.
LEAST_RANK_CORRELATION = 0.98

Run = Callable[[Sequence[int], int], Any]


@dataclass(frozen=True)
class PerturbPlace(Workplace):
    """A :class:`Workplace` that also remembers which genes are deleted; scores differ enough for effects to be seen."""

    score_spread: float = 3.0

    @property
    def _genes(self) -> Path:
        return self.folder / f"genes-{self.geometry.name}.json"

    @property
    def genes(self) -> list[int]:
        """Tokens."""
        found: list[int] = json.loads(self._genes.read_text())
        return found

    def prepare_genes(self, cells: pa.Table, n_genes: int) -> None:
        """Make everything; ``n_genes`` that all cells have, spread evenly over the ranks of those in the first cell."""
        self.prepare_with(cells)
        lists = self.token_lists()
        framed = slice(1, -1) if self.has_cls else slice(None)
        common = set.intersection(*(set(tokens.tolist()) for tokens in lists))
        shared = [token for token in lists[0][framed].tolist() if token in common]
        if len(shared) < n_genes:
            raise ValueError(f"{len(lists)} cells share {len(shared)} genes, not {n_genes}")
        places = ((np.arange(n_genes) + 0.5) / n_genes * len(shared)).astype(int)
        self._genes.write_text(json.dumps([shared[place] for place in places]))

    @property
    def has_cls(self) -> bool:
        """Whether cells begin with CLS, whose hidden states are compared then."""
        return self.geometry.has_cls


def cells_near(family: str, n_cells: int, length: int = LENGTH) -> pa.Table:
    """Tokens of the real cells whose lengths are nearest to one."""
    table = all_real_cells(family)
    apart = np.abs(table["length"].to_numpy() - length)
    return table.take(np.sort(np.argsort(apart, kind="stable")[:n_cells]))


@dataclass(frozen=True)
class Candidate:
    """One way to perturb.

    Attributes
    ----------
    what
        One line for the tables.
    dtype
        ``"float32"`` or ``"bfloat16"``.
    load
        Takes a place, loads the model and gives what is timed: of genes, and of variants per batch for rivals.
    is_ours
        Ours choose their batches themselves.
    """

    what: str
    dtype: str
    load: Callable[[PerturbPlace], Run]
    is_ours: bool = True


def _ours(dtype: str) -> Callable[[PerturbPlace], Run]:
    def load_ours(place: PerturbPlace) -> Run:
        from geneformer_fast import load, perturb

        model = load(place.model, dtype=dtype, device="cpu")
        # From the disk, in batches of its own choice.
        return lambda genes, batch_size: perturb(place.tokens, model, genes=list(genes), progress=False)

    return load_ours


def _plain(dtype: str) -> Callable[[PerturbPlace], Run]:
    def load_plain(place: PerturbPlace) -> Run:
        from transformers import BertForMaskedLM

        model = BertForMaskedLM.from_pretrained(place.model).to(getattr(torch, dtype)).eval()
        cells = place.token_lists()
        values = partial(deletion_values, model, cells, has_cls=place.has_cls)
        return lambda genes, batch_size: values(genes=genes, batch_size=batch_size)

    return load_plain


CANDIDATES = {
    "float32": Candidate("this project, float32", "float32", _ours("float32")),
    "bfloat16": Candidate("this project, bfloat16", "bfloat16", _ours("bfloat16")),
    WITNESS: Candidate(
        "transformers as the official tool calls it: float32, default attention, padded, all states, all logits",
        "float32",
        _plain("float32"),
        is_ours=False,
    ),
    "plain-bfloat16": Candidate("the same in bfloat16", "bfloat16", _plain("bfloat16"), is_ours=False),
}


def names_here() -> list[str]:
    """Candidates that this CPU has instructions for."""
    from geneformer_kernels.target import cpu_features

    has_bfloat16 = bool({"avx512_bf16", "amx_bf16", "arm_bf16"} & cpu_features())
    return [name for name, candidate in CANDIDATES.items() if has_bfloat16 or candidate.dtype == "float32"]


def values_of(result: Any) -> dict[tuple[int, int], float]:
    """(Cell, deleted token) -> value, of what a candidate gave."""
    if isinstance(result, list):
        return {(cell, token): value for cell, found in enumerate(result) for (token, _), (value,) in found.items()}
    return {
        (int(cell), int(tokens[0])): float(value)
        for cell, tokens, value in zip(result["cell"], result["tokens"], result["value"], strict=True)
    }


def compared(name: str, found: Mapping[Any, float], witness: Mapping[Any, float]) -> dict[str, float]:
    """How far a candidate's values are from the witness's, and whether genes come in the same order.

    Raises
    ------
    RuntimeError
        They are not the same variants, or not the same values.
    """
    from scipy.stats import spearmanr

    if found.keys() != witness.keys():
        raise RuntimeError(f"{name} and {WITNESS} did not delete the same genes of the same cells")
    mine, other = (np.array([values[key] for key in witness]) for values in (found, witness))
    apart, dtype = float(np.abs(mine - other).max()), CANDIDATES[name].dtype
    correlation = float(spearmanr(mine, other).statistic)
    # Not above, and so not a number either.
    if not apart <= MOST_APART[dtype]:
        raise RuntimeError(f"{name} and {WITNESS} disagree by {apart:.2g}: their times mean nothing")
    if CANDIDATES[name].is_ours and not correlation >= LEAST_RANK_CORRELATION:
        raise RuntimeError(f"{name} and {WITNESS} rank effects differently ({correlation:.4f}): times mean nothing")
    return {"largest_difference": float(f"{apart:.3g}"), "rank_correlation": round(correlation, 6)}


def tuned_batch_size(run: Run, genes: Sequence[int]) -> tuple[int, dict[int, float]]:
    """Variants at once that are fastest for a rival, and all that was tried, in variants per second."""
    tried: dict[int, float] = {}
    run(genes[:1], 1)
    for size in (size for size in RIVAL_BATCHES if size <= len(genes)):
        some = genes[: max(size, 2)]
        (ms,) = CLOCK.samples(lambda size=size, some=some: tried.__setitem__(size, len(values_of(run(some, size)))), 1)
        tried[size] = round(tried[size] / ms * 1e3, 3)
        # Beyond its peak it only falls.
        if tried[size] < 0.85 * max(tried.values()):
            break
    return max(tried, key=tried.__getitem__), tried


def side_by_side(place: PerturbPlace, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Every candidate once per round, in another order every time; rows, and the batch sizes that were tried.

    Raises
    ------
    RuntimeError
        Two candidates do not compute the same, in any round.
    """
    genes, lists = place.genes, place.token_lists()
    runs = {name: CANDIDATES[name].load(place) for name in names}
    batch_sizes, tried = dict.fromkeys(names, 0), {}
    for name in names:
        if CANDIDATES[name].is_ours:
            runs[name](genes[:2], 0)  # compiles, packs weights
        else:
            batch_sizes[name], tried[name] = tuned_batch_size(runs[name], genes)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    agreement: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    results: dict[str, Any] = {}
    for i in range(rounds):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            (ms,) = CLOCK.samples(lambda name=name: results.update({name: runs[name](genes, batch_sizes[name])}), 1)
            seconds[name].append(ms / 1e3)
        found = {name: values_of(results.pop(name)) for name in names}
        for name in names:
            agreement[name].append(compared(name, found[name], found[WITNESS]))
    n_variants = len(lists) * len(genes)
    return {
        "candidates": {
            name: {
                "what": CANDIDATES[name].what,
                "dtype": CANDIDATES[name].dtype,
                "is_ours": CANDIDATES[name].is_ours,
                "batch_size": batch_sizes[name],
                "seconds": percentiles(np.array(seconds[name])),
                "perturbed_cells_per_s": percentiles(n_variants / np.array(seconds[name])),
                "largest_difference": max(each["largest_difference"] for each in agreement[name]),
                "rank_correlation": min(each["rank_correlation"] for each in agreement[name]),
            }
            for name in names
        },
        "batch_sizes_tried_cells_per_s": tried,
    }


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times as fast ours is, by the medians: ``"<ours> / <rival>"``."""
    at = {name: row["seconds"]["p50"] for name, row in rows.items()}
    pairs = [("float32", WITNESS), ("bfloat16", WITNESS), ("bfloat16", "plain-bfloat16")]
    return {f"{ours} / {rival}": round(at[rival] / at[ours], 2) for ours, rival in pairs if ours in at and rival in at}


def peak_bytes(place: PerturbPlace, name: str, batch_size: int, threads: int) -> int:
    """Peak resident memory of one run in a process of its own, imports and loading included."""
    command = [sys.executable, "-m", "bench.cpu.perturb_case", str(place.folder), "--only", name]
    options = ["--geometry", place.geometry.name, "--threads", str(threads), "--batch-size", str(batch_size)]
    return run_child([*command, *options]).peak_bytes


def measured(place: PerturbPlace, names: Sequence[str], rounds: int, threads: int) -> dict[str, Any]:
    """What the case prints."""
    found = side_by_side(place, names, rounds)
    for name, row in found["candidates"].items():
        row["peak_bytes"] = peak_bytes(place, name, row["batch_size"], threads)
    lengths = np.array([len(tokens) for tokens in place.token_lists()])
    return {
        "n_cells": len(lengths),
        "n_variants": len(lengths) * len(place.genes),
        "n_genes": len(place.genes),
        "lengths": percentiles(lengths),
        **found,
        "ratios": ratios(found["candidates"]),
        "held_to": "AVX2" if HELD.items() <= os.environ.items() else "",
    }


def main() -> None:
    """Time candidates side by side, or (``--only``) run one once, as `peak_bytes` does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CANDIDATES)
    parser.add_argument("--batch-size", type=int, default=0)
    args = parser.parse_args()
    import numba

    torch.set_num_threads(args.threads)
    numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))
    geometry: Geometry = GEOMETRIES[args.geometry]
    place = PerturbPlace(args.folder, geometry)
    if args.only:
        genes = place.genes[: max(GENES_OF_PEAK, args.batch_size)]
        CANDIDATES[args.only].load(place)(genes, args.batch_size)
        return
    print(json.dumps(measured(place, names_here(), args.rounds, args.threads)))


if __name__ == "__main__":
    main()
