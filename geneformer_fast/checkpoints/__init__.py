"""Checkpoints of published models, in and out."""

from __future__ import annotations

from geneformer_fast.checkpoints.folders import load, save

__all__ = ["load", "save"]
