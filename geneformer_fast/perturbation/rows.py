"""Values of perturbed cells as columns: what the engine hands over, and how it looks as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import InputError
from geneformer_fast.ragged import Ragged

#: Columns that every file of perturbations has, in their order; further ones of a run and those of obs follow.
CELL, TOKENS, GENES, AFFECTED, STATE, VALUE = "cell", "tokens", "genes", "affected", "state", "value"
OWN: dict[str, pa.DataType] = {
    CELL: pa.int64(),
    TOKENS: pa.list_(pa.int32()),
    GENES: pa.list_(pa.string()),
    AFFECTED: pa.int32(),
    STATE: pa.string(),
    VALUE: pa.float32(),
}


@dataclass(frozen=True)
class CellRows:
    """Rows of one cell, or some of them: its variants, and the values that belong to them.

    Make it with :meth:`of`, which takes variants as they come.

    Attributes
    ----------
    tokens, bounds
        Perturbed tokens [N] int32 of all variants one after another, in the order in which they were perturbed, and
        [V + 1] where those of each variant begin and end.
    value
        [n] float32, one per row.
    variant
        [n] the variant that each row is of.
    affected
        [n] int32 token whose embedding is compared, -1 for the cell itself; None where that is every row.
    state
        [n] number of the state among those of the run, -1 for none; None where that is every row.
    extra
        Further columns of the run, by name: [V] a value for every variant, such as its dose.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    value: np.ndarray
    variant: np.ndarray
    affected: np.ndarray | None = None
    state: np.ndarray | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        perturbed: np.ndarray | Ragged | Sequence[Sequence[int]],
        value: Any,
        *,
        variant: Any = None,
        affected: Any = None,
        state: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> CellRows:
        """Rows from variants and values as arrays or tensors of any kind.

        Parameters
        ----------
        perturbed
            Tokens of every variant: [V] where each is of one token, [V, k] with -1 where there are fewer than k,
            packed, or a list.
        value
            [n] values. Without ``variant``: [V] one of each variant, or [V, S] one of each variant and state.
        variant, affected, state, extra
            As the attributes; ``state`` is not given where ``value`` has an axis of states.
        """
        tokens, bounds = _packed(perturbed)
        values = np.asarray(_on_host(value), dtype=np.float32)
        n_variants = len(bounds) - 1
        if values.ndim == 2:
            n_states = values.shape[1]
            variant = np.repeat(np.arange(len(values)), n_states)
            state = np.tile(np.arange(n_states), len(values))
            values = np.ascontiguousarray(values).reshape(-1)
        rows = np.arange(len(values)) if variant is None else np.asarray(_on_host(variant), dtype=np.int64)
        made = cls(
            tokens, bounds, values, rows,
            None if affected is None else np.asarray(_on_host(affected), dtype=np.int32),
            None if state is None else np.asarray(_on_host(state), dtype=np.int32),
            dict(extra or {}),
        )  # fmt: skip
        made._check(n_variants)
        return made

    def _check(self, n_variants: int) -> None:
        """Parts that do not fit together are a fault of the program, not of a file."""
        sizes = {len(part) for part in (self.value, self.variant, self.affected, self.state) if part is not None}
        if len(sizes) != 1:
            raise ValueError(f"rows of a cell have columns of different lengths: {sorted(sizes)}")
        if len(self.variant) and not 0 <= self.variant.min() <= self.variant.max() < n_variants:
            raise ValueError(f"rows of a cell name variants beyond its {n_variants}")
        for name, values in self.extra.items():
            if len(values) != n_variants:
                raise ValueError(f"{name} has {len(values)} values for {n_variants} variants")

    def __len__(self) -> int:
        return len(self.value)

    def pieces(self, n_rows: int) -> Iterator[CellRows]:
        """The same rows, at most so many at once; all variants with each."""
        for start in range(0, len(self), n_rows):
            part = slice(start, start + n_rows)
            yield CellRows(
                self.tokens, self.bounds, self.value[part], self.variant[part],
                None if self.affected is None else self.affected[part],
                None if self.state is None else self.state[part], self.extra,
            )  # fmt: skip


