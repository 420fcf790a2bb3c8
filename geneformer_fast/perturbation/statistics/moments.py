"""Number, mean and spread of the values of each pair of tokens, kept while batches come."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

# Sums of so many pairs are kept side by side before those of one pair are joined.
_MOST_PARTS = 4_000_000
_SHIFT = 31  # affected tokens are below 2**31


@dataclass
class Moments:
    """Sums over (edit, affected token), by the pairwise update of Chan, Golub and LeVeque (1979), in float64.

    Attributes
    ----------
    keys
        [P] int64, ``edit << 31 | affected``, ascending once :meth:`joined`.
    counts, means, squares
        [P] number, mean, and sum of squared deviations from it.
    """

    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    means: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, edit: np.ndarray, affected: np.ndarray, values: np.ndarray) -> None:
        """Take a batch of values [n]."""
        keys = (edit.astype(np.int64) << _SHIFT) | affected.astype(np.int64)
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order].astype(np.float64)
        found, first, counts = np.unique(keys, return_index=True, return_counts=True)
        means = np.add.reduceat(values, first) / counts
        squares = np.add.reduceat((values - np.repeat(means, counts)) ** 2, first)
        self._parts.append((found, counts, means, squares))
        if sum(len(part[0]) for part in self._parts) > _MOST_PARTS + len(self.keys):
            self.joined()

    def joined(self) -> Moments:
        """All that was taken, one row per pair."""
        parts = [(self.keys, self.counts, self.means, self.squares), *self._parts]
        keys, counts, means, squares = (np.concatenate([part[i] for part in parts]) for i in range(4))
        self._parts = []
        if len(parts) == 1 or not len(keys):
            return self
        order = np.argsort(keys, kind="stable")
        keys, counts, means, squares = keys[order], counts[order], means[order], squares[order]
        found, first = np.unique(keys, return_index=True)
        total = np.add.reduceat(counts, first)
        mean = np.add.reduceat(counts * means, first) / total
        lengths = np.diff(np.append(first, len(keys)))
        between = counts * (means - np.repeat(mean, lengths)) ** 2
        # A pair of one part keeps its very mean, which the division by the number would round once more.
        single = lengths == 1
        mean[single] = means[first[single]]
        self.keys, self.counts, self.means = found, total, mean
        self.squares = np.add.reduceat(squares, first) + np.where(single, 0, np.add.reduceat(between, first))
        return self

    def edits(self) -> np.ndarray:
        """The edits that have values of genes."""
        return np.unique(self.joined().keys >> _SHIFT)

    def renumbered(self, new: np.ndarray) -> Moments:
        """The same where edit ``e`` has the number ``new[e]``."""
        self.joined()
        if len(self.keys):
            keys = (new[self.edit].astype(np.int64) << _SHIFT) | self.affected
            order = np.argsort(keys, kind="stable")
            self.keys, self.counts = keys[order], self.counts[order]
            self.means, self.squares = self.means[order], self.squares[order]
        return self

    def taken(self, new: np.ndarray) -> Moments:
        """Those of some edits: ``new`` gives their numbers, and -1 for the others."""
        number = new[self.edit] if len(self.keys) else self.keys
        at = number >= 0
        keys = (number[at].astype(np.int64) << _SHIFT) | self.affected[at]
        return Moments(keys, self.counts[at], self.means[at], self.squares[at])

    @property
    def edit(self) -> np.ndarray:
        """[P] which edit."""
        return self.keys >> _SHIFT

    @property
    def affected(self) -> np.ndarray:
        """[P] which token was looked at."""
        return self.keys & ((1 << _SHIFT) - 1)

    @property
    def deviations(self) -> np.ndarray:
        """[P] standard deviation, divided by the number of values."""
        return np.sqrt(self.squares / self.counts)
