"""Columns of obs that go along with tokens: which, of what type, and their values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_fast.counts import CountSource
from geneformer_fast.counts.arrays import number_array, text_list_array
from geneformer_fast.counts.source import OBS_NAMES
from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    from geneformer_fast.tokenization.inputs import ReadOptions


def carried_columns(obs: str | Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """{column of obs: name in the result} for what a user asks to carry along.

    The names of cells are always carried, as ``obs_names``, or as what they are to be called.
    """
    names = [obs] if isinstance(obs, str) else obs or ()
    asked = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    return {OBS_NAMES: OBS_NAMES, **asked}


def no_column(source: CountSource, name: str, purpose: str) -> str:
    """What is said of a column that is not there."""
    known = ", ".join(source.obs_columns) or "no columns"
    return f"{source.name}: obs has no column {name!r} {purpose}; there are {known}"


def arrow_type(source: CountSource, name: str) -> pa.DataType:
    """The type of a column in a token folder.

    Raises
    ------
    InputError
        There is no such column.
    """
    if not source.has_obs(name):
        raise InputError(f"{no_column(source, name, 'to carry along')} (and {OBS_NAMES})")
    values = source.obs(name)
    kind = values.type if isinstance(values, pa.Array) else pa.from_numpy_dtype(values.dtype)
    if pa.types.is_boolean(kind):
        return pa.bool_()
    if pa.types.is_integer(kind):
        return kind if pa.types.is_uint64(kind) else pa.int64()
    return pa.float64() if pa.types.is_floating(kind) else pa.string()


def joined_types(types: Sequence[Mapping[str, pa.DataType]], options: ReadOptions) -> dict[str, pa.DataType]:
    """One Arrow type per carried column that holds the values of all inputs, whose types are given."""
    joined: dict[str, pa.DataType] = {}
    for name in options.carried.values():
        kinds = {entry[name] for entry in types}
        if len(kinds) == 1:
            joined[name] = kinds.pop()
        elif kinds == {pa.int64(), pa.float64()}:
            joined[name] = pa.float64()
        else:
            joined[name] = pa.string()
    return joined


def carried_values(source: CountSource, name: str, kind: pa.DataType) -> pa.Array:
    """A column of all cells of one input, in the type that holds those of all inputs."""
    return _cast(_as_array(source.obs(name)), kind, f"{source.name}: obs column {name!r}")


def cell_columns(inputs: Iterable[Any], options: ReadOptions) -> dict[str, pa.ChunkedArray]:
    """The carried columns of all cells of all inputs, of those without tokens too."""
    columns: list[dict[str, pa.Array]] = []
    kinds: list[dict[str, pa.DataType]] = []
    for data in inputs:
        with options.open(data, is_checked=True) as source:
            kinds.append({new: arrow_type(source, old) for old, new in options.carried.items()})
            columns.append({new: _as_array(source.obs(old)) for old, new in options.carried.items()})
    return {
        name: pa.chunked_array([_cast(entry[name], kind, f"the column {name!r}") for entry in columns], type=kind)
        for name, kind in joined_types(kinds, options).items()
    }


def _as_array(values: np.ndarray | pa.Array) -> pa.Array:
    return values if isinstance(values, pa.Array) else number_array(values)


def _cast(array: pa.Array, kind: pa.DataType, where: str) -> pa.Array:
    if array.type == kind:
        return array
    if pa.types.is_string(kind) and pa.types.is_boolean(array.type):
        return text_list_array([None if value is None else str(value) for value in array.to_pylist()])
    try:
        return array.cast(kind)
    except pa.ArrowException as error:
        raise InputError(f"{where} cannot be carried as {kind} ({error})") from None
