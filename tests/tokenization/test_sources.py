"""Every format gives the same counts, in checked row blocks of bounded size."""

from __future__ import annotations

import gzip
import shutil
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from geneformer_fast.counts import block as block_module
from geneformer_fast.counts import expand_inputs, open_source, spool
from geneformer_fast.errors import InputError, UnsupportedError

N_CELLS, N_GENES = 53, 37


def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    dense = rng.poisson(1.2, (N_CELLS, N_GENES)).astype(np.float32)
    dense[7] = 0  # an empty cell
    dense[11] = rng.integers(1, 5000, N_GENES)  # a cell with every gene
    dense[:, 5] = 0  # a gene nobody expresses
    return dense


DENSE = counts()


def make(values) -> anndata.AnnData:
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(["T", "B", "NK"] * 17 + ["T", None]),
            "batch": pd.Categorical([1, 2] * 26 + [1]),
            "n_counts": DENSE.sum(axis=1).astype(np.float64),
            "donor": [f"d{i % 4}" for i in range(N_CELLS)],
            "age": pd.array([None if i % 5 == 0 else i for i in range(N_CELLS)], dtype="Int64"),
            "is_doublet": [i % 7 == 0 for i in range(N_CELLS)],
        },
        index=[f"cell-{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{i:011d}" for i in range(N_GENES)]}, index=[f"G{i}" for i in range(N_GENES)]
    )
    return anndata.AnnData(values, obs=obs, var=var)


LAYOUTS = {
    "csr": lambda: sp.csr_matrix(DENSE),
    "csr_int64": lambda: sp.csr_matrix(DENSE.astype(np.int64)),
    "csr_uint16": lambda: sp.csr_matrix(DENSE.astype(np.uint16)),
    "csr_float64": lambda: sp.csr_matrix(DENSE.astype(np.float64)),
    "csr_array": lambda: sp.csr_array(DENSE),
    "csc": lambda: sp.csc_matrix(DENSE),
    "dense": lambda: DENSE.copy(),
    "dense_int32": lambda: DENSE.astype(np.int32),
}


def read_back(source, **options) -> np.ndarray:
    rows, start = [], options.get("start", 0)
    for block in source.blocks(**options):
        assert block.start == start
        assert block.indptr.dtype == np.int64
        assert block.indices.dtype == np.int32
        assert block.data.dtype == source.value_dtype
        assert block.n_cells <= options.get("rows", 4096)
        start += block.n_cells
        matrix = sp.csr_matrix((block.data, block.indices, block.indptr), shape=(block.n_cells, source.n_genes))
        rows.append(matrix.toarray())
        block.release()
    return np.concatenate(rows)


def check(source, dense=DENSE) -> None:
    assert (source.n_cells, source.n_genes) == dense.shape
    for rows in (4096, 10, 1):
        np.testing.assert_array_equal(read_back(source, rows=rows), dense)
    np.testing.assert_array_equal(read_back(source, start=9, stop=31, rows=4), dense[9:31])
    assert list(source.blocks(start=5, stop=5)) == []


