"""Which column becomes which gene: as the official tool decides, plus what it misses, all of it reported."""

from __future__ import annotations

import json
import time

import h5py
import numpy as np
import pytest

from geneformer_fast.counts import open_source
from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.genes import map_genes
from geneformer_fast.tokenization.vocabulary import Vocabulary

A, B, C, D = (f"ENSG{i:011d}" for i in (11, 22, 33, 44))
VOCABULARY = Vocabulary.from_medians(
    {A: 1.0, B: 2.0, C: 3.0, D: 4.0},
    aliases={A: A, B: B, C: C, D: D, "ALPHA": A, "BETA": B, "OLD-BETA.2": B, "ENSG00000000099": A, "LOST": "ENSG0"},
)


def mapped(ids, vocabulary=VOCABULARY):
    gene_map = map_genes(ids, vocabulary, source_name="file.h5ad")
    targets = [gene_map.genes[i] if i >= 0 else None for i in gene_map.column_to_gene]
    return targets, gene_map


@pytest.mark.parametrize(
    ("written", "gene", "kinds"),
    [
        (B, B, []),
        (f"{B}.7", B, ["versioned"]),
        (f"{B}.12_PAR_Y", B, ["versioned"]),
        (f"{B}_PAR_Y", B, ["versioned"]),
        (f"{B}.5_2", B, ["versioned"]),
        (f"{B}.5_2_PAR_Y", B, ["versioned"]),
        (f"{B}.5_PAR_Y_2", B, ["versioned"]),
        (f"{B}-1", B, ["versioned"]),
        (f"{B.lower()}.5_2", B, ["recased", "versioned"]),
        (f"BETA_{B}.3_1", B, ["versioned"]),
        (f"BETA_{B}.3", B, ["versioned"]),
        (f"HLA-A_X_{B}", B, ["versioned"]),
        ("ENSG00000000099", A, ["aliased"]),
        ("ENSG00000000099.4", A, ["aliased", "versioned"]),
        ("ALPHA", A, ["aliased"]),
        ("Alpha", A, ["aliased", "recased"]),
        ("OLD-BETA.2", B, ["aliased"]),
        (B.lower(), B, ["recased"]),
        (f"{B.lower()}.2", B, ["recased", "versioned"]),
        (B.encode(), B, []),
        ("LOST", None, ["dropped", "known_without_token"]),
        ("ALPHA.1", None, ["dropped"]),
        ("", None, ["dropped"]),
        (None, None, ["dropped"]),
        (float("nan"), None, ["dropped"]),
        ("nan", None, ["dropped"]),
        ("<NA>", None, ["dropped"]),
        (17, None, ["dropped"]),
        ("βeta-Ångström", None, ["dropped"]),
        ("x" * 500, None, ["dropped"]),
    ],
)
def test_one_id(written, gene, kinds):
    targets, gene_map = mapped([D, written])
    assert targets == [D, gene]
    report = gene_map.report.to_dict()
    counted = [k for k in ("aliased", "dropped", "known_without_token", "recased", "versioned") if report[k]]
    assert counted == sorted(kinds)
    assert report["matched"] == 1 + (gene is not None)


def test_integer_ids_of_any_type():
    vocabulary = Vocabulary.from_medians({"574405": 1.0, "7": 2.0})
    for ids in (np.array([7, 574405, 9]), np.array([7.0, 574405.0, np.nan]), [7, "574405", None]):
        assert mapped(ids, vocabulary)[0] == ["7", "574405", None]


def test_other_species_and_mixed_case_symbols():
    mouse = Vocabulary.from_medians({"ENSMUSG00000000001": 1.0, "Trp53": 2.0, "FBgn0000008": 3.0})
    ids = ["ENSMUSG00000000001.4", "Trp53", "TRP53", "FBgn0000008.2", "Trp53.1"]
    targets, gene_map = mapped(ids, mouse)
    assert targets == ["ENSMUSG00000000001", "Trp53", "Trp53", "FBgn0000008", "Trp53"]
    assert gene_map.report.collapsed == 2


def test_genes_ascend_by_token_id_and_know_their_columns():
    _, gene_map = mapped([D, "unknown", A, "BETA"])
    assert gene_map.genes == [A, B, D]
    assert gene_map.token_ids.tolist() == [4, 5, 7]
    assert gene_map.token_ids.dtype == np.int32
    assert gene_map.medians.tolist() == [1.0, 2.0, 4.0]
    assert gene_map.column_to_gene.tolist() == [2, -1, 0, 1]
    assert gene_map.column_to_token.tolist() == [7, -1, 4, 5]
    assert not gene_map.has_collisions


