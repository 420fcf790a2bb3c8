"""What is done to cells: which genes are deleted, switched on or moved, and the numbered variants that this gives.

Every edit says where some genes of a cell stand and where they are to stand (:class:`Moves`); what follows is index
arithmetic on packed cells. Variants are numbered over a batch of cells, and any of them can be made without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.edited_cells import EditedCells
from geneformer_fast.perturbation.kinds import check_genes
from geneformer_fast.ragged import Ragged


@dataclass(frozen=True)
class Edits:
    """Edits of ranks that are asked for, in tokens.

    Attributes
    ----------
    kind
        ``"delete"``: the genes are taken out. ``"overexpress"``: they are put in front of all others, in the order that
        was given. ``"activate"`` and ``"inhibit"``: they move up or down by a share of the cell's ranks. ``"swap"``:
        two genes change places. ``"counts"``: their counts are multiplied by a factor and the cell is ranked again
        (:class:`~geneformer_fast.perturbation.counts.CountEdits` knows the counts).
    genes
        The genes; None is every gene of each cell, in the order of ranks.
    together
        All genes of the list at once, instead of one after another.
    pairs
        Two genes at once: every pair of the list, or of each cell's genes.
    anchor
        A gene that is perturbed together with each of the others, in cells that have both.
    sets
        Several lists, each of which is perturbed together; ``genes`` is None then.
    doses
        Shares of a cell's ranks that genes move by (kinds ``"inhibit"`` and ``"activate"``): ``round(share * genes)``
        ranks, at least one, and at most up to the first or last rank. Of the kind ``"counts"``: factors. A variant for
        each.
    front, back
        Special tokens before and behind the genes of every cell.
    is_present
        Whether genes are perturbed in cells that have them only, also where they are put in front.
    max_len
        Most tokens that the model reads; None where nothing is ever put in front of a cell that lacks it.
    chosen
        Of the pairs that are asked for those that are made, in cells that have both genes; None is all.

    Notes
    -----
    A list (``together``, or a pair of one) that is deleted, moved or swapped is that of cells which have all of its
    genes. A set is that of cells which have any of them, and the others are left out. Genes that are overexpressed need
    not be there. An anchor and its gene are put in front in the order of their ranks.

    With all genes one by one, the first-ranked is not overexpressed or activated and the last-ranked not inhibited: it
    stands there already.
    """

    kind: str
    genes: tuple[int, ...] | None = None
    together: bool = False
    pairs: bool = False
    anchor: int | None = None
    sets: tuple[tuple[int, ...], ...] | None = None
    doses: tuple[float, ...] = ()
    front: int = 0
    back: int = 0
    max_len: int | None = None
    is_present: bool = False
    chosen: tuple[tuple[int, ...], ...] | None = None
    #: [I, k] int64: lists that are perturbed together, filled up with -1; None where all genes are asked for.
    items: torch.Tensor | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_genes(
            self.kind, self.genes, together=self.together, pairs=self.pairs, anchor=self.anchor, sets=self.sets,
            doses=self.doses,
        )  # fmt: skip
        items = _items(self)
        object.__setattr__(self, "items", items)
        if self.kind == "overexpress" and items is not None and self.max_len is not None:
            room = self.max_len - self.front - self.back
            if items.shape[1] > room:
                raise UnsupportedError(
                    f"{items.shape[1]:,} genes cannot be put in front of a cell at once: the model reads {room:,}"
                )

    @property
    def n_doses(self) -> int:
        """Variants of each edit."""
        return max(1, len(self.doses))

    @property
    def needs(self) -> str:
        """Which genes of a list a cell must have: ``"all"``, ``"any"`` or ``"none"``."""
        if self.kind == "overexpress" and self.anchor is None and not self.is_present:
            return "none"
        return "all" if self.sets is None else "any"

    def on(self, cells: Ragged, ranks: np.ndarray | None = None) -> EditedCells:
        """The edits of a batch of cells: packed tokens, each cell with its special tokens.

        ``ranks`` are their places in the run, which edits of counts need and others do not.
        """
        return EditedCells(self, cells)


def _items(edits: Edits) -> torch.Tensor | None:
    """[I, k] lists that are perturbed together."""
    if edits.chosen is not None:
        return torch.tensor(edits.chosen)
    if edits.sets is not None:
        lists: Sequence[Sequence[int]] = edits.sets
    elif edits.genes is None:
        return None
    elif edits.anchor is not None:
        lists = [(edits.anchor, gene) for gene in edits.genes]
    elif edits.pairs:
        return torch.combinations(torch.tensor(edits.genes), 2)
    elif edits.together:
        lists = [edits.genes]
    else:
        lists = [(gene,) for gene in edits.genes]
    width = max(map(len, lists))
    return torch.tensor([[*genes, *[-1] * (width - len(genes))] for genes in lists])
