"""Damaged and senseless inputs give one clear error of ours, never a traceback from inside another library."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from damaged_inputs import FUZZ, N_CELLS, N_GENES, replace, small_adata, use
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast.counts import open_source
from geneformer_fast.errors import GeneformerFastError, InputError
from geneformer_fast.tokenization.genes import map_genes
from geneformer_fast.tokenization.vocabulary import Vocabulary


@pytest.fixture(scope="module", params=["csr", "csr_gzip", "csc", "dense"])
def h5ad_file(request, tmp_path_factory) -> Path:
    adata = small_adata()
    if request.param == "csc":
        adata.X = sp.csc_matrix(adata.X)
    elif request.param == "dense":
        adata.X = adata.X.toarray()
    path = tmp_path_factory.mktemp("h5ad") / f"{request.param}.h5ad"
    adata.write_h5ad(path, compression="gzip" if request.param.endswith("gzip") else None)
    use(path)
    return path


@pytest.mark.parametrize(
    "fraction",
    [
        0.0,
        0.01,
        0.3,
        0.7,
        0.9999,
        *(pytest.param(each, marks=pytest.mark.slow) for each in (1e-4, 0.1, 0.5, 0.9, 0.99)),
    ],
)
def test_truncated_h5ad(h5ad_file, tmp_path, fraction):
    whole = h5ad_file.read_bytes()
    path = tmp_path / "cut.h5ad"
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(InputError, match=r"cut\.h5ad"):
        use(path)


def test_file_truncated_after_it_was_opened(h5ad_file, tmp_path):
    path = tmp_path / "cut.h5ad"
    shutil.copy(h5ad_file, path)
    with h5py.File(path) as file:
        node = file["X"] if isinstance(file["X"], h5py.Dataset) else file["X/data"]
        place = node.id.get_chunk_info(0).byte_offset if node.chunks else node.id.get_offset()
    with open_source(path) as source:
        with path.open("r+b") as file:
            file.truncate(place + 8)
        if source.is_dense:
            pytest.skip("HDF5 has the dense matrix in its own cache already")
        with pytest.raises(InputError, match=r"cut\.h5ad: cannot read X.*truncated"):
            list(source.blocks())


def stored_extents(path: Path) -> list[tuple[int, int]]:
    """(offset, size) of the matrix in the file: damage elsewhere meets libhdf5's own structures, which may crash it."""
    extents = []
    with h5py.File(path) as file:
        nodes = (
            [file["X"]]
            if isinstance(file["X"], h5py.Dataset)
            else [file[f"X/{k}"] for k in ("data", "indices", "indptr")]
        )
        for node in nodes:
            if node.chunks:
                infos = [node.id.get_chunk_info(i) for i in range(node.id.get_num_chunks())]
                extents += [(info.byte_offset, info.size) for info in infos]
            else:
                extents.append((node.id.get_offset(), node.id.get_storage_size()))
    return extents


@settings(FUZZ, max_examples=20)  # test_flips.py has a campaign of them
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5), st.data())
def test_flipped_bytes_in_the_matrix(h5ad_file, tmp_path, flips, data):
    damaged = bytearray(h5ad_file.read_bytes())
    extents = stored_extents(h5ad_file)
    for place, value in flips:
        offset, size = data.draw(st.sampled_from(extents))
        damaged[offset + int(place * size)] = value
    path = tmp_path / "flipped.h5ad"
    path.write_bytes(damaged)
    with suppress(GeneformerFastError):
        use(path)


def edited(tmp_path: Path, edit) -> Path:
    path = tmp_path / "edited.h5ad"
    small_adata().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def _indices_out_of_range(file):
    file["X/indices"][3] = N_GENES


def _negative_index(file):
    file["X/indices"][3] = -1


def _gene_twice(file):
    file["X/indices"][1] = file["X/indices"][0]


def _indptr_falls(file):
    file["X/indptr"][5] = file["X/indptr"][4] - 1


def _indptr_short(file):
    replace(file, "X/indptr", file["X/indptr"][:-1])


