"""Speed and memory of embedding cells, beside the rivals, in one run.

Every round times every candidate once, so that noise on the machine hits all alike, and what they compute is compared
before any time is believed. ``bench/cpu/test_bench_embed.py`` runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.child import run_child
from bench.cpu.embed_candidates import CANDIDATES, GEOMETRIES, Run, Workplace
from bench.cpu.embed_rival import longest_first
from geneformer_fast.profiling.clock import WallClock, percentiles

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 100)
#: Agreement in float32, as cosine similarity per cell, centred over cells (without centring, all cells look alike).
LEAST_COSINE_FLOAT32 = 0.9999
#: What Geneformer's extractor takes if nobody says otherwise (``forward_batch_size``).
EXTRACTOR_BATCH_SIZE = 100
# A rival is not asked to fill the machine: it would be killed.
SHARE_OF_MEMORY = 0.5
#: Results of all candidates are in the host's memory when they are done.
CLOCK = WallClock()


class SideBySide:
    """Candidates on the same cells, timed in turns.

    Parameters
    ----------
    place
        Prepared.
    names
        Of `CANDIDATES`; the first is timed by the caller, through `first_once`.
    batch_sizes
        Cells per batch of every rival, as `tuned_batch_sizes` found them.
    """

    def __init__(self, place: Workplace, names: Sequence[str], batch_sizes: Mapping[str, int]) -> None:
        self.place, self.names, self.batch_sizes = place, names, batch_sizes
        self.cells = place.token_lists()
        self.runs = {name: CANDIDATES[name].load(place) for name in names}
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.rounds = 0
        # Warm, and the truth that later rounds have to repeat.
        self.results = {name: self._run(name) for name in names}
        self.agreement = check_agreement(self.results, place.geometry.least_cosine)

    def others_once(self) -> None:
        """One timed run of every candidate but the first, in another order every time."""
        others = self.names[1:]
        shift = self.rounds % len(others)
        for name in (*others[shift:], *others[:shift]):
            results: list[np.ndarray] = []
            (ms,) = CLOCK.samples(lambda name=name, results=results: results.append(self._run(name)), 1)
            self.seconds[name].append(ms / 1e3)
            check_agreement({**self.results, name: results[0]}, self.place.geometry.least_cosine)
        self.rounds += 1

    def first_once(self) -> np.ndarray:
        """One run of the first."""
        return self._run(self.names[0])

    def rows(self) -> dict[str, dict[str, Any]]:
        """What was measured, per candidate."""
        n_tokens = sum(len(tokens) for tokens in self.cells)
        return {name: self._row(name, np.array(self.seconds[name]), n_tokens) for name in self.names}

    def _row(self, name: str, seconds: np.ndarray, n_tokens: int) -> dict[str, Any]:
        candidate, batch_size = CANDIDATES[name], self.batch_sizes.get(name)
        return {
            "what": candidate.what,
            "layer": candidate.layer,
            "is_ours": candidate.is_ours,
            "batch_size": batch_size,
            "seconds": percentiles(seconds),
            "cells_per_s": percentiles(len(self.cells) / seconds),
            "tokens_per_s": percentiles(n_tokens / seconds),
            "agreement": self.agreement[name],
            "peak_bytes": peak_bytes(self.place, name, batch_size or 0),
        }

    def _run(self, name: str) -> np.ndarray:
        return self.runs[name](self.cells, self.batch_sizes.get(name, 0))


def check_agreement(results: Mapping[str, np.ndarray], least_bfloat16: float) -> dict[str, dict[str, Any]]:
    """Compare every result with the one of the same layer that came first among the rivals.

    Raises
    ------
    RuntimeError
        Two candidates that should compute the same do not.
    """
    found = {}
    for name, result in results.items():
        layer = CANDIDATES[name].layer
        others = [other for other in results if CANDIDATES[other].layer == layer]
        witness = next((other for other in others if not CANDIDATES[other].is_ours), others[0])
        cosine = centred_cosine(result, results[witness])
        is_exact = "float32" in name or name.startswith("extractor")
        least = LEAST_COSINE_FLOAT32 if is_exact and "extractor" in witness else least_bfloat16
        if not cosine >= least:
            raise RuntimeError(
                f"{name} and {witness} disagree (cosine {cosine:.6f} < {least}): their times mean nothing"
            )
        found[name] = {"with": witness, "least_centred_cosine": round(cosine, 6)}
    return found


def centred_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Smallest cosine over rows, after the mean row is taken away."""
    if a.shape != b.shape:
        return float("nan")
    center = b.mean(0, dtype=np.float64)
    a, b = a - center, b - center
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / norms).min())