def check_tables(source) -> None:
    adata = make(DENSE)
    assert source.gene_ids_from == "ensembl_id"
    assert source.gene_ids().tolist() == adata.var["ensembl_id"].tolist()
    assert source.cell_names().tolist() == adata.obs_names.tolist()
    assert source.obs_columns == list(adata.obs.columns)
    assert source.obs("kind").to_pylist() == ["T", "B", "NK"] * 17 + ["T", None]
    assert source.obs("batch").tolist() == [1, 2] * 26 + [1]
    assert source.obs("n_counts").dtype == np.float64
    np.testing.assert_array_equal(source.obs("n_counts"), DENSE.sum(axis=1))
    assert source.obs("donor").to_pylist() == adata.obs["donor"].tolist()
    assert source.obs("age").to_pylist() == [None if i % 5 == 0 else i for i in range(N_CELLS)]
    assert source.obs("is_doublet").tolist() == adata.obs["is_doublet"].tolist()
    with pytest.raises(InputError, match="no column 'absent'; there are kind, batch"):
        source.obs("absent")


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_h5ad(tmp_path, layout, compression):
    path = tmp_path / "cells.h5ad"
    make(LAYOUTS[layout]()).write_h5ad(path, compression=compression)
    with open_source(path) as source:
        assert (source.kind, source.counts_from, source.name) == ("h5ad", "X", str(path))
        assert source.is_dense == layout.startswith("dense")
        assert source.value_dtype == LAYOUTS[layout]().dtype
        check(source)
        check_tables(source)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_anndata_in_memory(layout):
    adata = make(LAYOUTS[layout]())
    with open_source(adata) as source:
        assert (source.kind, source.name) == ("anndata", "<AnnData>")
        check(source)
        check_tables(source)
    with open_source(adata[5:40, ::3]) as source:
        check(source, DENSE[5:40, ::3])
    stored = adata.X.toarray() if sp.issparse(adata.X) else adata.X
    np.testing.assert_array_equal(stored, DENSE)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_backed_anndata(tmp_path, layout):
    path = tmp_path / "cells.h5ad"
    make(LAYOUTS[layout]()).write_h5ad(path)
    adata = anndata.read_h5ad(path, backed="r")
    with open_source(adata) as source:
        check(source)
    with open_source(adata[5:40, ::3]) as source:
        check(source, DENSE[5:40, ::3])
    adata.file.close()


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_zarr(tmp_path, monkeypatch, layout, zarr_format):
    pytest.importorskip("zarr", minversion="3.1.3")
    path = tmp_path / "cells.zarr"
    with anndata.settings.override(zarr_write_format=zarr_format):
        make(LAYOUTS[layout]()).write_zarr(path)
    with open_source(path) as source:
        assert source.kind == "zarr"
        check(source)
        check_tables(source)
        assert source.fingerprint()["bytes"] > 0
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'geneformer-fast\[zarr\]'"):
        open_source(path)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 100, 5000])
def test_gzip_chunks_of_any_size(tmp_path, chunk, shuffle):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for key in ("data", "indices"):
            values = file[f"X/{key}"][:]
            del file[f"X/{key}"]
            file["X"].create_dataset(
                key, data=values, maxshape=(None,), chunks=(chunk,), compression="gzip", shuffle=shuffle
            )
    with open_source(path) as source:
        check(source)


def test_other_storage_goes_through_the_library(tmp_path):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        data, indices = file["X/data"][:], file["X/indices"][:]
        del file["X/data"], file["X/indices"]
        file["X"].create_dataset("data", data=data.astype(">f4"))
        file["X"].create_dataset("indices", data=indices.astype(">i8"), chunks=(50,), fletcher32=True)
    with open_source(path) as source:
        check(source)


def test_blocks_are_bounded_by_entries_too(tmp_path, monkeypatch):
    monkeypatch.setattr(block_module, "MAX_ENTRIES", 100)
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        sizes = [len(block.data) for block in source.blocks()]
        assert max(sizes) <= 100
        assert len(sizes) > 8
        check(source)


