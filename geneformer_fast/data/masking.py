"""Masked gene modelling: which genes are asked for, and what is shown in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.files.schema import check_fields

if TYPE_CHECKING:
    # A recipe, which says how genes are masked, is looked at before anything heavy is loaded.
    import torch

    from geneformer_fast.data.kinds import TokenKinds
    from geneformer_fast.data.random import CellRandom
    from geneformer_fast.ragged import Ragged

_ASKED, _FATE, _RANDOM = range(3)  # independent streams of random numbers


@dataclass(frozen=True)
class Masking:
    """How genes are masked (Devlin et al., arXiv:1810.04805).

    Attributes
    ----------
    share
        Share of a cell's genes that are asked for.
    mask, random
        Of those, the share that shows ``<mask>`` and the share that shows a random gene; the rest shows itself.
        80/10/10 in Geneformer, 80/2/18 in the models BioNeMo released.
    masks_specials
        False: special tokens are never asked for, and a random gene is a gene. True: as Geneformer's public V2 code
        does, whose collator takes only ``<pad>`` and ``<mask>`` for special, so that ``<cls>`` and ``<eos>`` are asked
        for too, and random replacements come from the whole vocabulary.
    """

    share: float = 0.15
    mask: float = 0.8
    random: float = 0.1
    masks_specials: bool = False

    def __post_init__(self) -> None:
        check_fields(self, UnsupportedError)
        if not 0 < self.share <= 1:
            raise UnsupportedError(f"the masked share must be above 0 and at most 1, not {self.share}")
        if min(self.mask, self.random) < 0 or self.mask + self.random > 1 + 1e-9:
            raise UnsupportedError(
                f"the shares shown as <mask> ({self.mask}) and as a random gene ({self.random}) must not be negative "
                "nor exceed 1 together"
            )


@dataclass(frozen=True)
class MaskedBatch:
    """Cells as the model sees them, and what it is asked.

    Attributes
    ----------
    tokens
        Packed tokens with some genes replaced.
    rows, targets
        [R] int64: positions asked for, and the tokens that stood there.
    """

    tokens: Ragged
    rows: torch.Tensor
    targets: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens of all cells."""
        return self.tokens.n_tokens

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> MaskedBatch:
        """The same batch on another device."""
        move: dict[str, Any] = dict(device=device, non_blocking=non_blocking)
        return MaskedBatch(
            self.tokens.to(device, non_blocking=non_blocking), self.rows.to(**move), self.targets.to(**move)
        )

    def pin_memory(self) -> MaskedBatch:
        """The same batch in page-locked memory, from which a GPU copies while it computes."""
        return MaskedBatch(self.tokens.pin_memory(), self.rows.pin_memory(), self.targets.pin_memory())


def mask_genes(tokens: Ragged, kinds: TokenKinds, masking: Masking, random: CellRandom) -> MaskedBatch:
    """Mask a batch.

    Parameters
    ----------
    tokens
        Packed token ids, on the CPU.
    kinds
        Which ids are special, and which is ``<mask>``.
    masking
        How much, and what is shown instead.
    random
        The random numbers of these cells.

    Returns
    -------
    MaskedBatch
        Its ``rows`` ascend; a batch of very short cells may ask for nothing.
    """
    import numpy as np
    import torch

    values, cu_seqlens = tokens.values.numpy(), tokens.cu_seqlens.numpy()
    kept = [kinds.special[name] for name in ("pad", "mask") if name in kinds.special]
    is_never_asked = np.zeros(max(kinds.n_tokens, int(values.max(initial=0)) + 1), dtype=bool)
    is_never_asked[kept if masking.masks_specials else list(kinds.special.values())] = True
    is_asked = random.uniform(cu_seqlens, _ASKED) < masking.share
    is_asked &= ~is_never_asked[values]
    rows = np.flatnonzero(is_asked)
    targets = values[rows].astype(np.int64)
    fate = random.uniform(cu_seqlens, _FATE)[rows]
    drawn_from = np.arange(kinds.n_tokens) if masking.masks_specials else kinds.gene_ids
    is_random = (fate >= masking.mask) & (fate < masking.mask + masking.random)
    shown = values.astype(np.int64)
    shown[rows[fate < masking.mask]] = kinds.mask_id
    if is_random.any():
        drawn = random.uniform(cu_seqlens, _RANDOM)[rows[is_random]]
        shown[rows[is_random]] = drawn_from[(drawn * len(drawn_from)).astype(np.int64)]
    return MaskedBatch(tokens.with_values(torch.from_numpy(shown)), torch.from_numpy(rows), torch.from_numpy(targets))
