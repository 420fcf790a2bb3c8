"""A made-up family that reads values, in one file: the square root of every count, over a fixed list of genes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.config import EncoderConfig
from geneformer_fast.families import Family, Reading
from geneformer_fast.families.gene_list import GeneList, in_order
from geneformer_fast.families.preparation import Counted, Facts, Option, Preparation, Stored

PATTERNS = ("roots.txt",)


def genes(path: Path) -> GeneList:
    file = path / PATTERNS[0] if path.is_dir() else path
    return in_order("roots", file.read_text(encoding="utf-8").split(), file)


def prepare(counted: Counted, _: GeneList, options: Mapping[str, Any]) -> Stored:
    roots = np.minimum(np.sqrt(counted.counts), options["most"]).astype(np.float32)
    return Stored(counted.ids, roots, counted.indptr)


def expand(cells: Stored, facts: Facts, is_there: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    rows = np.zeros((cells.n_cells, facts.n_genes), dtype=np.float32)
    rows[np.repeat(np.arange(cells.n_cells), np.diff(cells.bounds)), cells.ids] = cells.values
    return rows.reshape(-1), np.arange(cells.n_cells + 1, dtype=np.int64) * facts.n_genes


CONFIG = EncoderConfig(
    n_layers=2, width=16, n_heads=2, ff_width=32, vocab_size=0, max_len=40, norm="pre", activation="swiglu", eps=1e-5,
    embedding_norm=False, final_norm=True, n_token_types=0, inputs="values", n_bins=8, pad_id=-2, tied_decoder=False,
    init_std=0.3, vocabulary="roots", family="roots",
)  # fmt: skip

FAMILY = Family(
    name="roots",
    title="Roots",
    paper="Nobody et al., Square roots of counts (2031)",
    licence="CC0",
    presets={"roots-small": CONFIG},
    preparation=Preparation(
        inputs="values",
        patterns=PATTERNS,
        genes=genes,
        prepare=prepare,
        expand=expand,
        is_dense=True,
        n_extra=0,
        options={"most": Option(9, "the largest root", least=1, most=99)},
    ),
    reading=Reading(layer="last", pool="mean"),
)
