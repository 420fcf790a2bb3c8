"""What is compared: a variant with the cell it was made of, or both with the embeddings of states."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.perturbation.kinds import MODES
from geneformer_fast.perturbation.variants import Variants
from geneformer_fast.ragged import Ragged

# torch.nn.CosineSimilarity's: rows of zeros have the cosine 0.
_LEAST_NORM = 1e-8


@dataclass(frozen=True)
class Framing:
    """How many special tokens stand before and behind the genes of every cell."""

    n_front: int = 0
    n_back: int = 0

    def is_gene(self, tokens: Ragged) -> torch.Tensor:
        """[T] whether each place holds a gene."""
        places, lengths = tokens.positions(), tokens.lengths.long()[tokens.cell_index()]
        return (places >= self.n_front) & (places < lengths - self.n_back)


@dataclass(frozen=True)
class Originals:
    """What variants are compared with, of a few cells; parts that nobody asks for are None.

    Attributes
    ----------
    rows
        [T, C] hidden states of length 1.
    cell
        [B, C] the first token's, of length 1.
    to_states
        [B, S] cosines of the cells and the states.
    """

    rows: torch.Tensor | None
    cell: torch.Tensor | None
    to_states: torch.Tensor | None

    def __add__(self, more: Originals) -> Originals:
        """Those of further cells behind these."""
        return Originals(
            _joined(self.rows, more.rows), _joined(self.cell, more.cell), _joined(self.to_states, more.to_states)
        )


@dataclass(frozen=True)
class Effects:
    """Values of one batch of variants, on the host.

    Attributes
    ----------
    cell
        [V, S] float32: a shift for each state, or without states one similarity. NaN where nothing is left to compare.
    variant, affected, genes
        [n] for the genes that are in both, variant by variant in their order: the variant's place in the batch, the
        gene's token, and its similarity. None where only cells are compared.
    """

    cell: np.ndarray
    variant: np.ndarray | None = None
    affected: np.ndarray | None = None
    genes: np.ndarray | None = None


@dataclass(frozen=True)
class PendingEffects:
    """:class:`Effects` as tensors on the device, perhaps not computed yet; ``of_genes`` [2, n]: variants and tokens."""

    cell: torch.Tensor
    of_genes: torch.Tensor | None = None
    genes: torch.Tensor | None = None

    def on_host(self) -> Effects:
        """Wait for them."""
        cell = self.cell.cpu().numpy()
        if self.of_genes is None or self.genes is None:
            return Effects(cell)
        variant, affected = self.of_genes.cpu().numpy()
        return Effects(cell, variant, affected, self.genes.cpu().numpy())


class Comparison:
    """Compares hidden states of variants with those of their cells.

    Without states, mode ``"cls"`` gives the cosine of the two first tokens, and ``"cell"`` the mean over the genes that
    are in both, the perturbed ones excluded, of the cosine of their hidden states. With states it is the cosine with
    the state's embedding after the edit, less the one before; a cell's embedding is the first token's, or the mean over
    its genes. Modes ``"..._and_gene"`` add the cosine of every gene that is in both.

    Parameters
    ----------
    mode
        One of :data:`~geneformer_fast.perturbation.kinds.MODES`.
    framing
        Where special tokens are.
    states
        [S, C] embeddings of states; None compares with the cell itself.
    """

    def __init__(self, mode: str, framing: Framing, states: torch.Tensor | None = None) -> None:
        if mode not in MODES:
            raise UnsupportedError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        self.mode, self.framing = mode, framing
        self.is_cls, self.has_genes = mode.startswith("cls"), mode.endswith("_and_gene")
        self._states = None if states is None else _unit(_wide(states))

    @property
    def reads(self) -> str:
        """What is read of hidden states: ``"cls"``, the first token's, or ``"all"``."""
        return "cls" if self.is_cls and not self.has_genes else "all"

    @property
    def n_values(self) -> int:
        """Values per variant for the cell itself."""
        return 1 if self._states is None else len(self._states)

    @property
    def _needs_rows(self) -> bool:
        return self.has_genes or (not self.is_cls and self._states is None)

    def originals(self, tokens: Ragged, hidden: torch.Tensor) -> Originals:
        """What is kept of cells: ``hidden`` is [B, C] of first tokens, or [T, C], as :attr:`reads` says."""
        rows = _unit(hidden) if self._needs_rows else None
        cell = _unit(_wide(self._first(tokens, hidden))) if self.is_cls and self._states is None else None
        to_states = None if self._states is None else self._to_states(tokens, hidden)
        return Originals(rows, cell, to_states)

    def effects(self, variants: Variants, hidden: torch.Tensor, originals: Originals) -> PendingEffects:
        """Values of variants; ``hidden`` is of their tokens, as in :meth:`originals`."""
        tokens, similarity, shared = variants.tokens, None, variants.is_common
        if self._needs_rows:
            assert originals.rows is not None
            dots = (hidden * originals.rows[variants.source.clamp(min=0)]).sum(1)
            similarity = _wide(dots) / _wide(torch.linalg.vector_norm(hidden, dim=1)).clamp(min=_LEAST_NORM)
        if self._states is not None:
            assert originals.to_states is not None
            cell = self._to_states(tokens, hidden) - originals.to_states[variants.original]
        elif self.is_cls:
            assert originals.cell is not None
            cell = (_unit(_wide(self._first(tokens, hidden))) * originals.cell[variants.original]).sum(1, keepdim=True)
        else:
            assert similarity is not None
            cell = segment_mean(similarity, tokens.lengths.long(), shared)[:, None]
        if not self.has_genes:
            return PendingEffects(cell.float())
        assert similarity is not None
        places = shared.nonzero()[:, 0]
        of_genes = torch.stack((tokens.cell_index()[places], tokens.values[places].long())).int()
        return PendingEffects(cell.float(), of_genes, similarity[places].float())

    def _first(self, tokens: Ragged, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.reads == "cls" else hidden[tokens.starts.long()]

    def _to_states(self, tokens: Ragged, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S] cosines of cells and states."""
        assert self._states is not None
        if self.is_cls:
            cells = _wide(self._first(tokens, hidden))
        else:
            is_gene = self.framing.is_gene(tokens) if self.framing != Framing() else None
            cells = segment_mean(_wide(hidden), tokens.lengths.long(), is_gene)
        return _unit(cells) @ self._states.T


def segment_mean(values: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """[T, ...] -> [B, ...]: means over each of B segments of the rows that count [T]; NaN where none does.

    Lengths are not checked, for which a card would have to wait.
    """
    if counts is None:
        sums, numbers = torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True), lengths.to(values.dtype)
    else:
        weights = counts.to(values.dtype)
        weighted = values * weights.view(-1, *[1] * (values.ndim - 1))
        sums = torch.segment_reduce(weighted, "sum", lengths=lengths, unsafe=True)
        numbers = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    return sums / numbers.view(-1, *[1] * (values.ndim - 1))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In float64 on a CPU, where that is free; a card keeps float32, whose noise the report shows."""
    return x.double() if x.device.type == "cpu" else x


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=_LEAST_NORM)


def _joined(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return None if first is None or second is None else torch.cat((first, second))
