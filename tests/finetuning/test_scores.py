"""Scores on cases counted by hand, and pictures that are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast.finetuning.pictures import plot_confusion, plot_roc
from geneformer_fast.finetuning.scores import GRID, over_folds, roc_on_grid, score


def one_hot(codes: list[int], n_classes: int = 3) -> np.ndarray:
    return np.eye(n_classes)[codes] * 0.8 + 0.2 / n_classes


def test_by_hand():
    truth = np.array([0, 0, 0, 0, 1, 1, 2])
    found = score(truth, one_hot([0, 0, 0, 1, 1, 0, 0]), ["T", "B", "NK"])
    assert found["n"] == 7
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["confusion"] == [[3, 1, 0], [1, 1, 0], [1, 0, 0]]
    t = found["per_class"]["T"]
    assert (t["precision"], t["recall"], t["n"]) == (pytest.approx(3 / 5), pytest.approx(3 / 4), 4)
    assert found["per_class"]["NK"]["f1"] == 0
    f1 = [2 * 0.6 * 0.75 / 1.35, 0.5, 0.0]
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3)


def test_area_of_two_classes_is_the_share_of_pairs_in_order():
    truth = np.array([0, 0, 1, 1, 1])
    p = np.array([0.1, 0.6, 0.5, 0.7, 0.9])
    found = score(truth, np.stack([1 - p, p], 1), ["no", "yes"])
    assert found["roc_auc"] == pytest.approx(5 / 6)
    assert found["per_class"]["no"]["roc_auc"] == pytest.approx(5 / 6)


def test_area_of_several_classes_is_the_mean_of_each_against_the_rest():
    rng = np.random.default_rng(0)
    truth, p = rng.integers(3, size=60), rng.dirichlet(np.ones(3), 60)
    found = score(truth, p, ["a", "b", "c"])

    def pairs(code: int) -> float:
        yes, no = p[truth == code, code], p[truth != code, code]
        return float((yes[:, None] > no).mean())

    assert found["roc_auc"] == pytest.approx(np.mean([pairs(code) for code in range(3)]))


def test_a_class_that_is_absent_has_no_area_and_is_said_to_have_none():
    found = score(np.array([0, 0, 1]), one_hot([0, 1, 1]), ["a", "b", "c"])
    assert found["roc_auc"] is None
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "roc_auc": None, "n": 0}
    # Of the classes that occur only: an absent class is no failure of the model.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_over_folds():
    parts = [{"accuracy": value, "macro_f1": value / 2, "roc_auc": None} for value in (0.7, 0.8, 0.9)]
    found = over_folds(parts)
    assert found["accuracy"] == {"mean": pytest.approx(0.8), "sd": pytest.approx(0.1), "folds": [0.7, 0.8, 0.9]}
    assert "roc_auc" not in found
    assert over_folds(parts[:1])["macro_f1"]["sd"] is None


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_the_curve_rises_and_holds_the_area(seed, n_classes):
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(n_classes), rng.integers(n_classes, size=400)])
    p = rng.dirichlet(np.ones(n_classes), len(truth)) + 0.4 * np.eye(n_classes)[truth]
    p /= p.sum(1, keepdims=True)
    curve = roc_on_grid(truth, p)
    assert curve[0] == 0
    assert curve[-1] == 1
    assert (np.diff(curve) >= 0).all()
    area = score(truth, p, [str(code) for code in range(n_classes)])["roc_auc"]
    assert np.trapezoid(curve, GRID) == pytest.approx(area, abs=0.03)


def test_no_curve_without_both_sides():
    assert roc_on_grid(np.zeros(3, dtype=int), one_hot([0, 0, 0], 2)) is None


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"cell type {i}" for i in range(6)]
    confusion = rng.integers(0, 30, (6, 6)) + np.diag(rng.integers(50, 300, 6))
    curves = [np.sqrt(GRID) ** power for power in (0.3, 0.5, 0.6)]
    confused = plot_confusion(confusion.tolist(), names, tmp_path / "confusion.png", title="held-out cells")
    drawn = plot_roc(curves, [0.95, 0.9, 0.88], tmp_path / "roc.png", title="folds")
    single = plot_roc(curves[:1], [0.95], tmp_path / "one.svg")
    assert confused.read_bytes()[:4] == drawn.read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in single.read_bytes()
