"""Models over values: embeddings of folders, files and AnnData; fine-tuning, prediction, eight bits, profiles."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from value_files import N_LISTED, SYMBOLS, make_value_cells
from value_oracles import aido_row, aligned, scbert_row

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.extract import encoding
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.run import tokenize

TINY = {"n_layers": 2, "width": 16, "n_heads": 2, "ff_width": 24, "max_len": N_LISTED + 2}


def aido_encoder(seed=0, **changes):
    """A small AIDO.Cell whose biases and norms are away from where they begin."""
    torch.manual_seed(seed)
    model = gf.Encoder(gf.EncoderConfig.preset("aido-cell-3m", **{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def by_hand(model, adata, missing="zero", layer="last"):
    """Row of the input -> hidden states [62, C] of its values, worked out cell by cell."""
    rows, there = aligned(adata, SYMBOLS)
    found = {}
    for row in np.flatnonzero(rows.any(1)):
        values = torch.from_numpy(aido_row(rows[row], there, missing=missing).astype(np.float32))
        with torch.inference_mode():
            found[int(row)] = model(Ragged.from_cells([values]), layer=layer).values.double().numpy()
    return found, there, rows


@pytest.fixture(scope="module")
def cells():
    return make_value_cells(24, seed=3)


@pytest.fixture(params=["zero", "mask"])
def folder(request, lists, cells, tmp_path):
    """How missing genes are read, and a folder of values."""
    tokenize(
        cells, tmp_path / "values", family="aido-cell", dictionary=lists["aido-cell"], obs=["label"], progress=False,
        options={"missing": request.param},
    ).close()  # fmt: skip
    return request.param, tmp_path / "values"


@pytest.mark.parametrize("pool", [None, "mean-all", "mean"])
def test_means_are_over_the_genes_that_a_file_has(folder, cells, pool):
    missing, values = folder
    model = aido_encoder()
    hidden, there, _ = by_hand(model, cells, missing)
    is_behind = pool in (None, "mean-all")
    kept = np.concatenate([there, [is_behind, is_behind]])
    found = gf.embed(values, model, pool=pool, progress=False)
    assert len(found) == len(hidden) == 22
    for embedding, states in zip(found, hidden.values(), strict=True):
        np.testing.assert_allclose(embedding, states[kept].mean(0), rtol=2e-5, atol=2e-6)


def test_embeddings_of_genes_are_over_the_cells_that_express_them(folder, cells):
    missing, values = folder
    model = aido_encoder()
    hidden, _, rows = by_hand(model, cells, missing)
    found = gf.embed(values, model, pool="gene", progress=False)
    assert found.shape == (N_LISTED, TINY["width"])
    for gene in range(N_LISTED):
        states = [states[gene] for row, states in hidden.items() if rows[row, gene] > 0]
        if states:
            np.testing.assert_allclose(found[gene], np.mean(states, 0), rtol=2e-5, atol=2e-6)
        else:
            assert np.isnan(found[gene]).all()


def test_counts_are_embedded_as_their_folder_is(lists, cells, tmp_path):
    model = aido_encoder()
    tokenize(cells, tmp_path / "values", family="aido-cell", dictionary=lists["aido-cell"], progress=False).close()
    expected = gf.embed(tmp_path / "values", model, progress=False)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    is_there = np.setdiff1d(np.arange(24), [3, 5])
    of_file = gf.embed(tmp_path / "cells.h5ad", model, dictionary=lists["aido-cell"], progress=False)
    np.testing.assert_array_equal(of_file[is_there], expected)
    assert np.isnan(of_file[[3, 5]]).all()
    adata = gf.embed(cells, model, dictionary=lists["aido-cell"], copy=True, progress=False)
    np.testing.assert_array_equal(adata.obsm["X_geneformer"], of_file)
    assert adata.uns["X_geneformer"]["vocabulary"] == "aido-cell"
    frame = gf.embed(cells, model, dictionary=lists["aido-cell"], as_frame=True, where={"label": 1}, progress=False)
    chosen = [row for row in is_there if row % 3 == 1]
    assert list(frame.index) == [f"s3c{row}" for row in chosen]
    numbers = frame[[name for name in frame if name.startswith("embedding_")]].to_numpy()
    # Other cells share their batches: numbers of the order of 1, in float32, added up in another order.
    np.testing.assert_allclose(numbers, of_file[chosen], rtol=1e-6, atol=2e-6)


def test_the_gene_list_beside_a_model_is_found(lists, cells, tmp_path):
    from geneformer_fast.families.gene_list import read_gene_list

    model = aido_encoder()
    gf.save(model, tmp_path / "model")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(VocabularyError, match=r"--dictionary., the gene list of aido-cell"):
        gf.embed(tmp_path / "cells.h5ad", tmp_path / "model", progress=False)
    read_gene_list(lists["aido-cell"], "aido-cell", ()).save(tmp_path / "model")
    found = gf.embed(tmp_path / "cells.h5ad", tmp_path / "model", dtype="float32", progress=False)
    expected = gf.embed(tmp_path / "cells.h5ad", model, dictionary=lists["aido-cell"], progress=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_windows_of_long_cells_are_small(folder, monkeypatch):
    _, values = folder
    model = aido_encoder()
    expected = gf.embed(values, model, progress=False)
    monkeypatch.setattr(encoding, "WINDOW_VALUES", 5 * (N_LISTED + 2))
    reads = []

    from geneformer_fast.data.values import ValueCells

    read = ValueCells.__call__

    def watched(self, cells, *more):
        reads.append(len(cells))
        return read(self, cells, *more)

    monkeypatch.setattr(ValueCells, "__call__", watched)
    found = gf.embed(values, model, progress=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert max(reads) == 5
    assert sum(reads) == 22


def test_memory_budgets_hold_and_pools_of_others_are_refused(folder):
    _, values = folder
    model = aido_encoder()
    expected = gf.embed(values, model, progress=False)
    found = gf.embed(values, model, memory_budget="3GB", progress=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedError, match="pool"):
        gf.embed(values, model, pool="median", progress=False)
    with pytest.raises(UnsupportedError, match="no CLS token"):
        gf.embed(values, model, pool="cls", progress=False)


def test_a_classifier_is_fine_tuned_and_predicts(lists, cells, tmp_path):
    many = make_value_cells(90, seed=5)
    # Cells of label 1 express some genes ten times as much.
    x = many.X.toarray()
    x[many.obs["label"].to_numpy() == 1, :20] *= 10
    many.X = many.X.__class__(x)
    tokenize(
        many, tmp_path / "values", family="aido-cell", dictionary=lists["aido-cell"], obs=["label"], progress=False
    ).close()
    model = aido_encoder()
    gf.save(model, tmp_path / "model")
    from geneformer_fast.families.gene_list import read_gene_list

    read_gene_list(lists["aido-cell"], "aido-cell", ()).save(tmp_path / "model")
    recipe = gf.Recipe(epochs=3, batch_cells=8, learning_rate=3e-3, token_budget=4096)
    made = gf.finetune_cells(
        tmp_path / "values", tmp_path / "model", "label", tmp_path / "run", recipe=recipe, device="cpu", progress=False
    )
    final = tmp_path / "run" / "final"
    assert final.is_dir(), made
    assert (final / "genes.json").exists()
    of_folder = gf.predict(tmp_path / "values", final, device="cpu", progress=False)
    many.write_h5ad(tmp_path / "cells.h5ad")
    of_counts = gf.predict(tmp_path / "cells.h5ad", final, device="cpu", progress=False)
    assert isinstance(of_folder, pd.DataFrame)
    assert of_folder["label_predicted"].tolist() == of_counts["label_predicted"].tolist()
    card = json.loads((final / "finetuned.json").read_text())
    assert card["vocabulary"] == "aido-cell"
    with pytest.raises(UnsupportedError, match="genes"):
        gf.finetune_genes(tmp_path / "values", model, {"a": ["SYM1"], "b": ["SYM2"]}, tmp_path / "genes")


def test_eight_bits_are_measured_and_checked_on_values(folder, tmp_path, capsys):
    _, values = folder
    gf.save(aido_encoder(width=64, n_heads=2, ff_width=96), tmp_path / "model")
    words = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "small")]
    assert main([*words, "--calibrate", str(values), "--check", str(values)]) == 0
    assert "cosine" in capsys.readouterr().out
    small = gf.load(tmp_path / "small")
    exact, found = (gf.embed(values, each, progress=False) for each in (gf.load(tmp_path / "model"), small))
    assert np.corrcoef(exact.ravel(), found.ravel())[0, 1] > 0.99


def test_embedding_of_values_is_profiled(folder, tmp_path, capsys):
    _, values = folder
    gf.save(aido_encoder(), tmp_path / "model")
    words = ["profile", "--model", str(tmp_path / "model"), "--device", "cpu", "--seconds", "0.1"]
    assert main([*words, "--tokens", str(values), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "mean-all" in json.dumps(said)
    assert main([*words, "--lengths", "60"]) != 0
    assert "cells are made up of ranked tokens only" in capsys.readouterr().err


def scgpt_encoder():
    """A small scGPT over the vocabulary of the tests."""
    torch.manual_seed(2)
    config = gf.EncoderConfig.preset(
        "scgpt-whole-human", n_layers=2, width=16, n_heads=2, ff_width=24, vocab_size=63, max_len=63, pad_id=0
    )
    model = gf.Encoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def test_embeddings_of_scgpt_are_its_cls_of_length_one(lists, cells, tmp_path):
    model = scgpt_encoder()
    given = {"family": "scgpt", "dictionary": lists["scgpt"], "progress": False}
    with tokenize(cells, tmp_path / "values", **given) as tokens:
        from geneformer_fast.data.values import cells_of_folder

        tokens.on_read = cells_of_folder(tokens)
        values, bounds = tokens.read(np.arange(tokens.n_cells))
    found = gf.embed(tmp_path / "values", model, progress=False)
    means = gf.embed(tmp_path / "values", model, pool="mean", progress=False)
    genes = gf.embed(tmp_path / "values", model, pool="gene", progress=False)
    sums, seen = np.zeros((63, 16)), np.zeros(63)
    for cell, (start, stop) in enumerate(itertools.pairwise(bounds)):
        pairs = torch.from_numpy(values[start:stop])
        with torch.inference_mode():
            hidden = model(Ragged.from_cells([pairs])).values.double().numpy()
        for embedding, expected in ((found[cell], hidden[0]), (means[cell], hidden[1:].mean(0))):
            np.testing.assert_allclose(embedding, expected / np.linalg.norm(expected), rtol=2e-5, atol=2e-6)
        np.add.at(sums, values[start + 1 : stop, 0].astype(int), hidden[1:])
        np.add.at(seen, values[start + 1 : stop, 0].astype(int), 1)
    is_seen = seen > 0
    np.testing.assert_allclose(genes[is_seen], sums[is_seen] / seen[is_seen, None], rtol=2e-5, atol=2e-6)
    assert np.isnan(genes[~is_seen]).all()
    is_there = np.setdiff1d(np.arange(24), [3, 5])
    adata = gf.embed(cells, model, dictionary=lists["scgpt"], copy=True, progress=False)
    np.testing.assert_allclose(adata.obsm["X_geneformer"][is_there], found, rtol=1e-5, atol=1e-6)


def test_a_folder_of_scgpt_says_the_vocabulary_that_its_cells_say(lists, cells, tmp_path):
    from geneformer_fast.families.scgpt.args import fingerprint_of, read_vocabulary

    said = fingerprint_of(read_vocabulary(lists["scgpt"]))
    tokens = tokenize(cells, tmp_path / "values", family="scgpt", dictionary=lists["scgpt"], progress=False)
    assert tokens.vocabulary["fingerprint"] == said


def test_classes_are_told_by_scgpt(lists, tmp_path):
    many = make_value_cells(60, seed=6)
    tokenize(
        many, tmp_path / "values", family="scgpt", dictionary=lists["scgpt"], obs=["label"], progress=False
    ).close()
    recipe = gf.Recipe(epochs=1, batch_cells=8, learning_rate=1e-3, token_budget=4096)
    gf.finetune_cells(
        tmp_path / "values", scgpt_encoder(), "label", tmp_path / "run", recipe=recipe, device="cpu", progress=False
    )
    table = gf.predict(tmp_path / "values", tmp_path / "run" / "final", device="cpu", progress=False)
    assert len(table) == 58


def test_scbert_reads_a_level_at_every_place(lists, cells, tmp_path):
    pytest.importorskip("geneformer_fast.families.scbert")
    torch.manual_seed(4)
    (preset,) = gf_presets("scbert")
    config = gf.EncoderConfig.preset(preset, n_layers=2, max_len=N_LISTED + 1)
    model = gf.Encoder(config).eval()
    given = {"family": "scbert", "dictionary": lists["scbert"], "progress": False, "options": {"min_genes": 5}}
    tokens = tokenize(cells, tmp_path / "values", **given)
    rows, there = aligned(cells, SYMBOLS)
    found = gf.embed(tmp_path / "values", model, progress=False)
    genes = gf.embed(tmp_path / "values", model, pool="gene", progress=False)
    sums, seen = np.zeros((N_LISTED, config.width)), np.zeros(N_LISTED)
    for cell, row in enumerate(tokens.column("source_row").to_pylist()):
        levels = scbert_row(rows[row])
        with torch.inference_mode():
            hidden = model(Ragged.from_cells([torch.from_numpy(levels)])).values.double().numpy()
        np.testing.assert_allclose(found[cell], hidden[:-1][there].mean(0), rtol=2e-4, atol=2e-5)
        expressed = np.flatnonzero(levels[:-1])
        sums[expressed] += hidden[expressed]
        seen[expressed] += 1
    is_seen = seen > 0
    np.testing.assert_allclose(genes[is_seen], sums[is_seen] / seen[is_seen, None], rtol=2e-4, atol=2e-5)
    assert np.isnan(genes[~is_seen]).all()


def gf_presets(family):
    """Names of a family's presets."""
    from geneformer_fast import families

    return list(families.family(family).presets)[:1]