def test_columns_of_one_gene_are_summed_with_one_product():
    ids = [A, "ALPHA", B, B, "nothing", B.lower(), "ENSG00000000099"]
    _, gene_map = mapped(ids)
    assert gene_map.has_collisions
    assert (gene_map.report.collapsed, gene_map.report.duplicated, gene_map.report.recased) == (4, 1, 1)
    counts = np.arange(14.0).reshape(2, 7)
    summed = counts @ gene_map.collapse_matrix()
    assert summed.tolist() == [[0 + 1 + 6, 2 + 3 + 5], [7 + 8 + 13, 9 + 10 + 12]]


def test_report_is_readable_and_fits_json():
    _, gene_map = mapped([A, "ALPHA", f"{B}.7", "unknown"])
    text = str(gene_map.report)
    assert "3 of 4 columns matched, 2 genes" in text
    assert f"ALPHA + {A} -> {A}" in text
    assert "unknown" in text
    assert json.loads(json.dumps(gene_map.report.to_dict()))["versioned"] == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["TP53", "GAPDH"], r"0 of 2.*'TP53', 'GAPDH'.*'ENSG00000000011'.*knows no gene symbols"),
        (["ENSMUSG00000000001"], "right species"),
        (["βeta", "名前"], "名前"),
        (np.arange(300), "'0', '1'"),
        ([f"gene{i}" for i in range(1000)] + [A], "1 of 1001"),
        ([], "no genes"),
    ],
)
def test_next_to_nothing_matches(ids, message):
    vocabulary = Vocabulary.from_medians({A: 1.0, B: 2.0})
    with pytest.raises(InputError, match=message) as caught:
        map_genes(ids, vocabulary, source_name="cells.h5ad")
    assert "cells.h5ad" in str(caught.value)


@pytest.fixture(scope="module")
def official(shared_dir):
    """The official dictionaries by preset, which take half a second to read."""
    return {preset: Vocabulary.from_folder(shared_dir / "data" / "dicts", preset=preset) for preset in ("v1", "v2")}


def official_targets(ids, vocabulary):
    usable = {key: gene for key, gene in vocabulary.aliases.items() if gene in vocabulary.token_ids}
    return [usable.get(identifier.upper()) for identifier in ids]


@pytest.mark.parametrize("preset", ["v1", "v2"])
@pytest.mark.parametrize(
    "file",
    ["pbmc3k/pbmc3k", "pbmc3k/pbmc3k_symbols_int32", "pbmc_facs/pbmc_facs_test100", "oligo184_float/oligo184_float"],
)
def test_same_columns_as_the_official_rule(shared_dir, official, preset, file):
    vocabulary = official[preset]
    with h5py.File(shared_dir / "data" / f"{file}.h5ad") as opened:
        ids = opened["var/ensembl_id"].asstr()[:]
    expected = official_targets(ids, vocabulary)
    if not any(expected):
        with pytest.raises(InputError, match="knows no gene symbols"):
            mapped(ids, vocabulary)
        return
    assert mapped(ids, vocabulary)[0] == expected


def test_versioned_ids_of_a_real_file(shared_dir, official):
    vocabulary = official["v2"]
    path = shared_dir / "data" / "panglao_versioned" / "SRA617020_SRS2566664.h5ad"
    with (
        open_source(path, allow_float=True) as by_column,
        open_source(path, allow_float=True, gene_column="var_names") as by_name,
    ):
        assert by_name.gene_ids()[0] == "AAED1_ENSG00000158122.11"
        from_column, from_name = (mapped(source.gene_ids(), vocabulary) for source in (by_column, by_name))
    assert from_column[0] == from_name[0]
    assert from_column[1].report.versioned == from_column[1].report.matched == 6155
    assert official_targets(by_column.gene_ids(), vocabulary) == [None] * 7947


@pytest.mark.parametrize("spelled", ["nan", "NaN", "NA", "Na", " NA ", "NAT", b"NA"])
def test_words_for_missing_ids_are_no_genes(official, spelled):
    """V2 knows NAN, NA and NAT as old symbols, and a quarter of a column would become one gene."""
    vocabulary = official["v2"]
    ids = [*list(vocabulary.token_ids)[:525], *[spelled] * 175]
    targets, gene_map = mapped(ids, vocabulary)
    assert targets == [*ids[:525], *[None] * 175]
    assert (gene_map.report.missing, gene_map.report.dropped, gene_map.report.matched) == (175, 175, 525)
    assert "missing: 175 (of these have no id" in str(gene_map.report)


