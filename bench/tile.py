"""Large files out of real cells: a small .h5ad repeated."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np


def tile_h5ad(source: Path, target: Path, *, n_cells: int, is_exact: bool = False) -> Path:
    """Write an .h5ad of at least ``n_cells`` cells by repeating those of ``source``; uncompressed CSR, whole repeats.

    With ``is_exact`` the last repeat is cut, so that there are ``n_cells``. Cell names are numbered, so that none
    repeats. Written in pieces, under a temporary name: a target that exists is complete and is left as it is.
    """
    if target.exists():
        return target
    temporary = target.with_suffix(".part")
    with h5py.File(source) as old, h5py.File(temporary, "w") as new:
        indptr, indices, data = (old[f"X/{key}"][:] for key in ("indptr", "indices", "data"))
        n_rows, nnz = len(indptr) - 1, len(data)
        repeats = -(-n_cells // n_rows)
        n_cells = n_cells if is_exact else repeats * n_rows
        bounds = np.concatenate([*(indptr[:-1].astype(np.int64) + i * nnz for i in range(repeats)), [nnz * repeats]])
        bounds = bounds[: n_cells + 1]
        new.attrs.update(dict(old.attrs))
        x = new.create_group("X")
        x.attrs.update(dict(old["X"].attrs))
        x.attrs["shape"] = np.array([n_cells, old["X"].attrs["shape"][1]])
        for name, values in (("indices", indices), ("data", data)):
            stored = x.create_dataset(name, shape=(bounds[-1],), dtype=values.dtype)
            for i in range(repeats):
                stored[i * nnz : (i + 1) * nnz] = values[: bounds[-1] - i * nnz]
        x["indptr"] = bounds
        old.copy("var", new)
        _tile_obs(old["obs"], new.create_group("obs"), n_cells, repeats)
        for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            new.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    os.replace(temporary, target)
    return target


def _tile_obs(old: h5py.Group, new: h5py.Group, n_cells: int, repeats: int) -> None:
    new.attrs.update(dict(old.attrs))
    index = old.attrs["_index"]
    for name, column in old.items():
        if name == index:
            names = np.array([f"cell{i}" for i in range(n_cells)], dtype=h5py.string_dtype())
            new.create_dataset(name, data=names)
            new[name].attrs.update(dict(column.attrs))
        elif isinstance(column, h5py.Group):
            old.copy(name, new)
            del new[name]["codes"]
            new[name].create_dataset("codes", data=np.tile(column["codes"][:], repeats)[:n_cells])
            new[name]["codes"].attrs.update(dict(column["codes"].attrs))
        else:
            new.create_dataset(name, data=np.tile(column[:], repeats)[:n_cells])
            new[name].attrs.update(dict(column.attrs))
