"""The obs and var tables of a file: columns by name, whatever way they are encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.counts.reading import reading
from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa


class Table:
    """Columns read on demand.

    Parameters
    ----------
    name
        File and table, for errors.
    n_rows
        Every column must have as many values.
    columns
        Column name to a function that reads it.
    index
        Reads the row names, or None where there are none (then they are the row numbers).
    """

    def __init__(
        self,
        name: str,
        n_rows: int,
        columns: Mapping[str, Callable[..., Any]],
        index: Callable[[], Any] | None,
    ) -> None:
        self.name = name
        self.n_rows = n_rows
        self._columns = columns
        self._index = index

    @property
    def columns(self) -> list[str]:
        """Column names in file order, the index excluded."""
        return list(self._columns)

    def read(self, column: str) -> np.ndarray | pa.Array:
        """One column: numbers as numpy, strings, categories and anything with missing values as pyarrow.

        Raises
        ------
        InputError
            No such column, or it cannot be read.
        """
        if column not in self._columns:
            raise InputError(f"{self.name}: no column {column!r}; there are {', '.join(self.columns) or 'none'}")
        with reading(self.name, f"column {column!r}"):
            values = self._columns[column]()
        if len(values) != self.n_rows:
            raise InputError(f"{self.name}: column {column!r} has {len(values)} values for {self.n_rows} rows")
        return values

    def index(self) -> np.ndarray:
        """Row names as an object array of strings."""
        values = self.stored_index()
        return np.array([str(i) for i in range(self.n_rows)], dtype=object) if values is None else as_text(values)

    def stored_index(self) -> np.ndarray | pa.Array | None:
        """Row names as stored, or None where there are none."""
        if self._index is None:
            return None
        with reading(self.name, "row names"):
            values = self._index()
        if len(values) != self.n_rows:
            raise InputError(f"{self.name}: has {len(values)} row names for {self.n_rows} rows")
        return values

    def subset(self, keep: np.ndarray) -> Table:
        """The rows where `keep` is True."""

        def chosen(values: np.ndarray | pa.Array) -> np.ndarray | pa.Array:
            if isinstance(values, np.ndarray):
                return values[keep]
            from geneformer_fast.counts.arrays import number_array

            return values.filter(number_array(keep))

        readers = {column: lambda column=column: chosen(self.read(column)) for column in self._columns}  # type: ignore[misc]
        index = None if self._index is None else lambda: chosen(self.stored_index())  # type: ignore[arg-type]
        return Table(self.name, int(np.count_nonzero(keep)), readers, index)


def as_text(values: Any) -> np.ndarray:
    """Any column as an object array of strings; missing values become empty strings."""
    from geneformer_fast.counts.identifiers import id_text

    listed = values.to_pylist() if hasattr(values, "to_pylist") else values
    out = np.empty(len(listed), dtype=object)
    out[:] = id_text(listed)
    return out


def signed(values: np.ndarray | pa.Array) -> np.ndarray | pa.Array:
    """Unsigned 64-bit integers as signed ones, where all of them fit."""
    if isinstance(values, np.ndarray):
        fits = values.dtype == np.uint64 and (values.size == 0 or int(values.max()) < 2**63)
        return values.astype(np.int64) if fits else values
    import pyarrow as pa

    if not pa.types.is_uint64(values.type):
        return values
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        return values


def text_array(values: np.ndarray) -> pa.Array:
    """Strings or bytes of any numpy flavour as a pyarrow string array.

    Raises
    ------
    ValueError
        Bytes that are not UTF-8.
    """
    from geneformer_fast.counts.arrays import bytes_list_array, text_list_array

    listed = values.tolist()
    if listed and isinstance(listed[0], bytes):
        return bytes_list_array(listed)
    return text_list_array([value if value is None or value == value else None for value in listed])


def decode_categories(codes: np.ndarray, categories: np.ndarray | pa.Array) -> np.ndarray | pa.Array:
    """Values of a categorical column; the code -1 is a missing value.

    Raises
    ------
    ValueError
        A code that is no category's.
    """
    import pyarrow as pa

    from geneformer_fast.counts.arrays import number_array

    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"category codes have type {codes.dtype}, expected integers")
    if codes.size and int(codes.max()) >= len(categories):
        raise ValueError(f"category code {int(codes.max())}, but there are only {len(categories)} categories")
    if codes.size and int(codes.min()) < -1:
        raise ValueError(f"category code {int(codes.min())}; a missing value is -1")
    missing = codes < 0
    if isinstance(categories, np.ndarray) and not missing.any():
        return categories[codes]
    values = categories if isinstance(categories, pa.Array) else number_array(categories)
    return values.take(number_array(np.where(missing, 0, codes).astype(np.int64), missing))


def with_missing(values: np.ndarray | pa.Array, mask: np.ndarray) -> pa.Array:
    """A pyarrow array with nulls where `mask` is True."""
    from geneformer_fast.counts.arrays import number_array, text_list_array

    mask = np.asarray(mask, dtype=bool)
    if len(mask) != len(values):
        raise ValueError(f"has {len(values)} values, but says of {len(mask)} whether they are missing")
    if isinstance(values, np.ndarray):
        return number_array(values, mask)
    texts = zip(values.to_pylist(), mask.tolist(), strict=True)
    return text_list_array([None if missing else text for text, missing in texts])