def test_other_words_for_missing_ids():
    written = ["", "None", "<NA>", "N/A", "null", "-", "nan-1", "NA.2", None, float("nan")]
    vocabulary = Vocabulary.from_medians({A: 1.0, B: 2.0}, aliases={str(word).upper(): A for word in written})
    targets, gene_map = mapped([B, *written], vocabulary)
    assert targets == [B, *[None] * len(written)]
    assert gene_map.report.missing == len(written)


@pytest.mark.parametrize(
    ("others", "n_nan", "expected"),
    [
        (["ALPHA", "BETA", "GAMMA"], 1, "ENSG00000000044"),  # among unique symbols it is the symbol
        (["ALPHA", "BETA", "GAMMA"], 2, None),
        (["ALPHA", "BETA", "BETA"], 1, None),  # these symbols are not unique
        ([A, B, C], 1, None),  # among Ensembl ids it is none
    ],
)
def test_a_single_symbol_that_is_spelled_like_a_missing_value(others, n_nan, expected):
    vocabulary = Vocabulary.from_medians(
        {A: 1.0, B: 2.0, C: 3.0, D: 4.0}, aliases={"ALPHA": A, "BETA": B, "GAMMA": C, "NAN": D}
    )
    targets, gene_map = mapped([*others, *["NAN"] * n_nan], vocabulary)
    assert targets[-1] == expected
    assert gene_map.report.missing == (0 if expected else n_nan)


def test_ensembl_ids_of_which_most_match_nothing(official):
    vocabulary = official["v2"]
    genes = list(vocabulary.token_ids)[:1000]
    strange = [f"gene:{gene}/x" for gene in genes]
    for n_strange in (600, 900, 1000):
        ids = [*strange[:n_strange], *genes[n_strange:]]
        with pytest.raises(InputError, match=f"{1000 - n_strange} of 1000 gene ids match.*'gene:ENSG") as caught:
            map_genes(ids, vocabulary, source_name="cells.h5ad")
        assert ("--allow-few-genes (allow_few_genes=True)" in str(caught.value)) == (n_strange < 1000)
        if n_strange < 1000:
            report = map_genes(ids, vocabulary, source_name="cells.h5ad", allow_few_genes=True).report
            assert (report.matched, report.dropped) == (1000 - n_strange, n_strange)
    with pytest.raises(InputError, match="0 of 1000"):
        map_genes(strange, vocabulary, source_name="cells.h5ad", allow_few_genes=True)
    assert map_genes([*strange[:400], *genes[400:]], vocabulary, source_name="cells.h5ad").report.matched == 600


def test_names_that_are_old_symbols_by_chance_are_next_to_nothing(official):
    """V2's mapping knows 13 of g0 to g699."""
    vocabulary = official["v2"]
    names = [f"g{i}" for i in range(700)]
    with pytest.raises(InputError, match=r"13 of 700 gene ids match.* pass --allow-few-genes"):
        map_genes(names, vocabulary, source_name="cells.h5ad")
    assert map_genes(names, vocabulary, source_name="cells.h5ad", allow_few_genes=True).report.aliased == 13
    panel = [*list(vocabulary.token_ids)[:40], *(f"control {i}" for i in range(400))]
    assert map_genes(panel, vocabulary, source_name="cells.h5ad").report.matched == 40


def test_ids_that_the_mapping_knows_or_a_whole_annotation_are_no_few_genes(official):
    """Most genes of an annotation have no token: what V2's mapping knows, and files with all genes of V1, go on."""
    v2 = official["v2"]
    without_token = [alias for alias, gene in v2.aliases.items() if gene not in v2.token_ids and alias[:4] == "ENSG"]
    ids = [*list(v2.token_ids)[:500], *without_token[:2000]]
    assert map_genes(ids, v2, source_name="cells.h5ad").report.known_without_token == 2000
    v1 = official["v1"]
    ids = [*list(v1.token_ids)[: len(v1.token_ids) * 3 // 4], *(f"ENSG{i:011d}" for i in range(40_000))]
    assert 2 * map_genes(ids, v1, source_name="cells.h5ad").report.matched < len(ids)


def test_sixty_thousand_columns_take_no_time(official):
    vocabulary = official["v2"]
    ids = [f"{key}.1" if i % 2 else key for i, key in enumerate(list(vocabulary.aliases)[:60_000])]
    best = min(_timed(ids, vocabulary) for _ in range(3))
    assert best < 1.5, f"mapping 60,000 columns took {best:.2f} s"


def _timed(ids, vocabulary):
    start = time.perf_counter()
    map_genes(ids, vocabulary, source_name="big")
    return time.perf_counter() - start