def _indptr_beyond(file):
    file["X/indptr"][-1] = 10**6


def _data_short(file):
    replace(file, "X/data", file["X/data"][:-1])


def _both_short(file):
    replace(file, "X/data", file["X/data"][:-1])
    replace(file, "X/indices", file["X/indices"][:-1])


def _wrong_shape(file):
    file["X"].attrs["shape"] = np.array([N_CELLS + 1, N_GENES])


def _more_genes_than_var(file):
    file["X"].attrs["shape"] = np.array([N_CELLS, N_GENES + 1])


def _absurd_genes(file):
    file["X"].attrs["shape"] = np.array([N_CELLS, 2**40])


def _negative_shape(file):
    file["X"].attrs["shape"] = np.array([-1, N_GENES])


def _no_shape(file):
    del file["X"].attrs["shape"]


def _text_values(file):
    replace(file, "X/data", np.array([b"1"] * len(file["X/data"])))


def _complex_values(file):
    replace(file, "X/data", file["X/data"][:].astype(np.complex64))


def _float_indices(file):
    replace(file, "X/indices", file["X/indices"][:].astype(np.float32))


def _float_indptr(file):
    replace(file, "X/indptr", file["X/indptr"][:].astype(np.float64))


def _no_indptr(file):
    del file["X/indptr"]


def _unknown_encoding(file):
    file["X"].attrs["encoding-type"] = "coo_matrix"


def _no_var(file):
    del file["var"]


def _no_obs(file):
    del file["obs"]


def _obs_is_a_number(file):
    del file["obs"]
    file["obs"] = 3


def _obs_names_short(file):
    replace(file, "obs/_index", file["obs/_index"][:-1])


def _gene_ids_short(file):
    replace(file, "var/ensembl_id", file["var/ensembl_id"][:-1])


def _column_short(file):
    replace(file, "obs/kind/codes", file["obs/kind/codes"][:-1])


def _category_out_of_range(file):
    file["obs/kind/codes"][2] = 17


def _names_not_utf8(file):
    replace(file, "obs/_index", np.array([b"\xff\xfe%d" % i for i in range(N_CELLS)]))


def _x_three_dimensional(file):
    del file["X"]
    file["X"] = np.zeros((2, 3, 4))


def _x_is_text(file):
    del file["X"]
    file["X"] = "counts"


def _duplicate_barcodes(file):
    names = file["obs/_index"][:]
    names[7] = names[3]
    file["obs/_index"][:] = names


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_indices_out_of_range, r"column indices outside 0\.\.29"),
        (_negative_index, r"column indices outside 0\.\.29"),
        (_gene_twice, "lists a gene twice"),
        (_indptr_falls, "indptr does not rise"),
        (_indptr_short, "indptr has shape"),
        (_indptr_beyond, "indptr does not rise"),
        (_data_short, "values but .* column indices"),
        (_both_short, "indptr does not rise"),
        (_wrong_shape, "expected 42 integers"),
        (_more_genes_than_var, r"var: column 'ensembl_id' has 30 values for 31 rows"),
        (_absurd_genes, "has 30 values for|more than a file"),
        (_negative_shape, "has shape -1 x 30"),
        (_no_shape, "no shape"),
        (_text_values, "are not counts"),
        (_complex_values, "are not counts"),
        (_float_indices, "expected integers"),
        (_float_indptr, "indptr"),
        (_no_indptr, "indptr"),
        (_unknown_encoding, "unknown matrix encoding 'coo_matrix'"),
        (_no_var, "has no var"),
        (_no_obs, "has no obs"),
        (_obs_is_a_number, "obs"),
        (_obs_names_short, "39 row names for 40 rows"),
        (_gene_ids_short, "29 values for 30 rows"),
        (_column_short, "column 'kind' has 39 values"),
        (_category_out_of_range, "category code 17, but there are only 2 categories"),
        (_names_not_utf8, "row names"),
        (_x_three_dimensional, "expected cells x genes"),
        (_x_is_text, "cannot read X"),
        (_duplicate_barcodes, r"1 cell names \(barcodes\) appear more than once, e\.g\. 'c3'.*obs_names_make_unique"),
    ],
)
def test_inconsistent_h5ad(tmp_path, edit, message):
    path = edited(tmp_path, edit)
    with pytest.raises(InputError, match=message) as caught:
        use(path)
    assert "edited.h5ad" in str(caught.value)


