"""How much of an effect is arithmetic: the same variants once more, in another order and in other batches.

Shifts are differences of cosines near 1, and what rounding adds to them does not get smaller with the effect.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from geneformer_fast.perturbation.compare import Effects
from geneformer_fast.perturbation.variants import Variants
from geneformer_fast.ragged import Ragged

if TYPE_CHECKING:
    from geneformer_fast.perturbation.engine import Group, PerturbationRun

# Of the order in which variants are computed once more.
_SEED = 0


@dataclass(frozen=True)
class Noise:
    """Differences between two computations of the same values.

    Attributes
    ----------
    largest, root_mean_square
        Of the values of cells.
    genes_largest, genes_root_mean_square
        Of the values of genes; None where there are none.
    n_variants
        Variants that were computed twice.
    """

    largest: float
    root_mean_square: float
    genes_largest: float | None
    genes_root_mean_square: float | None
    n_variants: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what is not there."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def noise_of(run: PerturbationRun, group: Group) -> Noise | None:
    """The noise of a run, from the first batch of a group; None where that has no variants.

    Once they are computed as the run does, and once shuffled, in two batches of unequal size, beside originals that
    were each computed by itself.
    """
    first, last = next(group.edited.slices(run.token_budget), (0, 0))
    if first == last:
        return None
    with torch.inference_mode():
        variants = run.variants(group, first, last)
        once = run.effects(group, variants)
        singles = [run.originals(_only(group.edited.cells, cell)) for cell in range(group.edited.cells.n_cells)]
        originals = reduce(add, singles)
        if variants.shortened is not None:
            originals = originals + run.originals(variants.shortened)
        order = torch.from_numpy(np.random.default_rng(_SEED).permutation(last - first))
        cut = len(order) // 3
        again = [
            run.comparison.effects(some, run.reader(some.tokens), originals).on_host()
            for some in (picked(variants, part) for part in (order[:cut], order[cut:]) if len(part))
        ]
    cell = np.concatenate([each.cell for each in again]) - once.cell[order.numpy()]
    largest, mean = _size(cell)
    genes: tuple[float | None, float | None] = (None, None)
    if once.genes is not None:
        of_genes = np.concatenate([each.genes for each in again if each.genes is not None])
        genes = _size(of_genes - once.genes[_gene_order(once, order.numpy())])
    return Noise(largest, mean, *genes, n_variants=last - first)


def picked(variants: Variants, order: torch.Tensor) -> Variants:
    """Some variants, in an order; ``order`` [N] is on the host."""
    device, lengths = variants.tokens.values.device, variants.tokens.lengths.long().cpu()
    starts, lengths = variants.tokens.starts.long().cpu()[order], lengths[order]
    shift = starts - (lengths.cumsum(0) - lengths)
    index = (torch.arange(int(lengths.sum())) + torch.repeat_interleave(shift, lengths)).to(device)
    tokens = Ragged.from_lengths(variants.tokens.values[index], lengths)
    there = order.to(device)
    return dataclasses.replace(
        variants, tokens=tokens, origin=variants.origin[there], original=variants.original[there],
        source=variants.source[index], is_common=variants.is_common[index], perturbed=variants.perturbed[order],
        item=variants.item[order], dose=variants.dose[order],
    )  # fmt: skip


class Spread:
    """How large effects are, and how many of them are larger than the noise; values come piece by piece.

    Parameters
    ----------
    noise
        The largest difference that noise made.
    is_shift
        Whether values are shifts; similarities are effects by what they lack to 1.
    """

    def __init__(self, noise: float, is_shift: bool) -> None:
        self._noise, self._is_shift = noise, is_shift
        self._n = self._n_above = self._n_absent = 0
        self._squares = self._largest = 0.0

    def add(self, values: np.ndarray) -> None:
        """Take values in."""
        effects = np.abs(values.astype(np.float64) if self._is_shift else 1.0 - values.astype(np.float64))
        is_there = np.isfinite(effects)
        effects = effects[is_there]
        self._n_absent += int((~is_there).sum())
        self._n += len(effects)
        self._n_above += int((effects > self._noise).sum())
        self._squares += float(np.square(effects).sum())
        self._largest = max(self._largest, float(effects.max(initial=0.0)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        n = max(self._n, 1)
        return {
            "n": self._n, "n_without_value": self._n_absent, "largest": self._largest,
            "root_mean_square": float(np.sqrt(self._squares / n)), "share_above_noise": self._n_above / n,
        }  # fmt: skip


def _only(cells: Ragged, cell: int) -> Ragged:
    start, stop = (int(bound) for bound in cells.cu_seqlens[cell : cell + 2])
    return Ragged.from_lengths(cells.values[start:stop], [stop - start])


def _gene_order(once: Effects, order: np.ndarray) -> np.ndarray:
    """Where values of genes stand that come variant by variant in another order of variants."""
    assert once.variant is not None
    counts = np.bincount(once.variant, minlength=len(order))
    starts = np.cumsum(counts) - counts
    return np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in order])


def _size(differences: np.ndarray) -> tuple[float, float]:
    """The largest, and the root mean square; of values that are there."""
    there = differences[np.isfinite(differences)].astype(np.float64)
    if not len(there):
        return 0.0, 0.0
    return float(np.abs(there).max()), float(np.sqrt(np.square(there).mean()))
