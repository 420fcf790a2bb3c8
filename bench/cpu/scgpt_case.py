"""Embedding cells with scGPT's whole-human shape, beside its published way in plain torch: same weights, one run.

``python -m bench.cpu.scgpt_case FOLDER --threads 2`` makes the folder's model and cells where they are not there, times
every candidate in turns and prints JSON; with ``--only`` it runs one once, for its memory.
``bench/cpu/test_bench_scgpt.py`` starts it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.child import run_child
from bench.cpu import scgpt_rival
from bench.cpu.embed_candidates import SHARED
from bench.cpu.embed_case import CLOCK, centred_cosine
from geneformer_fast import EncoderConfig, embed, load, open_tokens, tokenize
from geneformer_fast.data.identity import identity_of
from geneformer_fast.profiling.clock import percentiles
from geneformer_fast.profiling.flops.work import encoder_flops

PRESET = "scgpt-whole-human"
#: Files of real counts whose cells give the distribution of lengths.
FILES = ("pbmc_facs/pbmc_facs.h5ad", "pbmc3k/pbmc3k.h5ad")
LEAST_COSINE, LEAST_COSINE_BFLOAT16 = 0.9999, 0.98
#: Cells per batch that the tuned rivals are tried with, on a part of the cells.
BATCH_SIZES, N_TRIED = (1, 2, 4, 8, 16), 16
# Scores of attention have about this spread, as those of trained models do; of fresh weights all would be alike.
_SPREAD = 3.0

Run = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Candidate:
    """One way to embed: a line for the tables, what loads it with a batch size (0: its own), and whether it is ours."""

    what: str
    load: Callable[[Path, int], Run]
    is_ours: bool = False
    is_tuned: bool = False


def prepare(folder: Path, n_cells: int) -> None:
    """A checkpoint of theirs with random weights, and a token folder of real cells with as many genes as all have."""
    import anndata

    files = [anndata.read_h5ad(SHARED / "data" / name) for name in FILES]
    genes = sorted({str(gene) for data in files for gene in data.var["ensembl_id"]})
    write_model(folder / "model", genes)
    n_genes = np.concatenate([np.diff(data.X.indptr) for data in files])
    by_length = np.argsort(n_genes, kind="stable")
    # The middles of equal shares of the sorted cells, in an order by chance.
    chosen = by_length[((np.arange(n_cells) + 0.5) / n_cells * len(by_length)).astype(int)]
    paths, start = [], 0
    for number, data in enumerate(files):
        rows = np.sort(chosen[(chosen >= start) & (chosen < start + data.n_obs)] - start)
        start += data.n_obs
        if len(rows):
            part = data[np.random.default_rng(number).permutation(rows)].copy()
            paths.append(str(folder / f"cells-{number}.h5ad"))
            anndata.AnnData(part.X, obs=part.obs[[]], var=part.var[["ensembl_id"]]).write_h5ad(paths[-1])
    tokenize(paths, folder / "tokens", family="scgpt", dictionary=folder / "model", progress=False)


def write_model(folder: Path, genes: Sequence[str]) -> None:
    """``args.json``, ``vocab.json`` and ``best_model.pt`` of the whole-human shape."""
    config = EncoderConfig.preset(PRESET)
    folder.mkdir(parents=True)
    names = [*genes, *(f"OTHER{i}" for i in range(config.vocab_size - 3 - len(genes)))]
    vocabulary = {name: i for i, name in enumerate((*names, "<pad>", "<cls>", "<eoc>"))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    args = {
        "embsize": config.width, "nheads": config.n_heads, "d_hid": config.ff_width, "nlayers": config.n_layers,
        "n_layers_cls": 3, "dropout": config.dropout, "pad_token": "<pad>", "pad_value": -2, "n_bins": config.n_bins,
        "max_seq_len": 1200, "input_style": "binned", "input_emb_style": "continuous",
    }  # fmt: skip
    (folder / "args.json").write_text(json.dumps(args))
    torch.manual_seed(0)
    model = scgpt_rival.PlainScGPT(
        config.vocab_size, config.width, config.n_heads, config.ff_width, config.n_layers, config.pad_id
    )
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("in_proj_weight"):
            tensor[: 2 * config.width].normal_(0.0, (_SPREAD / config.width) ** 0.5)
    torch.save(OrderedDict(state), folder / "best_model.pt")


def cells_of(folder: Path) -> list[np.ndarray]:
    """[n, 2] genes and values of every cell in memory, ``<cls>`` first, as the model reads them."""
    config = load(folder / "model", device="cpu").config
    with open_tokens(folder / "tokens") as tokens:
        identity_of(tokens, config)
        values, bounds = tokens.read(range(tokens.n_cells))
    return np.split(values, bounds[1:-1])


def _ours(dtype: str) -> Callable[[Path, int], Run]:
    def load_ours(folder: Path, batch_size: int) -> Run:
        model = load(folder / "model", dtype=dtype, device="cpu")
        # From the disk, in batches of its own choice.
        return lambda cells: embed(folder / "tokens", model, progress=False)

    return load_ours


def _published(dtype: torch.dtype = torch.float32, *, is_sorted: bool = False) -> Callable[[Path, int], Run]:
    def load_theirs(folder: Path, batch_size: int) -> Run:
        config = EncoderConfig.preset(PRESET)
        model = scgpt_rival.plain_scgpt(folder / "model", config.n_heads, config.pad_id).to(dtype)
        size = batch_size or scgpt_rival.BATCH_SIZE
        return lambda cells: scgpt_rival.embeddings(model, cells, batch_size=size, is_sorted=is_sorted)

    return load_theirs


CANDIDATES = {
    "float32": Candidate("this project, float32", _ours("float32"), is_ours=True),
    "auto": Candidate("this project, the fastest dtype of this CPU", _ours("auto"), is_ours=True),
    "published": Candidate(
        "the published way: torch.nn.TransformerEncoder, float32, 64 cells as they come, padded to the longest",
        _published(),
    ),
    "published-tuned": Candidate(
        "the same, longest cells first, with the batch size that is fastest here", _published(is_sorted=True),
        is_tuned=True,
    ),
    "published-bfloat16": Candidate(
        "the same in bfloat16", _published(torch.bfloat16, is_sorted=True), is_tuned=True
    ),
}  # fmt: skip
#: Ours beside theirs, in the same width of numbers.
PAIRS = (
    ("float32", "published"),
    ("float32", "published-tuned"),
    ("auto", "published"),
    ("auto", "published-bfloat16"),
)


def names_here() -> list[str]:
    """Candidates that mean something on this CPU: bfloat16 only where it has it."""
    from geneformer_kernels.target import target_of

    has = target_of("cpu").has_fast_bf16
    return [name for name in CANDIDATES if has or name not in ("auto", "published-bfloat16")]


def side_by_side(folder: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Every candidate once per round, in another order every time; what was measured, per candidate.

    Raises
    ------
    RuntimeError
        Two candidates do not compute the same.
    """
    cells, names = cells_of(folder), names_here()
    sizes = {name: _tuned(folder, name, cells) if CANDIDATES[name].is_tuned else 0 for name in names}
    runs = {name: CANDIDATES[name].load(folder, sizes[name]) for name in names}
    results = {name: run(cells) for name, run in runs.items()}  # compiled, and in memory
    cosines = {name: centred_cosine(result, results["published"]) for name, result in results.items()}
    for name, cosine in cosines.items():
        least = LEAST_COSINE_BFLOAT16 if name in ("auto", "published-bfloat16") else LEAST_COSINE
        if not cosine >= least:
            raise RuntimeError(f"{name} and the published way disagree (cosine {cosine:.6f}): times mean nothing")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in (*names[i % len(names) :], *names[: i % len(names)]):
            (ms,) = CLOCK.samples(lambda name=name: runs[name](cells), 1)
            seconds[name].append(ms / 1e3)
    lengths = np.array([len(cell) for cell in cells])
    flops = encoder_flops(EncoderConfig.preset(PRESET), lengths.sum(), (lengths**2).sum())
    rows = {}
    for name in names:
        taken = np.array(seconds[name])
        size = 0 if CANDIDATES[name].is_ours else sizes[name] or scgpt_rival.BATCH_SIZE
        rows[name] = {
            "what": CANDIDATES[name].what,
            "is_ours": CANDIDATES[name].is_ours,
            "batch_size": size,
            "seconds": percentiles(taken),
            "cells_per_s": percentiles(len(cells) / taken),
            "tflops": float(f"{flops / np.median(taken) / 1e12:.4g}"),
            "least_centred_cosine": round(cosines[name], 6),
        }
    return rows


