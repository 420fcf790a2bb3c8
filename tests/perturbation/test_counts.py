"""Counts that are multiplied give the tokens that the tokenizer gives of an AnnData with such counts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import toys

from geneformer_fast import open_tokens, tokenize
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.perturbation.counts import CellCounts, CountEdits
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.selection import packed_cells
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.vocabulary import Vocabulary

FACTORS = (0.0, 0.5, 3.0)


def changed(adata: anndata.AnnData, row: int, ids: list[str], factor: float) -> anndata.AnnData:
    """One cell with other counts, as an experiment would find it."""
    one = adata[[row]].copy()
    dense = np.asarray(one.X.todense()) if sp.issparse(one.X) else np.asarray(one.X)
    before = dense.sum()
    dense = dense.astype(dense.dtype if dense.dtype.kind == "f" else np.float64)
    dense[0, one.var_names.isin(ids) | one.var.get("ensembl_id", one.var_names.to_series()).isin(ids)] *= factor
    if "n_counts" in one.obs:
        one.obs["n_counts"] = one.obs["n_counts"].astype(np.float64) + (dense.sum() - before)
    one.X = sp.csr_matrix(dense) if sp.issparse(one.X) else dense
    return one


def expected(adata: anndata.AnnData, row: int, ids: list[str], factor: float, words: Vocabulary, **options: Any) -> Any:
    """Tokens of the changed cell; special tokens alone where no gene is left."""
    try:
        return tokenize(
            changed(adata, row, ids, factor), dictionary=words, allow_float=True, allow_few_genes=True, **options
        ).values.tolist()
    except InputError as error:
        if "no cell is left" not in str(error):
            raise
        return [token for token in (words.cls_id, words.eos_id) if token is not None]


def made(tmp_path: Path, adata: anndata.AnnData, words: Vocabulary, **options: Any) -> TokenFolder:
    return tokenize(adata, tmp_path / "tokens", dictionary=words, progress=False, **options)


def edits_of(words: Vocabulary, **asked: Any) -> Edits:
    framing = {"front": int(words.cls_id is not None), "back": int(words.eos_id is not None)}
    return Edits("counts", **asked, **framing, max_len=words.max_len)


KINDS = {
    "sparse float32": lambda adata: adata,
    "integers": lambda adata: _with(adata, X=adata.X.astype(np.int32)),
    "dense": lambda adata: _with(adata, X=np.asarray(adata.X.todense())),
    "totals in obs": lambda adata: _with(adata, n_counts=np.asarray(adata.X.sum(1)).ravel() * 1.1),
    "float64": lambda adata: _with(adata, X=adata.X.astype(np.float64)),
    "one gene in two columns": lambda adata: _twice(adata),
}


def _many(adata: anndata.AnnData) -> anndata.AnnData:
    """Enough counts that their halves are not taken for logarithms."""
    adata.X = adata.X * np.float32(40)
    return adata


def _with(adata: anndata.AnnData, X: Any = None, n_counts: Any = None) -> anndata.AnnData:
    if X is not None:
        adata.X = X
    if n_counts is not None:
        adata.obs["n_counts"] = n_counts
    return adata


def _twice(adata: anndata.AnnData) -> anndata.AnnData:
    ids = adata.var_names.to_series().tolist()
    ids[7] = ids[3]
    adata.var["ensembl_id"] = ids
    adata.var_names = [f"column{number}" for number in range(len(ids))]
    return adata


@pytest.mark.parametrize("family", ["v1", "v2"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_changed_counts(kind: str, family: str, tmp_path: Path) -> None:
    words, adata = toys.vocabulary(family), KINDS[kind](_many(toys.cells(6)))
    folder = made(tmp_path, adata, words)
    cells = np.array([4, 0, 5])
    edits = edits_of(words, doses=FACTORS)
    ready = CountEdits.of(edits, CellCounts.read(folder, cells, words, adata))
    _, packed = next(packed_cells(folder, cells, 3))
    on = ready.on(packed, np.arange(3))
    ids = {token: gene for gene, token in words.token_ids.items()}
    seen = 0
    for start, stop in on.slices(300):
        variants = on.variants(start, stop)
        variants.tokens.check()
        sources = variants.source.split(variants.tokens.lengths.tolist())
        common = variants.is_common.split(variants.tokens.lengths.tolist())
        for v, tokens in enumerate(variants.tokens.cells()):
            row, gene = int(cells[variants.origin[v]]), int(variants.perturbed[v, 0])
            factor = edits.doses[variants.dose[v]]
            if not seen % 11:  # to tokenize takes longer than all else
                assert tokens.tolist() == expected(adata, row, [ids[gene]], factor, words)
            of_cell = packed.cells()[variants.origin[v]].tolist()
            assert [packed.values[place].item() for place in sources[v]] == tokens.tolist()
            assert tokens[common[v]].tolist() == [
                t for t in tokens.tolist() if t != gene and t in of_cell and t not in words.special.values()
            ]
            seen += 1
    n_genes = packed.lengths.sum() - 3 * (edits.front + edits.back)
    assert seen == len(on) == int(n_genes) * len(FACTORS)


def test_genes_of_a_list_are_multiplied_together(tmp_path: Path) -> None:
    words, adata = toys.vocabulary("v2"), toys.cells(4)
    folder = made(tmp_path, adata, words)
    ids = toys.gene_ids()[:2]  # which every cell has
    genes = tuple(words.token_ids[gene] for gene in ids)
    ready = CountEdits.of(
        edits_of(words, doses=(5.0,), genes=genes, together=True), CellCounts.read(folder, np.arange(4), words, adata)
    )
    _, packed = next(packed_cells(folder, np.arange(4), 4))
    variants = ready.on(packed, np.arange(4)).variants(0, 4)
    for row, tokens in enumerate(variants.tokens.cells()):
        assert tokens.tolist() == expected(adata, row, ids, 5.0, words)


def test_what_lies_beyond_the_limit_comes_in_when_a_gene_goes(tmp_path: Path) -> None:
    words, adata = toys.vocabulary("v2"), toys.cells(8, seed=3)
    folder = made(tmp_path, adata, words, max_len=7)
    cells = np.flatnonzero(folder.lengths() == 7)
    counts = CellCounts.read(folder, cells, words, adata)
    _, packed = next(packed_cells(folder, cells, 8))
    on = CountEdits.of(edits_of(words, doses=(0.0,)), counts).on(packed, np.arange(len(cells)))
    variants = on.variants(0, len(on))
    gone = [tokens.tolist() for tokens in variants.tokens.cells()]
    ids = {token: gene for gene, token in words.token_ids.items()}
    for tokens, origin, gene in list(zip(gone, variants.origin, variants.perturbed[:, 0], strict=True))[::3]:
        assert tokens == expected(adata, int(cells[origin]), [ids[int(gene)]], 0.0, words, max_len=7)
    inserted = (variants.source < 0).split(variants.tokens.lengths.tolist())
    assert {int(each.sum()) for each in inserted} >= {1}
    assert not (variants.is_common & (variants.source < 0)).any()


def test_counts_are_found_where_the_tokens_say(tmp_path: Path) -> None:
    words = toys.vocabulary("v1")
    for name in ("a", "b"):
        toys.cells(5, seed=ord(name), prefix=name, empty=(1,)).write_h5ad(tmp_path / f"{name}.h5ad")
    folder = tokenize([tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "tokens", dictionary=words, progress=False)
    cells = np.array([6, 0, 3, 5])  # of both files, in no order
    counts = CellCounts.read(folder, cells, words)
    _, packed = next(packed_cells(folder, cells, 4))
    genes = np.array([[int(cell[1])] for cell in packed.cells()])
    values, lengths = counts.ranked(np.arange(4), genes, np.full(4, 9.0))
    wanted = []
    for cell, gene in zip(cells, genes[:, 0], strict=True):
        name = folder.column("source_file")[cell].as_py()
        gene_id = next(each for each, token in words.token_ids.items() if token == gene)
        row = folder.column("source_row")[cell].as_py()
        wanted.append(expected(anndata.read_h5ad(name), row, [gene_id], 9.0, words))
    assert values.tolist() == list(itertools.chain(*wanted))
    assert lengths.tolist() == list(map(len, wanted))
    moved = [str((tmp_path / f"{name}.h5ad").rename(tmp_path / f"{name}2.h5ad")) for name in ("a", "b")]
    with pytest.raises(InputError, match=r"a\.h5ad, which is not there"):
        CellCounts.read(folder, cells, words)
    assert CellCounts.read(folder, cells, words, moved)
    with pytest.raises(InputError, match=r"made of 2 inputs, and counts .--counts. names 1"):
        CellCounts.read(folder, cells, words, moved[0])
    with pytest.raises(InputError, match="ranked again, they give other tokens for cell"):
        CellCounts.read(folder, cells, words, [moved[0], tmp_path / "c.h5ad"][:1] + _other(tmp_path))


def _other(folder: Path) -> list[str]:
    toys.cells(5, seed=1, prefix="z", empty=(1,)).write_h5ad(folder / "c.h5ad")
    return [str(folder / "c.h5ad")]


def test_counts_of_other_cells_are_refused(tmp_path: Path) -> None:
    words, adata = toys.vocabulary("v1"), toys.cells(6)
    folder = made(tmp_path, adata, words)
    with pytest.raises(InputError, match=r"not hold the counts .* ranked again"):
        CellCounts.read(folder, np.arange(6), words, toys.cells(6, seed=9))
    with pytest.raises(InputError, match=r"not hold the counts .* it has 4 cells"):
        CellCounts.read(folder, np.arange(6), words, adata[:4].copy())
    with pytest.raises(InputError, match="which is not there"):
        CellCounts.read(folder, np.arange(6), words)


def test_tokens_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"input_ids": [[5, 6]]}).save_to_disk(str(tmp_path / "t"))
    with pytest.raises(UnsupportedError, match="does not say which counts"):
        CellCounts.read(open_tokens(tmp_path / "t"), np.arange(1), toys.vocabulary("v1"), toys.cells(1))


@pytest.mark.parametrize(
    ("doses", "says"),
    [((), "say by which factors"), ((1.0,), "not 1.0"), ((-0.5,), "not -0.5"), ((2.0, 2.0), "differ"),
     ((1e300,), "not 1e.300"), ((float("inf"),), "not inf"), ((float("nan"),), "not nan")],
)  # fmt: skip
def test_factors_are_numbers_that_change_something(doses: tuple[float, ...], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        Edits("counts", doses=doses)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    words, adata = toys.vocabulary("v1"), toys.cells(4)
    folder = made(tmp_path, adata, words)
    others = dict.fromkeys(toys.gene_ids(), 1.0)
    other = Vocabulary.from_medians(others, "v1", name="other")
    with pytest.raises((InputError, VocabularyError), match="other tokens"):
        CellCounts.read(folder, np.arange(4), other, adata)
