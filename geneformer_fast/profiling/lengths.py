"""Lengths of made-up cells: all alike, uniform, or as real cells have them. The same on every machine."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from geneformer_fast.errors import UnsupportedError

# Midpoints of 48 equal shares of the V2 tokens per cell (specials included), as the official tokenizer made them of
# real cells: 6,474 blood cells (Zheng et al. 2017 and 10x pbmc3k), and 909 deeply sequenced cells of five lines
# (CEL-seq2, Tian et al. 2019), more than half of which fill all 4,096 places.
BLOOD = (
    152, 339, 371, 392, 408, 425, 440, 455, 468, 480, 494, 509, 522, 536, 548, 561, 575, 589, 604, 620, 633, 648, 665,
    681, 696, 710, 725, 742, 758, 771, 785, 800, 814, 831, 849, 867, 893, 918, 943, 979, 1019, 1071, 1128, 1208, 1299,
    1426, 1531, 1853,
)  # fmt: skip
DEEP = (
    678, 2648, 2858, 3019, 3156, 3263, 3366, 3447, 3524, 3627, 3698, 3768, 3832, 3886, 3940, 4006, 4062, *(4096,) * 31,
)  # fmt: skip

_UNIFORM = re.compile(r"uniform:([0-9]{1,9})-([0-9]{1,9})", re.ASCII)
_ALIKE = re.compile(r"[0-9]{1,9}", re.ASCII)


def real_lengths(n_cells: int, *, mean: float, max_len: int = 4096, seed: int = 0) -> list[int]:
    """Lengths of blood cells and deep cells, mixed so that their mean comes near ``mean``, in an order by chance.

    Parameters
    ----------
    n_cells
        How many.
    mean
        Wanted mean, between that of blood cells (744) and that of deep cells (3,828), both before cutting.
    max_len
        Longer cells are cut, as a tokenizer does.
    seed
        Of the order.

    Raises
    ------
    ValueError
        The mean lies outside.
    """
    blood, deep = (np.minimum(lengths, max_len) for lengths in (BLOOD, DEEP))
    # Where all are cut to the same, there is nothing to mix.
    share = 0.0 if mean == blood.mean() else (mean - blood.mean()) / (deep.mean() - blood.mean())
    if not 0 <= share <= 1:
        raise ValueError(f"a mean of {mean} is not between {blood.mean():.0f} and {deep.mean():.0f}")
    n_deep = round(share * n_cells)
    lengths = [*_spread(blood, n_cells - n_deep), *_spread(deep, n_deep)]
    return [int(length) for length in np.random.default_rng(seed).permutation(lengths)]


def uniform_lengths(n_cells: int, low: int, high: int, *, seed: int = 0) -> list[int]:
    """Lengths spread evenly from ``low`` to ``high``, in an order by chance."""
    lengths = np.rint(np.linspace(low, high, n_cells)).astype(int)
    return [int(length) for length in np.random.default_rng(seed).permutation(lengths)]


def _spread(quantiles: np.ndarray, n: int) -> np.ndarray:
    """``n`` lengths at even steps through a distribution."""
    return quantiles[((np.arange(n) + 0.5) / max(n, 1) * len(quantiles)).astype(int)]


@dataclass(frozen=True)
class Lengths:
    """What ``--lengths`` says: how long made-up cells are.

    Attributes
    ----------
    low, high
        Of the shortest and the longest cell; None of both: as 6,474 real blood cells.
    """

    low: int | None = None
    high: int | None = None

    @classmethod
    def parsed(cls, text: str) -> Lengths:
        """From ``real``, ``uniform:300-2048`` or a number of tokens.

        Raises
        ------
        UnsupportedError
            It is none of these.
        """
        if text == "real":
            return cls()
        if _ALIKE.fullmatch(text) and int(text):
            return cls(int(text), int(text))
        match = _UNIFORM.fullmatch(text)
        if match is not None and 0 < int(match[1]) <= int(match[2]):
            return cls(int(match[1]), int(match[2]))
        raise UnsupportedError(
            f"lengths (--lengths) must be real, uniform:LOW-HIGH with 0 < LOW <= HIGH (such as uniform:300-2048), or a "
            f"number of tokens above 0, not {text!r}"
        )

    def of(self, n_cells: int, max_len: int, *, what: str = "positions of the model", seed: int = 0) -> np.ndarray:
        """[n_cells] int64 lengths, in an order by chance.

        Parameters
        ----------
        n_cells
            How many.
        max_len
            Of the longest cell there may be; real cells are cut there, as a tokenizer does.
        what
            Of what there are so many, in words.
        seed
            Of the order.

        Raises
        ------
        UnsupportedError
            Cells are longer than that.
        """
        if self.low is None or self.high is None:
            lengths = np.minimum(_spread(np.array(BLOOD), n_cells), max_len)
            return np.random.default_rng(seed).permutation(lengths).astype(np.int64)
        if self.high > max_len:
            raise UnsupportedError(
                f"lengths (--lengths) of up to {self.high:,} are more than the {max_len:,} {what}; take no more"
            )
        return np.array(uniform_lengths(n_cells, self.low, self.high, seed=seed), dtype=np.int64)

    def __str__(self) -> str:
        if self.low is None:
            return "lengths of real blood cells"
        return f"{self.low:,} tokens each" if self.low == self.high else f"{self.low:,} to {self.high:,} tokens"
