"""Cells to measure a model on, and the embeddings it makes of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from geneformer_fast.config import EncoderConfig
from geneformer_fast.data.batches import evaluation_pieces
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.loader import read_ragged
from geneformer_fast.data.values import preparation_in
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import InputError
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens

_TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class SomeCells:
    """Packed cells in memory.

    Attributes
    ----------
    batches
        Of at most 4,096 tokens each, or of one cell.
    special_ids
        Tokens that no mean over genes includes.
    cls_id
        The token whose hidden state stands for the cell, where there is one.
    """

    batches: Sequence[Ragged]
    special_ids: Sequence[int] = ()
    cls_id: int | None = None

    @classmethod
    def of(cls, tokens: Any, config: EncoderConfig, n_cells: int, seed: int) -> SomeCells:
        """At most ``n_cells`` of a token folder, drawn at random; or packed cells as they are.

        Raises
        ------
        InputError
            There are none.
        VocabularyError
            They belong to another vocabulary than the model.
        """
        if isinstance(tokens, str | os.PathLike):
            with open_tokens(tokens) as folder:
                return cls.of(folder, config, n_cells, seed)
        if not isinstance(tokens, TokenFolder):
            found = cls([tokens] if isinstance(tokens, Ragged) else list(tokens))
            if not found.n_tokens:
                raise InputError("there are no cells to calibrate on")
            return found
        special = identity_of(tokens, config)["special"]
        if not tokens.n_cells:
            raise InputError(f"{tokens.path} has no cells to calibrate on; name a folder that has")
        drawn = np.random.default_rng(seed).choice(tokens.n_cells, min(n_cells, tokens.n_cells), replace=False)
        pieces = evaluation_pieces(tokens.lengths(), drawn, _TOKEN_BUDGET)
        batches = [read_ragged(tokens, piece.cells) for piece in pieces]
        is_of_values = preparation_in(tokens) is not None
        return cls(batches, () if is_of_values else sorted(special.values()), special.get("cls"))

    @property
    def n_cells(self) -> int:
        """Cells in all batches."""
        return sum(batch.n_cells for batch in self.batches)

    @property
    def n_tokens(self) -> int:
        """Tokens in all batches."""
        return sum(batch.n_tokens for batch in self.batches)

    def first(self, n_cells: int) -> SomeCells:
        """So many cells or a few more, in whole batches."""
        n_before = np.cumsum([0, *(batch.n_cells for batch in self.batches)])[:-1]
        return replace(self, batches=[b for b, n in zip(self.batches, n_before, strict=True) if n < n_cells])

    def embeddings(self, encoder: Encoder) -> torch.Tensor:
        """[n, C] float32, what the last layer makes of each cell: of its CLS token, or the mean over its genes."""
        special = torch.tensor(list(self.special_ids), device=encoder.device)
        found = []
        with torch.inference_mode():
            for batch in self.batches:
                tokens = batch.to(encoder.device)
                hidden = encoder(tokens)
                if self.cls_id is not None:
                    found.append(hidden.values[hidden.starts.long()])
                    continue
                is_gene = torch.ones(tokens.n_tokens, dtype=torch.bool, device=tokens.values.device)
                if len(special):
                    is_gene = ~torch.isin(tokens.values, special)
                weights, lengths = is_gene.to(hidden.values.dtype), hidden.lengths.long()
                sums = torch.segment_reduce(hidden.values * weights[:, None], "sum", lengths=lengths)
                found.append(sums / torch.segment_reduce(weights, "sum", lengths=lengths)[:, None])
        return torch.cat(found).float().cpu()
