"""The tour on real cells: tokens, the same embeddings as stock transformers in less time and memory, fine-tuning."""

from geneformer_fast.quickstart.example import example_cells

__all__ = ["example_cells"]
