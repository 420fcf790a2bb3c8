"""Damaged folders and files of other formats than .h5ad, and dictionaries, give one clear error of ours."""

from __future__ import annotations

import gzip
import shutil
from contextlib import suppress
from pathlib import Path

import anndata
import h5py
import pytest
from damaged_inputs import FUZZ, replace, small_adata, use
from hypothesis import given
from hypothesis import strategies as st

from geneformer_fast.errors import GeneformerFastError, InputError


def test_loom_without_its_attributes(shared_dir, tmp_path):
    path = tmp_path / "cells.loom"
    shutil.copy(shared_dir / "data" / "loom_small" / "facs_test100.loom", path)
    path.chmod(0o644)
    with h5py.File(path, "r+") as file:
        replace(file, "row_attrs/ensembl_id", file["row_attrs/ensembl_id"][:-1])
    with pytest.raises(InputError, match=r"column 'ensembl_id' has 16790 values for 16791 rows"):
        use(path)
    whole = path.read_bytes()
    for fraction in (0.01, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * fraction)])
        with pytest.raises(InputError, match=r"cells\.loom"):
            use(path)


def tenx_folder(tmp_path: Path, matrix: str, n_genes: int = 3, n_cells: int = 2) -> Path:
    (tmp_path / "matrix.mtx").write_text(matrix)
    (tmp_path / "genes.tsv").write_text("".join(f"ENSG{i:011d}\tG{i}\n" for i in range(n_genes)))
    (tmp_path / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(n_cells)))
    return tmp_path


HEADER = "%%MatrixMarket matrix coordinate integer general\n%\n"


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ("", "MatrixMarket"),
        ("1 2 3\n", "MatrixMarket"),
        (HEADER, "no line with its size"),
        (HEADER.replace("coordinate", "array") + "3 2\n", "MatrixMarket"),
        (HEADER.replace("integer", "complex") + "3 2 1\n1 1 1 0\n", "expected integer or real"),
        (HEADER.replace("general", "symmetric") + "3 2 1\n1 1 1\n", "expected integer or real"),
        (HEADER + "3 x 1\n1 1 1\n", "invalid literal"),
        (HEADER + "4 2 1\n1 1 1\n", "is 4 x 2, but lists 3 features and 2 barcodes"),
        (HEADER + "2 3 1\n1 1 1\n", "cells x features"),
        (HEADER + "3 2 3\n1 1 1\n2 1 1\n", "announces 3 entries but holds 2"),
        (HEADER + "3 2 1\n4 1 1\n", r"column index outside 0\.\.2"),
        (HEADER + "3 2 1\n0 1 1\n", r"column index outside 0\.\.2"),
        (HEADER + "3 2 1\n1 3 1\n", r"row index outside 0\.\.1"),
        (HEADER + "3 2 2\n1 1 1\n1 1\n", "matrix"),
        (HEADER + "3 2 2\n1 1 1\n1 2 many\n", "X"),
        (HEADER + "3 2 2\n1 1 1\n1 2 -4\n", "negative|does not hold counts"),
        (HEADER.replace("integer", "real") + "3 2 2\n1 1 1\n1 2 nan\n", "NaN"),
        (HEADER.replace("integer", "real") + "3 2 2\n1 1 1\n1 2 2.5\n", "not whole numbers"),
        (HEADER + "3 2 2\n1 1 1\n1 1 1\n", "lists a gene twice"),
    ],
)
def test_malformed_matrix_market(tmp_path, matrix, message):
    folder = tenx_folder(tmp_path, matrix)
    with pytest.raises(InputError, match=message) as caught:
        use(folder)
    assert str(folder) in str(caught.value)


def test_matrix_folder_without_companions_or_cut_short(shared_dir, tmp_path):
    original = shared_dir / "data" / "tenx_small" / "3.0.0" / "filtered_feature_bc_matrix"
    for missing in ("features.tsv.gz", "barcodes.tsv.gz"):
        folder = tmp_path / f"without_{missing}"
        shutil.copytree(original, folder, ignore=shutil.ignore_patterns(missing))
        with pytest.raises(InputError, match="is missing beside the matrix"):
            use(folder)
    folder = tmp_path / "cut"
    shutil.copytree(original, folder)
    for name in ("matrix.mtx.gz", "features.tsv.gz"):
        whole = (original / name).read_bytes()
        (folder / name).chmod(0o644)
        for fraction in (0.0, 0.001, 0.5, 0.999):
            (folder / name).write_bytes(whole[: int(len(whole) * fraction)])
            with pytest.raises(InputError, match="cut"):
                use(folder)
        (folder / name).write_bytes(whole)
    use(folder)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_flipped_bytes_in_a_matrix_folder(tmp_path, flips, compressed):
    text = HEADER + "3 2 4\n1 1 5\n2 1 7\n3 2 1\n1 2 2\n"
    folder = tenx_folder(tmp_path, text)
    damaged = bytearray(gzip.compress(text.encode(), mtime=0) if compressed else text.encode())
    for place, value in flips:
        damaged[place % len(damaged)] = value
    (folder / "matrix.mtx").unlink()
    path = folder / ("matrix.mtx.gz" if compressed else "matrix.mtx")
    path.write_bytes(damaged)
    with suppress(GeneformerFastError):
        use(folder)
    path.unlink()


def test_malformed_10x_h5(shared_dir, tmp_path):
    original = shared_dir / "data" / "tenx_small" / "3.0.0" / "filtered_feature_bc_matrix.h5"

    def without(key):
        path = tmp_path / "tenx.h5"
        path.unlink(missing_ok=True)
        shutil.copy(original, path)
        path.chmod(0o644)
        with h5py.File(path, "r+") as file:
            del file[key]
        return path

    for key in ("barcodes", "data", "indices", "indptr", "shape"):
        with pytest.raises(InputError, match=f"the 10x matrix lacks {key}"):
            use(without(f"matrix/{key}"))
    with pytest.raises(InputError, match="lists no feature ids"):
        use(without("matrix/features/id"))
    path = without("matrix/features/name")
    use(path)
    with h5py.File(path, "r+") as file:
        replace(file, "matrix/features/id", file["matrix/features/id"][:-1])
    with pytest.raises(InputError, match="506 gene_ids for a matrix with 507 features"):
        use(path)
    whole = original.read_bytes()
    for fraction in (0.01, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * fraction)])
        with pytest.raises(InputError, match=r"tenx\.h5"):
            use(path)


def test_malformed_zarr(tmp_path):
    pytest.importorskip("zarr", minversion="3.1.3")
    path = tmp_path / "cells.zarr"
    with anndata.settings.override(zarr_write_format=2):
        small_adata().write_zarr(path)
    use(path)
    chunk = next(file for file in (path / "X" / "data").iterdir() if not file.name.startswith("."))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cells\.zarr: cannot read X"):
        use(path)
    chunk.unlink()
    with pytest.raises(InputError, match=r"cells\.zarr: .*lacks 1 of 1 chunks"):
        use(path)
    chunk.write_bytes(whole)
    shutil.rmtree(path / "X" / "indptr")
    with pytest.raises(InputError, match=r"cells\.zarr"):
        use(path)
    (path / ".zmetadata").write_text("{not json")
    with pytest.raises(InputError, match=r"cells\.zarr: cannot read store"):
        use(path)
