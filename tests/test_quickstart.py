"""The quickstart: cells that look like cells, training that learns, and the whole tour at a small scale."""

from __future__ import annotations

import dataclasses
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from toys import draw_without_umap

import geneformer_fast
from geneformer_fast import cli
from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.quickstart import evaluate, synthetic, train
from geneformer_fast.quickstart.run import quickstart
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.loop import fit

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return synthetic.synthetic_cells(synthetic.Recipe(n_cells=1200), seed=3)


class TestCells:
    def test_shape_and_columns(self, cells):
        assert cells.shape == (1200, 1000)
        assert {"cell_type", "lineage", "donor", "batch", "n_counts", "filter_pass"} <= set(cells.obs)
        assert cells.obs["cell_type"].nunique() == 8
        assert cells.obs["donor"].nunique() == 10
        assert cells.obs_names.is_unique
        # A donor's cells were all processed in one batch.
        assert cells.obs.groupby("donor", observed=True)["batch"].nunique().max() == 1

    def test_ids_look_like_ensembl_and_are_no_real_ones(self, cells):
        ids = cells.var["ensembl_id"]
        assert ids.str.fullmatch(r"ENSG\d{11}").all()
        assert ids.is_unique
        assert (ids.str[4:].astype(np.int64) > 10_000_000_000).all()

    def test_counts_are_whole_sparse_and_sum_to_n_counts(self, cells):
        assert (cells.X.data == np.floor(cells.X.data)).all()
        assert cells.X.data.min() > 0
        np.testing.assert_array_equal(np.asarray(cells.X.sum(1)).ravel(), cells.obs["n_counts"])
        assert 0.1 < cells.X.nnz / np.prod(cells.shape) < 0.6

    def test_means_span_orders_of_magnitude(self, cells):
        means = np.asarray(cells.X.mean(0)).ravel()
        low, high = np.percentile(means, [1, 99.5])
        assert high / max(low, 1e-3) > 1000

    def test_library_sizes_are_log_normal(self, cells):
        logs = np.log(cells.obs["n_counts"])
        assert 0.3 < logs.std() < 0.7
        assert abs(logs.mean() - logs.median()) < 0.1

    def test_counts_vary_more_than_poisson(self, cells):
        same_type = cells[cells.obs["cell_type"] == "CD4 T-like"].X.toarray()
        means, variances = same_type.mean(0), same_type.var(0)
        is_expressed = means > 1
        assert np.median(variances[is_expressed] / means[is_expressed]) > 1.3

    def test_markers_mark(self, cells):
        scaled = cells.X.toarray() / cells.obs["n_counts"].to_numpy()[:, None]
        for name in cells.obs["cell_type"].cat.categories:
            genes = (cells.var["role"] == f"marker:{name}").to_numpy()
            is_own = (cells.obs["cell_type"] == name).to_numpy()
            assert scaled[is_own][:, genes].mean() > 1.5 * scaled[~is_own][:, genes].mean(), name

    def test_the_seed_decides(self):
        recipe = synthetic.Recipe(n_cells=120)
        first, same, other = (synthetic.synthetic_cells(recipe, seed=seed) for seed in (1, 1, 2))
        assert (first.X != same.X).nnz == 0
        assert (first.X != other.X).nnz > 0

    def test_types_can_be_told_apart_but_not_trivially(self, cells):
        labels = cells.obs["cell_type"].astype(str).to_numpy()
        is_held_out = evaluate.hold_out(cells.obs["donor"].astype(str).to_numpy(), 3)
        score = evaluate.score_features(evaluate.pca_features(cells.X, is_held_out), labels, is_held_out)
        majority = evaluate.score_majority(labels, is_held_out)
        assert majority.accuracy < 0.35
        assert 0.8 < score.accuracy < 0.99


class TestHoldingOut:
    def test_whole_donors_are_held_out(self):
        donors = np.array(["a", "b", "c", "d"] * 5)
        is_held_out = evaluate.hold_out(donors, 2, seed=1)
        assert set(donors[is_held_out]).isdisjoint(donors[~is_held_out])
        assert len(set(donors[is_held_out])) == 2

    def test_majority_score_by_hand(self):
        labels = np.array(["x", "x", "x", "y", "x", "y"])
        score = evaluate.score_majority(labels, np.array([False] * 4 + [True] * 2))
        assert score.accuracy == 0.5
        # F1 of x is 2 * 1 / (2 * 1 + 1) = 2/3, of y 0.
        assert score.macro_f1 == pytest.approx(1 / 3)

    def test_nothing_of_held_out_cells_reaches_the_classifier(self):
        rng = np.random.default_rng(0)
        features, labels = rng.normal(size=(200, 5)), rng.integers(2, size=200).astype(str)
        is_held_out = np.arange(200) >= 100
        features[is_held_out] += 1e6 * (labels[is_held_out] == "1")[:, None]
        assert evaluate.score_features(features, labels, is_held_out).accuracy < 0.7


@pytest.fixture(scope="module")
def two_kinds(tmp_path_factory) -> TokenFolder:
    """Cells of two kinds over 40 genes: the first kind expresses half of them, the second the other half."""
    rng = np.random.default_rng(0)
    counts = np.zeros((200, 40), dtype=np.float32)
    for i, row in enumerate(counts):
        row[20 * (i % 2) + rng.permutation(20)[:12]] = rng.permutation(12) + 1
    genes = [f"ENSG{90_000_000_000 + i:011d}" for i in range(40)]
    words = geneformer_fast.Vocabulary.from_medians(dict.fromkeys(genes, 1.0), name="two-kinds")
    adata = anndata.AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=genes))
    return geneformer_fast.tokenize(adata, tmp_path_factory.mktemp("kinds") / "t", dictionary=words, progress=False)


