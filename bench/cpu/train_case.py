"""Speed, memory and losses of pretraining, beside transformers' Trainer, in one run.

Every round trains every candidate once from the same weights, in turns, and losses are compared before any time is
believed. ``bench/cpu/test_bench_train.py`` runs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.child import run_child
from bench.cpu.train_candidates import CANDIDATES, DROPOUT, GEOMETRY, Workplace
from bench.cpu.train_rival import Schedule, Trained
from geneformer_fast.profiling.clock import percentiles

#: With dropout, runs from the same weights differ by chance: mean losses may differ by so many nats.
BAND_WITH_DROPOUT = 0.03
#: Without dropout, every step's loss may differ by so many nats from the Trainer's in float32.
BAND = {"float32": 0.002, "bfloat16": 0.02}
# A rival is not asked to fill the machine: it would be killed.
SHARE_OF_MEMORY = 0.5


class SideBySide:
    """Candidates on the same masked cells, timed in turns.

    Parameters
    ----------
    place
        Prepared.
    names
        Of `CANDIDATES`; the first is timed by the caller, through `first_once`.
    schedule
        Of every run.
    micro_batches
        Cells at once of every rival.
    """

    def __init__(
        self, place: Workplace, names: Sequence[str], schedule: Schedule, micro_batches: Mapping[str, int]
    ) -> None:
        self.place, self.names, self.schedule, self.micro_batches = place, names, schedule, micro_batches
        examples = place.examples(schedule)
        self.lengths = np.array([len(example["input_ids"]) for example in examples])
        self.seconds: dict[str, list[list[float]]] = {name: [] for name in names}
        self.rounds = 0
        # Warm, and the losses that later rounds have to come near.
        self.losses = {name: self._run(name).losses for name in names}
        check_means(self.losses)

    def others_once(self) -> None:
        """One timed run of every candidate but the first, in another order every time."""
        others = self.names[1:]
        shift = self.rounds % len(others)
        for name in (*others[shift:], *others[:shift]):
            self._timed(name)
        self.rounds += 1

    def first_once(self) -> None:
        """One timed run of the first."""
        self._timed(self.names[0])

    def rows(self) -> dict[str, dict[str, Any]]:
        """What was measured, per candidate."""
        return {name: self._row(name) for name in self.names}

    def _timed(self, name: str) -> None:
        trained = self._run(name)
        check_means({**self.losses, name: trained.losses})
        self.seconds[name].append(trained.seconds)

    def _row(self, name: str) -> dict[str, Any]:
        candidate, micro_batch = CANDIDATES[name], self.micro_batches.get(name)
        seconds = np.array(self.seconds[name]).sum(1)
        return {
            "what": candidate.what,
            "is_ours": candidate.is_ours,
            "batch_size": micro_batch,
            "seconds": percentiles(seconds),
            "cells_per_s": percentiles(len(self.lengths) / seconds),
            "tokens_per_s": percentiles(self.lengths.sum() / seconds),
            "seconds_by_step": np.median(self.seconds[name], axis=0).round(3).tolist(),
            "losses": [round(loss, 5) for loss in self.losses[name]],
            "peak_bytes": peak_bytes(self.place, name, self.schedule, micro_batch or 0),
        }

    def _run(self, name: str) -> Trained:
        return CANDIDATES[name].run(self.place, self.schedule, DROPOUT, self.micro_batches.get(name, 0))


def check_means(losses: Mapping[str, Sequence[float]]) -> None:
    """Compare the mean loss of every run with the first rival's.

    Raises
    ------
    RuntimeError
        Two candidates that should learn the same do not.
    """
    witness = next(name for name in losses if not CANDIDATES[name].is_ours)
    for name, found in losses.items():
        difference = abs(float(np.mean(found)) - float(np.mean(losses[witness])))
        if len(found) != len(losses[witness]) or not difference <= BAND_WITH_DROPOUT:
            raise RuntimeError(
                f"{name} and {witness} disagree (mean losses differ by {difference:.4f}, allowed are "
                f"{BAND_WITH_DROPOUT}): their times mean nothing"
            )


def curves(
    place: Workplace, names: Sequence[str], schedule: Schedule, micro_batches: Mapping[str, int]
) -> dict[str, Any]:
    """Losses without dropout, beside the Trainer's in float32, and by how much they differ at most."""
    losses = {name: CANDIDATES[name].run(place, schedule, 0.0, micro_batches.get(name, 0)).losses for name in names}
    exact = np.array(losses["trainer"])
    differences = {name: float(np.abs(np.array(found) - exact).max()) for name, found in losses.items()}
    return {
        "what": "losses in nats of every step, dropout 0, same weights, same masked cells",
        "n_steps": schedule.n_steps,
        "losses": {name: [round(loss, 5) for loss in found] for name, found in losses.items()},
        "largest_difference_from_trainer": {name: round(value, 5) for name, value in differences.items()},
        "bands": {name: BAND["bfloat16" if CANDIDATES[name].is_bfloat16 else "float32"] for name in names},
    }


