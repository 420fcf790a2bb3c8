"""Small gene lists and cells of value families; families whose checkpoints are not here yet are registered."""

from __future__ import annotations

import json
from importlib import import_module

import anndata
import numpy as np
import scipy.sparse as sp

from geneformer_fast import families
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.families.family import Family

FAMILIES = ("aido-cell", "scgpt", "scbert")
N_LISTED = 60
SYMBOLS = [f"SYM{i}" for i in range(N_LISTED)]
#: Numbers of a vocabulary of scGPT are in no order.
SCGPT_IDS = {name: 3 + (7 * i + 5) % N_LISTED for i, name in enumerate(SYMBOLS)}
SPECIAL = {"<pad>": 0, "<cls>": 1, "<eoc>": 2}


def preparation(name):
    """The rule of a family."""
    return import_module(f"geneformer_fast.families.preparations.{name.replace('-', '_')}").PREPARATION


def know_families():
    """Every value family is in the registry; returns those that were not."""
    added = []
    for name in FAMILIES:
        try:
            families.family(name)
        except UnsupportedError:
            families.register(Family(name, name, "-", "-", {}, preparation=preparation(name)))
            added.append(name)
    return added


def gene_files(folder):
    """Family -> the file with its genes, as it comes with a model."""
    folder.mkdir(exist_ok=True)
    table = folder / "OS_scRNA_gene_index.60.tsv"
    table.write_text("gene_name\tindex\n" + "".join(f"{name}\t{i}\n" for i, name in enumerate(SYMBOLS)))
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({**SPECIAL, **SCGPT_IDS}))
    panglao = folder / "panglao_60.h5ad"
    shape = anndata.AnnData(sp.csr_matrix((1, N_LISTED), dtype=np.float32))
    shape.var_names = SYMBOLS
    shape.write_h5ad(panglao)
    return {"aido-cell": table, "scgpt": vocabulary, "scbert": panglao}


def numbers(family):
    """Name of a gene -> its number."""
    return SCGPT_IDS if family == "scgpt" else {name: i for i, name in enumerate(SYMBOLS)}


def make_value_cells(n_cells, seed=0, *, dtype="float32", storage="csr", is_float=False, deep=0):
    """Cells x columns in another order than the lists: two columns of SYM7, some unknown, SYM50 and on absent.

    Cell 3 is empty, cell 5 has counts in unknown genes only; the first ``deep`` cells express every gene.
    """
    rng = np.random.default_rng(seed)
    columns = [*rng.permutation(SYMBOLS[:50]), "SYM7", "UNKNOWN1", "UNKNOWN2"]
    share = rng.uniform(0.15, 0.9, (n_cells, 1))
    counts = rng.geometric(0.4, (n_cells, len(columns))) * (rng.random((n_cells, len(columns))) < share)
    counts[rng.random(counts.shape) < 0.03] *= 37
    counts[:deep] += 1
    if n_cells > 5:
        counts[3] = 0
        counts[5, :-2], counts[5, -1] = 0, 4
    values = counts * rng.uniform(0.5, 2, counts.shape) if is_float else counts
    made = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[storage](values.astype(dtype))
    adata = anndata.AnnData(made)
    adata.obs_names, adata.var_names = [f"s{seed}c{i}" for i in range(n_cells)], columns
    adata.obs["label"] = np.arange(n_cells) % 3
    return adata
