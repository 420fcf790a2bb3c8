"""Flips single bytes of one format and says what became of each; run by test_flips.py in a process of its own.

``python flips.py FORMAT FOLDER FIRST LAST``: FOLDER holds what ``write`` made; the flips are those of the seeds from
FIRST to LAST. One line of JSON before each flip and one after it, so that whoever waits knows at which one it ended.
"""

from __future__ import annotations

import io
import json
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.errors import GeneformerFastError

N_CELLS, N_GENES = 40, 30
SECONDS = 20
# A damaged size must not be allocated; the modules that are loaded take half of this.
MOST_MEMORY = 12 << 30
Content = list[Any]


def write(kind: str, folder: Path) -> None:
    """The whole thing whose bytes are flipped."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(1)
    dense = rng.poisson(1.5, (N_CELLS, N_GENES)).astype(np.float32) + np.eye(N_CELLS, N_GENES, dtype=np.float32)
    ids, names = [f"ENSG{i:011d}" for i in range(N_GENES)], [f"cell{i}" for i in range(N_CELLS)]
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * (N_CELLS // 2)), "score": rng.random(N_CELLS)}, index=names)
    adata = anndata.AnnData(sp.csr_matrix(dense), obs=obs, var=pd.DataFrame({"ensembl_id": ids}, index=ids))
    if kind.startswith("h5ad"):
        adata.X = dense if kind == "h5ad dense" else sp.csc_matrix(dense) if kind == "h5ad csc" else adata.X
        adata.write_h5ad(folder / "cells.h5ad", compression="gzip" if kind.endswith("gzip") else None)
    elif kind.startswith("zarr"):
        with warnings.catch_warnings(action="ignore"), anndata.settings.override(zarr_write_format=int(kind[-1])):
            adata.write_zarr(folder / "cells.zarr")
    elif kind == "10x h5":
        _write_tenx(folder, dense, ids, names)
    elif kind == "loom":
        _write_loom(folder, dense, ids, names)
    elif kind == "tokens":
        from geneformer_fast.tokenization.run import tokenize
        from geneformer_fast.tokenization.vocabulary import Vocabulary

        words = Vocabulary.from_medians({gene: 1.0 + i % 7 for i, gene in enumerate(ids)}, "v2", name="toy", max_len=20)
        tokenize(adata, folder / "tokens", dictionary=words, obs=["kind", "score"], shard_bytes=2_000, progress=False)
    else:
        import pickle

        for protocol in (0, 2, 4):
            values: dict[str, Any] = {gene: np.float64(i / 3) for i, gene in enumerate(ids)}
            (folder / f"medians{protocol}.pkl").write_bytes(pickle.dumps(values | {"<pad>": 0}, protocol))


def _write_tenx(folder: Path, dense: np.ndarray, ids: list[str], names: list[str]) -> None:
    import h5py
    import scipy.sparse as sp

    matrix = sp.csr_matrix(dense.astype(np.int32))
    with h5py.File(folder / "cells.h5", "w") as file:
        group = file.create_group("matrix")
        for key, values in (("data", matrix.data), ("indices", matrix.indices), ("indptr", matrix.indptr)):
            group.create_dataset(key, data=values, compression="gzip")
        group["shape"] = np.array([N_GENES, N_CELLS])
        group["barcodes"] = np.array(names, dtype="S")
        group["features/id"] = np.array(ids, dtype="S")
        group["features/name"] = np.array([f"G{i}" for i in range(N_GENES)], dtype="S")


def _write_loom(folder: Path, dense: np.ndarray, ids: list[str], names: list[str]) -> None:
    import h5py

    with h5py.File(folder / "cells.loom", "w") as file:
        file.create_dataset("matrix", data=dense.T, chunks=(16, 16), compression="gzip")
        file["row_attrs/Accession"] = np.array(ids, dtype="S")
        file["col_attrs/CellID"] = np.array(names, dtype="S")
        file["col_attrs/kind"] = np.array(["a", "b"] * (N_CELLS // 2), dtype="S")
        file.create_group("layers")


def ours(kind: str, folder: Path) -> Content:
    """What this package reads."""
    if kind == "tokens":
        from geneformer_fast.tokenization.arrow import open_tokens

        with open_tokens(folder / "tokens") as tokens:
            values, cu_seqlens = tokens.read(range(len(tokens)))
            columns = [tokens.column(name).to_pylist() for name in tokens.columns if name != "input_ids"]
            return [values.tolist(), cu_seqlens.tolist(), *columns, tokens.vocabulary]
    if kind == "pickles":
        from geneformer_fast.tokenization.pickles import read_pickle

        return [repr(read_pickle(path)) for path in sorted(folder.iterdir())]
    from geneformer_fast.counts import open_source

    (path,) = folder.iterdir()
    with open_source(path) as source:
        dense = np.zeros((source.n_cells, source.n_genes))
        for block in source.blocks(rows=16):
            for row in range(block.n_cells):
                part = slice(block.indptr[row], block.indptr[row + 1])
                dense[block.start + row, block.indices[part]] = block.data[part]
        asked = () if kind == "10x h5" else ("kind",) if kind == "loom" else ("kind", "score")
        columns = {name: _listed(source.obs(name)) for name in asked}
        return [dense.tolist(), source.gene_ids().tolist(), source.cell_names().tolist(), columns]


def _listed(values: Any) -> list[Any]:
    return values.to_pylist() if hasattr(values, "to_pylist") else values.tolist()


def others(kind: str, folder: Path) -> Content | None:
    """What the format's own library makes of the same bytes; None where they have a checksum, or it has none."""
    if kind == "tokens":
        return None
    if kind == "pickles":
        from geneformer_fast.tokenization.pickles import _Official

        return [repr(_Official(io.BytesIO(path.read_bytes())).load()) for path in sorted(folder.iterdir())]
    (path,) = folder.iterdir()
    if path.suffix == ".zarr":
        return _by_anndata(path)
    if path.suffix == ".h5ad":
        try:
            return _by_anndata(path)
        except Exception:  # it reads all of the file, also what is damaged and not asked for
            return _by_h5py(path)
    import h5py
    import scipy.sparse as sp

    with h5py.File(path) as file:
        if path.suffix == ".loom":
            texts = [file[key].asstr()[:].tolist() for key in ("row_attrs/Accession", "col_attrs/CellID")]
            columns = {key: file["col_attrs"][key].asstr()[:].tolist() for key in ("kind",) if key in file["col_attrs"]}
            return [file["matrix"][:].T.astype(float).tolist(), *texts, columns]
        group = file["matrix"]
        parts = [group[key][:] for key in ("data", "indices", "indptr")]
        matrix = sp.csr_matrix(tuple(parts), shape=tuple(group["shape"][:][::-1]))
        texts = [group[key].asstr()[:].tolist() for key in ("features/id", "barcodes")]
        return [matrix.toarray().astype(float).tolist(), *texts, {}]


