"""Random numbers that belong to a place in an epoch, not to whoever happens to compute them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class CellRandom:
    """The random numbers of some cells in one epoch.

    A number depends on the seed, the epoch, the cell's place in the epoch's order (its slot: a cell that a sampler
    draws twice has two) and the position within the cell, and on nothing else. So masks are the same for any number of
    loader workers, of ranks, and of cells in a batch, and nothing has to be stored to continue a run.

    Attributes
    ----------
    seed, epoch
        Of the run.
    slots
        [B] place of every cell in the epoch's order.
    """

    seed: int
    epoch: int
    slots: np.ndarray

    def uniform(self, cu_seqlens: np.ndarray, stream: int = 0) -> np.ndarray:
        """[T] float64 in [0, 1), one per token of the packed cells; ``stream`` numbers independent draws."""
        lengths = np.diff(cu_seqlens)
        offsets = np.repeat(np.asarray(cu_seqlens)[:-1], lengths)
        position = (np.arange(len(offsets)) - offsets).astype(np.uint64)
        starts = _mixed(self.slots.astype(np.uint64) * _GAMMA + self._key(stream))
        bits = _mixed(np.repeat(starts, lengths) + (position + np.uint64(1)) * _GAMMA)
        return (bits >> np.uint64(11)) * 2.0**-53

    def generator(self) -> np.random.Generator:
        """A numpy generator for whatever is drawn once per batch; it depends on the batch's first slot too."""
        first = int(self.slots[0]) if len(self.slots) else 0
        return np.random.default_rng((self.seed, self.epoch, first))

    def _key(self, stream: int) -> np.uint64:
        (key,) = np.random.SeedSequence((self.seed, self.epoch, stream)).generate_state(1, np.uint64)
        return np.uint64(key)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, [N] uint64 -> [N] uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FACTORS[0]
    bits = (bits ^ (bits >> np.uint64(27))) * _FACTORS[1]
    return bits ^ (bits >> np.uint64(31))
