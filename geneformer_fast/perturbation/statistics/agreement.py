"""Whether other runs say the same of a gene: of another layer, or another model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    import pandas

#: The genes with the largest effects, of which the share is told that two runs have in common.
TOP = 100
_LEAST = 3


def sign_agreement(tables: Mapping[str, pandas.DataFrame], state: str = "") -> pandas.DataFrame:
    """Pairs of runs: in how far they agree.

    Parameters
    ----------
    tables
        Name of a run -> its table of effects.
    state
        The state whose shifts are compared.

    Returns
    -------
    pandas.DataFrame
        A row per pair: ``first``, ``second``, ``n_genes`` that both tested, ``same_sign`` (share; 0.5 by chance),
        ``same_sign_sure`` (of genes whose intervals exclude none in both), ``spearman``, and ``top_shared``: share of
        the :data:`TOP` largest effects of either that are among those of the other.

    Raises
    ------
    InputError
        Two runs have fewer than three genes in common.
    """
    import pandas as pd

    found = {name: directed(table, state) for name, table in tables.items()}
    rows = []
    for first, second in combinations(found, 2):
        both = found[first].join(found[second], how="inner", lsuffix="_1", rsuffix="_2")
        if len(both) < _LEAST:
            raise InputError(
                f"{first} and {second} have {len(both)} tested genes in common, by their ids; {_LEAST} are the least "
                "that can agree. Runs of different vocabularies have ids where a dictionary was given"
            )
        one, two = both["effect_1"].to_numpy(), both["effect_2"].to_numpy()
        is_same = np.sign(one) == np.sign(two)
        is_sure = (both["is_sure_1"] & both["is_sure_2"]).to_numpy()
        n_top = min(TOP, len(both))
        top = [set(np.argsort(-np.abs(each), kind="stable")[:n_top].tolist()) for each in (one, two)]
        rows.append(
            {
                "first": first,
                "second": second,
                "n_genes": len(both),
                "same_sign": is_same.mean(),
                "n_sure": int(is_sure.sum()),
                "same_sign_sure": is_same[is_sure].mean() if is_sure.any() else np.nan,
                "spearman": float(spearmanr(one, two).statistic) if np.ptp(one) and np.ptp(two) else np.nan,
                "top_shared": len(top[0] & top[1]) / n_top,
            }
        )
    return pd.DataFrame(rows)


def directed(table: pandas.DataFrame, state: str = "") -> pandas.DataFrame:
    """``effect`` and ``is_sure`` by gene: of shifts the mean, of cosines what is beyond genes like it.

    A cosine is near one for every gene, so that only the difference from others has a sign.
    """
    import pandas as pd

    if "state" in table:
        table = table[table["state"] == state]
        effect, low, high = table["mean"], table["low"], table["high"]
    else:
        effect, low, high = table["difference"], table["difference_low"], table["difference_high"]
    by = _ids(table)
    is_sure = ((low > 0) | (high < 0)).to_numpy()
    found = pd.DataFrame({"effect": effect.to_numpy(), "is_sure": is_sure}, index=by.to_numpy())
    return found[table["is_covered"].to_numpy() & ~np.isnan(found["effect"].to_numpy())]


def agreeing(table: pandas.DataFrame, others: Mapping[str, pandas.DataFrame], state: str = "") -> pandas.DataFrame:
    """The table with ``n_runs`` that tested a gene beside this one, and ``n_same_sign`` of them.

    Rows of other states, and genes that were not tested, have none.
    """
    ours = directed(table, state)["effect"]
    sign = np.sign(ours)
    n_runs, n_same = ours * 0, ours * 0
    for other in others.values():
        theirs = directed(other, state)["effect"].reindex(ours.index)
        n_runs += theirs.notna()
        n_same += np.sign(theirs) == sign
    by = _ids(table)
    is_here = (table["state"] == state) if "state" in table else table["is_covered"].notna()
    return table.assign(n_runs=by.map(n_runs).where(is_here), n_same_sign=by.map(n_same).where(is_here))


def _ids(table: pandas.DataFrame) -> pandas.Series:
    """By what genes of two runs are the same: their ids, or where nobody knows these their tokens."""
    return table["gene"].where(table["gene"].notna(), "token " + table["tokens"])
