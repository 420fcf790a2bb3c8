"""Some of the columns of a matrix, as if the others did not exist."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from geneformer_fast.counts.block import CountBlock, CountMatrix, Sample


class ColumnSubset:
    """A matrix restricted to the columns where `keep` is True (gene expression without antibodies, one genome)."""

    def __init__(self, matrix: CountMatrix, keep: np.ndarray) -> None:
        if len(keep) != matrix.shape[1]:
            raise ValueError(f"{len(keep)} features described, but the matrix has {matrix.shape[1]}")
        self._matrix = matrix
        self.shape = (matrix.shape[0], int(np.count_nonzero(keep)))
        self.value_dtype = matrix.value_dtype
        self.is_dense, self.is_one_pass = matrix.is_dense, matrix.is_one_pass
        self._new_column = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)

    def sample(self) -> Sample:
        return self._matrix.sample()

    def blocks(self, start: int, stop: int, rows: int) -> Iterator[CountBlock]:
        from geneformer_fast.counts import loops

        for block in self._matrix.blocks(start, stop, rows):
            if len(block.indices) and not 0 <= int(block.indices.min()) <= int(block.indices.max()) < len(
                self._new_column
            ):
                raise ValueError(f"column indices outside 0..{len(self._new_column) - 1}; the matrix is corrupt")
            indptr = block.indptr.copy()
            if block.is_view:  # of a matrix in memory, which belongs to somebody else
                block.indices, block.data, block.is_view = block.indices.copy(), block.data.copy(), False
            kept = loops.keep_columns(indptr, block.indices, block.data, self._new_column)
            block.indptr, block.indices, block.data = indptr, block.indices[:kept], block.data[:kept]
            yield block
