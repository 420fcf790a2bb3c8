"""The quickstart: the same cells and the same fine-tuning through stock transformers and ours, at a small scale."""

from __future__ import annotations

import json
import re
import shutil

import anndata
import numpy as np
import pytest
import torch
from pictures import n_colors, pixels
from scipy import sparse
from small_tour import made_up_comparison
from toys import draw_without_umap

import geneformer_fast
from geneformer_fast import cli
from geneformer_fast.errors import GeneformerFastError, OutputError, UnsupportedError
from geneformer_fast.quickstart import finetune, side_by_side, stock, weights
from geneformer_fast.quickstart.run import quickstart
from geneformer_fast.quickstart.tour import WORK, Work

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

SMALL = Work(n_cells=50, n_compared=6, n_layers=2, width=32, n_heads=2, ff_width=32, steps=3, batch_cells=3)


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    out = tmp_path_factory.mktemp("tour") / "quickstart"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        draw_without_umap(patch)
        report = quickstart(out, work=SMALL, say=lines.append)
    return out, report, "\n".join(lines)


class TestTour:
    def test_it_leaves_what_it_promises(self, tour):
        out, report, text = tour
        assert report == json.loads((out / "report.json").read_text())
        assert report["is_finished"] is True
        for name in ("cells.h5ad", "tokens", "vocabulary", "model", "embeddings.npy", "embeddings.cells.parquet"):
            assert (out / name).exists(), name
        assert n_colors(pixels(out / "quickstart.png")) > 8
        assert "[7/7]" in text
        assert "geneformer-fast tokenize" in text

    def test_the_embeddings_are_those_of_stock_transformers(self, tour):
        out, report, text = tour
        from transformers import BertModel

        rows = np.arange(6)
        with geneformer_fast.open_tokens(out / "tokens") as tokens:
            values, bounds = tokens.read(rows)
        cells = np.split(values, bounds[1:-1])
        model = BertModel.from_pretrained(out / "model", add_pooling_layer=False).eval()
        witness = stock.stock_embeddings(model, cells, batch_size=1)
        ours = geneformer_fast.embed(
            out / "tokens", geneformer_fast.load(out / "model", dtype="float32"), pool="cls", layer="last"
        )[rows]
        told = report["embedding"]
        assert np.abs(ours - witness).max() < 1e-4
        assert told["largest_difference"] < 1e-4
        # What is said is what was measured, not a number that always stands there.
        assert told["largest_value"] == pytest.approx(np.abs(witness).max(), rel=1e-4)
        assert f"{told['largest_difference']:.1e}" in text
        assert told["n_tokens"] == sum(map(len, cells))

    def test_ratios_are_of_what_was_measured(self, tour):
        _, report, text = tour
        told = report["embedding"]
        measured = told["measured"]
        assert {"extractor", "stock", "ours"} <= set(measured)
        for ours in measured.keys() & {"ours", "ours-auto"}:
            faster, smaller = told["times_faster"][ours], told["share_of_memory"][ours]
            for name in ("extractor", "stock"):
                assert faster[name] == measured[ours]["cells_per_s"] / measured[name]["cells_per_s"]
                assert smaller[name] == measured[ours]["peak_bytes"] / measured[name]["peak_bytes"]
        # Both sides of what is said first compute in float32.
        assert {measured[name]["dtype"] for name in ("extractor", "stock", "ours")} == {"float32"}
        for name in ("extractor", "stock"):
            assert f"in {told['share_of_memory']['ours'][name]:.0%} of its memory" in text
            assert f"{told['times_faster']['ours'][name]:.1f} times as fast as {measured[name]['what']}" in text
        if "ours-auto" in measured:
            faster = told["times_faster"]["ours-auto"]
            assert f"{faster['extractor']:.1f} and {faster['stock']:.1f} times as fast as these" in text
        for each in measured.values():
            assert 50e6 < each["peak_bytes"] < 8e9
            (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{each['what']}  "))
            assert f"{each['cells_per_s']:.1f}" in line
            assert f"{each['peak_bytes'] / 1e6:,.0f} MB" in line

    def test_both_trainings_have_the_same_losses(self, tour):
        _, report, text = tour
        told = report["finetuning"]
        assert len(told["losses"]) == len(told["stock_losses"]) == SMALL.steps
        assert max(np.abs(np.subtract(told["losses"], told["stock_losses"]))) == told["largest_difference"] < 1e-3
        assert told["times_faster"] == told["stock_seconds"] / told["seconds"]
        assert f"{told['stock_seconds']:.1f} s" in text
        assert f"{told['times_faster']:.1f} times as fast" in text

    def test_the_finetuned_model_names_lineages(self, tour):
        out = tour[0]
        adata = anndata.read_h5ad(out / "cells.h5ad")
        geneformer_fast.predict(adata, out / "finetuned" / "final", dtype="float32")
        assert set(adata.obs["lineage_predicted"]) <= set(adata.obs["lineage"].cat.categories)
        np.testing.assert_allclose(adata.obsm["lineage_probabilities"].sum(1), 1, rtol=1e-5)

    def test_the_model_tells_types_apart_though_nobody_trained_it(self, tour):
        """A neighbour is of the same lineage far more often than by chance (half of the cells are T cells)."""
        out = tour[0]
        lineage = anndata.read_h5ad(out / "cells.h5ad").obs["lineage"].to_numpy()
        embeddings = np.load(out / "embeddings.npy")
        apart = np.linalg.norm(embeddings[:, None] - embeddings[None], axis=-1) + np.diag(np.full(50, np.inf))
        assert (lineage[apart.argmin(1)] == lineage).mean() > 0.75

    def test_cells_are_whole_and_their_types_go_along(self, tour):
        out, report, _ = tour
        assert report["cells"]["n_cells"] == 50
        with geneformer_fast.open_tokens(out / "tokens") as tokens:
            assert {"cell_type", "lineage"} <= set(tokens.columns)
            assert len(set(tokens.column("cell_type").to_pylist())) == 10

    def test_the_model_and_its_vocabulary_load_and_agree(self, tour):
        out = tour[0]
        for folder in (out / "model", out / "finetuned" / "final"):
            model = geneformer_fast.load(folder)
            vocabulary = geneformer_fast.Vocabulary.from_folder(folder)
            model.config.check_vocabulary(vocabulary.identity())
            assert model.config.vocab_size == vocabulary.n_tokens

    def test_work_is_fixed(self, tour):
        assert tour[1]["work"] == {**{name: getattr(SMALL, name) for name in vars(SMALL)}, "seed": 0}
        assert WORK.n_cells == 500


@pytest.fixture(scope="module")
def model():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


class TestStock:
    def test_batches_and_padding_change_nothing(self, model):
        rng = np.random.default_rng(0)
        cells = [rng.integers(1, 50, size=length) for length in (3, 1, 17, 9, 30)]
        with torch.inference_mode():
            alone = [model.bert(torch.as_tensor(cell)[None]).last_hidden_state[0, 0].numpy() for cell in cells]
        for size in (1, 2, 5):
            np.testing.assert_allclose(
                stock.extractor_embeddings(model, cells, batch_size=size), alone, atol=1e-5, err_msg=str(size)
            )
            np.testing.assert_allclose(
                stock.stock_embeddings(model.bert, cells, batch_size=size), alone, atol=1e-5, err_msg=str(size)
            )

    def test_logits_decide_the_extractors_batches(self):
        lengths = np.array([10, 1000])
        assert stock.logits_bytes(100, lengths, 10_000) == 100 * 1000 * 10_000 * 4
        assert stock.extractor_batch_size(lengths, 10_000, 1 << 30) == 26
        assert stock.extractor_batch_size(lengths, 10_000, 1 << 40) == 100
        assert stock.extractor_batch_size(lengths, 10_000, 1) == 1


class TestSchedule:
    def test_every_cell_comes_before_one_comes_again(self):
        batches = list(finetune.Schedule(steps=20, batch_cells=3, learning_rate=1.0).batches(30))
        assert len(batches) == 20
        assert all(len(batch) == 3 for batch in batches)
        np.testing.assert_array_equal(np.sort(np.concatenate(batches[:10])), np.arange(30))
        np.testing.assert_array_equal(np.sort(np.concatenate(batches[10:])), np.arange(30))
        assert not np.array_equal(batches[0], batches[10])

    def test_cells_of_a_large_step_come_again_within_it(self):
        (batch,) = finetune.Schedule(steps=1, batch_cells=7, learning_rate=1.0).batches(3)
        assert len(batch) == 7


class TestWeights:
    def test_genes_that_go_together_point_together(self):
        rng = np.random.default_rng(0)
        first, second = rng.poisson(20, (40, 3)), rng.poisson(20, (40, 3))
        first[:20] += 200
        second[20:] += 200
        vectors = weights.gene_vectors(sparse.csr_matrix(np.hstack([first, second]).astype(np.float32)), 2)
        assert vectors.shape == (6, 2)
        assert np.square(vectors).mean() == pytest.approx(1, rel=1e-5)
        # The first component is what tells the two groups of cells apart.
        side = np.sign(vectors[:, 0])
        assert abs(side[:3].sum()) == abs(side[3:].sum()) == 3
        assert side[0] != side[3]

    def test_tokens_of_an_average_cell_add_up_to_nothing(self, tour):
        out = tour[0]
        counts = anndata.read_h5ad(out / "cells.h5ad")
        model = geneformer_fast.load(out / "model", dtype="float32")
        with geneformer_fast.open_tokens(out / "tokens") as tokens:
            values, bounds = tokens.read(np.arange(counts.n_obs))
        cells = geneformer_fast.Ragged.from_cells(list(np.split(values, bounds[1:-1])))
        with torch.inference_mode():
            states = model(cells, layer="embeddings").values
        genes = np.flatnonzero(values > 3)  # without CLS and EOS
        assert states[genes].mean(0).abs().max() < 0.02
        assert states[genes].std(0).min() > 0.1


def test_a_process_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(GeneformerFastError, match=r"embedding with transformers as in Geneformer's extractor failed"):
        side_by_side.compare(tmp_path, tmp_path, [np.arange(3)], 50, tmp_path, device="cpu", auto="float32")


def test_a_second_tour_replaces_the_first_and_keeps_what_is_not_its_own(tmp_path, monkeypatch):
    from geneformer_fast.quickstart import run

    monkeypatch.setattr(run, "_tour", lambda tour: {"seed": tour.seed})  # the tour itself is shown above
    for name in ("summary.json", "report.json"):
        out = tmp_path / name
        (out / "tokens").mkdir(parents=True)
        (out / name).write_text('{"made_by": "geneformer-fast quickstart"}')
        (out / "notes.txt").write_text("mine")
        (out / "tokens" / "stale").write_text("")
        assert quickstart(out, n_cells=60, seed=3, say=lambda line: None) == {"seed": 3}
        assert (out / "notes.txt").read_text() == "mine"
        assert not (out / "tokens").exists()
        assert json.loads((out / "report.json").read_text())["is_finished"] is False
        assert not (out / "summary.json").exists()


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"made_by": "somebody else"}'])
def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path, content, capsys):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "precious").write_text("data")
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(OutputError, match="did not make"):
        quickstart(tmp_path)
    assert (tmp_path / "tokens" / "precious").read_text() == "data"
    assert cli.main(["quickstart", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_in_the_way_and_wrong_numbers_of_cells_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        quickstart(tmp_path / "file")
    for n_cells in (5, 501):
        with pytest.raises(UnsupportedError, match=f"--cells {n_cells}: the example has 500 cells"):
            quickstart(tmp_path / "new", n_cells=n_cells)
    with pytest.raises(UnsupportedError, match="seed must not be negative, but is -1"):
        quickstart(tmp_path / "new", seed=-1)
    assert cli.main(["quickstart", "--out", str(tmp_path / "new"), "--seed", str(2**64)]) == 2
    assert not (tmp_path / "new").exists()


def test_what_is_missing_is_said_with_its_extra(tmp_path, monkeypatch):
    from geneformer_fast.quickstart import ready

    monkeypatch.setattr(ready, "find_spec", lambda name: None if name in ("umap", "transformers") else object())
    with pytest.raises(UnsupportedError, match=re.escape("needs umap and transformers")) as caught:
        quickstart(tmp_path / "new")
    assert "geneformer-fast[hf,plot]" in str(caught.value)


def test_two_tours_at_once_and_hidden_files(tmp_path, capsys, monkeypatch):
    from geneformer_fast.files.locks import folder_lock
    from geneformer_fast.quickstart import run

    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / ".report.json.partial").write_text("{")
    with folder_lock(tmp_path):
        assert cli.main(["quickstart", "--out", str(tmp_path), "--cells", "120"]) == 2
    said = capsys.readouterr().err
    assert "being written by another process" in said
    assert said.count("\n") == 1
    monkeypatch.setattr(run, "_tour", lambda tour: {"begun in": tour.out})
    assert quickstart(tmp_path, n_cells=120, say=lambda line: None) == {"begun in": tmp_path}


def test_the_picture_needs_no_display_and_has_both_colours_of_bars(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    from geneformer_fast.quickstart.picture import Panels, draw

    draw_without_umap(monkeypatch)
    rng = np.random.default_rng(0)
    trained = finetune.Trained([2.0, 1.0], [2.0, 1.0], 3.0, 1.0)
    panels = Panels(
        embeddings=rng.normal(size=(30, 4)),
        labels=np.array(["T", "B", "NK"] * 10),
        model="model",
        pool="pool",
        comparison=made_up_comparison(),
        trained=trained,
        machine="machine",
    )
    draw(panels, tmp_path / "picture.png")
    image = pixels(tmp_path / "picture.png")
    assert image.shape[1] == 1800
    assert n_colors(image) >= 3
