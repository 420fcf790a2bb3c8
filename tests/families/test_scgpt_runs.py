"""scGPT all the way: counts in, embeddings out, fine-tuned, predicted with, in eight bits, profiled."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scgpt_folders import shapes, vocabulary, write

import geneformer_fast as gf
from geneformer_fast.data.identity import identity_of
from geneformer_fast.decoders import LayeredClassifier
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.families import scgpt
from geneformer_fast.finetuning.recipes import CELLS, cells_of
from geneformer_fast.ragged import Ragged
from geneformer_fast.training.recipe import Recipe

N_GENES, WIDTH = 57, 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as pretraining leaves it: no annotation head."""
    sizes = shapes(width=WIDTH, n_tokens=N_GENES + 3, n_cls=None)
    generator = torch.Generator().manual_seed(0)
    tensors = OrderedDict(
        (name, torch.randn(size, generator=generator) * 0.2 + (len(size) == 1 and name.endswith("weight")))
        for name, size in sizes.items()
    )
    folder = tmp_path_factory.mktemp("scgpt") / "model"
    return write(folder, tensors, vocab=vocabulary(N_GENES), embsize=WIDTH, d_hid=WIDTH, nheads=2, dropout=0.0)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety cells of two types, each with genes of its own, and one gene that the vocabulary lacks."""
    rng = np.random.default_rng(0)
    kinds = np.arange(90) % 2
    rates = np.where((np.arange(N_GENES + 1) < 20)[None] == (kinds == 0)[:, None], 4.0, 0.4)
    data = anndata.AnnData(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    data.var = pd.DataFrame({"gene_name": [*(f"GENE{i}" for i in range(N_GENES)), "UNKNOWN"]})
    data.var_names = data.var["gene_name"].to_numpy()
    data.obs["cell_type"] = pd.Categorical(np.where(kinds == 0, "one", "other"))
    path = tmp_path_factory.mktemp("counts") / "cells.h5ad"
    data.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def tokens(counts: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    gf.tokenize(counts, out, family="scgpt", dictionary=model, obs=["cell_type"], progress=False)
    return out


@pytest.fixture(scope="module")
def tuned(model: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    recipe = Recipe.preset("scgpt-cells", epochs=3, batch_cells=8, learning_rate=1e-3, progress=False)
    done = gf.finetune_cells(tokens, model, "cell_type", out, recipe=recipe, device="cpu")
    assert done.scores["tasks"]["cell_type"]["over_folds"]["accuracy"]["mean"] > 0.8
    return out / "final"


def pairs_of(tokens: Path, model: Path) -> Ragged:
    config = gf.load(model, device="cpu").config
    with gf.open_tokens(tokens) as folder:
        identity_of(folder, config)
        values, bounds = folder.read(np.arange(folder.n_cells))
    return Ragged.from_lengths(torch.from_numpy(values), np.diff(bounds))


def test_embeddings_are_those_of_the_original(tokens: Path, model: Path) -> None:
    """CLS after the last layer, divided by its length, with <cls> first and its value -2."""
    cells = pairs_of(tokens, model)
    first = cells.values[cells.starts.long()]
    assert first.unique(dim=0).tolist() == [[N_GENES + 1, -2.0]]
    found = gf.embed(tokens, model, dtype="float32", device="cpu", progress=False)
    wanted = scgpt.cell_embeddings(gf.load(model, device="cpu"), cells)
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_counts_are_embedded_as_their_folder_is(counts: Path, tokens: Path, model: Path) -> None:
    found = gf.embed(counts, model, dictionary=model, dtype="float32", device="cpu", progress=False)
    wanted = gf.embed(tokens, model, dtype="float32", device="cpu", progress=False)
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_fine_tuned_folder_is_one_of_scgpt(tuned: Path, model: Path) -> None:
    before, after = (torch.load(folder / "best_model.pt", weights_only=True) for folder in (model, tuned))
    assert list(after)[: len(before)] == list(before)
    more = {name: tuple(tensor.shape) for name, tensor in after.items() if name not in before}
    assert set(more) == set(shapes(width=WIDTH)) - set(shapes(width=WIDTH, n_cls=None))
    assert more["cls_decoder.out_layer.weight"] == (2, WIDTH)
    assert not torch.equal(after["encoder.embedding.weight"], before["encoder.embedding.weight"])
    assert torch.equal(after["decoder.fc.0.weight"], before["decoder.fc.0.weight"])  # nothing taught it
    assert (tuned / "vocab.json").read_bytes() == (model / "vocab.json").read_bytes()
    encoder = gf.load(tuned, device="cpu")
    assert isinstance(encoder.head, LayeredClassifier)
    assert json.loads((tuned / "finetuned.json").read_text())["tasks"] == [
        {"name": "cell_type", "classes": ["one", "other"]}
    ]


def test_predictions(tuned: Path, tokens: Path, counts: Path) -> None:
    table = gf.predict(tokens, tuned, dtype="float32", device="cpu", progress=False)
    truth = anndata.read_h5ad(counts).obs["cell_type"].to_numpy()
    assert (table["cell_type_predicted"].to_numpy() == truth).mean() > 0.8


def test_a_folder_in_eight_bits(tuned: Path, tokens: Path, tmp_path: Path) -> None:
    made = gf.quantize(tuned, tmp_path / "int8")
    assert (made / "config.json").exists()
    assert (made / "vocab.json").exists()
    assert not (made / "best_model.pt").exists()
    encoder = gf.load(made, device="cpu")
    assert encoder.quantization.scheme == "int8"
    plain = gf.predict(tokens, tuned, dtype="float32", device="cpu", progress=False)
    rounded = gf.predict(tokens, made, dtype="float32", device="cpu", progress=False)
    agree = (plain["cell_type_predicted"].to_numpy() == rounded["cell_type_predicted"].to_numpy()).mean()
    assert agree > 0.95
    a = gf.embed(tokens, tuned, dtype="float32", device="cpu", progress=False)
    b = gf.embed(tokens, made, dtype="float32", device="cpu", progress=False)
    assert (a * b).sum(1).min() > 0.99


def test_the_recipe_of_its_authors_is_the_default() -> None:
    assert cells_of(scgpt.FAMILY) == Recipe.preset("scgpt-cells")
    assert cells_of(None) is CELLS


def test_what_it_cannot_do_is_said_before_anything_runs(model: Path, tokens: Path, tmp_path: Path) -> None:
    classes = {f"GENE{i}": ("a", "b")[i % 2] for i in range(20)}
    with pytest.raises(UnsupportedError, match="classes of genes"):
        gf.finetune_genes(tokens, model, classes, tmp_path / "genes", device="cpu")
    with pytest.raises(UnsupportedError, match="scGPT reads values"):
        gf.perturb(tokens, model, tmp_path / "perturbed", device="cpu")
