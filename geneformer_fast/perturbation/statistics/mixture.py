"""The official mode ``mixture_model``: genes that move a cell much and those that hardly do, as two Gaussians."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.perturbation.statistics.columns import Run, mean_by
from geneformer_fast.perturbation.statistics.names import Names, columns_of

if TYPE_CHECKING:
    import pandas


def check_mixture() -> None:
    """Refuse, before anything is read, to fit without scikit-learn."""
    from importlib.util import find_spec

    if find_spec("sklearn") is None:
        raise UnsupportedError(
            "mixture_model needs scikit-learn, which is not installed: pip install 'geneformer-fast[plot]'"
        )


def mixture_model(run: Run, names: Names, *, mend: Collection[str] = ()) -> pandas.DataFrame:
    """The table of all genes, the official columns in their order.

    Parameters
    ----------
    run
        Without states.
    names
        Of genes.
    mend
        ``"components"``: the component of the lower cosines is the one with impact, however the fit numbers them.

    Raises
    ------
    InputError
        Fewer than two genes have values.
    """
    import pandas as pd

    values = run.only
    shown = np.flatnonzero(values.counts > 0)
    if len(shown) < 2:
        raise InputError(f"mixture_model compares genes, and {len(shown)} has values; two are the least")
    means = values.means()[shown]
    is_impact = _judge(means, is_sorted="components" in mend)
    shares = mean_by(is_impact(values.values.astype(np.float64)), values.starts)[shown]
    table = pd.DataFrame(
        {
            **columns_of([run.edits[edit] for edit in shown], names),
            "Test_avg_shift": means,
            "Impact_component": is_impact(means),
            "Impact_component_percent": shares * 100,
            "N_Detections": values.counts[shown],
        }
    )
    return table.sort_values(by=["Impact_component", "Test_avg_shift"], ascending=[False, True])


class _judge:
    """Says of values whether they belong to the component with impact: 1 or 0.

    Beyond the mean of a component nothing is left to the fit: its variances may differ, and the wider one would win
    far out on the other side.
    """

    def __init__(self, means: np.ndarray, *, is_sorted: bool) -> None:
        from sklearn.mixture import GaussianMixture

        self._fit = GaussianMixture(n_components=2, random_state=0).fit(means[:, None])
        centres = self._fit.means_[:, 0]
        self._impact = int(centres.argmin()) if is_sorted else 0
        self._low, self._high = centres[self._impact], centres[1 - self._impact]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        found = (self._fit.predict(values[:, None]) == self._impact).astype(np.int64)
        found[values < self._low] = 1
        found[values > self._high] = 0
        return found
