"""Lengths of cells for measurements: all alike, uniform, or as real cells have them. The same on every machine."""

from geneformer_fast.profiling.lengths import BLOOD, DEEP, real_lengths, uniform_lengths

__all__ = ["BLOOD", "DEEP", "real_lengths", "uniform_lengths"]