def test_csc_beyond_one_bucket_goes_through_a_scratch_file(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "MAX_ENTRIES", 150)
    monkeypatch.setattr(spool, "_PIECE", 64)
    made = []
    temporary_file = spool.tempfile.TemporaryFile
    monkeypatch.setattr(spool.tempfile, "TemporaryFile", lambda **kw: made.append(temporary_file(**kw)) or made[-1])
    path = tmp_path / "cells.h5ad"
    make(sp.csc_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        assert source._matrix._rows_per_bucket < N_CELLS / 5
        check(source)
        assert made
        assert all(file.closed for file in made)


def test_released_buffers_are_reused_and_kept_blocks_are_not_touched(tmp_path):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        kept = list(source.blocks(rows=5))
        rebuilt = [sp.csr_matrix((b.data, b.indices, b.indptr), shape=(b.n_cells, N_GENES)).toarray() for b in kept]
        np.testing.assert_array_equal(np.concatenate(rebuilt), DENSE)
        pool = block_module.BufferPool(keep=2)
        buffers = [pool.take(10), pool.take(20), pool.take(30)]
        pool.give(tuple(buffers))
        assert pool.take(25) is buffers[2]
        assert len(pool.take(25)) == 25


def test_which_matrix_holds_the_counts(tmp_path):
    adata = make(sp.csr_matrix(DENSE))
    adata.raw = adata
    adata = adata[:, :20].copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    for data in (path, adata):
        with open_source(data) as source:
            assert (source.counts_from, source.n_genes) == ("raw/X", N_GENES)
            check(source)
        with open_source(data, layer="counts") as source:
            assert (source.counts_from, source.n_genes) == ("layers/counts", 20)
            check(source, DENSE[:, :20])
        with pytest.raises(InputError, match="no layer 'spliced'; there are X, raw/X, layers/counts"):
            open_source(data, layer="spliced")
    del adata.raw
    with pytest.raises(InputError, match=r"X does not hold counts.*log-transformed.*layers/counts holds counts"):
        open_source(adata)
    # raw.X that is no better than X leaves X the choice
    logged = make(sp.csr_matrix(np.log1p(DENSE)))
    logged.raw = logged
    logged.X = sp.csr_matrix(DENSE)
    with open_source(logged) as source:
        assert source.counts_from == "X"


def test_x_is_no_layer_without_a_name(monkeypatch):
    """AnnData 0.13 lists X among the layers, under None."""
    adata = make(sp.csr_matrix(DENSE))
    adata.layers["counts"] = adata.X
    layers = {None: adata.X, "counts": adata.X}
    if None not in adata.layers:
        monkeypatch.setattr(anndata.AnnData, "layers", property(lambda self: layers))
    with pytest.raises(InputError, match=r"no layer 'spliced'; there are X, layers/counts$"):
        open_source(adata, layer="spliced")


def scaled(values):
    return (values - values.mean(axis=0)) / (values.std(axis=0) + 1)


def normalised(values, target):
    return values / np.maximum(values.sum(axis=1, keepdims=True), 1) * target


@pytest.mark.parametrize(
    ("change", "allow_float", "message"),
    [
        (scaled, False, "negative values such as -.*scaled"),
        (scaled, True, "negative values such as -.*scaled"),
        (np.log1p, True, "log-transformed"),
        (lambda v: np.log1p(normalised(v, 1e4)), False, "log-transformed"),
        (lambda v: np.log1p(normalised(v, 1e4)), True, "log-transformed"),
        (lambda v: np.log2(normalised(v, 1e6) + 1), True, "log-transformed"),
        (lambda v: normalised(v, 1e6), False, "not whole numbers.*--allow-float"),
        (lambda v: np.where(v == 3, np.nan, v), True, "NaN"),
        (lambda v: np.where(v == 3, np.inf, v), True, "infinite"),
        (lambda v: -v.astype(np.int32), False, "negative values"),
    ],
)
def test_what_are_not_counts_is_refused_with_values(tmp_path, change, allow_float, message):
    path = tmp_path / "cells.h5ad"
    make(change(DENSE)).write_h5ad(path)
    with pytest.raises(InputError, match=message) as caught:
        open_source(path, allow_float=allow_float)
    assert "cells.h5ad: X does not hold counts" in str(caught.value)


def test_tpm_like_floats_pass_when_allowed():
    values = normalised(DENSE, 1e6)
    with open_source(make(values), allow_float=True) as source:
        check(source, values)


@pytest.mark.parametrize("bad", [np.nan, -2.0, np.inf, 2.5])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_a_single_bad_value_anywhere_is_found(tmp_path, layout, bad):
    # opening looks at a sample of cells only; cell 100 of 318 is not among them
    values = np.tile(DENSE, (6, 1))
    values[100, 8] = bad
    make_matrix = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout]
    adata = anndata.AnnData(make_matrix(values))
    adata.var["ensembl_id"] = [f"ENSG{i:011d}" for i in range(N_GENES)]
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    with pytest.raises(InputError, match=r"cells\.h5ad: X does not hold counts") as caught, open_source(path) as source:
        list(source.blocks(rows=50))
    if layout != "csc":
        assert f"cell 100 ('100'), gene 'ENSG00000000008' has {bad:.6g}" in str(caught.value)


