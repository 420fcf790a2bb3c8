"""Files of old anndata, loom, 10x Genomics and Matrix Market give the counts they hold."""

from __future__ import annotations

import gzip
import shutil

import anndata
import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
from small_sources import DENSE, N_CELLS, N_GENES, check, read_back

from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError


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
