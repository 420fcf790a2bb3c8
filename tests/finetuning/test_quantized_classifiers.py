"""Classifiers of eight bits: quantized after they learned, or learned on top of a quantized encoder."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import toys
from typed_cells import SHORT, typed_cells

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.finetuning.engine import Choices, check_splits
from geneformer_fast.finetuning.outputs import Finetuned
from geneformer_fast.finetuning.search import Search, Space


@pytest.fixture(scope="module")
def new_cells() -> anndata.AnnData:
    return typed_cells(30, seed=9)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_a_classifier_is_quantized(done: Finetuned, new_cells: anndata.AnnData, tmp_path: Path, scheme: str) -> None:
    folder = gf.quantize(done.model, tmp_path / scheme, scheme=scheme)
    found, expected = (gf.predict(new_cells, each, copy=True, progress=False) for each in (folder, done.model))
    np.testing.assert_allclose(found.obsm["kind_probabilities"], expected.obsm["kind_probabilities"], atol=0.1)
    assert (found.obs["kind_predicted"] == expected.obs["kind_predicted"]).mean() > 0.9
    said = [each.uns["kind_predicted"]["quantization"] for each in (found, expected)]
    assert said == [scheme, "none"]


def test_several_tasks_on_a_frozen_quantized_encoder(home: Path, new_cells: anndata.AnnData, tmp_path: Path) -> None:
    """The head learns, nothing else does, and what is saved is quantized as it was."""
    base = gf.quantize(home / "model", tmp_path / "base")
    with pytest.warns(UserWarning, match=r"quantized \(int8\).*only the classifier on top is trained") as said:
        made = gf.finetune_cells(
            home / "tokens", base, ["kind", "donor"], tmp_path / "out", folds=0,
            recipe=dataclasses.replace(SHORT, epochs=2),
        )  # fmt: skip
    assert [Path(each.filename).name for each in said if "only the classifier" in str(each.message)] == [
        Path(__file__).name
    ]
    before, after = gf.load(base), gf.load(made.model)
    assert after.quantization == before.quantization
    kept = {name: tensor for name, tensor in before.state_dict().items() if not name.startswith("head.")}
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in kept.items())
    found = gf.predict(new_cells, made.model, copy=True, progress=False)
    assert {"kind_predicted", "donor_predicted"} <= set(found.obs)
    assert found.uns["donor_predicted"]["quantization"] == "int8"
    np.testing.assert_allclose(found.obsm["donor_probabilities"].sum(1), 1, atol=1e-6)


def test_from_command_to_command(done: Finetuned, home: Path, tmp_path: Path) -> None:
    """A classifier that was taught is quantized, and predicts; its folder is still one of classes."""
    small, out = tmp_path / "small", tmp_path / "out.parquet"
    assert main(["quantize", str(done.model), "--out", str(small), "--scheme", "int8-weights"]) == 0
    assert main(["predict", str(home / "tokens"), "--model", str(small), "--out", str(out)]) == 0
    gf.predict(home / "tokens", done.model, tmp_path / "plain.parquet", progress=False)
    found, wide = pq.read_table(out), pq.read_table(tmp_path / "plain.parquet")
    assert found.column_names == wide.column_names
    same = found["kind_predicted"].to_numpy(zero_copy_only=False) == wide["kind_predicted"].to_numpy(
        zero_copy_only=False
    )
    assert same.mean() > 0.95
    assert gf.load(small).quantization.scheme == "int8-weights"


class NothingToSplit:
    """Of a :class:`~geneformer_fast.finetuning.engine.Work` what is looked at before the first split."""

    kind = "genes"


@pytest.mark.parametrize(
    ("n_frozen", "embeddings", "is_quantized", "is_said"),
    [
        (0, False, True, True),
        (3, False, True, True),
        (2, True, True, True),
        (3, True, True, False),
        (0, False, False, False),
    ],
)
def test_what_does_not_learn_is_said_unless_it_was_asked_for(
    n_frozen: int, embeddings: bool, is_quantized: bool, is_said: bool
) -> None:
    base = gf.quantize(toys.encoder(), scheme="fp8") if is_quantized else toys.encoder()
    choices = Choices(SHORT, n_frozen, embeddings, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_splits(NothingToSplit(), base, choices, [])
    assert [re.findall(r"quantized \((.*?)\)", str(each.message)) for each in said] == [["fp8"]] * is_said


def test_there_is_nothing_to_search_in_layers_that_do_not_learn() -> None:
    base, search = gf.quantize(toys.encoder()), Search(2, Space(freeze_layers=(0, 2)))
    with pytest.raises(UnsupportedError, match=r"freeze_layers cannot be searched: the model is quantized \(int8\)"):
        check_splits(NothingToSplit(), base, Choices(SHORT, 0, False, search), [])
