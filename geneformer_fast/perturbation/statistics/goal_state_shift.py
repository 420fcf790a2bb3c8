"""The official mode ``goal_state_shift``: how far each gene moves cells towards a state, against all genes together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.perturbation.statistics.columns import Run, Values
from geneformer_fast.perturbation.statistics.multiple import false_discovery_rates
from geneformer_fast.perturbation.statistics.names import Names, columns_of
from geneformer_fast.perturbation.statistics.ranksum import RankSum, against, against_the_others, drawn

if TYPE_CHECKING:
    import pandas

#: Below this false discovery rate the official tables call a gene significant.
SIGNIFICANT = 0.05


def goal_state_shift(
    run: Run, names: Names, goal: str, alternatives: Sequence[str] = (), *, mend: Collection[str] = ()
) -> pandas.DataFrame:
    """The table of all genes, the official columns in their order.

    Parameters
    ----------
    run
        With shifts towards these states.
    names
        Of genes.
    goal, alternatives
        States.
    mend
        ``"pool"``: a gene is compared with the values of the others, all of them, rather than with a pool that it is
        in. ``"ties"``: the variance is corrected for ties.
    """
    import pandas as pd

    at = run.towards(goal)
    others = {state: run.towards(state) for state in alternatives}
    shown = np.flatnonzero(at.counts > 0)
    columns: dict[str, Any] = columns_of([run.edits[edit] for edit in shown], names)
    columns["Shift_to_goal_end"] = at.means()[shown]
    columns |= {f"Shift_to_alt_end_{state}": values.means()[shown] for state, values in others.items()}
    p_values = {"Goal_end": tested(at, mend).p_values[shown]}
    p_values |= {f"Alt_end_{state}": tested(values, mend).p_values[shown] for state, values in others.items()}
    columns |= {_named(name, "vs_random_pval"): values for name, values in p_values.items()}
    columns |= {_named(name, "FDR"): false_discovery_rates(values) for name, values in p_values.items()}
    columns["N_Detections"] = at.counts[shown]
    columns["Sig"] = (columns["Goal_end_FDR"] < SIGNIFICANT).astype(np.int64)
    return pd.DataFrame(columns).sort_values(
        by=["Sig", "Shift_to_goal_end", "Goal_end_FDR"], ascending=[False, False, True]
    )


def goal_state_shift_of_list(run: Run, goal: str, alternatives: Sequence[str] = (), edit: int = 0) -> pandas.DataFrame:
    """One row of mean shifts, for genes that were perturbed together."""
    import pandas as pd

    columns = {"Shift_to_goal_end": run.towards(goal)}
    columns |= {f"Shift_to_alt_end_{state}": run.towards(state) for state in alternatives}
    return pd.DataFrame({name: [values.means()[edit]] for name, values in columns.items()})


def tested(values: Values, mend: Collection[str]) -> RankSum:
    """The rank-sum test of each edit, as the official tool does it or mended."""
    has_ties = "ties" in mend
    if "pool" in mend:
        return against_the_others(values, has_ties=has_ties)
    return against(drawn(values.values), values, has_ties=has_ties)


def _named(end: str, what: str) -> str:
    """``Goal_end_FDR``, and of an alternative state ``Alt_end_FDR_STATE``."""
    kind, _, state = end.partition("_end")
    return f"{kind}_end_{what}{state}"
