"""Large files out of real cells: a small .h5ad repeated."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np


def tile_h5ad(source: Path, target: Path, *, n_cells: int) -> Path:
    """Write an .h5ad of at least ``n_cells`` cells by repeating those of ``source``; uncompressed CSR, whole repeats.

    Cell names are numbered, so that none repeats. Written in pieces, under a temporary name: a target that exists is
    complete and is left as it is.
    """
    if target.exists():
        return target
    temporary = target.with_suffix(".part")
    with h5py.File(source) as old, h5py.File(temporary, "w") as new:
        indptr, indices, data = (old[f"X/{key}"][:] for key in ("indptr", "indices", "data"))
        n_rows, nnz = len(indptr) - 1, len(data)
        repeats = -(-n_cells // n_rows)
        new.attrs.update(dict(old.attrs))
        x = new.create_group("X")
        x.attrs.update(dict(old["X"].attrs))
        x.attrs["shape"] = np.array([n_rows * repeats, old["X"].attrs["shape"][1]])
        for name, values in (("indices", indices), ("data", data)):
            stored = x.create_dataset(name, shape=(nnz * repeats,), dtype=values.dtype)
            for i in range(repeats):
                stored[i * nnz : (i + 1) * nnz] = values
        tiled = [indptr[:-1].astype(np.int64) + i * nnz for i in range(repeats)]
        x["indptr"] = np.concatenate([*tiled, [nnz * repeats]])
        old.copy("var", new)
        _tile_obs(old["obs"], new.create_group("obs"), n_rows, repeats)
        for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            new.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    os.replace(temporary, target)
    return target


def _tile_obs(old: h5py.Group, new: h5py.Group, n_rows: int, repeats: int) -> None:
    new.attrs.update(dict(old.attrs))
    index = old.attrs["_index"]
    for name, column in old.items():
        if name == index:
            names = np.array([f"cell{i}" for i in range(n_rows * repeats)], dtype=h5py.string_dtype())
            new.create_dataset(name, data=names)
            new[name].attrs.update(dict(column.attrs))
        elif isinstance(column, h5py.Group):
            old.copy(name, new)
            del new[name]["codes"]
            new[name].create_dataset("codes", data=np.tile(column["codes"][:], repeats))
            new[name]["codes"].attrs.update(dict(column["codes"].attrs))
        else:
            new.create_dataset(name, data=np.tile(column[:], repeats))
            new[name].attrs.update(dict(column.attrs))
