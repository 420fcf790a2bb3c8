"""Only gene expression counts, whatever the format and whatever the column of types is called."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from corpus import GENES
from formats import FORMATS, written

from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.run import tokenize, tokenize_anndata
from geneformer_fast.tokenization.vocabulary import Vocabulary

N_CELLS = 40
#: 12 genes, then antibodies against two of them, under their symbols
IDS = [*GENES[:12], "CD4", "CD19"]
TYPES = ["Gene Expression"] * 12 + ["Antibody Capture"] * 2
VOCABULARY = Vocabulary.from_medians(
    {gene: 1.0 + i for i, gene in enumerate(GENES[:12])}, aliases={"CD4": GENES[0], "CD19": GENES[1]}
)


def cells(column="feature_types", types=TYPES):
    counts = np.random.default_rng(0).poisson(2.0, (N_CELLS, len(IDS))).astype(np.float32)
    counts[:, 12:] += 50  # antibodies would come first in every cell
    var = pd.DataFrame({"gene_ids": IDS}, index=[f"f{i}" for i in range(len(IDS))])
    if column is not None:
        var[column] = types
    return anndata.AnnData(counts, obs=pd.DataFrame(index=[f"c{i}" for i in range(N_CELLS)]), var=var)


def tokens_of(data, folder):
    if isinstance(data, anndata.AnnData):
        result = tokenize_anndata(data, VOCABULARY)
        return result.values.tolist(), result.report["inputs"][0]
    folder = tokenize(data, folder / "tokens", dictionary=VOCABULARY)
    return folder.read(range(folder.n_cells))[0].tolist(), folder.manifest["inputs"][0]


def expected(*, is_dense):
    """Tokens of the genes alone; scores of dense matrices are divisions, and ties fall otherwise."""
    genes = cells(None)[:, :12].copy()
    genes.X = genes.X if is_dense else sp.csr_matrix(genes.X)
    return tokenize_anndata(genes, VOCABULARY).values.tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_antibodies_are_not_added_to_their_genes_in_any_format(kind, tmp_path):
    if kind == "zarr":
        pytest.importorskip("zarr", minversion="3.1.3")
    data = written(kind, cells(), tmp_path)
    before = data.X.copy() if kind.startswith("memory") else None
    got, described = tokens_of(data, tmp_path)
    assert got == expected(is_dense=described["is_dense"])
    assert described["left_out"] == {"Antibody Capture": 2}
    assert described["n_genes"] == 12
    if before is not None:
        assert (before != data.X).sum() == 0, "the matrix of the caller was written to"


@pytest.mark.parametrize(
    ("column", "types"),
    [
        ("feature_type", TYPES),
        ("Feature Type", TYPES),
        ("feature-types", TYPES),
        ("featuretypes", TYPES),
        ("feature_types-0", TYPES),
        ("modality", TYPES),
        ("Type", TYPES),
        ("feature_types", pd.Categorical(TYPES)),
        ("feature_types", ["gene expression"] * 12 + ["ADT"] * 2),
        ("feature_types", ["GENE_EXPRESSION"] * 12 + ["whatever"] * 2),
        ("feature_types", ["GEX"] * 12 + ["ADT"] * 2),
        ("feature_types", ["Gene"] * 12 + ["Antibody Capture"] * 2),
        ("feature_types", ["mRNA"] * 12 + ["AbSeq"] * 2),  # BD Rhapsody
        ("modality", ["rna"] * 12 + ["prot"] * 2),
    ],
)
def test_columns_and_values_of_the_wild(column, types, tmp_path):
    adata = cells(column, types)
    for data in (adata, written("h5ad", adata, tmp_path)):
        got, described = tokens_of(data, tmp_path)
        assert got == expected(is_dense=described["is_dense"])
        assert sum(described["left_out"].values()) == 2


@pytest.mark.parametrize(
    ("column", "types"),
    [
        ("feature_type", ["protein_coding"] * 7 + ["lncRNA"] * 7),  # CELLxGENE's are biotypes
        ("feature_type", ["gene"] * 7 + ["lncRNA"] * 7),
        ("type", ["a"] * 14),
        ("feature_types", ["Gene Expression"] * 14),
        ("feature_types", [""] * 14),
        ("feature_types", np.arange(14)),
        ("gene_type", TYPES),  # no name of a column of types
    ],
)
def test_what_says_nothing_of_the_kind_leaves_nothing_out(column, types):
    with open_source(cells(column, types)) as source:
        assert source.n_genes == 14
        assert source.left_out == {}


def test_types_that_nobody_knows_are_said():
    with pytest.warns(UserWarning, match=r"the types 'Gene', 'Spot', which say nothing known .* all are read as genes"):
        source = open_source(cells("feature_types", ["Gene"] * 12 + ["Spot"] * 2))
    assert (source.n_genes, source.left_out) == (14, {})


def test_joined_tables_with_a_column_of_types_each():
    adata = cells(None)
    adata.var["feature_types-0"] = [*TYPES[:6], *[None] * 7, TYPES[13]]
    adata.var["feature_types-1"] = [*[None] * 6, *TYPES[6:13], None]
    with open_source(adata) as source:
        assert source.left_out == {"Antibody Capture": 2}


@pytest.mark.parametrize("kind", ["h5ad", "10x_h5", "10x"])
def test_without_gene_expression(kind, tmp_path):
    types = ["Antibody Capture"] * 7 + ["Peaks"] * 7
    with pytest.raises(
        InputError, match=r"cells|matrices.*no feature is 'Gene Expression'; there are Antibody Capture"
    ):
        open_source(written(kind, cells(types=types), tmp_path))


@pytest.mark.parametrize("kind", ["memory", "h5ad", "10x_h5", "10x"])
@pytest.mark.parametrize("missing", ["", "nan"])
def test_a_feature_without_a_type_among_typed_ones(kind, missing, tmp_path):
    types = [*TYPES[:5], missing, *TYPES[6:]]
    with pytest.warns(UserWarning, match="1 features without a type .* are left out"):
        source = open_source(written(kind, cells(types=types), tmp_path))
    with source:
        assert source.gene_ids().tolist() == [*GENES[:5], *GENES[6:12]]
        assert source.left_out == {"Antibody Capture": 2, "no type": 1}


def test_most_features_without_a_type():
    with pytest.raises(InputError, match=r"8 of 14 features have no type, others are 'Gene Expression'"):
        open_source(cells(types=["Gene Expression"] * 6 + [""] * 8))


def test_one_short_row_of_a_10x_folder_drops_no_types(tmp_path):
    folder = written("10x", cells(), tmp_path)
    lines = (folder / "features.tsv").read_text().splitlines()
    lines[3] = lines[3].rpartition("\t")[0]
    (folder / "features.tsv").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=rf"1 features without a type \('{GENES[3]}'\) are left out"):
        source = open_source(folder)
    with source:
        assert source.gene_ids().tolist() == [*GENES[:3], *GENES[4:12]]
        assert source.left_out == {"Antibody Capture": 2, "no type": 1}


def test_report_names_what_is_left_out(tmp_path, capsys):
    from geneformer_fast.cli import main

    VOCABULARY.save(tmp_path / "dictionary")
    path = written("h5ad", cells(), tmp_path)
    arguments = ["--dictionary", str(tmp_path / "dictionary"), "--out", str(tmp_path / "out")]
    assert main(["tokenize", str(path), *arguments]) == 0
    assert "left out, since only gene expression counts: 2 Antibody Capture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "ids", "chosen"),
    [
        ("EnsemblID", GENES[:14], "EnsemblID"),  # loom
        ("ID", GENES[:14], "ID"),  # SingleCellExperiment
        ("ensembl_gene_id", GENES[:14], "ensembl_gene_id"),  # biomaRt
        ("gene.ids", GENES[:14], "gene.ids"),
        ("ens_id", GENES[:14], "ens_id"),
        ("gene", GENES[:14], "gene"),
        ("index", GENES[:14], "index"),  # after reset_index()
        ("gene", [f"x{i}" for i in range(14)], "var_names"),
        ("ID", [f"x{i}" for i in range(14)], "var_names"),
        ("notes", GENES[:14], "var_names"),
    ],
)
def test_id_columns_of_other_tools(column, ids, chosen, tmp_path):
    adata = cells(None)
    adata.var = pd.DataFrame({column: ids}, index=[f"SYMBOL{i}" for i in range(14)])
    for data in (adata, written("h5ad", adata, tmp_path)):
        with open_source(data) as source:
            assert source.gene_ids_from == chosen
    adata.var_names = [f"ENSG{i:011d}" for i in range(100, 114)]
    with open_source(adata) as source:
        assert source.gene_ids_from == "var_names", "row names that are Ensembl ids come first"


def test_no_warning_without_a_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize_anndata(cells(), VOCABULARY)
