"""Folders of perturbations of made cells, quickly written."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.perturbation.rows import CellRows, RowSchema
from geneformer_fast.perturbation.shards import Shard
from geneformer_fast.perturbation.store import PerturbationWriter, RunCells

STATES = ("ill", "well", "odd")
NAMES = [None, *(f"ENSG{token:011d}" for token in range(1, 400))]
PLAN = {"tokens": "aa", "model": "bb", "options": {"kind": "delete", "genes": "all"}}


def cells(n: int = 40, seed: int = 0) -> RunCells:
    """Cells of 1 to 30 genes, longest first, with two carried columns."""
    rng = np.random.default_rng(seed)
    length = np.sort(rng.integers(1, 31, n))[::-1]
    donors = pa.array([f"donor {i % 3}" for i in range(n)]).dictionary_encode()
    obs = {"donor": donors, "age": pa.array(rng.normal(size=n), mask=np.arange(n) % 5 == 0)}
    return RunCells(rng.permutation(1000)[:n], length, length * len(STATES), obs=obs)


def rows_of(cell: int, length: int, *, has_states: bool = True, has_genes: bool = False) -> CellRows:
    """Rows that depend on the cell alone: every gene of it deleted."""
    rng = np.random.default_rng(cell)
    tokens = rng.permutation(np.arange(1, 400))[:length]
    if has_genes:
        variant = np.repeat(np.arange(length), length)
        affected = np.where(np.eye(length, dtype=bool), -1, tokens).reshape(-1)
        return CellRows.of(tokens, rng.normal(size=length**2), variant=variant, affected=affected)
    return CellRows.of(tokens, rng.normal(size=(length, len(STATES)) if has_states else length))


def write(
    out: Path,
    chosen: RunCells | None = None,
    *,
    states: tuple[str, ...] = STATES,
    plan: Mapping[str, Any] = PLAN,
    shard: str | None = None,
    pieces: int = 1,
    has_genes: bool = False,
    **options: Any,
) -> None:
    """Write a whole folder, in so many pieces of each cell."""
    chosen, part = cells() if chosen is None else chosen, Shard.of(shard)
    chosen = chosen if part.is_whole else chosen.of_shard(part)
    schema = RowSchema(states=states, names=NAMES)
    with PerturbationWriter(out, chosen, plan=plan, rows=schema, shard=part, **options) as writer:
        for place in writer.remaining:
            cell = int(chosen.cell[place])
            made = rows_of(cell, int(chosen.length[place]), has_states=bool(states), has_genes=has_genes)
            for rows in _pieces(made, pieces):
                writer.append(cell, rows)
        writer.finish({"noise": 1e-7})


def _pieces(rows: CellRows, n: int) -> list[CellRows]:
    """The same rows in several pieces, every one with all variants."""
    bounds = np.linspace(0, len(rows), n + 1).astype(int)
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    return [
        CellRows.of(
            [rows.tokens[a:b].tolist() for a, b in zip(rows.bounds[:-1], rows.bounds[1:], strict=True)],
            rows.value[part], variant=rows.variant[part],
            affected=None if rows.affected is None else rows.affected[part],
            state=None if rows.state is None else rows.state[part],
        )
        for part in parts
    ]  # fmt: skip


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
