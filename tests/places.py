"""Where results can go, whatever function makes them, and what is found there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@dataclass(frozen=True)
class Place:
    """An input (``anndata``, ``file``, ``tokens``) and the suffix of an output; None keeps the result in memory."""

    source: str
    suffix: str | None

    @property
    def is_in_place(self) -> bool:
        return self.source == "anndata" and self.suffix is None

    def __str__(self) -> str:
        return f"{self.source} to {self.suffix or 'memory'}"


def places(suffixes: tuple[str, ...]) -> list[Place]:
    """Every input with every output, those aside that a function refuses whatever the options (.h5ad without .h5ad)."""
    pairs = [Place(source, suffix) for source in ("anndata", "file", "tokens") for suffix in (None, *suffixes)]
    return [place for place in pairs if place.suffix != ".h5ad" or place.source == "file"]


def in_turn(options: Iterable[str], everywhere: list[Place], *, every: int) -> list[Any]:
    """Every option at every place, of which each option's third place, say, in turn, is no slow test."""
    return [
        pytest.param(option, place, id=f"{option}-{place}", marks=() if (i + j) % every == 0 else pytest.mark.slow)
        for i, option in enumerate(options)
        for j, place in enumerate(everywhere)
    ]


def columns_of(path: Path) -> dict[str, list[Any]]:
    """The columns that name the rows of an output, and whatever else is in its table."""
    if path.suffix == ".npy":
        beside = next(path.parent.glob(f"{path.stem}.*.parquet"))
        return pq.read_table(beside).to_pydict()
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    if path.suffix == ".csv":
        return pd.read_csv(path).to_dict("list")
    if path.suffix == ".h5ad":
        return anndata.read_h5ad(path).obs.to_dict("list")
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all().to_pydict()
