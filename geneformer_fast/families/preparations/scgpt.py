"""scGPT: the expressed genes of a cell, each with the bin of its count among the cell's own.

The original bins all expressed genes that its vocabulary has by 50 quantiles of their counts, and then keeps at most
1,199 of them. A value that lies at several equal quantiles (a count of 1 mostly does) may get any bin that meets there:
the original throws dice, from a state that all cells share. Here it is the middle one unless asked otherwise, which is
what its formula gives for a throw of one half; dice are thrown by seed and name of the cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.families.gene_list import GeneList, read_gene_list
from geneformer_fast.families.preparation import Counted, Facts, Option, Preparation, Stored

FAMILY = "scgpt"
PATTERNS = ("vocab.json",)
MAX_LEN = 1200
PER = 10_000.0
#: The value beside <cls>, by the name of the call path whose it is.
CLS_VALUES = {"embed": -2.0, "finetune": 0.0}
# Special tokens that the original appends to a vocabulary that lacks them.
_SPECIAL = ("pad", "cls", "eoc")
_STREAMS = {"ties": 1, "sampling": 2}

OPTIONS = {
    "ties": Option(
        "middle",
        "the bin of a value at several equal quantiles: middle, upper (as a later branch of the original has it), or "
        "random among all that meet there, as the original",
        ("middle", "upper", "random"),
    ),
    "sampling": Option(
        "top",
        "which genes stay where there are too many: top, those with the largest counts, of equal ones the smaller "
        "numbers; or random, as the original",
        ("top", "random"),
    ),
    "seed": Option(0, "what ties and sampling are drawn by, together with the name of the cell, where they are random"),
    "normalise": Option(
        "none",
        "what is binned: raw counts, as the original embeds them, or log1p of counts per 10,000 genes of the "
        "vocabulary, as its tutorials prepare fine-tuning",
        ("none", "log1p"),
    ),
    "n_bins": Option(51, "bins, that of 0 included", least=3, most=2**15),
    "cls_value": Option(
        "embed",
        "the value beside <cls>: embed, -2 as in embed_data, or finetune, 0 as in tokenize_batch",
        tuple(CLS_VALUES),
    ),
}


def prepare(counted: Counted, genes: GeneList, options: Mapping[str, Any]) -> Stored:
    """Bins from 1 on, of the genes that fit."""
    from geneformer_fast.families.preparations import loops

    values = counted.counts.astype(np.float32)
    if options["normalise"] == "log1p":
        # In float32 and in scanpy's order: the total over 10,000 first, then the division, then the logarithm.
        scale = (counted.totals.astype(np.float32) / np.float32(PER)).astype(np.float32)
        values = np.log1p(values / np.repeat(scale, np.diff(counted.indptr)))
    ties = {"middle": loops.MIDDLE, "upper": loops.UPPER, "random": loops.RANDOM}[options["ties"]]
    bins = np.empty(len(values), dtype=np.float32)
    shares = np.linspace(0, 1, options["n_bins"] - 1)
    loops.bin_cells(counted.indptr, counted.ids, values, shares, ties, _keys("ties", counted, options), bins)
    most = options["max_len"] - 1
    if len(bins) and np.diff(counted.indptr).max() > most:
        kept = np.zeros(len(bins), dtype=np.bool_)
        loops.choose_genes(counted.indptr, counted.ids, counted.counts, most, _keys("sampling", counted, options), kept)
        bounds = np.concatenate([[0], np.cumsum(kept)])[counted.indptr].astype(np.int64)
        return Stored(counted.ids[kept], bins[kept], bounds)
    return Stored(counted.ids, bins, counted.indptr)


def _keys(what: str, counted: Counted, options: Mapping[str, Any]) -> np.ndarray:
    """[n] uint64, what is drawn by for each cell; empty where nothing is drawn."""
    if options[what] != "random":
        return np.zeros(0, dtype=np.uint64)
    assert counted.keys is not None
    (key,) = np.random.SeedSequence((options["seed"], _STREAMS[what])).generate_state(1, np.uint64)
    return counted.keys ^ np.uint64(key)


def expand(cells: Stored, facts: Facts, is_there: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """[T, 2] float32, gene and value; <cls> first."""
    bounds = cells.bounds + np.arange(cells.n_cells + 1)
    pairs = np.empty((int(bounds[-1]), 2), dtype=np.float32)
    is_gene = np.ones(len(pairs), dtype=bool)
    is_gene[bounds[:-1]] = False
    pairs[is_gene, 0], pairs[is_gene, 1] = cells.ids, cells.values
    pairs[~is_gene] = facts.special["cls"], CLS_VALUES[facts.options["cls_value"]]
    return pairs, bounds


def genes(path: Path) -> GeneList:
    """The genes of ``vocab.json``; special tokens that it lacks are appended, as the original does."""
    found = read_gene_list(path, FAMILY, PATTERNS)
    special, taken = dict(found.special), {*found.special.values(), *found.token_ids.values()}
    for name in _SPECIAL:
        if name not in special:
            special[name] = max(taken) + 1
            taken.add(special[name])
    return GeneList(FAMILY, found.token_ids, found.aliases, special)


def _is_drawn(options: Mapping[str, Any]) -> bool:
    is_random = "random" in (options["ties"], options["sampling"])
    if options["seed"] and not is_random:
        raise UnsupportedError("option seed draws nothing: neither ties nor sampling is random")
    return is_random


PREPARATION = Preparation(
    inputs="pairs",
    patterns=PATTERNS,
    genes=genes,
    prepare=prepare,
    expand=expand,
    is_dense=False,
    n_extra=1,
    max_len=MAX_LEN,
    options=OPTIONS,
    is_drawn=_is_drawn,
    uses_totals=lambda options: options["normalise"] != "none",
)