@dataclass(frozen=True)
class RowSchema:
    """How rows of a run become a table.

    Parameters
    ----------
    states
        Names of the states; empty without any.
    names
        [tokens of the vocabulary] Ensembl id of every token, None where it has none; None without a dictionary.
    extra
        Further columns of the run and their types, such as ``{"dose": pyarrow.float32()}``.
    obs
        Columns that are carried along, and their types.
    """

    states: Sequence[str] = ()
    names: Sequence[str | None] | None = None
    extra: Mapping[str, pa.DataType] = field(default_factory=dict)
    obs: Mapping[str, pa.DataType] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.obs:
            if name in OWN or name in self.extra:
                raise InputError(
                    f"a carried column is called {name!r}, and so is one of the result; carry it under another name "
                    f"(--obs another_name={name})"
                )
        object.__setattr__(self, "_states", pa.array(self.states, pa.string()))
        if self.names is not None:
            object.__setattr__(self, "_names", pa.array(self.names, pa.string()))

    @property
    def schema(self) -> pa.Schema:
        """Of the table."""
        columns = {**OWN, **self.extra, **self.obs}
        return pa.schema([pa.field(name, kind) for name, kind in columns.items()])

    def table(self, cell: int, rows: CellRows, carried: Mapping[str, pa.Scalar]) -> pa.Table:
        """The rows of one cell, with what is carried of it."""
        n, variant = len(rows), pa.array(rows.variant)
        bounds = pa.array(rows.bounds, pa.int32())
        tokens = pa.ListArray.from_arrays(bounds, pa.array(rows.tokens, pa.int32())).take(variant)
        columns: dict[str, Any] = {
            CELL: pa.array(np.full(n, cell, dtype=np.int64)),
            TOKENS: tokens,
            GENES: self._genes(rows, bounds, variant),
            AFFECTED: _with_nulls(rows.affected, n),
            STATE: pa.nulls(n, pa.string()) if rows.state is None else self._states.take(_with_nulls(rows.state, n)),  # type: ignore[attr-defined]
            VALUE: pa.array(rows.value),
        }
        if rows.extra.keys() != self.extra.keys():
            raise ValueError(f"rows have the further columns {sorted(rows.extra)}, the run has {sorted(self.extra)}")
        for name, kind in self.extra.items():
            columns[name] = pa.array(_on_host(rows.extra[name]), kind).take(variant)
        for name, kind in self.obs.items():
            columns[name] = pa.repeat(carried[name], n).cast(kind)
        return pa.table(columns, schema=self.schema)

    def _genes(self, rows: CellRows, bounds: pa.Array, variant: pa.Array) -> pa.Array:
        if self.names is None:
            return pa.nulls(len(rows), OWN[GENES])
        names = self._names.take(pa.array(rows.tokens))  # type: ignore[attr-defined]
        return pa.ListArray.from_arrays(bounds, names).take(variant)


def plain(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """A carried column with categories as text, one value per cell."""
    if pa.types.is_nested(column.type):
        raise InputError(f"a carried column holds {column.type}, which is not one value per cell; leave it out")
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _packed(perturbed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all variants one after another, and where each begins and ends."""
    if isinstance(perturbed, Ragged):
        return np.asarray(_on_host(perturbed.values), np.int32), np.asarray(_on_host(perturbed.cu_seqlens), np.int32)
    if isinstance(perturbed, Sequence) and not hasattr(perturbed, "dtype"):
        listed = [tokens if hasattr(tokens, "__len__") else (tokens,) for tokens in perturbed]
        lengths = [len(tokens) for tokens in listed]
        flat = [int(token) for tokens in listed for token in tokens]
        return np.array(flat, dtype=np.int32), np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]).astype(
            np.int32
        )
    tokens = np.asarray(_on_host(perturbed), dtype=np.int32).reshape(len(perturbed), -1)
    is_token = tokens >= 0
    bounds = np.zeros(len(tokens) + 1, dtype=np.int32)
    np.cumsum(is_token.sum(1), out=bounds[1:])
    return tokens[is_token], bounds


def _on_host(values: Any) -> Any:
    """A tensor of any device as one that numpy reads; everything else as it is."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else values


def _with_nulls(values: np.ndarray | None, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, pa.int32())
    return pa.array(values, pa.int32(), mask=values < 0)
