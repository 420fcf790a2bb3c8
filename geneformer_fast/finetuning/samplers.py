"""Over- and under-sampling of classes as lists of indices: no cell and no token is copied.

The usual tools return copied matrices (imbalanced-learn's ``RandomOverSampler`` and ``RandomUnderSampler``). Here an
epoch is an array of cell numbers. Each epoch draws anew, so under-sampling shows other cells of the large classes every
time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geneformer_fast.errors import UnsupportedError

SAMPLERS = ("none", "over", "under")


def over_sample(codes: np.ndarray, rng: np.random.Generator, *, cap: int | None = None) -> np.ndarray:
    """Positions in which every class comes equally often: as often as the largest class, or ``cap`` times.

    Parameters
    ----------
    codes
        [n] the class of each cell, 0 or greater.
    rng
        Draws and shuffles.
    cap
        Cells per class; None is the size of the largest class. Larger classes are cut to it.

    Returns
    -------
    numpy.ndarray
        int64, shuffled. Within a class no cell comes more than once more often than another.
    """
    groups = _by_class(codes)
    target = max((len(group) for group in groups), default=0) if cap is None else _checked(cap)
    return _draw(groups, [target] * len(groups), rng)


def under_sample(codes: np.ndarray, rng: np.random.Generator, *, cap: int | None = None) -> np.ndarray:
    """Positions in which no class comes more often than the smallest one, or than ``cap``; none is repeated.

    Parameters
    ----------
    codes
        [n] the class of each cell, 0 or greater.
    rng
        Draws and shuffles.
    cap
        Most cells per class; None is the size of the smallest class.

    Returns
    -------
    numpy.ndarray
        int64, shuffled.
    """
    groups = _by_class(codes)
    target = min((len(group) for group in groups), default=0) if cap is None else _checked(cap)
    return _draw(groups, [min(len(group), target) for group in groups], rng)


@dataclass(frozen=True)
class ClassSampler:
    """Which cells an epoch shows, and in which order: a ``sampler`` for :func:`geneformer_fast.training.loop.fit`.

    Attributes
    ----------
    codes
        [n_cells of the token folder] classes; -100 (no label in the task that is sampled by) is a class of its own that
        is never repeated nor left out.
    kind
        ``"none"``, ``"over"`` or ``"under"``.
    cap
        Most cells per class and epoch.
    """

    codes: np.ndarray
    kind: str = "none"
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in SAMPLERS:
            raise UnsupportedError(f"sampler must be one of {', '.join(SAMPLERS)}, not {self.kind!r}")
        if self.cap is not None:
            _checked(self.cap)

    def order(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The cells of one epoch, int64, in the order to show them.

        Parameters
        ----------
        cells
            [n] the training cells, as indices into the token folder.
        rng
            Depends on the run's seed and the epoch alone.
        """
        codes = self.codes[cells]
        labelled, rest = np.flatnonzero(codes >= 0), np.flatnonzero(codes < 0)
        if self.kind == "over":
            chosen = labelled[over_sample(codes[labelled], rng, cap=self.cap)]
        elif self.kind == "under" or self.cap is not None:
            chosen = labelled[under_sample(codes[labelled], rng, cap=self.cap)]
        else:
            chosen = labelled
        return cells[rng.permutation(np.concatenate([chosen, rest]))]


def _checked(cap: int) -> int:
    if cap < 1:
        raise UnsupportedError(f"a cap of {cap} cells per class leaves none; take 1 or more")
    return cap


def _by_class(codes: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(codes == code) for code in np.unique(codes)]


def _draw(groups: list[np.ndarray], sizes: list[int], rng: np.random.Generator) -> np.ndarray:
    """``sizes[c]`` members of every group, each as often as any other of its group, up to one."""
    parts = []
    for group, size in zip(groups, sizes, strict=True):
        rounds, rest = divmod(size, len(group))
        parts += [np.repeat(group, rounds), rng.choice(group, rest, replace=False)]
    return rng.permutation(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
