"""Values are those of the original tools, for every format, and for cells that go wrong elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from value_files import FAMILIES, N_LISTED, SCGPT_IDS, SPECIAL, SYMBOLS, make_value_cells, numbers
from value_oracles import (
    aido_row,
    aido_row_float32,
    aligned,
    scbert_row,
    scgpt_allowed,
    scgpt_bins,
    scgpt_top,
)

from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.values import cells_of_folder
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.tokenization.arrow import open_tokens
from geneformer_fast.tokenization.run import tokenize

sys.path.insert(0, str(Path(__file__).parent.parent / "counts"))
from formats import FORMATS, written

IDS = np.array([SCGPT_IDS[name] for name in SYMBOLS])


def as_read(folder):
    """Row of the input -> what a model reads of the cell."""
    with open_tokens(folder) as tokens:
        tokens.on_read = cells_of_folder(tokens)
        values, bounds = tokens.read(np.arange(tokens.n_cells))
        rows = tokens.column("source_row").to_numpy()
    assert np.array_equal(tokens.lengths(), np.diff(bounds))
    return {int(row): values[start:stop] for row, start, stop in zip(rows, bounds, bounds[1:], strict=False)}


def made(adata, family, lists, folder, **options):
    """``as_read`` of an AnnData."""
    options = {"options": {"min_genes": 1}, **options} if family == "scbert" else options
    tokenize(adata, folder / "out", family=family, dictionary=lists[family], progress=False, **options)
    return as_read(folder / "out")


def bins_of(cell):
    """Gene number -> bin of a cell of scGPT as read."""
    assert cell[0].tolist() == [SPECIAL["<cls>"], -2]
    genes = cell[1:, 0]
    assert (np.diff(genes) > 0).all()
    return dict(zip(genes.astype(int).tolist(), cell[1:, 1].astype(int).tolist(), strict=True))


@pytest.mark.parametrize("missing", ["zero", "mask"])
@pytest.mark.parametrize(("dtype", "is_float"), [("int32", False), ("float32", False), ("float64", True)])
def test_aido_cell(lists, tmp_path, missing, dtype, is_float):
    adata = make_value_cells(30, dtype=dtype, is_float=is_float)
    found = made(adata, "aido-cell", lists, tmp_path, options={"missing": missing}, allow_float=is_float)
    rows, there = aligned(adata, SYMBOLS)
    assert not there[50:].any()
    assert set(found) == set(range(30)) - {3, 5}  # without counts, or none in any gene of the list
    for row, cell in found.items():
        expected = aido_row(rows[row], there, missing=missing)
        assert cell.dtype == np.float32
        np.testing.assert_array_max_ulp(cell, expected.astype(np.float32), maxulp=1)
        if missing == "zero":
            # Theirs rounds three times on the way, in float32.
            np.testing.assert_allclose(cell, aido_row_float32(rows[row]), rtol=4e-7)


def test_depth_of_aido_cell_counts_from_a_hundred_thousand_on(lists, tmp_path):
    adata = make_value_cells(8, dtype="int64")
    adata.X[6] = adata.X[6] * 100_000
    found = made(adata, "aido-cell", lists, tmp_path)
    rows, there = aligned(adata, SYMBOLS)
    assert found[0][-2:].tolist() == [5, 5]
    assert found[6][-1] > 6
    np.testing.assert_array_max_ulp(found[6], aido_row(rows[6], there).astype(np.float32), maxulp=1)


def test_totals_of_aido_cell_are_over_the_list_all_genes_or_a_column(lists, tmp_path):
    adata = make_value_cells(10)
    adata.obs["depth"] = np.arange(10) * 1000.0 + 500
    rows, there = aligned(adata, SYMBOLS)
    whole = np.asarray(adata.X.sum(1), dtype=np.float64).ravel()
    for name, options, totals in (
        ("list", {}, rows.sum(1)),
        ("all", {"options": {"totals": "all"}}, whole),
        ("column", {"n_counts": "depth"}, adata.obs["depth"].to_numpy()),
    ):
        (tmp_path / name).mkdir()
        found = made(adata, "aido-cell", lists, tmp_path / name, **options)
        for row, cell in found.items():
            expected = aido_row(rows[row], there, total=totals[row])
            np.testing.assert_array_max_ulp(cell, expected.astype(np.float32), maxulp=1)


@pytest.mark.parametrize(("dtype", "storage"), [("int32", "csr"), ("float32", "csc"), ("int64", "dense")])
def test_scbert(lists, tmp_path, dtype, storage):
    adata = make_value_cells(40, dtype=dtype, storage=storage)
    found = made(adata, "scbert", lists, tmp_path)
    rows, _ = aligned(adata, SYMBOLS)
    assert set(found) == set(range(40)) - {3, 5}
    for row, cell in found.items():
        assert cell.tolist() == scbert_row(rows[row]).tolist()


def test_levels_of_scbert_are_exact_where_logarithms_round(lists, tmp_path):
    """Counts whose normalised value plus one is a power of two, and their neighbours, by integers alone."""
    import anndata
    import scipy.sparse as sp

    counts = np.zeros((5, N_LISTED), dtype=np.int64)
    for row, total in enumerate((2000, 6000, 70_000, 30_000, 90_000)):
        for gene, level in enumerate((1, 3, 7, 15, 31)):
            exact = level * total // 10_000
            counts[row, 3 * gene : 3 * gene + 3] = max(exact - 1, 0), exact, exact + 1
        counts[row, 59] = total - counts[row].sum()
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.var_names, adata.obs_names = SYMBOLS, [f"c{i}" for i in range(5)]
    found = made(adata, "scbert", lists, tmp_path)
    for row, cell in found.items():
        total = int(counts[row].sum())
        for gene, count in enumerate(counts[row].tolist()):
            level = sum(count * 10_000 >= (2**k - 1) * total for k in range(1, 6))
            assert cell[gene] == level, (row, gene, count, total)
        assert cell.tolist() == scbert_row(counts[row]).tolist()


def test_cells_of_scbert_with_few_genes_are_left_out_with_a_word(lists, tmp_path):
    adata = make_value_cells(40)
    rows, _ = aligned(adata, SYMBOLS)
    expressed = (rows > 0).sum(1)
    least = int(np.median(expressed))
    tokens = tokenize(
        adata, tmp_path / "out", family="scbert", dictionary=lists["scbert"], options={"min_genes": least},
        progress=False,
    )  # fmt: skip
    assert tokens.column("source_row").to_pylist() == np.flatnonzero(expressed >= least).tolist()
    (tally,) = tokens.manifest["cells"]
    assert tally["few_genes"] == int(((expressed > 0) & (expressed < least)).sum())
    assert tally["empty"] == 2
    with pytest.raises(InputError, match=r"38 have fewer genes than option min_genes asks for"):
        tokenize(adata, tmp_path / "none", family="scbert", dictionary=lists["scbert"], progress=False)


@pytest.mark.parametrize("normalise", ["none", "log1p"])
@pytest.mark.parametrize("n_bins", [51, 7])
def test_scgpt_bins_are_what_the_original_gives_for_one_half(lists, tmp_path, normalise, n_bins):
    adata = make_value_cells(30)
    found = made(adata, "scgpt", lists, tmp_path, options={"normalise": normalise, "n_bins": n_bins})
    rows, _ = aligned(adata, SYMBOLS, dtype=np.float32)
    for row, cell in found.items():
        values = rows[row]
        if normalise == "log1p":
            values = np.log1p(values / np.float32(values.sum(dtype=np.float32) / np.float32(1e4)))
        places = np.flatnonzero(values)
        bins = scgpt_bins(values[places], np.full(len(places), 0.5), n_bins)
        assert bins_of(cell) == dict(zip(IDS[places].tolist(), bins.tolist(), strict=True))


@pytest.mark.parametrize("ties", ["middle", "upper", "random"])
def test_scgpt_bins_are_among_those_the_original_may_give(lists, tmp_path, ties):
    adata = make_value_cells(60, seed=4)
    found = made(adata, "scgpt", lists, tmp_path, options={"ties": ties})
    rows, _ = aligned(adata, SYMBOLS)
    shares = []
    for row, cell in found.items():
        places = np.flatnonzero(rows[row])
        least, largest = scgpt_allowed(rows[row][places])
        bins = bins_of(cell)
        given = np.array([bins[number] for number in IDS[places].tolist()])
        assert ((least <= given) & (given <= largest)).all()
        wide = largest - least >= 10
        shares += ((given - least) / np.maximum(largest - least, 1))[wide].tolist()
    assert len(shares) > 300
    if ties == "upper":
        assert min(shares) == 1
    else:
        assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    if ties == "random":  # spread as theirs are: evenly over all bins that meet
        assert np.std(shares) == pytest.approx(12**-0.5, abs=0.06)
        assert (min(shares), max(shares)) == (0, 1)


def test_genes_of_scgpt_beyond_the_limit(lists, tmp_path):
    adata = make_value_cells(20, deep=4)
    rows, _ = aligned(adata, SYMBOLS)
    whole = made(adata, "scgpt", lists, tmp_path)
    for name, options in (
        ("top", {}),
        ("random", {"sampling": "random"}),
        ("other", {"sampling": "random", "seed": 1}),
    ):
        (tmp_path / name).mkdir()
        found = made(adata, "scgpt", lists, tmp_path / name, options=options, max_len=13)
        for row, cell in found.items():
            bins, kept = bins_of(whole[row]), bins_of(cell)
            assert kept.items() <= bins.items()  # binned among all genes, then chosen
            assert len(kept) == min(12, len(bins))
            if name == "top":
                places = np.flatnonzero(rows[row])
                top = [int(IDS[places][i]) for i in scgpt_top(rows[row][places], IDS[places], 12)]
                assert list(kept) == top
        with open_tokens(tmp_path / name / "out") as tokens:
            assert tokens.manifest["cells"][0]["full"] == sum(len(cell) == 13 for cell in found.values()) > 4
        if name != "top":
            first = {row: tuple(bins_of(cell)) for row, cell in found.items()}
            assert first != {row: tuple(bins_of(cell)) for row, cell in whole.items()}
    seeds = [as_read(tmp_path / name / "out")[0][:, 0].tolist() for name in ("random", "other")]
    assert seeds[0] != seeds[1]


@pytest.mark.parametrize("option", ["ties", "sampling"])
def test_chance_belongs_to_the_cell_not_to_its_place(lists, tmp_path, option):
    adata = make_value_cells(20, deep=4)
    parts = {"whole": np.arange(20), "part": np.array([17, 2, 0, 11])}
    found = {}
    for name, chosen in parts.items():
        (tmp_path / name).mkdir()
        columns = np.arange(adata.n_vars) if name == "whole" else np.arange(adata.n_vars)[::-1]
        cells = made(
            adata[chosen][:, columns].copy(), "scgpt", lists, tmp_path / name, options={option: "random"}, max_len=13
        )
        found[name] = {int(chosen[row]): cell.tolist() for row, cell in cells.items()}
    assert found["part"].items() <= found["whole"].items()


def test_value_beside_cls_follows_the_call_path(lists, tmp_path):
    adata = make_value_cells(8)
    found = made(adata, "scgpt", lists, tmp_path, options={"cls_value": "finetune"})
    assert found[0][0].tolist() == [SPECIAL["<cls>"], 0]
    with pytest.raises(UnsupportedError, match=r"option cls_value must be embed or finetune, not 'both'"):
        made(adata, "scgpt", lists, tmp_path / "b", options={"cls_value": "both"})


def test_special_tokens_that_a_vocabulary_lacks_are_appended(tmp_path, lists):
    import json

    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(SYMBOLS)}))
    adata = make_value_cells(8)
    tokens = tokenize(adata, tmp_path / "out", family="scgpt", dictionary=tmp_path, progress=False)
    assert tokens.vocabulary["special"] == {"pad": 60, "cls": 61, "eoc": 62}
    assert tokens.vocabulary["n_tokens"] == 63


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_values(lists, tmp_path, family, kind):
    adata = make_value_cells(15, storage="dense")
    adata.obs = adata.obs[[]]
    options = {"options": {"min_genes": 1}} if family == "scbert" else {}
    given = {"family": family, "dictionary": lists[family], "progress": False, "gene_column": None, **options}
    tokenize(adata, tmp_path / "plain", **given)
    data = written(kind, adata, tmp_path)
    if kind == "loom":
        given["gene_column"] = "Accession"
    tokenize(data, tmp_path / "out", **given)
    expected, found = as_read(tmp_path / "plain"), as_read(tmp_path / "out")
    assert set(found) == set(expected)
    for row, cell in found.items():
        assert np.array_equal(cell, expected[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_is_what_is_written(lists, tmp_path, family):
    adata = make_value_cells(30)
    options = {"options": {"min_genes": 5}} if family == "scbert" else {}
    given = {"family": family, "dictionary": lists[family], "progress": False, **options}
    cells = tokenize(adata, **given)
    with tokenize(adata, tmp_path / "out", **given) as tokens:
        ids, bounds = tokens.read_stored(np.arange(tokens.n_cells))
        tokens.locate_values("values")
        values, _ = tokens.read_stored(np.arange(tokens.n_cells), "values")
        assert np.array_equal(cells.values, ids)
        assert np.array_equal(cells.amounts, values)
        assert np.array_equal(cells.cu_seqlens, bounds)
        assert np.array_equal(cells.kept_rows, tokens.column("source_row").to_numpy())
        if family == "aido-cell":
            assert np.array_equal(cells.totals, tokens.column("total").to_numpy())
        else:
            assert cells.totals is None
            assert "total" not in tokens.columns


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_genes_are_those_of_the_list(lists, tmp_path, family):
    adata = make_value_cells(20)
    options = {"options": {"min_genes": 1}} if family == "scbert" else {}
    tokenize(adata, tmp_path / "out", family=family, dictionary=lists[family], progress=False, **options)
    rows, _ = aligned(adata, SYMBOLS)
    number = numbers(family)
    with open_tokens(tmp_path / "out") as tokens:
        for cell, row in enumerate(tokens.column("source_row").to_pylist()):
            ids, _ = tokens.read_stored([cell])
            expressed = sorted(number[SYMBOLS[gene]] for gene in np.flatnonzero(rows[row]))
            if family == "scbert":  # a level of 0 is as good as none
                expressed = [gene for gene in expressed if scbert_row(rows[row])[gene] > 0]
            assert ids.tolist() == expressed


def test_cells_of_several_files_miss_the_genes_of_their_own_file(lists, tmp_path):
    first, second = make_value_cells(8, seed=1), make_value_cells(8, seed=2)
    second = second[:, [name in SYMBOLS[10:30] for name in second.var_names]].copy()
    first.write_h5ad(tmp_path / "1.h5ad")
    second.write_h5ad(tmp_path / "2.h5ad")
    files = [tmp_path / "1.h5ad", tmp_path / "2.h5ad"]
    tokens = tokenize(
        files, tmp_path / "out", family="aido-cell", dictionary=lists["aido-cell"], options={"missing": "mask"},
        progress=False,
    )  # fmt: skip
    with tokens:
        tokens.on_read = cells_of_folder(tokens)
        sources = tokens.column("source_file").to_pylist()
        values, bounds = tokens.read(np.arange(tokens.n_cells))
        measured = tokens.on_read.measured(np.arange(tokens.n_cells)).reshape(tokens.n_cells, -1)
        for cell, source in enumerate(sources):
            there = set(SYMBOLS[:50] if source.endswith("1.h5ad") else SYMBOLS[10:30])
            row = values[bounds[cell] : bounds[cell + 1]][:N_LISTED]
            lacking = [name for name, value in zip(SYMBOLS, row, strict=True) if value == -1]
            assert lacking == [name for name in SYMBOLS if name not in there]
            assert measured[cell, :N_LISTED].tolist() == [name in there for name in SYMBOLS]
            assert measured[cell, N_LISTED:].all()


def test_a_model_of_ranks_refuses_values_and_one_of_values_ranks(lists, tmp_path):
    from corpus import make_cells, small_vocabulary

    from geneformer_fast.config import EncoderConfig
    from geneformer_fast.errors import VocabularyError

    adata = make_value_cells(8)
    tokenize(adata, tmp_path / "values", family="scgpt", dictionary=lists["scgpt"], progress=False)
    tokenize(make_cells(8), tmp_path / "ranks", dictionary=small_vocabulary(), progress=False)
    ranks = EncoderConfig.preset("geneformer-v2-104m")
    values = EncoderConfig.preset("aido-cell-3m", max_len=62)
    with open_tokens(tmp_path / "values") as tokens:
        with pytest.raises(VocabularyError, match="were made with scgpt, but the model reads geneformer-v2"):
            identity_of(tokens, ranks)
        with pytest.raises(VocabularyError, match="were made with scgpt, but the model reads aido-cell"):
            identity_of(tokens, values)
    with (
        open_tokens(tmp_path / "ranks") as tokens,
        pytest.raises(VocabularyError, match="are ranks of small, but the model reads cells of aido-cell"),
    ):
        identity_of(tokens, values)
    tokenize(adata, tmp_path / "aido", family="aido-cell", dictionary=lists["aido-cell"], progress=False)
    with open_tokens(tmp_path / "aido") as tokens:
        assert identity_of(tokens, values)["n_genes"] == N_LISTED
        assert tokens.lengths().tolist() == [62] * 6
        with pytest.raises(VocabularyError, match="62 positions, for 60 genes of aido-cell, but the model has 19,266"):
            identity_of(tokens, EncoderConfig.preset("aido-cell-3m"))
