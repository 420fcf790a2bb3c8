"""CountSource: one opened file or AnnData, whatever its format, as checked row blocks of counts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.counts.block import CountBlock, CountMatrix
from geneformer_fast.counts.features import gene_expression
from geneformer_fast.counts.identifiers import is_ensembl_gene
from geneformer_fast.counts.reading import reading
from geneformer_fast.counts.selection import CHOSEN_BY, shown
from geneformer_fast.counts.table import Table, as_text, signed, text_array
from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

# Where gene ids are looked for, best first; then other spellings, then the row names of var.
GENE_COLUMNS = ("ensembl_id", "gene_ids", "gene_id", "feature_id", "ensembl")
# Names that loom, R and others give the same column, as letters and digits; believed only where they hold Ensembl ids.
_OTHER_GENE_COLUMNS = re.compile(
    r"(?:ensembl|ensemblgene|ens|geneens|gene|feature)?(?:ids?|accessions?)|ensembl|ensemblgenes?|ensg|geneensembl"
    r"|genestableids?|genes?|features?|index"
)
#: What the row names of obs are called, as in scanpy; ``tokenize`` carries them along.
OBS_NAMES = "obs_names"
# These mean the row names where no column is called so; anndata itself stores them as ``_index``.
_INDEX = ("index", "_index")
_HASHED_BYTES = 1 << 16
_HASHED_ROWS = 4096
_MAX_NAMED = 3


class CountSource:
    """An opened input. Use as a context manager, or call `close`.

    Attributes
    ----------
    name
        Path as given, or ``"<AnnData>"``.
    kind
        ``"h5ad"``, ``"zarr"``, ``"10x_h5"``, ``"10x_mtx"``, ``"loom"`` or ``"anndata"``.
    n_cells, n_genes
        Shape of the chosen matrix, without features that are no gene expression.
    left_out
        Those features: their type to how many there are.
    counts_from
        Which matrix was chosen: ``"X"``, ``"raw/X"``, ``"layers/NAME"``.
    value_dtype
        Type of the counts in blocks.
    is_dense
        Whether the matrix is stored densely (the official arithmetic differs then).
    is_one_pass
        Whether any cells, however few, cost a pass over all of the file.
    gene_ids_from
        Which column of var the gene ids come from, ``"var_names"`` for its row names.
    """

    def __init__(
        self,
        *,
        name: str,
        kind: str,
        matrix: CountMatrix,
        counts_from: str,
        obs: Table,
        var: Table,
        gene_column: str | None = None,
        allow_float: bool = False,
        paths: Iterable[Path] = (),
        parts: Mapping[str, Path] | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.kind = kind
        with reading(name, counts_from):
            matrix, var, self.left_out = gene_expression(name, matrix, var, is_typed=kind.startswith("10x"))
        self.n_cells, self.n_genes = matrix.shape
        self.counts_from = counts_from
        self.value_dtype = matrix.value_dtype
        self.is_dense, self.is_one_pass = matrix.is_dense, matrix.is_one_pass
        self._matrix = matrix
        self._obs = obs
        self._var = var
        self._whole = not allow_float
        self._paths = list(paths)
        self._parts = dict(parts or {})
        self._close = close
        if self.n_cells == 0:
            raise InputError(f"{name}: has no cells ({counts_from} is 0 x {self.n_genes})")
        if self.n_genes == 0:
            raise InputError(f"{name}: has no genes ({counts_from} is {self.n_cells} x 0)")
        if self.n_genes >= 2**31:
            raise InputError(f"{name}: {self.n_genes} gene columns are more than a file of counts can have")
        self.gene_ids_from = self._choose_gene_column(gene_column)
        # read now: it also proves that var has as many rows as the matrix has columns
        self._gene_ids = self._read_gene_ids()

    def __enter__(self) -> CountSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the underlying files."""
        self._close()

    def _choose_gene_column(self, asked: str | None) -> str:
        if asked == "var_names" or (asked in _INDEX and asked not in self._var.columns):
            return "var_names"
        if asked is not None:
            if asked not in self._var.columns:
                raise InputError(
                    f"{self._var.name} has no column {asked!r}; there are "
                    f"{', '.join(self._var.columns) or 'none'} (and var_names)"
                )
            return asked
        named = next((column for column in GENE_COLUMNS if column in self._var.columns), None)
        return named or self._other_gene_column() or "var_names"

    def _other_gene_column(self) -> str | None:
        """A column of Ensembl ids under a name of another tool's, where the row names are none."""
        plain = {column: re.sub(r"[^a-z0-9]", "", column.lower()) for column in self._var.columns}
        columns = [column for column, name in plain.items() if _OTHER_GENE_COLUMNS.fullmatch(name)]
        if not columns or _are_ensembl_ids(self._var.index()):
            return None
        for column in columns:
            try:
                ids = as_text(self._var.read(column))
            except InputError:
                continue  # a column nobody asked for
            if _are_ensembl_ids(ids):
                return column
        return None

    def gene_ids(self) -> np.ndarray:
        """Gene ids as written, an object array of strings; see `gene_ids_from`."""
        return self._gene_ids

    def gene_ids_of(self, column: str) -> np.ndarray | None:
        """What a column of var holds as gene ids, ``"var_names"`` for its row names; None where there is no such."""
        if column == "var_names":
            return self._var.index()
        return as_text(self._var.read(column)) if column in self._var.columns else None

    def _read_gene_ids(self) -> np.ndarray:
        if self.gene_ids_from == "var_names":
            return self._var.index()
        return as_text(self._var.read(self.gene_ids_from))

    @property
    def obs_columns(self) -> list[str]:
        """Names of the cell annotations."""
        return self._obs.columns

    def has_obs(self, name: str) -> bool:
        """Whether ``obs(name)`` is there."""
        return name in self._obs.columns or name == OBS_NAMES or name in _INDEX

    def obs(self, name: str) -> np.ndarray | pa.Array:
        """One cell annotation; categories are decoded, text and missing values come as pyarrow.

        ``obs_names`` are the cell names, and so is ``index`` where no column is called that.
        """
        if name == OBS_NAMES or (name in _INDEX and name not in self._obs.columns):
            return text_array(self._obs.index())
        return signed(self._obs.read(name))

    def cell_names(self) -> np.ndarray:
        """Barcodes or other cell names, an object array of strings."""
        return self._obs.index()

    def check_cell_names(self, *, allow_duplicates: bool = False) -> None:
        """Raise InputError where there are more or fewer names than cells, or two cells share a name."""
        stored = self._obs.stored_index()
        if stored is None or allow_duplicates:
            return
        n_distinct = len(stored.unique()) if hasattr(stored, "unique") else len(np.unique(stored))
        if n_distinct == len(stored):
            return
        names = self.cell_names().tolist()
        seen: set[str] = set()
        repeated = [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
        examples = ", ".join(repr(name) for name in dict.fromkeys(repeated[:_MAX_NAMED]))
        raise InputError(
            f"{self.name}: {len(repeated)} cell names (barcodes) appear more than once, e.g. {examples}. Results could "
            "not be told apart by name: call adata.obs_names_make_unique() and save, or pass --allow-duplicate-cells "
            "(allow_duplicate_cells=True): cells are then told apart by their row."
        )

    def blocks(self, start: int = 0, stop: int | None = None, rows: int = 4096) -> Iterator[CountBlock]:
        """Cells `start` to `stop` as checked blocks in row order.

        Parameters
        ----------
        start, stop
            Rows of this source; `stop` defaults to the last.
        rows
            Most cells per block. Blocks of cells with many genes are shorter, so that memory stays bounded.

        Yields
        ------
        CountBlock
            Valid until the next but one is asked for if `release` is called on it, for ever otherwise.

        Raises
        ------
        InputError
            Unreadable data, or values that are not counts: NaN, infinite, negative, or fractional without
            `allow_float`; names the file, the matrix, the cell and the gene.
        """
        stop = self.n_cells if stop is None else min(stop, self.n_cells)
        if start < 0 or rows < 1:
            raise ValueError(f"start {start} and rows {rows} must not be negative or zero")
        with reading(self.name, self.counts_from):
            stamp = np.empty(self.n_genes, dtype=np.int64)
            for block in self._matrix.blocks(start, stop, rows):
                self._check(block, stamp)
                yield block

    def _check(self, block: CountBlock, stamp: np.ndarray) -> None:
        from geneformer_fast.counts import loops

        stamp.fill(-1)
        whole = self._whole and block.data.dtype.kind == "f"
        status = loops.check_entries(block.indptr, block.indices, block.data, self.n_genes, whole, stamp)
        if status & loops.BAD_INDEX:
            raise InputError(
                f"{self.name}: {self.counts_from} has column indices outside 0..{self.n_genes - 1} near cell "
                f"{block.start}; the matrix is corrupt"
            )
        if status & loops.BAD_VALUE:
            self._raise_bad_values(block)
        if status & loops.DUPLICATE:
            raise InputError(
                f"{self.name}: {self.counts_from} lists a gene twice in one cell near cell {block.start}; call "
                "adata.X.sum_duplicates() and save the file again"
            )
        if block.indices.dtype != np.int32:
            block.indices = block.indices.astype(np.int32)

    def _raise_bad_values(self, block: CountBlock) -> None:
        data = block.data
        with np.errstate(invalid="ignore"):
            bad = ~((data >= 0) & (data < np.inf))
            if self._whole:
                bad |= np.floor(data) != data
        places = np.flatnonzero(bad)
        row = int(np.searchsorted(block.indptr, places[0], side="right")) - 1
        gene = int(block.indices[places[0]])
        advice = f"Give the raw counts: choose another matrix with {CHOSEN_BY}, or put them into adata.raw."
        if self._whole and not (~((data >= 0) & (data < np.inf))).any():
            advice += " TPM-like values pass with --allow-float (allow_float=True)."
        raise InputError(
            f"{self.name}: {self.counts_from} does not hold counts: cell {block.start + row} "
            f"({self._label(self.cell_names, block.start + row)}), gene {self._label(self.gene_ids, gene)} has "
            f"{shown(data[places[:1]])}; {len(places)} such values in {block.n_cells} cells: {shown(data[places])}. "
            f"{advice}"
        )

    @staticmethod
    def _label(names: Callable[[], np.ndarray], i: int) -> str:
        try:
            return repr(names()[i])
        except InputError:
            return f"number {i}"

    def fingerprint(self, *, is_whole: bool = False) -> dict[str, Any]:
        """A digest that changes when the input does.

        Of a file: its size, time, and both ends; of a store of many files: that of its metadata, and size and time of
        every chunk. Of an AnnData in memory, which has no time: its shape, names and values.

        Parameters
        ----------
        is_whole
            Whether an AnnData's values are all looked at, which takes about as long as ranking them, or a sample.

        Returns
        -------
        dict
            ``path``, ``bytes``, ``mtime_ns`` and ``sha256``; for an AnnData ``path`` is ``"<AnnData>"``.
        """
        digest = sha256(f"{self.n_cells}x{self.n_genes} {self.counts_from}".encode())
        if not self._paths:
            for names in (self.cell_names(), self.gene_ids()):
                digest.update("\n".join(names.tolist()).encode("utf-8", "surrogatepass"))
            if is_whole:
                for block in self._matrix.blocks(0, self.n_cells, _HASHED_ROWS):
                    for array in (block.indptr, block.indices, block.data):
                        digest.update(np.ascontiguousarray(array).data)
                    block.release()
            else:
                digest.update(np.ascontiguousarray(self._matrix.sample().values).data)
            return {"path": self.name, "bytes": None, "mtime_ns": None, "sha256": digest.hexdigest()}
        total, newest = 0, 0
        with reading(self.name, "file"):
            for path in self._paths:
                status = path.stat()
                total += status.st_size
                newest = max(newest, status.st_mtime_ns)
                digest.update(f"{path.name} {status.st_size}\n".encode())
                with path.open("rb") as file:
                    digest.update(file.read(_HASHED_BYTES))
                    if status.st_size > _HASHED_BYTES:
                        file.seek(-_HASHED_BYTES, os.SEEK_END)
                        digest.update(file.read(_HASHED_BYTES))
            for part, path in self._parts.items():
                status = path.stat()
                total += status.st_size
                newest = max(newest, status.st_mtime_ns)
                digest.update(f"{part} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
        return {"path": self.name, "bytes": total, "mtime_ns": newest, "sha256": digest.hexdigest()}


def _are_ensembl_ids(ids: np.ndarray) -> bool:
    return 2 * sum(map(is_ensembl_gene, ids.tolist())) > len(ids)