def tuned_batch_sizes(place: Workplace, names: Sequence[str]) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
    """For every rival the batch size that is fastest, and all that was tried, in cells per second.

    The extractor as it comes keeps its own batch size, halved until its logits fit into half of the memory. For the
    others, each size is tried on batches of neighbours in the sorted order, at short, middling and long cells: there a
    batch has as little padding as in a run over many thousand cells.
    """
    chosen, tried = {}, {}
    cells = place.token_lists()
    cells = [cells[i] for i in longest_first(cells)]
    for name in names:
        if CANDIDATES[name].is_ours:
            continue
        if name == "extractor":
            chosen[name] = EXTRACTOR_BATCH_SIZE
            while is_too_large(place, name, chosen[name], len(cells[0])):
                chosen[name] //= 2
            continue
        run = CANDIDATES[name].load(place)
        tried[name] = {}
        run(cells[-1:], 1)
        for size in BATCH_SIZES:
            if size > len(cells) or is_too_large(place, name, size, len(cells[0])):
                break
            tried[name][size] = round(size * 3 / _seconds_of_batches(run, cells, size), 2)
            # Beyond its peak it only falls.
            if tried[name][size] < 0.85 * max(tried[name].values()):
                break
        chosen[name] = max(tried[name], key=tried[name].__getitem__)
    return chosen, tried


def _seconds_of_batches(run: Run, cells: list[np.ndarray], size: int) -> float:
    """Seconds for three batches of this size, of sorted cells."""
    total = 0.0
    for share in (0.1, 0.5, 0.9):
        start = int(share * (len(cells) - size))
        total += CLOCK.samples(lambda start=start: run(cells[start : start + size], size), 1)[0] / 1e3
    return total


def is_too_large(place: Workplace, name: str, size: int, length: int) -> bool:
    """Whether a batch of the longest cells would need more memory than the rival is given."""
    shape = place.geometry
    n_bytes = 2 if "bfloat16" in name else 4
    hidden = size * length * shape.width * (shape.n_layers + 8) * n_bytes
    logits = size * length * shape.vocab_size * n_bytes if "extractor" in name else 0
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return hidden + logits > SHARE_OF_MEMORY * machine


def peak_bytes(place: Workplace, name: str, batch_size: int) -> int:
    """Peak resident memory of one run in a process of its own."""
    arguments = ["--only", name, "--folder", str(place.folder), "--geometry", place.geometry.name]
    command = [sys.executable, "-m", "bench.cpu.embed_case", *arguments, "--batch-size", str(batch_size)]
    return run_child(command).peak_bytes


def default_attention(geometry: str) -> str:
    """Which attention transformers takes when nobody asks."""
    from transformers import BertForMaskedLM

    with torch.device("meta"):
        return str(BertForMaskedLM(GEOMETRIES[geometry].stock_config()).config._attn_implementation)


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times faster ours is, by the medians: ``"<ours> / <rival>"``."""
    pairs = [
        ("ours", "extractor"),
        ("ours", "extractor-tuned"),
        ("ours-float32", "extractor-tuned"),
        ("ours", "stock-bfloat16"),
        ("ours-last", "stock-bfloat16"),
    ]
    return {
        f"{ours} / {rival}": round(rows[rival]["seconds"]["p50"] / rows[ours]["seconds"]["p50"], 2)
        for ours, rival in pairs
        if ours in rows and rival in rows
    }


def main() -> None:
    """Run one candidate once on a prepared folder: what `peak_bytes` measures."""
    parser = argparse.ArgumentParser(description="run one candidate once")
    parser.add_argument("--only", choices=CANDIDATES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--batch-size", type=int, default=0)
    args = parser.parse_args()
    place = Workplace(args.folder, GEOMETRIES[args.geometry])
    cells = [] if CANDIDATES[args.only].is_ours else place.token_lists()
    CANDIDATES[args.only].load(place)(cells, args.batch_size)


if __name__ == "__main__":
    main()
