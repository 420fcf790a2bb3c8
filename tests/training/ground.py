"""A small token folder to train on, and what trains on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import toys

import geneformer_fast as gf
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.masking import Masking
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.loop import fit
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.recipe import Recipe

GEOMETRY = dict(n_layers=2, width=32, n_heads=2, ff_width=48, dropout=0.1, attention_dropout=0.1)
SHORT = Recipe(epochs=2, batch_cells=16, token_budget=150, learning_rate=3e-3, warmup_share=0.1)


@dataclass(frozen=True)
class Ground:
    """Cells of a toy vocabulary, and how to train on them."""

    tokens: TokenFolder

    @property
    def train_cells(self) -> np.ndarray:
        return np.arange(60)

    @property
    def eval_cells(self) -> np.ndarray:
        return np.arange(60, self.tokens.n_cells)

    def config(self, **changes: Any) -> gf.EncoderConfig:
        words = toys.vocabulary()
        identity = dict(vocabulary=words.name, vocabulary_fingerprint=words.fingerprint)
        values = dict(vocab_size=words.n_tokens, max_len=words.max_len)
        return gf.EncoderConfig(**{**GEOMETRY, **values, **identity, **changes})

    def model(self, **changes: Any) -> gf.Encoder:
        torch.manual_seed(0)
        return gf.Encoder(self.config(**changes), head="mlm")

    def objective(self, masking: Masking | None = None) -> MaskedGenes:
        config = self.config()
        return MaskedGenes(TokenKinds.of(identity_of(self.tokens, config), config), masking or Masking())

    def fit(self, model: gf.Encoder, recipe: Recipe = SHORT, **options: Any) -> Any:
        options = {"objective": self.objective(recipe.masking), "train_cells": self.train_cells, **options}
        return fit(model, self.tokens, options.pop("objective"), recipe, **options)