def test_bad_values_far_from_the_sample_name_cell_and_gene():
    values = np.ones((400, N_GENES), dtype=np.float32)
    values[130, 8] = 2.5
    adata = anndata.AnnData(sp.csr_matrix(values))
    with open_source(adata) as source:
        blocks = source.blocks(rows=100)
        assert next(blocks).n_cells == 100
        with pytest.raises(InputError, match=r"cell 130 \('130'\), gene '8' has 2\.5; 1 such values.*--allow-float"):
            next(blocks)
    with open_source(adata, allow_float=True) as source:
        np.testing.assert_array_equal(read_back(source), values)


def test_gene_columns(tmp_path):
    adata = make(sp.csr_matrix(DENSE))
    adata.var = adata.var.rename(columns={"ensembl_id": "gene_ids"})
    adata.var["other"] = pd.Categorical([f"X{i % 5}" for i in range(N_GENES)])
    path = tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    expected = {None: "ENSG00000000006", "other": "X1", "var_names": "G6"}
    for column, sixth in expected.items():
        with open_source(path, gene_column=column) as source:
            assert source.gene_ids()[6] == sixth
            assert source.gene_ids_from == (column or "gene_ids")
    with pytest.raises(InputError, match=r"var has no column 'nope'; there are gene_ids, other \(and var_names\)"):
        open_source(path, gene_column="nope")


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
@pytest.mark.parametrize("version", ["0.7.0", "0.7.8"])
def test_files_of_old_anndata(shared_dir, version):
    path = shared_dir / "data" / "old_h5ad" / f"anndata_v{version}.h5ad"
    adata = anndata.read_h5ad(path)
    with open_source(path) as source:
        assert source.counts_from == "raw/X"
        check(source, adata.raw.X.toarray())
        assert source.obs("obs_cat").to_pylist() == adata.obs["obs_cat"].tolist()
        assert source.obs("uint8").tolist() == adata.obs["uint8"].tolist()
        assert source.gene_ids().tolist() == adata.raw.var_names.tolist()


def test_compound_tables_of_anndata_05(shared_dir, tmp_path):
    original = shared_dir / "data" / "old_h5ad" / "anndata_v0.5.0.h5ad"
    with pytest.raises(InputError, match=r"negative values such as -0\.326.*scaled"):
        open_source(original)
    path = tmp_path / "old.h5ad"
    shutil.copy(original, path)
    path.chmod(0o644)
    with h5py.File(path, "r+") as file:
        whole = np.rint(np.abs(file["X"][:]))
        file["X"][:] = whole
        labels = [label.decode() for label in file["uns/bulk_labels_categories"][:]]
        codes = file["obs"]["bulk_labels"]
    with open_source(path) as source:
        check(source, whole)
        assert source.obs("bulk_labels").to_pylist() == [labels[code] for code in codes]
        assert source.obs("n_counts").dtype == np.float32
        assert source.gene_ids()[0] == "HES4"
        assert source.cell_names()[0] == "AAAGCCTGGCTAAC-1"


def test_a_file_without_x(shared_dir):
    with pytest.raises(InputError, match="has no matrix X"):
        open_source(shared_dir / "data" / "old_h5ad" / "anndata_v0.11.4.h5ad")


