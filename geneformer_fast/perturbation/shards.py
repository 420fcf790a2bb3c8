"""Parts of a run that are computed apart: ``--shard 2/8``, and which cells they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geneformer_fast.errors import UnsupportedError


@dataclass(frozen=True)
class Shard:
    """One of several parts of a run.

    Attributes
    ----------
    index, n_shards
        The part, from 1, and how many there are.
    """

    index: int = 1
    n_shards: int = 1

    def __post_init__(self) -> None:
        if self.n_shards < 1 or not 1 <= self.index <= self.n_shards:
            raise UnsupportedError(
                f"shard (--shard) is i/N with i from 1 to N, such as 1/4, 2/4, 3/4 and 4/4; {self} is none"
            )

    @classmethod
    def of(cls, text: str | None) -> Shard:
        """What ``"2/8"`` says; None is the whole run.

        Raises
        ------
        UnsupportedError
            It is no such text, or the part is not among them.
        """
        if text is None:
            return cls()
        index, slash, n_shards = text.partition("/")
        if not slash or not all(part.strip().isascii() and part.strip().isdigit() for part in (index, n_shards)):
            raise UnsupportedError(
                f"shard (--shard) is i/N with i from 1 to N, such as 1/4, 2/4, 3/4 and 4/4; {text!r} is none"
            )
        return cls(int(index), int(n_shards))

    def __str__(self) -> str:
        return f"{self.index}/{self.n_shards}"

    @property
    def is_whole(self) -> bool:
        """Whether this is all of the run."""
        return self.n_shards == 1

    def ranks(self, n_cells: int) -> np.ndarray:
        """[n] ascending ranks of the cells of this part.

        Every Nth cell: cells are in order of length, so that all parts take about the same time.
        """
        return np.arange(self.index - 1, n_cells, self.n_shards)