def _by_anndata(path: Path) -> Content:
    import anndata

    with warnings.catch_warnings(action="ignore"):
        adata = anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)
    dense = adata.X if isinstance(adata.X, np.ndarray) else adata.X.toarray()
    columns = {name: adata.obs[name].tolist() for name in ("kind", "score") if name in adata.obs}
    columns |= {"kind": [None if kind != kind else kind for kind in columns["kind"]]} if "kind" in columns else {}
    ids = adata.var.get("ensembl_id", adata.var_names)
    return [dense.astype(float).tolist(), [*ids], [*adata.obs_names], columns]


def _by_h5py(path: Path) -> Content:
    import h5py
    import scipy.sparse as sp

    with h5py.File(path) as file:
        if isinstance(file["X"], h5py.Dataset):
            dense = file["X"][:]
        else:
            parts = tuple(file[f"X/{key}"][:] for key in ("data", "indices", "indptr"))
            make = sp.csr_matrix if file["X"].attrs["encoding-type"] == "csr_matrix" else sp.csc_matrix
            dense = make(parts, shape=tuple(file["X"].attrs["shape"])).toarray()
        kinds = [*file["obs/kind/categories"].asstr()[:].tolist(), None]
        columns = {"kind": [kinds[code] for code in file["obs/kind/codes"][:]], "score": file["obs/score"][:].tolist()}
        texts = [file[key].asstr()[:].tolist() for key in ("var/ensembl_id", "obs/_index")]
        return [dense.astype(float).tolist(), *texts, columns]


def flip(source: Path, target: Path, seed: int) -> str:
    """Copy a folder with one byte of one of its files changed, each file as often as any; says which."""
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target)
    rng = np.random.default_rng(seed)
    files = sorted(path for path in target.rglob("*") if path.is_file() and path.stat().st_size)
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    place, mask = int(rng.integers(len(content))), int(rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255]))
    content[place] ^= mask
    path.write_bytes(content)
    return f"{path.relative_to(target)} byte {place} ^ {mask}"


def judged(kind: str, folder: Path, whole: Content) -> str:
    """``same``, ``refused``, ``as stored`` (other values, which the format's own library reads too), or a fault."""
    try:
        got = ours(kind, folder)
    except GeneformerFastError as error:
        return "refused" if str(error).strip() and "\n" not in str(error) else f"unclear message: {error}"
    except TimeoutError:
        return f"took more than {SECONDS} seconds"
    except BaseException as error:
        import traceback

        return f"{type(error).__name__}: {error} at {traceback.format_exc().splitlines()[-3].strip()}"
    if _equal(got, whole):
        return "same"
    try:
        expected = others(kind, folder)
    except Exception as error:
        return f"changed, and the other reader refuses: {type(error).__name__}: {error}"
    return "as stored" if expected is not None and _equal(got, expected) else "changed without a word"


def _equal(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)


def _stop(*_: object) -> None:
    raise TimeoutError


def main(kind: str, folder: Path, first: int, last: int) -> None:
    """Print what became of each flip."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    whole = ours(kind, folder)
    report: Callable[..., None] = lambda **values: print(json.dumps(values), flush=True)  # noqa: E731
    signal.signal(signal.SIGALRM, _stop)
    damaged = folder.parent / f"{folder.name} {first}"
    for seed in range(first, last):
        what = flip(folder, damaged, seed)
        report(seed=seed, what=what)
        signal.alarm(SECONDS)
        outcome = judged(kind, damaged, whole)
        signal.alarm(0)
        report(seed=seed, what=what, outcome=outcome)
    shutil.rmtree(damaged)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
