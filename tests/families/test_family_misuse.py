"""Choices that would change nothing, and models given what is not theirs: one sentence instead of a silent result."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from scbert_files import as_stored, state_of
from value_files import N_LISTED, SYMBOLS, make_value_cells

import geneformer_fast as gf
from geneformer_fast import families
from geneformer_fast.errors import CheckpointError, InputError, UnsupportedError, VocabularyError
from geneformer_fast.profiling.scenarios.models import model_to_train
from geneformer_fast.tokenization.run import tokenize


@pytest.fixture
def scbert(lists, tmp_path):
    """A small checkpoint with its gene list beside it."""
    folder = tmp_path / "scbert"
    folder.mkdir()
    torch.save({"model_state_dict": as_stored(state_of(length=N_LISTED + 1))}, folder / "panglao_pretrain.pth")
    shutil.copyfile(lists["scbert"], folder / lists["scbert"].name)
    return folder


def test_totals_that_no_value_depends_on_are_refused(lists, tmp_path):
    adata = make_value_cells(8)
    adata.obs["depth"] = 1e6
    given = {"family": "scgpt", "dictionary": lists["scgpt"], "n_counts": "depth", "progress": False}
    with pytest.raises(UnsupportedError, match=r"n_counts \(--n-counts\) changes nothing: .* scgpt depend on no total"):
        tokenize(adata, tmp_path / "out", **given)
    tokenize(adata, tmp_path / "out", options={"normalise": "log1p"}, **given).close()


def test_the_gene_list_beside_a_file_is_found(scbert, tmp_path):
    """scBERT's models are files; what lies beside them is looked at as what lies in a folder."""
    adata, file = make_value_cells(8), scbert / "panglao_pretrain.pth"
    given = {"as_frame": True, "dtype": "float32", "device": "cpu", "progress": False}
    # Cells of the small list have fewer genes than the original asks for.
    with pytest.raises(InputError, match="fewer genes than option min_genes"):
        gf.embed(adata, file, **given)
    shutil.move(scbert / "panglao_60.h5ad", tmp_path / "elsewhere.h5ad")
    with pytest.raises(VocabularyError, match=r"pass dictionary=.*, the gene list of scbert"):
        gf.embed(adata, file, **given)


def test_no_token_is_called_top_ranked_where_none_is_ranked(lists, scbert, tmp_path):
    tokenize(
        make_value_cells(8), tmp_path / "values", family="scbert", dictionary=lists["scbert"], progress=False,
        options={"min_genes": 1},
    ).close()  # fmt: skip
    with pytest.raises(UnsupportedError) as caught:
        gf.embed(tmp_path / "values", scbert, pool="cls", progress=False)
    assert str(caught.value) == "scbert has no CLS token. Use pool 'mean'"


@pytest.mark.parametrize("layer", [0, 1])
def test_a_file_without_a_layers_features_is_still_scberts(scbert, layer):
    """The tensor that is missing is named, as for any other, whichever it is."""
    state, name = as_stored(state_of()), f"performer.net.layers.{layer}.0.fn.fast_attention.projection_matrix"
    del state[name]
    torch.save({"model_state_dict": state}, scbert / "panglao_pretrain.pth")
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' .*is missing"):
        gf.load(scbert)


def test_a_classifier_refuses_cells_of_another_order_of_genes(lists, scbert, tmp_path):
    """As many genes in another order would give labels of any kind; no field of scBERT's files says the order."""
    (tmp_path / "reversed.txt").write_text("gene_name\n" + "\n".join(SYMBOLS[::-1]))
    folders = {}
    for name, genes in {"right": lists["scbert"], "wrong": tmp_path / "reversed.txt"}.items():
        folders[name] = tmp_path / name
        tokenize(
            make_value_cells(24), folders[name], family="scbert", dictionary=genes, obs=["label"], progress=False,
            options={"min_genes": 1},
        ).close()  # fmt: skip
    recipe = gf.Recipe(epochs=1, batch_cells=8)
    gf.finetune_cells(folders["right"], scbert, "label", tmp_path / "run", recipe=recipe, device="cpu", progress=False)
    final = tmp_path / "run" / "final"
    assert len(gf.predict(folders["right"], final, device="cpu", progress=False)) == 22
    with pytest.raises(VocabularyError, match="the dictionaries differ"):
        gf.predict(folders["wrong"], final, device="cpu", progress=False)


@pytest.mark.parametrize("family", ["aido-cell", "scgpt", "scbert"])
def test_values_are_no_ranks_to_pretrain_on(lists, tmp_path, family):
    options = {"min_genes": 1} if family == "scbert" else {}
    tokenize(
        make_value_cells(8), tmp_path / "values", family=family, dictionary=lists[family], progress=False,
        options=options,
    ).close()  # fmt: skip
    reason = families.family(family).refused["pretrain"]
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        gf.pretrain(tmp_path / "values", tmp_path / "run")


def test_a_classifier_says_the_gene_list_that_it_learned_from(lists, tmp_path):
    """Where the format has a place for it: embedding with it refuses another order too."""
    (tmp_path / "reversed.txt").write_text("gene_name\n" + "\n".join(SYMBOLS[::-1]))
    for name, genes in {"right": lists["aido-cell"], "wrong": tmp_path / "reversed.txt"}.items():
        tokenize(
            make_value_cells(24), tmp_path / name, family="aido-cell", dictionary=genes, obs=["label"], progress=False
        ).close()
    sizes = {"n_layers": 1, "width": 8, "n_heads": 1, "ff_width": 8, "max_len": N_LISTED + 2}
    model = gf.Encoder(gf.EncoderConfig.preset("aido-cell-3m", **sizes))
    recipe = gf.Recipe(epochs=1, batch_cells=8)
    gf.finetune_cells(tmp_path / "right", model, "label", tmp_path / "run", recipe=recipe, device="cpu", progress=False)
    final = tmp_path / "run" / "final"
    assert gf.embed(tmp_path / "right", final, device="cpu", progress=False).shape == (22, 8)
    with pytest.raises(VocabularyError, match="the dictionaries differ"):
        gf.embed(tmp_path / "wrong", final, device="cpu", progress=False)
    assert model.config.vocabulary_fingerprint is None


@pytest.mark.parametrize("is_preset", [False, True])
def test_training_is_not_profiled_where_there_is_none(scbert, is_preset):
    with pytest.raises(UnsupportedError, match=re.escape(families.family("scbert").refused["pretrain"])):
        model_to_train("scbert" if is_preset else str(scbert), device=torch.device("cpu"))
