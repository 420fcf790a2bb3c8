"""What is done to cells: which genes are deleted, switched on or moved, and the numbered variants that this gives.

Every edit says where some genes of a cell stand and where they are to stand (:class:`Moves`); what follows is index
arithmetic on packed cells. Variants are numbered over a batch of cells, and any of them can be made without the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.edited_cells import EditedCells
from geneformer_fast.ragged import Ragged

#: Kinds of edits of ranks.
KINDS = ("delete", "overexpress", "inhibit", "activate", "swap")
#: Those that move a gene by a share of a cell's ranks.
MOVING = ("inhibit", "activate")
#: Edits of counts, after which a cell's genes are ranked again.
COUNTS = "counts"


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
    max_len
        Most tokens that the model reads; None where nothing is ever put in front of a cell that lacks it.

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
    #: [I, k] int64: lists that are perturbed together, filled up with -1; None where all genes are asked for.
    items: torch.Tensor | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_kind(self)
        _check_genes(self)
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
        if self.kind == "overexpress" and self.anchor is None:
            return "none"
        return "all" if self.sets is None else "any"

    def on(self, cells: Ragged, ranks: np.ndarray | None = None) -> EditedCells:
        """The edits of a batch of cells: packed tokens, each cell with its special tokens.

        ``ranks`` are their places in the run, which edits of counts need and others do not.
        """
        return EditedCells(self, cells)


def _items(edits: Edits) -> torch.Tensor | None:
    """[I, k] lists that are perturbed together."""
    if edits.sets is not None:
        lists: Sequence[Sequence[int]] = edits.sets
    elif edits.genes is None:
        return None
    elif edits.anchor is not None:
        lists = [(edits.anchor, gene) for gene in edits.genes]
    elif edits.pairs:
        lists = list(itertools.combinations(edits.genes, 2))
    elif edits.together:
        lists = [edits.genes]
    else:
        lists = [(gene,) for gene in edits.genes]
    width = max(map(len, lists))
    return torch.tensor([[*genes, *[-1] * (width - len(genes))] for genes in lists])


def _check_kind(edits: Edits) -> None:
    kind, doses = edits.kind, edits.doses
    if kind not in (*KINDS, COUNTS):
        raise UnsupportedError(f"kind must be one of {', '.join((*KINDS, COUNTS))}, not {kind!r}")
    if kind == COUNTS:
        if not doses:
            raise UnsupportedError("kind 'counts' multiplies counts: say by which factors with doses")
        wrong = [dose for dose in doses if not 0 <= dose < math.inf or dose == 1]
        if wrong:
            raise UnsupportedError(f"doses of counts are factors from 0 on, other than 1, not {wrong[0]}")
    elif (kind in MOVING) != bool(doses):
        raise UnsupportedError(
            f"kind {kind!r} moves genes by a share of the ranks: say which with doses"
            if kind in MOVING
            else f"doses say how far genes move: kind {kind!r} takes none; use inhibit, activate or counts"
        )
    elif wrong := [dose for dose in doses if not 0 < dose <= 1]:
        raise UnsupportedError(f"doses are shares of a cell's ranks, above 0 and up to 1, not {wrong[0]}")
    if len(set(doses)) < len(doses):
        raise UnsupportedError("doses must differ from one another")
    is_two = edits.genes is not None and edits.together and len(edits.genes) == 2
    if kind == "swap" and edits.sets is None and not (edits.pairs or edits.anchor is not None or is_two):
        raise UnsupportedError("kind 'swap' exchanges two genes: ask for pairs, an anchor, or two genes together")


def _check_genes(edits: Edits) -> None:
    ways = {"together": edits.together, "pairs": edits.pairs, "anchor": edits.anchor is not None}
    asked = [name for name, is_asked in ways.items() if is_asked]
    if edits.sets is not None:
        asked += ["genes"] if edits.genes is not None else []
        if asked:
            raise UnsupportedError(f"sets are lists of genes of their own: leave {' and '.join(asked)} out")
        if not edits.sets or not all(edits.sets):
            raise UnsupportedError("sets must hold a gene each")
        if edits.kind == "swap":
            raise UnsupportedError("kind 'swap' exchanges two genes and takes no sets")
    if len(asked) > 1:
        raise UnsupportedError(f"ask for one of {', '.join(asked)}")
    if edits.together and edits.genes is None:
        raise UnsupportedError("together is of a list of genes: say which genes")
    if edits.genes is not None and len(edits.genes) < (2 if edits.pairs else 1):
        raise UnsupportedError("pairs need two genes" if edits.pairs else "genes must name a gene")
    if edits.anchor is not None and edits.genes is not None and edits.anchor in edits.genes:
        raise UnsupportedError("the anchor is perturbed with each of the other genes and must not be one of them")
    for genes in (edits.genes, *(edits.sets or ())):
        if genes is not None and len(set(genes)) < len(genes):
            twice = next(gene for gene in genes if genes.count(gene) > 1)
            raise UnsupportedError(f"a gene is in its list twice: token {twice}")