def test_loom(shared_dir):
    expected = anndata.read_h5ad(shared_dir / "data" / "pbmc_facs" / "pbmc_facs_test100.h5ad")
    with open_source(shared_dir / "data" / "loom_small" / "facs_test100.loom") as source:
        assert (source.kind, source.is_dense, source.gene_ids_from) == ("loom", True, "ensembl_id")
        np.testing.assert_array_equal(read_back(source, rows=30), expected.X.toarray())
        assert source.gene_ids().tolist() == expected.var["ensembl_id"].tolist()
        assert source.cell_names().tolist() == expected.obs_names.tolist()
        assert source.obs("celltype").to_pylist() == expected.obs["celltype"].tolist()


def tenx_v3_counts(shared_dir) -> np.ndarray:
    with h5py.File(shared_dir / "data" / "tenx_small" / "3.0.0" / "filtered_feature_bc_matrix.h5") as file:
        group = file["matrix"]
        parts = (group["data"][:], group["indices"][:], group["indptr"][:])
        return sp.csc_matrix(parts, shape=group["shape"][:]).toarray().T


@pytest.mark.parametrize("name", ["filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix"])
def test_10x_version_3(shared_dir, name):
    with open_source(shared_dir / "data" / "tenx_small" / "3.0.0" / name) as source:
        assert source.kind == ("10x_h5" if name.endswith("h5") else "10x_mtx")
        np.testing.assert_array_equal(read_back(source, rows=100), tenx_v3_counts(shared_dir))
        assert source.gene_ids()[:2].tolist() == ["ENSG00000279493", "ENSG00000277117"]
        assert source.cell_names()[0] == "AAACCCAAGGAGAGTA-1"


def test_10x_version_2_and_several_genomes(shared_dir):
    folder = shared_dir / "data" / "tenx_small" / "1.2.0"
    with open_source(folder / "filtered_gene_bc_matrices_h5.h5") as source:
        assert (source.n_cells, source.n_genes) == (12, 343)
        one = read_back(source)
    several = folder / "multiple_genomes.h5"
    with pytest.raises(
        InputError, match=r"several genomes \(another_genome, hg19_chr21\); choose one with counts_layer= \(--counts"
    ):
        open_source(several)
    with open_source(several, layer="hg19_chr21") as source:
        np.testing.assert_array_equal(read_back(source), one)
    with pytest.raises(InputError, match="no genome 'mm10'"):
        open_source(several, layer="mm10")


def test_10x_antibodies_and_second_genome_are_left_out(shared_dir, tmp_path):
    path = tmp_path / "mixed.h5"
    shutil.copy(shared_dir / "data" / "tenx_small" / "3.0.0" / "filtered_feature_bc_matrix.h5", path)
    path.chmod(0o644)
    everything = tenx_v3_counts(shared_dir)
    with h5py.File(path, "r+") as file:
        types = file["matrix/features/feature_type"][:]
        types[::3] = b"Antibody"
        file["matrix/features/feature_type"][:] = types
    kept = types != b"Antibody"
    with open_source(path) as source:
        np.testing.assert_array_equal(read_back(source, rows=64), everything[:, kept])
        assert source.n_genes == len(source.gene_ids()) == kept.sum()
    with h5py.File(path, "r+") as file:
        genomes = file["matrix/features/genome"][:]
        genomes[1::3] = b"mm10"
        file["matrix/features/genome"][:] = genomes
        first = genomes[2].decode()
    with pytest.raises(InputError, match="several genomes"):
        open_source(path)
    with open_source(path, layer=first) as source:
        np.testing.assert_array_equal(read_back(source), everything[:, 2::3])


