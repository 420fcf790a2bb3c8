"""Which token ids are genes, and which are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from geneformer_fast.config import EncoderConfig


@dataclass(frozen=True)
class TokenKinds:
    """What the ids of a vocabulary are.

    Attributes
    ----------
    mask_id
        The token that hides a gene.
    special
        Name to id of every special token.
    n_tokens
        Ids run from 0 to this, exclusive.
    """

    mask_id: int
    special: Mapping[str, int]
    n_tokens: int

    @classmethod
    def of(cls, identity: Mapping[str, Any], config: EncoderConfig) -> TokenKinds:
        """From a vocabulary's identity; a size it does not name is the model's."""
        special = {str(name): int(token) for name, token in identity["special"].items()}
        return cls(special["mask"], special, int(identity.get("n_tokens") or config.vocab_size))

    @cached_property
    def gene_ids(self) -> np.ndarray:
        """Every id that is no special token, ascending."""
        return np.setdiff1d(np.arange(self.n_tokens), list(self.special.values()))
