"""Gene lists: every form in which one comes, other ids, and one error for what is none."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from value_files import SYMBOLS, gene_files, make_value_cells
from value_oracles import aligned

from geneformer_fast.errors import InputError, VocabularyError
from geneformer_fast.families.gene_list import GeneList, in_order, read_gene_list
from geneformer_fast.tokenization.run import tokenize

PATTERNS = ("genes.tsv",)


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("genes.tsv", "gene_name\tindex\nA1BG\t0\nA2M\t1\n"),
        ("genes.csv", "index,gene_symbol\n0,A1BG\n1,A2M\n"),
        ("genes.txt", "A1BG\nA2M\n"),
        ("genes.txt", "\ufeffA1BG\r\nA2M\r\n\r\n"),
        ("genes.json", '["A1BG", "A2M"]'),
        ("genes.json", '{"A1BG": 0, "A2M": 1}'),
    ],
)
def test_forms(tmp_path, name, text):
    genes = read_gene_list(write(tmp_path / name, text), "scbert", PATTERNS)
    assert genes.token_ids == {"A1BG": 0, "A2M": 1}
    assert genes.fingerprint == in_order("scbert", ["A1BG", "A2M"], "").fingerprint
    assert genes.fingerprint != in_order("scbert", ["A2M", "A1BG"], "").fingerprint


def test_row_names_of_an_h5ad_whatever_its_matrix_holds(tmp_path, lists):
    found = read_gene_list(lists["scbert"], "scbert", PATTERNS)
    assert list(found.token_ids) == SYMBOLS


def test_it_is_read_back_as_it_was_saved(tmp_path):
    genes = in_order("aido-cell", ["A1BG", "A2M"], "", ["ENSG00000121410", "ENSG00000175899"])
    genes.save(tmp_path)
    found = read_gene_list(tmp_path, "aido-cell", ("*.tsv",))
    assert (found.token_ids, found.aliases, found.special) == (genes.token_ids, genes.aliases, genes.special)
    assert (found.fingerprint, found.mapping_fingerprint) == (genes.fingerprint, genes.mapping_fingerprint)
    content = json.loads((tmp_path / "genes.json").read_text())
    content["genes"]["A2M"] = 7
    (tmp_path / "genes.json").write_text(json.dumps(content))
    with pytest.raises(VocabularyError, match=r"genes\.json"):
        read_gene_list(tmp_path, "aido-cell", ())
    genes.save(tmp_path)
    with pytest.raises(VocabularyError, match=r"genes\.json: is the gene list of aido-cell, not of scbert"):
        read_gene_list(tmp_path, "scbert", ())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("genes.tsv", "gene_name\tindex\nA1BG\t1\nA2M\t0\n", "its column index does not count from 0"),
        ("genes.tsv", "gene_name\tindex\nA1BG\t0\nA2M\n", "row 2 has 1 columns, the first has 2"),
        ("genes.tsv", "a\tb\nA1BG\t0\n", "no column of its header is called gene_name; there are a, b"),
        ("genes.txt", "A1BG\nA2M\nA1BG\n", "'A1BG' is listed twice, as gene 0 and as gene 2"),
        ("genes.tsv", "", "is empty"),
        ("genes.tsv", "gene_name\n", "holds no genes"),
        ("genes.bin", "A1BG", "a gene list is a .tsv, .csv, .txt, .json or .h5ad"),
        ("genes.json", '{"A1BG": 0, "A2M": 0}', "number 0 is used twice, by 'A1BG' and 'A2M'"),
        ("genes.json", '{"A1BG": -1}', "expected a whole number from 0 to 16,777,215"),
        ("genes.json", '{"A1BG": "x"}', "the number of 'A1BG' is 'x', expected a whole number"),
        ("genes.json", '["A1BG", 3]', "'3' is no name of a gene"),
        ("genes.json", '["A1BG", ""]', "gene 1 .counted from 0. has no name"),
        ("genes.json", '"A1BG"', "holds neither a list of genes nor an object"),
        ("genes.json", "{", "cannot be read as JSON"),
        ("genes.h5ad", "no", "cannot be read as a list of genes"),
    ],
)
def test_what_is_no_list(tmp_path, name, text, said):
    with pytest.raises(VocabularyError, match=said):
        read_gene_list(write(tmp_path / name, text), "scbert", PATTERNS)


def test_folders_without_a_list_or_with_several(tmp_path):
    with pytest.raises(VocabularyError, match=r"holds no gene list of scbert: expected a\*\.tsv, or genes\.json"):
        read_gene_list(tmp_path, "scbert", ("a*.tsv",))
    write(tmp_path / "a1.tsv", "A1BG\n")
    write(tmp_path / "a2.tsv", "A1BG\n")
    with pytest.raises(VocabularyError, match=r"holds several gene lists: a1\.tsv, a2\.tsv; name one of them"):
        read_gene_list(tmp_path, "scbert", ("a*.tsv",))


def test_no_pickle_is_executed(tmp_path):
    write(tmp_path / "genes.tsv", "A1BG\n")

    class Bad:
        def __reduce__(self):
            return (sys.exit, (3,))

    (tmp_path / "ensembl_mapping_dict_gc95M.pkl").write_bytes(pickle.dumps({"A": Bad()}))
    with pytest.raises(VocabularyError, match="refused"):
        read_gene_list(tmp_path, "scbert", PATTERNS)


def test_dictionaries_beside_a_list_add_other_ids(tmp_path):
    write(tmp_path / "genes.tsv", "NEWNAME\nOLDNAME\nC1orf112\n")
    mapping = {
        "NEWNAME": "ENSG00000000001", "EARLIER": "ENSG00000000001", "ENSG00000000009": "ENSG00000000001",
        # By another dictionary a name of the list is an alias of another gene of the list.
        "OLDNAME": "ENSG00000000001", "C1ORF112": "ENSG00000000003", "FIRRM": "ENSG00000000003",
        "ELSE": "ENSG00000000004",
    }  # fmt: skip
    (tmp_path / "ensembl_mapping_dict.json").write_text(json.dumps(mapping))
    genes = read_gene_list(tmp_path, "scbert", PATTERNS)
    assert genes.aliases == {
        "ENSG00000000001": "NEWNAME", "EARLIER": "NEWNAME", "ENSG00000000009": "NEWNAME",
        "ENSG00000000003": "C1orf112", "FIRRM": "C1orf112",
    }  # fmt: skip


def test_symbols_are_found_beside_ensembl_ids(tmp_path, lists):
    """Of a file with Ensembl ids first and symbols as row names a list of symbols takes the row names."""
    adata = make_value_cells(12)
    given = {"family": "scgpt", "dictionary": lists["scgpt"], "progress": False}
    expected = tokenize(adata, **given)
    adata.var["gene_ids"] = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    found = tokenize(adata, **given)
    assert np.array_equal(found.values, expected.values)
    assert found.report["inputs"][0]["gene_ids_from"] == "var_names"
    adata.var["feature_name"] = adata.var_names.tolist()
    adata.var_names = adata.var["gene_ids"].tolist()
    found = tokenize(adata, **given)
    assert np.array_equal(found.values, expected.values)
    assert found.report["inputs"][0]["gene_ids_from"] == "feature_name"
    with pytest.raises(InputError, match=r"0 of 53 gene ids match .*'scgpt'.*Ensembl|0 of 53 gene ids match"):
        tokenize(adata, **given, gene_column="gene_ids")


def test_files_that_match_next_to_nothing_say_what_to_do(lists):
    adata = make_value_cells(6)
    adata.var_names = [f"thing{i}" for i in range(adata.n_vars)]
    with pytest.raises(InputError) as raised:
        tokenize(adata, family="scbert", dictionary=lists["scbert"])
    assert "0 of 53 gene ids match vocabulary 'scbert'" in str(raised.value)
    assert "Name the column of var with the names of the list with gene_column= (--gene-column)" in str(raised.value)
    assert "put Geneformer's ensembl_mapping_dict beside the list" in str(raised.value)


def test_a_list_with_ensembl_ids_reads_both(tmp_path):
    ensembl = [f"ENSG{i:011d}" for i in range(60)]
    lines = [f"{name}\t{gene}\n" for name, gene in zip(SYMBOLS, ensembl, strict=True)]
    path = write(tmp_path / "genes.tsv", "gene_name\tensembl_id\n" + "".join(lines))
    adata = make_value_cells(12)
    expected = tokenize(adata, family="aido-cell", dictionary=path)
    number = dict(zip(SYMBOLS, ensembl, strict=True))
    adata.var_names = [number.get(name, name) for name in adata.var_names]
    found = tokenize(adata, family="aido-cell", dictionary=path)
    assert np.array_equal(found.values, expected.values)
    assert np.array_equal(found.amounts, expected.amounts)
    rows, _ = aligned(make_value_cells(12), SYMBOLS)
    assert found.totals.tolist() == rows.sum(1)[found.kept_rows].tolist()


def test_numbers_of_a_list_that_is_read_whole_are_places():
    genes = GeneList("aido-cell", {"A1BG": 0, "A2M": 2})
    with pytest.raises(VocabularyError, match="its numbers must be 0 to 1, the places of genes"):
        tokenize(make_value_cells(6), family="aido-cell", dictionary=genes)


def test_lists_of_the_families_are_found_in_their_folders(tmp_path):
    from value_files import preparation

    files = gene_files(tmp_path / "lists")
    for family, file in files.items():
        assert preparation(family).genes(Path(file).parent).token_ids == preparation(family).genes(file).token_ids
