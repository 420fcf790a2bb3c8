"""Values of a run as columns: those of cells by what was perturbed, never as dicts.

A value of a cell takes 8 bytes. Values of single genes are far more, one per gene of each variant; of them only sums
are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.perturbation.statistics.moments import Moments

Edit = tuple[int, ...]


@dataclass(frozen=True)
class Values:
    """Values of cells for one state, those of one edit together.

    Attributes
    ----------
    values
        [n] float32, by edit; those of one edit in the order of the run.
    cells
        [n] int32, which of the run's cells each is of.
    starts
        [E + 1] int64, where each edit begins.
    """

    values: np.ndarray
    cells: np.ndarray
    starts: np.ndarray

    @classmethod
    def empty(cls, n_edits: int) -> Values:
        """No value of any edit."""
        return cls(np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(n_edits + 1, np.int64))

    @property
    def counts(self) -> np.ndarray:
        """[E] values of each edit."""
        return np.diff(self.starts)

    @property
    def edits(self) -> np.ndarray:
        """[n] int32, the edit of each value."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), self.counts)

    def of(self, edit: int | np.integer[Any]) -> np.ndarray:
        """The values of one edit."""
        return self.values[self.starts[edit] : self.starts[edit + 1]]

    def means(self) -> np.ndarray:
        """[E] float64 means; NaN where there is none."""
        return mean_by(self.values, self.starts)


@dataclass(frozen=True)
class Run:
    """What one run says, or several that are read as one.

    Attributes
    ----------
    edits
        [E] what was perturbed, tokens, in ascending order.
    genes
        [E] the gene ids of these; None where the run does not say.
    states
        Whose shifts there are, in the order of the run; one empty name where there are no states.
    values
        State -> values of cells.
    cells
        [C] int64, rows of the token folder.
    obs
        Columns that were asked for, [C] each.
    rank
        [E] mean place of the gene among the variants of its cells, 0 first and 1 last; NaN where a run has no order.
    moments
        Of values of genes: number, mean and spread for each (edit, affected token).
    n_missing
        Values that are NaN, which are left out.
    lengths
        [C] tokens of each cell; None where nobody says.
    sets
        What edits are called that were given as named sets of genes.
    """

    edits: list[Edit]
    genes: list[tuple[str | None, ...]]
    states: list[str]
    values: dict[str, Values]
    cells: np.ndarray
    obs: dict[str, np.ndarray]
    rank: np.ndarray
    moments: Moments
    n_missing: int = 0
    lengths: np.ndarray | None = None
    sets: Mapping[Edit, str] = field(default_factory=dict)

    @property
    def has_states(self) -> bool:
        """Whether values are shifts towards states."""
        return self.states != [""]

    @property
    def only(self) -> Values:
        """The values, where there are no states.

        Raises
        ------
        InputError
            There are.
        """
        if self.has_states:
            raise InputError(
                f"the run has shifts towards states ({', '.join(self.states)}); what compares cells without states "
                "cannot read them: use goal_state_shift, or perturb once more without states"
            )
        return self.values[""]

    def towards(self, state: str) -> Values:
        """The shifts towards a state.

        Raises
        ------
        InputError
            There are none.
        """
        if state not in self.values or not self.has_states:
            found = f"it has {', '.join(self.states)}" if self.has_states else "it has no states"
            raise InputError(f"the run has no shifts towards {state!r}; {found}")
        return self.values[state]


def mean_by(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[E] float64 means of groups that stand together; NaN for an empty one."""
    counts = np.diff(starts)
    sums = np.zeros(len(counts))
    full = counts > 0
    if full.any():
        sums[full] = np.add.reduceat(values.astype(np.float64), starts[:-1][full])
    return np.divide(sums, counts, out=np.full(len(counts), math.nan), where=full)
