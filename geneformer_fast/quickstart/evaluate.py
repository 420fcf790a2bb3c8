"""How well cell types of cells from unseen donors are told apart, beside two baselines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse


@dataclass(frozen=True)
class Score:
    """Accuracy and macro-F1 on held-out cells, both from 0 to 1."""

    accuracy: float
    macro_f1: float


def hold_out(donors: np.ndarray, n_held_out: int, *, seed: int = 0) -> np.ndarray:
    """Booleans [n_cells]: True for the cells of ``n_held_out`` donors chosen by the seed."""
    names = np.unique(donors)
    chosen = np.random.default_rng(seed).choice(names, n_held_out, replace=False)
    return np.isin(donors, chosen)


def score_features(features: np.ndarray, labels: np.ndarray, is_held_out: np.ndarray) -> Score:
    """Logistic regression on standardised features [n_cells, n_features], fitted to the cells that are not held out."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    model.fit(features[~is_held_out], labels[~is_held_out])
    return _score(labels[is_held_out], model.predict(features[is_held_out]))


def score_majority(labels: np.ndarray, is_held_out: np.ndarray) -> Score:
    """Everything is called what most training cells are."""
    names, counts = np.unique(labels[~is_held_out], return_counts=True)
    truth = labels[is_held_out]
    return _score(truth, np.full(len(truth), names[counts.argmax()]))


def pca_features(counts: sparse.csr_matrix, is_held_out: np.ndarray, *, n_components: int = 50) -> np.ndarray:
    """The usual features: counts per 10,000, log1p, principal components fitted to the cells that are not held out."""
    from sklearn.decomposition import PCA

    totals = np.asarray(counts.sum(1)).ravel()
    scaled = sparse.diags(1e4 / np.maximum(totals, 1)) @ counts
    log_counts = np.log1p(scaled.toarray())
    n_components = min(n_components, int((~is_held_out).sum()) - 1, counts.shape[1])
    pca = PCA(n_components, random_state=0).fit(log_counts[~is_held_out])
    return pca.transform(log_counts)


def _score(truth: np.ndarray, predicted: np.ndarray) -> Score:
    from sklearn.metrics import accuracy_score, f1_score

    return Score(float(accuracy_score(truth, predicted)), float(f1_score(truth, predicted, average="macro")))
