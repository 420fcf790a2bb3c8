"""One way to embed cells, in a process of its own: ``python -m geneformer_fast.quickstart.candidate NAME FOLDER``.

A process of its own has a peak of memory of its own, and imports nothing that its way does not need. The folder holds
``job.json`` and ``cells.npz`` (see :mod:`geneformer_fast.quickstart.side_by_side`); ``NAME.npy`` and ``NAME.json`` are
the answer.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[], np.ndarray]
#: A pass over all cells, and what is to be told of it.
Pass = tuple[Run, dict[str, Any]]


def main(name: str, folder: Path) -> None:
    """Time a candidate's passes and write what the fastest one computed, and the memory that it took to get there."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    fastest = float("inf")
    for run, facts in CANDIDATES[name](job, folder):
        begin = time.perf_counter()
        found = run()
        seconds = time.perf_counter() - begin
        if seconds < fastest:
            fastest, embeddings = seconds, found
            told = {"seconds": seconds, "peak_bytes": peak_bytes(job["device"]), **facts}
    np.save(folder / f"{name}.npy", embeddings)
    (folder / f"{name}.json").write_text(json.dumps(told), encoding="utf-8")


def peak_bytes(device: str) -> int:
    """The most memory so far: of the card, or of this process (not of its parent, as ``getrusage`` would have it)."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_reserved()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _extractor(job: dict[str, Any], folder: Path) -> list[Pass]:
    from transformers import BertForMaskedLM

    from geneformer_fast.quickstart.stock import extractor_embeddings

    model: Any = BertForMaskedLM.from_pretrained(job["model"]).to(job["device"]).eval()
    cells, size = _cells(folder), job["extractor_batch_size"]
    facts = {"batch_size": size, "dtype": "float32", "attention": model.config._attn_implementation}
    # One pass, since it is the slowest way by far; what its first calls set up is set up before.
    extractor_embeddings(model, cells[:2], batch_size=1)
    return [(lambda: extractor_embeddings(model, cells, batch_size=size), facts)]


def _stock(job: dict[str, Any], folder: Path) -> list[Pass]:
    from transformers import BertModel

    from geneformer_fast.quickstart.stock import BATCH_SIZES, stock_embeddings

    model: Any = BertModel.from_pretrained(job["model"], attn_implementation="sdpa", add_pooling_layer=False)
    model, cells = model.to(job["device"]).eval(), _cells(folder)
    stock_embeddings(model, cells[:2], batch_size=1)
    return [
        (
            lambda size=size: stock_embeddings(model, cells, batch_size=size),  # type: ignore[misc]
            {"batch_size": size, "dtype": "float32", "attention": "sdpa"},
        )
        for size in BATCH_SIZES[job["device"]]
    ]


def _ours(dtype: str) -> Callable[[dict[str, Any], Path], list[Pass]]:
    def load(job: dict[str, Any], folder: Path) -> list[Pass]:
        import geneformer_fast

        model = geneformer_fast.load(job["model"], dtype=dtype, device=job["device"])

        def run() -> np.ndarray:
            # From the disk, in batches of its own choice.
            embeddings = geneformer_fast.embed(job["tokens"], model, pool="cls", layer="last", progress=False)
            assert isinstance(embeddings, np.ndarray)
            return embeddings

        return 2 * [(run, {"dtype": str(model.dtype).removeprefix("torch.")})]

    return load


def _cells(folder: Path) -> list[np.ndarray]:
    with np.load(folder / "cells.npz", allow_pickle=False) as stored:
        return np.split(stored["values"], np.cumsum(stored["lengths"])[:-1])


#: What prepares a way to embed: its passes over all cells. The fastest one counts, so that nobody's first calls do.
CANDIDATES: dict[str, Callable[[dict[str, Any], Path], list[Pass]]] = {
    "extractor": _extractor,
    "stock": _stock,
    "ours": _ours("float32"),
    "ours-auto": _ours("auto"),
}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