def test_duplicate_barcodes_may_be_allowed(tmp_path):
    use(edited(tmp_path, _duplicate_barcodes), allow_duplicate_cells=True)


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize(
    ("cells", "genes", "message"), [(0, 5, "has no cells"), (5, 0, "has no genes"), (0, 0, "has no cells")]
)
@pytest.mark.parametrize("make", [sp.csr_matrix, sp.csc_matrix, np.zeros], ids=["csr", "csc", "dense"])
def test_nothing_in_it(tmp_path, make, cells, genes, message, compression):
    adata = anndata.AnnData(make((cells, genes), dtype=np.float32))
    path = tmp_path / "empty.h5ad"
    adata.write_h5ad(path, compression=compression)
    for data in (path, adata):
        with pytest.raises(InputError, match=message):
            use(data)


def test_all_zero_counts_are_counts():
    use(anndata.AnnData(sp.csr_matrix((5, 4), dtype=np.float32)))
    use(anndata.AnnData(np.zeros((5, 4), dtype=np.int8)))


@pytest.mark.parametrize(
    "ids",
    [
        [f"基因{i}" for i in range(N_GENES)],
        [str(i) for i in range(N_GENES)],
        ["\u202e\x07\n😀" + str(i) for i in range(N_GENES)],
    ],
    ids=["unicode", "integers", "control characters"],
)
def test_ids_that_are_no_genes(tmp_path, ids):
    adata = small_adata()
    adata.var["ensembl_id"] = ids
    path = tmp_path / "ids.h5ad"
    adata.write_h5ad(path)
    vocabulary = Vocabulary.from_medians({"ENSG00000000001": 1.0})
    for data in (path, adata):
        with open_source(data) as source:
            assert source.gene_ids().tolist() == ids
            with pytest.raises(InputError, match="0 of 30 gene ids match vocabulary 'custom'"):
                map_genes(source.gene_ids(), vocabulary, source_name="ids.h5ad")


def test_integer_id_columns(tmp_path):
    adata = small_adata()
    adata.var["ensembl_id"] = np.arange(N_GENES)
    path = tmp_path / "ids.h5ad"
    adata.write_h5ad(path)
    for data in (path, adata):
        with open_source(data) as source:
            assert source.gene_ids().tolist() == [str(i) for i in range(N_GENES)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.h5ad", b"", r"is empty \(0 bytes\)"),
        ("text.h5ad", b"gene,cell\n1,2\n", "not a supported format.*is none: damaged"),
        ("table.csv", b"gene,cell\n1,2\n", "not a supported format"),
        ("cells.rds", b"\x1f\x8b\x08\x00", "not a supported format"),
        ("pointer.h5ad", b"version https://git-lfs.github.com/spec/v1\n", "not a supported format"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_source(path)
    assert name in str(caught.value)


def test_paths_and_objects_that_are_no_input(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_source(tmp_path / "absent.h5ad")
    with pytest.raises(InputError, match=r"neither a \.zarr store nor a 10x"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="cannot read counts from a ndarray"):
        open_source(np.zeros((2, 2)))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["something"] = 1
    with pytest.raises(InputError, match=r"neither AnnData .* nor loom; it holds something"):
        open_source(tmp_path / "other.h5")


@pytest.mark.parametrize("values", [np.array([["a", "b"]], dtype=object), np.ones((2, 2), dtype=complex)])
def test_anndata_with_values_that_are_no_numbers(values):
    with pytest.raises(InputError, match="are not counts"):
        use(anndata.AnnData(values))
