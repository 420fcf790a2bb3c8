"""What narrower numbers change: effects of some variants by another model beside those of the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.compare import Comparison
from geneformer_fast.perturbation.engine import PerturbationRun

# Groups of cells of which the first batch of variants is computed by both.
_N_GROUPS = 4


@dataclass(frozen=True)
class Agreement:
    """How effects of a run agree with another model's.

    Attributes
    ----------
    n_values
        Values that both computed.
    rank_correlation
        Spearman's, over all of them.
    largest, root_mean_square
        Of the differences.
    """

    n_values: int
    rank_correlation: float
    largest: float
    root_mean_square: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def agreement_of(run: PerturbationRun, other: Encoder, states: torch.Tensor | None) -> Agreement | None:
    """Compute variants of some cells, from the longest to the shortest, by both; None where there are none.

    Parameters
    ----------
    run
        The run.
    other
        Another model that reads the same tokens.
    states
        [S, C] embeddings of states that both are compared with.

    Raises
    ------
    UnsupportedError
        The other model has other dimensions, and there are states.
    """
    if states is not None and other.config.width != run.encoder.config.width:
        raise UnsupportedError(
            f"compare: the other model has {other.config.width} dimensions, and states {states.shape[1]}; compare "
            "without states"
        )
    comparison = Comparison(run.comparison.mode, run.comparison.framing, None if states is None else states)
    beside = PerturbationRun(
        other, run.edits, comparison, run.layer, run.lengths, run.read, token_budget=run.token_budget
    )
    groups = run.groups()
    chosen = sorted({int(place) for place in np.linspace(0, len(groups) - 1, _N_GROUPS)})
    pairs = []
    with torch.inference_mode():
        for first, last in (groups[place] for place in chosen):
            values = []
            for each in (run, beside):
                group = each.group(first, last)
                start, stop = next(group.edited.slices(run.token_budget), (0, 0))
                if stop > start:
                    values.append(each.effects(group, each.variants(group, start, stop)).cell.reshape(-1))
            if values:
                pairs.append(np.stack(values))
    if not pairs:
        return None
    mine, theirs = np.concatenate(pairs, axis=1).astype(np.float64)
    is_there = np.isfinite(mine) & np.isfinite(theirs)
    mine, theirs = mine[is_there], theirs[is_there]
    if len(mine) < 2:
        return None
    from scipy.stats import spearmanr

    difference = mine - theirs
    return Agreement(
        len(mine), float(spearmanr(mine, theirs).statistic), float(np.abs(difference).max()),
        float(np.sqrt(np.square(difference).mean())),
    )  # fmt: skip
