"""The same cells and weights through stock transformers and through this package, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geneformer_fast.errors import GeneformerFastError
from geneformer_fast.files.writing import write_json
from geneformer_fast.quickstart.stock import EXTRACTOR_BATCH_SIZE, extractor_batch_size, logits_bytes

#: What is said and drawn of each way to embed, in the order in which they run.
NAMES = {
    "extractor": "transformers as in Geneformer's extractor",
    "stock": "transformers at its best",
    "ours": "geneformer-fast",
    "ours-auto": "geneformer-fast",
}
#: What the extractor's logits may take: with its own 100 cells per batch they are 10 GB, which not every machine has.
MOST_LOGITS_BYTES = 1 << 30


@dataclass(frozen=True)
class Measured:
    """One way to embed.

    Attributes
    ----------
    what
        Its name, with dtype and cells per batch where these are not the usual ones.
    cells_per_s
        Of the fastest pass.
    peak_bytes
        Of its process, libraries included; or of the card.
    dtype, batch_size
        Of matrix products; cells per batch, None where it chooses itself.
    """

    what: str
    cells_per_s: float
    peak_bytes: int
    dtype: str
    batch_size: int | None


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes
    ----------
    measured
        By name, as in :data:`NAMES`; the last one is the one that users get without asking for a dtype.
    largest_difference
        Between embeddings in float32 of ours and of both stock ways, over all cells and dimensions.
    auto_difference
        Between ours in the fastest dtype of this machine and in float32; None where that is float32.
    largest_value
        Of stock embeddings, to see differences beside.
    n_cells, n_tokens
        That everybody embedded.
    extractor_logits_bytes
        What the extractor's own batch size would need for logits alone.
    """

    measured: dict[str, Measured]
    largest_difference: float
    auto_difference: float | None
    largest_value: float
    n_cells: int
    n_tokens: int
    extractor_logits_bytes: int

    @property
    def ours(self) -> Measured:
        """Ours as users get it."""
        return list(self.measured.values())[-1]

    def times_faster(self, name: str, *, ours: str = "ours") -> float:
        """Cells per second of ours over those of another: in float32 as theirs, or ``"ours-auto"`` as users get it."""
        return self.measured[ours].cells_per_s / self.measured[name].cells_per_s

    def share_of_memory(self, name: str, *, ours: str = "ours") -> float:
        """Peak memory of ours over that of another, in the same way."""
        return self.measured[ours].peak_bytes / self.measured[name].peak_bytes


def compare(
    model: Path, tokens: Path, cells: Sequence[np.ndarray], vocab_size: int, folder: Path, *, device: str, auto: str
) -> Comparison:
    """Embed the same cells in every way, one after another.

    Parameters
    ----------
    model
        A BertForMaskedLM folder.
    tokens, cells
        The cells as a token folder, and the same in memory.
    vocab_size
        Of the model.
    folder
        Where processes leave their results.
    device
        Where all of them compute.
    auto
        The fastest dtype there; if it is another than float32, it is measured too.

    Raises
    ------
    GeneformerFastError
        One of the processes failed.
    """
    lengths = np.array([len(each) for each in cells])
    np.savez(folder / "cells.npz", values=np.concatenate(list(cells)), lengths=lengths)
    job = {
        "model": str(model.resolve()),
        "tokens": str(tokens.resolve()),
        "device": device,
        "extractor_batch_size": extractor_batch_size(lengths, vocab_size, MOST_LOGITS_BYTES),
    }
    write_json(folder / "job.json", job)
    names = [name for name in NAMES if name != "ours-auto" or auto != "float32"]
    measured = {name: _measured(name, folder, len(cells)) for name in names}
    found = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in names}
    return Comparison(
        measured,
        max(_difference(found["ours"], found[name]) for name in ("extractor", "stock")),
        _difference(found["ours"], found["ours-auto"]) if "ours-auto" in found else None,
        float(np.abs(found["stock"]).max()),
        len(cells),
        int(lengths.sum()),
        logits_bytes(EXTRACTOR_BATCH_SIZE, lengths, vocab_size),
    )


def _measured(name: str, folder: Path, n_cells: int) -> Measured:
    # What this process finds, its children find: also in a checkout that is not installed.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "geneformer_fast.quickstart.candidate", name, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise GeneformerFastError(
            f"embedding with {NAMES[name]} failed (exit code {done.returncode}): {said}; the quickstart needs 3 GB of "
            "memory"
        )
    told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    batch_size, dtype = told.get("batch_size"), told["dtype"]
    notes = [] if batch_size is None else [f"batches of {batch_size}"]
    notes += [dtype] if dtype != "float32" else []
    what = NAMES[name] + (f" ({', '.join(notes)})" if notes else "")
    return Measured(what, n_cells / told["seconds"], told["peak_bytes"], dtype, batch_size)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())
