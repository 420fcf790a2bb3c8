"""A model beside another one: measures by scikit-learn and by hand, what is held and missed, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import cells, encoder, vocabulary

import geneformer_fast as gf
from geneformer_fast import Encoder
from geneformer_fast.errors import CheckpointError, InputError, UnsupportedError, VocabularyError
from geneformer_fast.finetuning.models import save_classifier, with_head
from geneformer_fast.heads import make_head
from geneformer_fast.quantization import answers, quantize
from geneformer_fast.quantization import check as checking
from geneformer_fast.quantization.check import Check, check, neighbours_shared

CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    adata = cells(60)
    adata.obs["other"] = np.where(adata.obs["kind"] == "a", "b", "none of them")
    adata.write_h5ad(folder / "cells.h5ad")
    gf.tokenize(
        str(folder / "cells.h5ad"), folder / "tokens", dictionary=vocabulary(), obs=["kind", "other"], progress=False
    )
    return folder / "tokens"


def with_genes() -> Encoder:
    made = encoder()
    made.head = make_head("mlm", made.config)
    return made.eval()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = with_head(encoder(), "cells", 3)
    with torch.no_grad():
        made.head.classifier.weight.mul_(50.0)
    card = {"kind": "cells", "tasks": [{"name": "kind", "classes": CLASSES}]}
    return save_classifier(made, tmp_path_factory.mktemp("model") / "final", CLASSES, card, None, {})


def disturbed(made: Encoder, by: float) -> Encoder:
    made = copy.deepcopy(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return made


def by_name(found: Check) -> dict[str, Any]:
    return {measure.name: measure for measure in found.measures}


@pytest.mark.parametrize("at_once", [1 << 24, 100, 1])
def test_neighbours_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(checking, "_DISTANCES", at_once)
    rng = np.random.default_rng(0)
    one = rng.normal(size=(53, 8))
    other = one + rng.normal(size=one.shape) * 0.3
    from sklearn.neighbors import NearestNeighbors

    sets = []
    for x in (one, other):
        near = NearestNeighbors(n_neighbors=15, algorithm="brute").fit(x).kneighbors(return_distance=False)
        sets.append([set(row) for row in near])
    expected = np.mean([len(a & b) / 15 for a, b in zip(*sets, strict=True)])
    assert 0.3 < expected < 0.95
    assert neighbours_shared(torch.from_numpy(one), torch.from_numpy(other)) == pytest.approx(expected)
    assert neighbours_shared(torch.from_numpy(one), torch.from_numpy(one)) == 1.0


def test_few_cells_have_fewer_neighbours_and_equal_cells_no_trouble() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert neighbours_shared(x, x) == 1.0
    assert neighbours_shared(torch.ones(5, 3), torch.ones(5, 3)) == 1.0


@pytest.mark.parametrize(
    ("common", "noise", "is_held", "is_told"),
    [
        (4.0, 0.0005, True, True),  # a model that was hardly trained: as little is lost as in bfloat16
        (4.0, 0.0030, False, True),  # more is lost
        (0.0, 0.0005, False, False),  # cells that differ as much and have nothing in common
        (0.0, 0.00001, True, False),
    ],
)
def test_neighbours_are_asked_for_as_far_as_cells_can_be_told_apart(
    common: float, noise: float, is_held: bool, is_told: bool
) -> None:
    """The quickstart's model was seen to share 0.83 of neighbours in int8, and 0.74 once rounded to bfloat16."""
    rng = np.random.default_rng(0)
    exact = common * rng.normal(size=64) / 8 + 0.004 * rng.normal(size=(400, 64))
    said = [
        answers.Answers(x.astype(np.float32), None, None, None, 1, "float32", None)
        for x in (exact, exact + noise * rng.normal(size=exact.shape))
    ]
    found = checking.compared(*said)
    measure = by_name(found)["15 nearest neighbours shared"]
    assert (measure.is_held, bool(measure.note)) == (is_held, is_told)
    rounded = neighbours_shared(
        *(torch.from_numpy(exact).to(dtype).double() for dtype in (torch.float32, torch.bfloat16))
    )
    least = rounded if is_told else 0.95
    assert measure.bound == f">= {least:.3g}"
    assert measure.is_held == (measure.quantized >= least)
    assert (measure.quantized < 0.95) == (is_told or not is_held)
    assert (f"to bfloat16 leaves {rounded:.3g}" in found.as_text()) == is_told


def test_a_model_beside_itself_holds_everything(tokens: Path) -> None:
    made = with_genes()
    found = check(made, made, tokens, progress=False)
    assert found.is_held
    assert found.n_cells == 60
    measures = by_name(found)
    for name in ("cosine of embeddings, least", "15 nearest neighbours shared", "20 likeliest genes shared"):
        assert measures[name].quantized == pytest.approx(1.0)
        assert measures[name].is_held
    assert measures["model, MB"].exact == measures["model, MB"].quantized
    assert found.n_masked > 50


def test_another_model_misses_everything(tokens: Path) -> None:
    found = check(with_genes(), disturbed(with_genes(), 0.5), tokens, progress=False)
    assert not found.is_held
    held = {measure.name: measure.is_held for measure in found.measures if measure.is_held is not None}
    assert len(held) == 3
    assert not any(held.values())
    assert found.as_text().count("MISSED") == 3


