"""Embedding in float32 on a CPU with AVX2 and nothing wider, beside stock parts and the ceiling of the machine.

``python -m bench.cpu.float32_case FOLDER --geometry v1-10m --threads 2`` times every candidate in turns, between two
measurements of what large matrix products reach, and prints JSON. A process of its own for the reasons of
``quantized_case.py``; ``bench/cpu/test_bench_float32.py`` starts it, held to AVX2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.child import run_child
from bench.cpu.embed_candidates import GEOMETRIES, Run, Workplace
from bench.cpu.embed_rival import extractor_embeddings, stock_embeddings
from bench.cpu.quantized_case import CANDIDATES, HELD, Candidate, side_by_side
from geneformer_fast import EncoderConfig
from geneformer_fast.profiling import ceilings
from geneformer_fast.profiling.flops.work import encoder_flops

#: Second-to-last layer, as the extractor counts: here the last one is asked of all.
_LAST = 0


def _through_torch(place: Workplace) -> Run:
    from geneformer_kernels.dispatch import use_impl

    run = CANDIDATES["float32"].load(place)

    def run_through_torch(cells: Any, batch_size: int) -> np.ndarray:
        with use_impl("torch"):
            return run(cells, batch_size)

    return run_through_torch


def _stock(place: Workplace) -> Run:
    from transformers import BertModel

    model = BertModel.from_pretrained(place.model, attn_implementation="sdpa", add_pooling_layer=False).eval()
    has_cls = place.geometry.has_cls
    return lambda cells, batch_size: stock_embeddings(model, cells, has_cls=has_cls, batch_size=batch_size)


def _extractor(place: Workplace) -> Run:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(place.model).eval()
    has_cls = place.geometry.has_cls
    return lambda cells, batch_size: extractor_embeddings(
        model, cells, emb_layer=_LAST, has_cls=has_cls, batch_size=batch_size
    )


FLOAT32 = {
    "float32": Candidate("this project, float32", CANDIDATES["float32"].load),
    "float32-torch": Candidate("this project, float32, every operation through torch", _through_torch),
    "stock-float32": Candidate(
        "best stock parts: BertModel, float32, SDPA, padded, no head", _stock, is_ours=False
    ),
    "quantize-dynamic": CANDIDATES["quantize-dynamic"],
    "extractor-tuned": Candidate(
        "transformers as Geneformer's extractor calls it, with the batch size that is fastest here", _extractor,
        is_ours=False,
    ),
}  # fmt: skip


def shares(rows: dict[str, dict[str, Any]], flops: float, ceiling: float) -> None:
    """Adds to every row 10**12 operations/s, and the share of what large matrix products reach."""
    for row in rows.values():
        row["tflops"] = float(f"{flops / row['seconds']['p50'] / 1e12:.4g}")
        row["share_of_ceiling"] = round(row["tflops"] / ceiling, 4)


def ceiling_now() -> float:
    """10**12 operations/s of large products of float32, measured anew."""
    ceilings._found.clear()
    found = ceilings.product_ceiling("cpu", "float32")
    assert isinstance(found, float)
    return found


def main() -> None:
    """Time candidates side by side, or (``--only``) run one once, for its memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=FLOAT32)
    parser.add_argument("--batch-size", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    place = Workplace(args.folder, GEOMETRIES[args.geometry])
    if args.only:
        cells = [] if FLOAT32[args.only].is_ours else place.token_lists()
        FLOAT32[args.only].load(place)(cells, args.batch_size)
        return
    before = ceiling_now()
    rows = side_by_side(place, list(FLOAT32), args.rounds, FLOAT32)
    ceiling = max(before, ceiling_now())
    lengths = np.array([len(tokens) for tokens in place.token_lists()])
    config = EncoderConfig.preset(f"geneformer-{args.geometry}")
    shares(rows, encoder_flops(config, lengths.sum(), (lengths**2).sum(), config.n_layers), ceiling)
    for name, row in rows.items():
        command = [sys.executable, "-m", "bench.cpu.float32_case", str(place.folder), "--only", name]
        options = ["--geometry", args.geometry, "--threads", str(args.threads), "--batch-size", str(row["batch_size"])]
        row["peak_bytes"] = run_child([*command, *options]).peak_bytes
    at = {name: row["seconds"]["p50"] for name, row in rows.items()}
    found = {
        "candidates": rows,
        "ratios": {f"float32 / {name}": round(at[name] / at["float32"], 2) for name in at if name != "float32"},
        "ceiling_tflops": float(f"{ceiling:.4g}"),
        "held_to": "AVX2" if HELD.items() <= os.environ.items() else "",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
