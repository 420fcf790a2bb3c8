"""Values of cells as a matrix: cells x perturbations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geneformer_fast.errors import InputError, OutputError
from geneformer_fast.perturbation.rows import CELL, GENES, STATE, TOKENS, VALUE

if TYPE_CHECKING:
    from anndata import AnnData

_MEMORY = Path("/proc/meminfo")


def anndata_of(
    batches: Iterable[pa.RecordBatch],
    cells: pa.Table,
    *,
    states: Sequence[str],
    state: str | None,
    extra: Sequence[str],
    path: Path,
    about: Mapping[str, Any],
) -> AnnData:
    """A matrix of the values in ``batches``.

    Parameters
    ----------
    batches
        Rows of cells, without those of genes.
    cells
        The cells that become rows.
    states, state
        All states, and the one whose values are X.
    extra
        Columns that tell variants of the same genes apart.
    path
        Of the folder, for messages.
    about
        For ``uns``.
    """
    from anndata import AnnData

    columns: dict[tuple[Any, ...], int] = {}
    genes: list[Any] = []
    pieces: list[tuple[np.ndarray, ...]] = []
    for batch in batches:
        number = _columns_of(batch, extra, columns, genes)
        of_state = _numbers(batch[STATE], states) if states else np.zeros(len(batch), dtype=np.int64)
        row = pc.index_in(batch[CELL], cells[CELL])
        if row.null_count:
            raise OutputError(f"{path}: there are values of cells that it does not list; perturb again")
        pieces.append((row.to_numpy(), number, of_state, batch[VALUE].to_numpy()))
    n_layers = max(1, len(states))
    n_bytes = 4 * n_layers * cells.num_rows * len(columns)
    if (free := _free_bytes()) is not None and n_bytes > free:
        raise InputError(
            f"{path}: a matrix of {cells.num_rows:,} cells and {len(columns):,} perturbations takes "
            f"{n_bytes / 2**30:,.1f} GiB, and {free / 2**30:,.1f} are free; choose fewer cells, or use read()"
        )
    values = np.full((n_layers, cells.num_rows, len(columns)), np.nan, dtype=np.float32)
    is_there = np.zeros(values.shape, dtype=bool) if pieces else values
    for row, column, layer, value in pieces:
        place = (layer * cells.num_rows + row) * len(columns) + column
        if is_there[layer, row, column].any() or len(np.unique(place)) < len(place):
            raise InputError(f"{path}: a cell has two values of one perturbation, so that they make no matrix")
        is_there[layer, row, column] = True
        values[layer, row, column] = value
    obs = _observations(cells)
    adata = AnnData(
        X=values[states.index(state) if state is not None else 0],
        obs=obs.set_index(obs[CELL].astype(str).rename(None)),
        var=_variables(columns, genes, extra, is_there),
    )
    for layer_of_state, name in zip(values, states, strict=False):
        adata.layers[name] = layer_of_state
    # As text, since what a plan holds (None, lists of lists) is not all that .h5ad files do.
    adata.uns["perturbations"] = {name: json.dumps(value) for name, value in about.items()}
    if state is not None:
        adata.uns["perturbations"]["state"] = state
    return adata


def _observations(cells: pa.Table) -> Any:
    """Cells and what is carried of them, as .h5ad files can hold it; names are short but for those that are taken."""
    import pandas

    own = [name for name in cells.column_names if not name.startswith("obs_")]
    shorter = {name: name.removeprefix("obs_") for name in cells.column_names}
    names = [name if short in own and name not in own else short for name, short in shorter.items()]
    for place, field in enumerate(cells.schema):
        if not (pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_boolean(field.type)):
            column = cells[field.name].cast(pa.string())
            cells = cells.set_column(place, field.name, column)
    kinds = {pa.bool_(): pandas.BooleanDtype()}
    obs = cells.rename_columns(names).to_pandas(types_mapper=kinds.get)
    # A column of missing values alone is one of text to nobody but Arrow.
    empty = [name for name in obs if obs[name].dtype == object and obs[name].isna().all()]
    return obs.astype(dict.fromkeys(empty, "category"))


def _columns_of(
    batch: pa.RecordBatch, extra: Sequence[str], columns: dict[tuple[Any, ...], int], genes: list[Any]
) -> np.ndarray:
    """[n] number of each row's perturbation; new ones are added."""
    text = pc.binary_join(batch[TOKENS].cast(pa.list_(pa.string())), " ")
    keys = [text, *(batch[name] for name in extra)]
    coded = [key.dictionary_encode(null_encoding="encode") for key in keys]
    code = np.zeros(len(batch), dtype=np.int64)
    for part in coded:
        code = code * max(1, len(part.dictionary)) + part.indices.to_numpy(zero_copy_only=False)
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    for place in np.argsort(first).tolist():  # in order of first appearance
        row = int(first[place])
        key = tuple(part[row].as_py() for part in keys)
        if key not in columns:
            columns[key] = len(columns)
            genes.append(batch[GENES][row].as_py())
        number[place] = columns[key]
    return number[inverse]


def _variables(
    columns: Mapping[tuple[Any, ...], int], genes: Sequence[Any], extra: Sequence[str], is_there: np.ndarray
) -> Any:
    """What a perturbation is: its tokens, its genes' names, and in how many cells it was done."""
    import pandas

    names = []
    for (tokens, *more), ids in zip(columns, genes, strict=True):
        known = [name or token for name, token in zip(ids or tokens.split(), tokens.split(), strict=True)]
        names.append(" ".join(["+".join(known), *map(str, more)]))
    frame = pandas.DataFrame({TOKENS: [key[0] for key in columns]}, index=pandas.Index(names, dtype=object))
    for place, name in enumerate(extra, start=1):
        frame[name] = [key[place] for key in columns]
    frame["n_cells"] = is_there.any(0).sum(0) if len(columns) else np.zeros(0, dtype=np.int64)
    return frame


def _numbers(column: pa.Array, states: Sequence[str]) -> np.ndarray:
    return pc.index_in(column, pa.array(states, pa.string())).to_numpy(zero_copy_only=False)


def _free_bytes() -> int | None:
    """Memory that programs can have without others being pushed out; None where the system does not say."""
    try:
        lines = _MEMORY.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