class TestTraining:
    def test_the_loss_falls_below_guessing_by_frequency_when_genes_go_together(self, two_kinds):
        recipe = dataclasses.replace(train.RECIPE, steps=150, batch_cells=20, learning_rate=5e-3)
        config = geneformer_fast.EncoderConfig(
            2, 32, 2, 64, 44, 16, dropout=0.0, attention_dropout=0.0, vocabulary="two-kinds"
        )
        torch.manual_seed(0)
        model = geneformer_fast.Encoder(config, head="mlm")
        seen, unseen = np.arange(160), np.arange(160, 200)
        # Frequency knows 40 genes, log 40 = 3.7 nats; who has understood a cell's kind is left with its 20, 3.0.
        by_frequency = train.frequency_loss(model, two_kinds, seen, unseen)
        assert by_frequency == pytest.approx(np.log(40), abs=0.1)
        assert train.held_out_loss(model, two_kinds, unseen, recipe) > by_frequency - 0.1
        objective = train.objective_of(model, two_kinds, recipe)
        fit(model, two_kinds, objective, recipe, train_cells=seen)
        assert train.held_out_loss(model, two_kinds, unseen, recipe) < by_frequency - 0.3

    def test_the_thread_count_comes_back(self, two_kinds):
        model = geneformer_fast.Encoder(
            geneformer_fast.EncoderConfig(1, 16, 1, 16, 44, 16, vocabulary="two-kinds"), "mlm"
        )
        before = torch.get_num_threads()
        with train.best_threads(model, two_kinds, np.arange(60), train.RECIPE) as n_threads:
            assert torch.get_num_threads() == n_threads
        assert torch.get_num_threads() == before
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    out = tmp_path_factory.mktemp("tour") / "quickstart"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        draw_without_umap(patch)
        summary = quickstart(out, n_cells=300, max_seconds=3, say=lines.append)
    return out, summary, "\n".join(lines)


class TestTour:
    def test_it_leaves_what_it_promises(self, tour):
        out, summary, text = tour
        assert summary == json.loads((out / "summary.json").read_text())
        assert summary["is_finished"] is True
        assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
        assert (out / "quickstart.png").stat().st_size > 20_000
        for name in ("cells.h5ad", "tokens", "vocabulary", "model", "embeddings.npy"):
            assert (out / name).exists(), name
        assert "[7/7]" in text
        assert "geneformer-fast tokenize" in text

    def test_the_loss_fell_and_is_shown(self, tour):
        _, summary, text = tour
        losses = summary["losses_nats"]
        assert losses["trained"] < losses["untrained"] - 0.1
        assert f"{losses['trained']:.2f} after" in text

    def test_scores_stand_beside_baselines(self, tour):
        _, summary, text = tour
        scores = summary["scores"]
        assert set(scores) >= {"majority class", "untrained encoder", "encoder", "PCA of log counts"}
        assert scores["encoder"]["accuracy"] > scores["majority class"]["accuracy"]
        for name, score in scores.items():
            (line,) = (line for line in text.splitlines() if line.strip().startswith(name))
            assert f"{score['accuracy']:.3f}" in line
            assert f"{score['macro_f1']:.3f}" in line

    def test_speeds_are_numbers(self, tour):
        assert all(speed > 0 for speed in tour[1]["speed"].values())

    def test_the_model_and_its_vocabulary_load_and_agree(self, tour):
        out = tour[0]
        model = geneformer_fast.load(out / "model")
        vocabulary = geneformer_fast.Vocabulary.from_folder(out / "model")
        model.config.check_vocabulary(vocabulary.identity())
        assert model.config.vocab_size == vocabulary.n_tokens

    def test_a_second_tour_replaces_the_first_and_keeps_what_is_not_its_own(self, tour, monkeypatch):
        draw_without_umap(monkeypatch)
        out = tour[0]
        (out / "notes.txt").write_text("mine")
        (out / "tokens" / "stale").write_text("")
        summary = quickstart(out, n_cells=120, max_seconds=1, say=lambda line: None)
        assert summary["cells"]["n_cells"] == 120
        assert (out / "notes.txt").read_text() == "mine"
        assert not (out / "tokens" / "stale").exists()


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"made_by": "somebody else"}'])
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path, content, capsys):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "precious").write_text("data")
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(OutputError, match="did not make"):
        quickstart(tmp_path, n_cells=120)
    assert (tmp_path / "tokens" / "precious").read_text() == "data"
    assert cli.main(["quickstart", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_in_the_way_and_too_few_cells_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        quickstart(tmp_path / "file")
    with pytest.raises(UnsupportedError, match="--cells 5: too few"):
        quickstart(tmp_path / "new", n_cells=5)
    assert not (tmp_path / "new").exists()


def test_two_tours_at_once_and_hidden_files(tmp_path, capsys, monkeypatch):
    from geneformer_fast.files.locks import folder_lock
    from geneformer_fast.quickstart import run

    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / ".summary.json.partial").write_text("{")
    with folder_lock(tmp_path):
        assert cli.main(["quickstart", "--out", str(tmp_path), "--cells", "120"]) == 2
    said = capsys.readouterr().err
    assert "being written by another process" in said
    assert said.count("\n") == 1
    monkeypatch.setattr(run, "_tour", lambda out, *_: {"begun in": out})  # the tour itself is shown above
    assert quickstart(tmp_path, n_cells=120, max_seconds=1, say=lambda line: None) == {"begun in": tmp_path}
