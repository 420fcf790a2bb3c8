"""Token for token what the official tokenizer wrote, on every file it was run on."""

from __future__ import annotations

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from oracle import as_lists, oracle_tokens

from geneformer_fast.tokenization.run import tokenize, tokenize_anndata
from geneformer_fast.tokenization.vocabulary import Vocabulary

# reference, input, what it needs
FILES = {
    "pbmc_facs": ("pbmc_facs/pbmc_facs.h5ad", {"obs": ["celltype", "subpop"]}),
    "pbmc_facs_test100": ("pbmc_facs/pbmc_facs_test100.h5ad", {"obs": ["celltype", "subpop"]}),
    "facs_test100_loom": ("loom_small/facs_test100.loom", {"obs": ["celltype"]}),
    "pbmc3k": ("pbmc3k/pbmc3k.h5ad", {"obs": ["cell_type"]}),
    "pbmc3k_symbols_int32": ("pbmc3k/pbmc3k_symbols_int32.h5ad", {}),
    "mix_celseq2_5cl": ("mix_celseq2_5cl/mix_celseq2_5cl.h5ad", {"obs": ["cell_line"]}),
    "oligo184_float": ("oligo184_float/oligo184_float.h5ad", {"allow_float": True}),
}
CASES = [
    (name, preset) for name in FILES for preset in ("v1", "v2") if (name, preset) != ("pbmc3k_symbols_int32", "v1")
]


@pytest.fixture(scope="module")
def vocabularies(shared_dir):
    return {preset: Vocabulary.from_folder(shared_dir / "data/dicts", preset) for preset in ("v1", "v2")}


@pytest.mark.parametrize(("name", "preset"), CASES)
def test_every_reference_file(name, preset, shared_dir, vocabularies, tmp_path):
    path, options = FILES[name]
    reference = pq.read_table(shared_dir / f"data/reference_official/{name}__{preset.upper()}.parquet")
    tokens = tokenize(shared_dir / "data" / path, tmp_path / "out", dictionary=vocabularies[preset], **options)
    values, cu_seqlens = tokens.read(range(tokens.n_cells))
    want = reference["input_ids"].combine_chunks()
    assert tokens.schema.field("input_ids").type == want.type, "int16 for V1, int32 for V2"
    np.testing.assert_array_equal(np.diff(cu_seqlens), np.diff(want.offsets.to_numpy()))
    np.testing.assert_array_equal(values, want.values.to_numpy())
    np.testing.assert_array_equal(tokens.column("length").to_numpy(), reference["length"].to_numpy())
    for column in set(reference.column_names) & set(tokens.columns) - {"input_ids", "length"}:
        assert tokens.column(column).to_pylist() == reference[column].to_pylist()


def test_all_references_are_tried(shared_dir):
    there = {path.stem for path in (shared_dir / "data/reference_official").glob("*.parquet")}
    assert there == {f"{name}__{preset.upper()}" for name, preset in CASES}


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_float32_totals_and_dense_storage(preset, shared_dir, vocabularies):
    """Against the plain algorithm; float32 steps must change some cells, or the case would prove nothing."""
    cells = anndata.read_h5ad(shared_dir / "data/mix_celseq2_5cl/mix_celseq2_5cl.h5ad")[:60].copy()
    exact = oracle_tokens(cells, vocabularies[preset])
    for x_dtype, n_dtype, storages in (
        ("float32", "float32", ("csr", "dense")),
        ("int32", "float32", ("dense",)),
        ("int64", "int64", ("csr",)),
    ):
        adata = cells.copy()
        adata.obs["n_counts"] = adata.obs["n_counts"].astype(n_dtype)
        for storage in storages:
            adata.X = cells.X.astype(x_dtype) if storage == "csr" else cells.X.toarray().astype(x_dtype)
            want = oracle_tokens(adata, vocabularies[preset])
            got = tokenize_anndata(adata, vocabularies[preset])
            assert as_lists(got.values, got.cu_seqlens) == want, (x_dtype, n_dtype, storage)
            if x_dtype == n_dtype == "float32":
                assert want != exact, storage


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_order_of_columns_does_not_matter(preset, shared_dir, vocabularies):
    """Also where scores tie: every count is made 1 and medians of many genes are equal in V2."""
    adata = anndata.read_h5ad(shared_dir / "data/pbmc3k/pbmc3k.h5ad")[:40].copy()
    adata.X = (adata.X > 0).astype("float32")
    adata.obs["n_counts"] = np.asarray(adata.X.sum(1)).ravel()
    first = tokenize_anndata(adata, vocabularies[preset])
    shuffled = adata[:, np.random.default_rng(0).permutation(adata.n_vars)].copy()
    second = tokenize_anndata(shuffled, vocabularies[preset])
    np.testing.assert_array_equal(first.values, second.values)
    assert as_lists(first.values, first.cu_seqlens) == oracle_tokens(adata, vocabularies[preset])


def test_flaws_of_the_official_tool_are_fixed(shared_dir, vocabularies):
    """Duplicate, lower-case and versioned ids are one gene; stored zeros are no tokens; dense X may collapse."""
    vocabulary = vocabularies["v2"]
    rng = np.random.default_rng(5)
    genes = rng.choice(list(vocabulary.token_ids), 600, replace=False).tolist()
    counts = rng.poisson(1.0, (20, 600)).astype("float32")
    plain = anndata.AnnData(sp.csr_matrix(counts))
    plain.var["ensembl_id"] = genes
    plain.obs["n_counts"] = counts.sum(1).astype("float64")
    want = tokenize_anndata(plain, vocabulary)

    # The first 100 genes once more in three spellings, each with a part of the counts.
    part = np.floor(counts[:, :100] * rng.random((20, 100))).astype("float32")
    rest = counts.copy()
    rest[:, :100] -= part
    spelled = [genes[i] if i < 30 else genes[i].lower() if i < 60 else f"{genes[i]}.7" for i in range(100)]
    for dense in (False, True):
        x = np.hstack([rest, part])
        split = anndata.AnnData(x if dense else sp.csr_matrix(x))
        split.var["ensembl_id"] = genes + spelled
        split.obs["n_counts"] = plain.obs["n_counts"].to_numpy()
        got = tokenize_anndata(split, vocabulary)
        if dense:
            plain.X = counts
            want = tokenize_anndata(plain, vocabulary)
        np.testing.assert_array_equal(got.values, want.values)
        report = got.report["inputs"][0]["genes"]
        assert (report["collapsed"], report["duplicated"], report["versioned"]) == (100, 30, 40)
        assert report["recased"] == 30

    zeros = sp.csr_matrix(counts)
    zeros.data[::7] = 0
    stored = anndata.AnnData(zeros)
    stored.var["ensembl_id"] = genes
    stored.obs["n_counts"] = plain.obs["n_counts"].to_numpy()
    cleaned = stored.copy()
    cleaned.X.eliminate_zeros()
    got, want = tokenize_anndata(stored, vocabulary), tokenize_anndata(cleaned, vocabulary)
    np.testing.assert_array_equal(got.values, want.values)
    assert got.report["cells"][0]["stored_zeros"] == len(zeros.data[::7])
    assert want.report["cells"][0]["stored_zeros"] == 0
