"""AIDO.Cell at full length on a CPU, beside the published way in plain torch: same weights, same cells, one run.

``python -m bench.cpu.aido_case FOLDER --threads 2`` makes the folder's model and cells where they are not there, times
every candidate in turns and prints JSON; with ``--only`` it runs one once, for its memory.
``bench/cpu/test_bench_aido.py`` starts it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.child import run_child
from bench.cpu import aido_rival
from bench.cpu.embed_case import CLOCK, centred_cosine
from geneformer_fast import Encoder, EncoderConfig, Ragged, load, save
from geneformer_fast.profiling.clock import percentiles
from geneformer_fast.profiling.flops.work import encoder_flops

PRESET = "aido-cell-3m"
#: Genes of a cell that are not 0, as in blood.
N_GENES = 2_000
#: Of float32 against the published way, and of what is computed in bfloat16; cosines of centred rows.
LEAST_COSINE, LEAST_COSINE_BFLOAT16 = 0.9999, 0.98
#: Scores of attention have about this spread, as those of trained models do; of fresh weights all would be alike.
_SPREAD = 2.0

Run = Callable[[np.ndarray], np.ndarray]


def prepare(folder: Path, n_cells: int, preset: str = PRESET) -> None:
    """A checkpoint of theirs with random weights, and values of cells as the model reads them."""
    config = EncoderConfig.preset(preset)
    torch.manual_seed(0)
    encoder = Encoder(config, "mlm")
    with torch.no_grad():
        for block in encoder.blocks:
            block.qkv.weight[: 2 * config.width].normal_(0.0, (_SPREAD / config.width) ** 0.5)
        for table in (encoder.embeddings.linear1, encoder.embeddings.linear2, encoder.embeddings.lookup_table):
            table.weight.normal_(0.0, 0.5)
    save(encoder, folder / "model")
    rng = np.random.default_rng(0)
    values = np.zeros((n_cells, config.max_len), dtype=np.float32)
    for row in values:
        genes = rng.choice(config.max_len - 2, N_GENES, replace=False)
        counts = rng.geometric(0.45, N_GENES)
        row[genes] = np.log1p(counts / counts.sum() * 1e4)
    values[:, -2:] = 5.0
    np.save(folder / "cells.npy", values)


def _ours(dtype: str) -> Callable[[Path], Run]:
    def load_ours(folder: Path) -> Run:
        encoder = load(folder / "model", dtype=dtype, device="cpu")

        def run(cells: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                rows = [encoder(Ragged.from_cells([torch.from_numpy(cell)])).values.mean(0) for cell in cells]
                return torch.stack(rows).numpy()

        return run

    return load_ours


def _published(folder: Path) -> Run:
    from safetensors.torch import load_file

    weights, config = load_file(folder / "model" / "model.safetensors"), EncoderConfig.preset(PRESET)
    shape = {"n_layers": config.n_layers, "n_heads": config.n_heads, "eps": config.eps}
    return lambda cells: torch.cat(
        [aido_rival.embeddings(weights, torch.from_numpy(cell)[None], **shape) for cell in cells]
    ).numpy()


#: What is timed: a line for the tables, what loads it, and whether it is this project's.
CANDIDATES: dict[str, tuple[str, Callable[[Path], Run], bool]] = {
    "float32": ("this project, float32", _ours("float32"), True),
    "auto": ("this project, the fastest dtype of this CPU", _ours("auto"), True),
    "published": ("the published way in plain torch: dense, SDPA, float32", _published, False),
}


def side_by_side(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Every candidate once per round, in another order every time; what was measured, per candidate.

    Raises
    ------
    RuntimeError
        Two candidates do not compute the same.
    """
    cells = np.load(folder / "cells.npy")
    runs = {name: loader(folder) for name, (_, loader, _) in CANDIDATES.items()}
    for run in runs.values():
        run(cells[:1, :64])  # compiled, and in memory
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, np.ndarray] = {}
    for i in range(rounds):
        names = list(runs)
        for name in (*names[i % len(names) :], *names[: i % len(names)]):

            def once(name: str = name) -> None:
                results[name] = runs[name](cells)

            (ms,) = CLOCK.samples(once, 1)
            seconds[name].append(ms / 1e3)
    cosines = {name: centred_cosine(result, results["published"]) for name, result in results.items()}
    for name, cosine in cosines.items():
        least = LEAST_COSINE if name == "float32" else LEAST_COSINE_BFLOAT16
        if not cosine >= least:
            raise RuntimeError(f"{name} and the published way disagree (cosine {cosine:.6f}): times mean nothing")
    return {
        name: {
            "what": what,
            "is_ours": is_ours,
            "seconds_per_cell": percentiles(np.array(seconds[name]) / len(cells)),
            "least_centred_cosine": round(cosines[name], 6),
        }
        for name, (what, _, is_ours) in CANDIDATES.items()
    }


def main() -> None:
    """Time candidates side by side, or (``--only``) run one once on one cell, for its memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cells", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=CANDIDATES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.folder / "cells.npy").exists():
        prepare(args.folder, args.cells)
    if args.only:
        CANDIDATES[args.only][1](args.folder)(np.load(args.folder / "cells.npy")[:1])
        return
    rows = side_by_side(args.folder, args.rounds)
    config = EncoderConfig.preset(PRESET)
    flops = encoder_flops(config, config.max_len, config.max_len**2, config.n_layers)
    for name, row in rows.items():
        row["tflops"] = float(f"{flops / row['seconds_per_cell']['p50'] / 1e12:.4g}")
        command = [sys.executable, "-m", "bench.cpu.aido_case", str(args.folder), "--threads", str(args.threads)]
        row["peak_bytes"] = run_child([*command, "--only", name]).peak_bytes
    at = {name: row["seconds_per_cell"]["p50"] for name, row in rows.items()}
    ratios = {f"{name} / published": round(at["published"] / at[name], 2) for name in at if name != "published"}
    print(json.dumps({"candidates": rows, "ratios": ratios}))


if __name__ == "__main__":
    main()