def _tuned(folder: Path, name: str, cells: Sequence[np.ndarray]) -> int:
    """The rival's fastest number of cells at once, on cells of all lengths."""
    order = np.argsort([len(cell) for cell in cells], kind="stable")
    part = [cells[i] for i in order[:: max(1, len(order) // N_TRIED)]]
    taken = {}
    for size in BATCH_SIZES:
        run = CANDIDATES[name].load(folder, size)
        run(part[:1])
        (taken[size],) = CLOCK.samples(lambda run=run: run(part), 1)
    return min(taken, key=taken.__getitem__)


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as fast ours is, by the medians: ``"<ours> / <theirs>"``."""
    at = {name: row["seconds"]["p50"] for name, row in rows.items()}
    return {
        f"{ours} / {theirs}": round(at[theirs] / at[ours], 2) for ours, theirs in PAIRS if {ours, theirs} <= set(at)
    }


def main() -> None:
    """Time candidates side by side, or (``--only``) run one once, for its memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=CANDIDATES)
    parser.add_argument("--batch-size", type=int, default=0)
    args = parser.parse_args()
    import numba

    torch.set_num_threads(args.threads)
    numba.set_num_threads(min(args.threads, numba.config.NUMBA_NUM_THREADS))
    if not (args.folder / "tokens").exists():
        prepare(args.folder, args.cells)
    if args.only:
        cells = [] if CANDIDATES[args.only].is_ours else cells_of(args.folder)
        CANDIDATES[args.only].load(args.folder, args.batch_size)(cells)
        return
    rows = side_by_side(args.folder, args.rounds)
    for name, row in rows.items():
        command = [sys.executable, "-m", "bench.cpu.scgpt_case", str(args.folder), "--threads", str(args.threads)]
        row["peak_bytes"] = run_child([*command, "--only", name, "--batch-size", str(row["batch_size"])]).peak_bytes
    lengths = np.array([len(cell) for cell in cells_of(args.folder)])
    found = {
        "n_tokens": int(lengths.sum()),
        "lengths": percentiles(lengths),
        "candidates": rows,
        "ratios": ratios(rows),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