def tuned_micro_batches(
    place: Workplace, names: Sequence[str], schedule: Schedule
) -> tuple[dict[str, int], dict[str, dict[int, float]]]:
    """Cells at once for every rival, and all that was tried, in cells per second.

    The Trainer as Geneformer calls it takes the whole step, halved until it fits into half of the memory; the steps
    stay the same. For the others all divisors of a step are tried, on two steps.
    """
    lengths = sorted((len(example["input_ids"]) for example in place.examples(schedule)), reverse=True)
    sizes = [size for size in range(1, schedule.cells_per_step + 1) if schedule.cells_per_step % size == 0]
    able = [size for size in sizes if not is_too_large(size, lengths[0])] or sizes[:1]
    chosen, tried = {}, {}
    for name in names:
        if CANDIDATES[name].is_ours:
            continue
        if name == "trainer":
            chosen[name] = able[-1]
            continue
        tried[name] = {}
        short = replace(schedule, n_steps=2)
        for size in able:
            seconds = sum(CANDIDATES[name].run(place, short, DROPOUT, size).seconds)
            tried[name][size] = round(2 * schedule.cells_per_step / seconds, 3)
        chosen[name] = max(tried[name], key=tried[name].__getitem__)
    return chosen, tried


def is_too_large(size: int, length: int) -> bool:
    """Whether the longest cells, so many at once, would need more memory than a rival is given.

    With dropout transformers' attention keeps four float32 matrices of all pairs per head and layer, and the loss holds
    four times the logits.
    """
    pairs = 4 * GEOMETRY.n_layers * GEOMETRY.n_heads * size * length**2 * 4
    logits = 4 * size * length * GEOMETRY.vocab_size * 4
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pairs + logits > SHARE_OF_MEMORY * machine


def peak_bytes(place: Workplace, name: str, schedule: Schedule, micro_batch: int) -> int:
    """Peak resident memory of one run in a process of its own."""
    numbers = {"--steps": schedule.n_steps, "--cells-per-step": schedule.cells_per_step, "--micro-batch": micro_batch}
    options = [str(part) for option in numbers.items() for part in option]
    command = [sys.executable, "-m", "bench.cpu.train_case", "--only", name, "--folder", str(place.folder), *options]
    return run_child(command).peak_bytes


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many times faster ours are, by the medians: ``"<ours> / <rival>"``."""
    return {
        f"{ours} / {rival}": round(rows[rival]["seconds"]["p50"] / rows[ours]["seconds"]["p50"], 2)
        for ours in rows
        for rival in rows
        if CANDIDATES[ours].is_ours and not CANDIDATES[rival].is_ours
    }


def main() -> None:
    """Train one candidate once on a prepared folder: what `peak_bytes` measures."""
    parser = argparse.ArgumentParser(description="train one candidate once")
    parser.add_argument("--only", choices=CANDIDATES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--cells-per-step", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    args = parser.parse_args()
    schedule = Schedule(args.steps, args.cells_per_step)
    CANDIDATES[args.only].run(Workplace(args.folder), schedule, DROPOUT, args.micro_batch)


if __name__ == "__main__":
    main()