def test_10x_folder_uncompressed_unsorted_irregular_and_prefixed(shared_dir, tmp_path):
    original = shared_dir / "data" / "tenx_small" / "3.0.0" / "filtered_feature_bc_matrix"
    text = gzip.decompress((original / "matrix.mtx.gz").read_bytes()).decode().split("\n")
    header, entries = text[:3], [line for line in text[3:] if line]
    np.random.default_rng(0).shuffle(entries)
    lines = [*header, *("  " + line.replace(" ", "\t") + " " for line in entries)]
    (tmp_path / "GSM1_matrix.mtx").write_text("\n".join(lines))
    features = gzip.decompress((original / "features.tsv.gz").read_bytes()).decode().split("\n")
    genes = "\n".join("\t".join(line.split("\t")[:2]) for line in features)
    (tmp_path / "GSM1_genes.tsv").write_text(genes)
    shutil.copy(original / "barcodes.tsv.gz", tmp_path / "GSM1_barcodes.tsv.gz")
    with open_source(tmp_path / "GSM1_matrix.mtx") as source:
        np.testing.assert_array_equal(read_back(source, rows=100), tenx_v3_counts(shared_dir))


def test_10x_folder_with_integer_ids(shared_dir):
    with open_source(shared_dir / "data" / "tenx_small" / "int-ids") as source:
        assert source.gene_ids()[:2].tolist() == ["574405", "574404"]
        assert (source.n_cells, source.n_genes, read_back(source).sum()) == (5, 6, 8)


def test_matrix_market_written_by_scipy(tmp_path):
    scipy.io.mmwrite(tmp_path / "matrix.mtx", sp.coo_matrix(DENSE.T.astype(np.int64)))
    (tmp_path / "genes.tsv").write_text("\n".join(f"ENSG{i:011d}\tG{i}" for i in range(N_GENES)))
    (tmp_path / "barcodes.tsv").write_text("\n".join(f"c{i}" for i in range(N_CELLS)))
    with open_source(tmp_path) as source:
        check(source)


def test_inputs_are_sorted_and_unique(tmp_path):
    for name in ("b.h5ad", "a.loom", "c.h5", "notes.txt", ".hidden.h5ad"):
        (tmp_path / name).touch()
    (tmp_path / "d.zarr").mkdir()
    (tmp_path / "d.zarr" / ".zgroup").touch()
    (tmp_path / "e_mtx").mkdir()
    (tmp_path / "e_mtx" / "matrix.mtx.gz").touch()
    (tmp_path / "other").mkdir()
    names = ["a.loom", "b.h5ad", "c.h5", "d.zarr", "e_mtx"]
    assert [path.name for path in expand_inputs(tmp_path)] == names
    given = [str(tmp_path / "c*"), tmp_path / "b.h5ad", f"{tmp_path}/*.h5ad", str(tmp_path / "d.zarr")]
    assert [path.name for path in expand_inputs(given)] == ["b.h5ad", "c.h5", "d.zarr"]
    with pytest.raises(InputError, match=r"\*\.zip.*nothing matches"):
        expand_inputs(str(tmp_path / "*.zip"))
    with pytest.raises(InputError, match=r"holds no input\. Supported are AnnData"):
        expand_inputs(tmp_path / "other")
    with pytest.raises(InputError, match="no inputs"):
        expand_inputs([])


def test_fingerprint_notices_a_changed_input(tmp_path):
    path = tmp_path / "cells.h5ad"
    make(sp.csr_matrix(DENSE)).write_h5ad(path)
    with open_source(path) as source:
        first = source.fingerprint()
        assert source.fingerprint() == first
        assert (first["path"], first["bytes"]) == (str(path), path.stat().st_size)
    changed = DENSE.copy()
    changed[0, 0] += 1
    make(sp.csr_matrix(changed)).write_h5ad(path)
    with open_source(path) as source:
        assert source.fingerprint()["sha256"] != first["sha256"]
    with open_source(make(DENSE)) as one, open_source(make(changed)) as two:
        assert one.fingerprint()["sha256"] != two.fingerprint()["sha256"]