def test_measures_are_what_they_are_by_hand(tokens: Path) -> None:
    one, other = with_genes(), disturbed(with_genes(), 0.02)
    found = by_name(check(one, other, tokens, layer="last", progress=False))
    x, y = (gf.embed(tokens, each, layer="last", progress=False) for each in (one, other))
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert found["cosine of embeddings, least"].quantized == pytest.approx(cosine.min(), abs=1e-5)
    assert found["cosine of embeddings, median"].quantized == pytest.approx(np.median(cosine), abs=1e-4)
    shared = neighbours_shared(torch.from_numpy(x), torch.from_numpy(y))
    assert found["15 nearest neighbours shared"].quantized == pytest.approx(shared, abs=0.02)
    assert shared < 1


def test_genes_are_asked_at_masked_places_and_special_tokens_are_none(
    tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = with_genes(), disturbed(with_genes(), 0.02)
    with torch.no_grad():
        for made in (one, other):
            made.head.bias[:4] += 1000.0  # what is not a gene would always come first
    monkeypatch.setattr(answers, "N_MASKED_CELLS", 7)
    with gf.open_tokens(tokens) as folder:
        cells_ = np.arange(20)
        said = [answers.Questions(folder, cells_, "last", 64, 3, False).ask(made) for made in (one, other)]
        values, bounds = folder.read(cells_[:7])
    assert np.array_equal(said[0].targets, said[1].targets)
    assert (said[0].targets >= 4).all()
    assert set(said[0].targets) <= set(values)
    assert 0.05 * bounds[-1] < len(said[0].targets) < 0.3 * bounds[-1]
    assert (said[0].genes >= 4).all()
    assert all(len(set(row)) == 20 for row in said[0].genes)
    shared = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(said[0].genes, said[1].genes, strict=True)])
    (measure, right) = checking._of_genes(*said)
    assert measure.quantized == pytest.approx(shared)
    assert shared < 1
    assert right.exact == pytest.approx(
        np.mean([t in row for t, row in zip(said[0].targets, said[0].genes, strict=True)])
    )


def test_a_classifier_is_scored_where_tokens_carry_its_column(tokens: Path, classifier: Path) -> None:
    other = disturbed(gf.load(classifier), 0.05)
    found = check(classifier, other, tokens, progress=False)
    measures = by_name(found)
    truth = gf.open_tokens(tokens).column("kind").to_pylist()
    drawn = np.random.default_rng(0).permutation(60)
    predicted = gf.predict(tokens, classifier, progress=False)["kind_predicted"].to_numpy()
    from sklearn.metrics import f1_score

    expected = f1_score(truth, predicted, average="macro")
    assert measures["kind: macro-F1"].exact == pytest.approx(expected)
    assert measures["kind: macro-F1"].quantized != measures["kind: macro-F1"].exact
    assert measures["kind: cells called the same"].quantized < 1
    assert len(drawn) == found.n_cells
    assert not measures["kind: macro-F1"].is_held or measures["kind: macro-F1"].quantized > expected - 0.005


def test_the_column_of_labels_may_be_named(tokens: Path, classifier: Path) -> None:
    made = gf.load(classifier)
    named = by_name(check(classifier, made, tokens, label="other", progress=False))["kind: macro-F1"]
    # Labels that are no class of the model are left out; what is left has one class.
    labels = np.array(gf.open_tokens(tokens).column("other").to_pylist())
    predicted = gf.predict(tokens, classifier, progress=False)["kind_predicted"].to_numpy()
    from sklearn.metrics import f1_score

    expected = f1_score(labels[labels == "b"], predicted[labels == "b"], average="macro")
    assert named.exact == pytest.approx(expected)
    with pytest.raises(InputError, match="no column 'absent'"):
        check(classifier, made, tokens, label="absent", progress=False)


def test_a_classifier_in_memory_tells_only_whether_it_calls_cells_the_same(tokens: Path, classifier: Path) -> None:
    made = gf.load(classifier)
    measures = by_name(check(made, made, tokens, progress=False))
    assert measures["cells called the same"].quantized == 1.0
    assert not any("macro-F1" in name for name in measures)
    with pytest.raises(UnsupportedError, match="label 'kind' is for a classifier of cells"):
        check(made, made, tokens, label="kind", progress=False)


def test_a_quantized_model_is_smaller_and_said_to_be_one(tokens: Path) -> None:
    made = with_genes()
    found = check(made, quantize.quantize(made), tokens, max_cells=30, progress=False)
    size = by_name(found)["model, MB"]
    assert size.quantized < size.exact
    assert (found.scheme, found.n_cells) == ("int8", 30)
    content = json.loads(json.dumps(found.to_dict()))
    assert content["measures"][0]["name"] == "cosine of embeddings, least"
    assert content["is_held"] == found.is_held
    text = found.as_text()
    assert all(measure.name in text for measure in found.measures)
    assert "quantized to int8" in text


def test_what_cannot_be_compared_is_refused(tokens: Path, classifier: Path, tmp_path: Path) -> None:
    made = with_genes()
    with pytest.raises(CheckpointError, match="not of one kind: genes are"):
        check(made, encoder(), tokens, progress=False)
    with pytest.raises(CheckpointError, match="not of one kind: embeddings are"):
        check(made, encoder(width=48), tokens, progress=False)
    with pytest.raises(VocabularyError, match="other"):
        check(encoder(vocabulary(name="other")), made, tokens, progress=False)
    with pytest.raises(UnsupportedError, match="max_cells must be at least 2"):
        check(made, made, tokens, max_cells=1, progress=False)
    cells(1).write_h5ad(tmp_path / "one.h5ad")
    gf.tokenize(str(tmp_path / "one.h5ad"), tmp_path / "tokens", dictionary=vocabulary(), progress=False)
    with pytest.raises(InputError, match="has 1 cell, and two at least"):
        check(made, made, tmp_path / "tokens", progress=False)
