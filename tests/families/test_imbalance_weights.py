"""The study of unequal classes with real weights: files as scGPT's and scBERT's tools write them are fine-tuned."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scbert_files import as_stored, state_of
from scgpt_folders import shapes, vocabulary, write

import geneformer_fast as gf
from bench.imbalance import process
from bench.imbalance.models import Model
from bench.imbalance.study import MODELS, Asked, Row, Study
from geneformer_fast.tokenization.manifest import read_json

N_GENES, N_CELLS = 17, 60


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two types; symbols are the names that the models' lists have."""
    rng = np.random.default_rng(0)
    kinds = np.arange(N_CELLS) % 2
    rates = np.where((np.arange(N_GENES) < 8)[None] == (kinds == 0)[:, None], 4.0, 0.8)
    symbols = [f"GENE{gene}" for gene in range(N_GENES)]
    adata = anndata.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    adata.var = pd.DataFrame({"gene_name": symbols}, index=symbols)
    adata.var["ensembl_id"] = [f"ENSG{gene:011d}" for gene in range(1, N_GENES + 1)]
    adata.obs = pd.DataFrame({"kind": pd.Categorical.from_codes(kinds, ["a", "b"])}, index=[f"c{i}" for i in range(60)])
    path = tmp_path_factory.mktemp("cells") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def scgpt_weights(folder: Path) -> Path:
    sizes, generator = shapes(n_cls=None), torch.Generator().manual_seed(0)
    tensors = OrderedDict((name, torch.randn(size, generator=generator) * 0.2) for name, size in sizes.items())
    return write(folder, tensors, vocab=vocabulary(N_GENES))


def scbert_weights(folder: Path) -> Path:
    folder.mkdir()
    genes = "\n".join(["gene_name", *(f"GENE{gene}" for gene in range(N_GENES)), ""])
    (folder / "gene2vec_genes.tsv").write_text(genes)
    path = folder / "panglao_pretrain.pth"
    torch.save({"model_state_dict": as_stored(state_of(length=N_GENES + 1))}, path)
    return path


def geneformer_weights(folder: Path) -> Path:
    medians = {f"ENSG{gene:011d}": 1.0 for gene in range(1, N_GENES + 1)}
    words = gf.Vocabulary.from_medians(medians, "v2", name="seventeen", max_len=12)
    sizes = {"n_layers": 2, "width": 32, "n_heads": 2, "ff_width": 32, "vocab_size": words.n_tokens, "max_len": 12}
    torch.manual_seed(0)
    config = gf.EncoderConfig(**sizes, vocabulary=words.name, vocabulary_fingerprint=words.fingerprint)
    gf.save(gf.Encoder(config, "mlm"), folder)
    words.save(folder)
    return folder


WRITERS = {"geneformer": geneformer_weights, "scgpt": scgpt_weights, "scbert": scbert_weights}


@pytest.mark.parametrize("name", MODELS)
def test_named_weights_are_those_that_learn(name: str, cells: Path, tmp_path: Path) -> None:
    weights = WRITERS[name](tmp_path / "weights")
    asked = Asked(str(cells), "kind", "b", (), {name: str(weights)}, steps=2, batch_cells=8, folds=2)
    study = Study(tmp_path / "work", asked)
    base, given = Model(study, name).encoder(), gf.load(weights, dtype="float32", device="cpu")
    assert all(torch.equal(tensor, given.state_dict()[key]) for key, tensor in base.state_dict().items())
    process.main(str(study.work), name, "prepare", 0.0)
    process.main(str(study.work), name, "rows", 0.0)
    assert not study.found()  # no time was left for any
    row = Row(name, 0.2, "over-sampled", 0)
    for other in study.missing(name):
        if other != row:
            study.keep(other, {"error": "not asked here"})
    process.main(str(study.work), name, "rows", 100.0)
    scores = study.found()[row]
    assert scores["n_train"] == 15 + 3
    assert scores["n_rare"] == 3
    assert scores["seconds_per_epoch"] == pytest.approx(scores["step_s"] * 3)  # 18 cells, 8 at a time
    about = read_json(study.work / name / "model.json")
    assert about["is_given"]
    assert not (study.work / name / "pretraining.json").exists()
    assert not (study.work / "genes.json").exists()
    if name == "scbert":
        assert about["longest"] == N_GENES + 1
