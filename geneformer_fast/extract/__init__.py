"""Embeddings of cells and genes: counts or tokens in; obsm, arrays or tables out."""

from __future__ import annotations

from geneformer_fast.extract.run import embed

__all__ = ["embed"]
