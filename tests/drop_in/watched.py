"""An accelerated model whose head is watched: how often it has seen all positions."""

from __future__ import annotations

from typing import Any

import torch
from small_berts import bert, count_head_rows, inputs, labels_for

import geneformer_fast as gf


class Watched:
    """A model, its stock output, and the number of times its head has seen all positions since it was accelerated."""

    def __init__(self, *, is_training: bool, **options: Any) -> None:
        self.model = bert("BertForMaskedLM").train(is_training)
        self.given = inputs()
        self.labels = labels_for(self.model, self.given)
        self.keep = self.given["attention_mask"].bool()
        with torch.no_grad():
            self.stock = self.model(**self.given, **self.labels)
        gf.accelerate(self.model, **options)
        self.sizes = count_head_rows(self.model)

    def call(self, **more: Any) -> Any:
        return self.model(**self.given, **self.labels, **more)

    @property
    def n_full(self) -> int:
        return self.sizes.count(self.keep.numel())
