"""Ranking: the compiled loop against the reference and against plain numpy, bit for bit."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from geneformer_kernels import rank_genes
from geneformer_kernels.dispatch import ImplUnavailableError, choose
from geneformer_kernels.ops.rank_genes import host
from geneformer_kernels.ops.rank_genes.plan import plan
from geneformer_kernels.target import CARDS
from hypothesis import given, settings
from hypothesis import strategies as st

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _oracle_scores(x, n, medians, is_division):
    """The score as numpy computes it from the arrays' own dtypes."""
    if is_division:
        return np.asarray((x / n) * 10000, dtype=np.float64) / medians
    return np.asarray((x * np.true_divide(1.0, n)) * 10000, dtype=np.float64) * np.true_divide(1.0, medians)


def _oracle(dense, n_counts, column_to_gene, token_ids, medians, *, is_division, keep, first=-1, last=-1):
    """One cell after another, with numpy's lexsort."""
    cells = []
    for row, n in zip(dense, n_counts, strict=True):
        total = np.zeros(len(token_ids), dtype=row.dtype)
        for column, gene in enumerate(column_to_gene):
            if gene >= 0:
                total[gene] += row[column]
        genes = np.flatnonzero(total)
        score = _oracle_scores(total[genes], np.full(len(genes), n, n_counts.dtype), medians[genes], is_division)
        ranked = token_ids[genes[np.lexsort((token_ids[genes], -score))]][:keep].tolist()
        if ranked:
            ranked = [first] * (first >= 0) + ranked + [last] * (last >= 0)
        cells.append(ranked)
    return cells


def _csr(dense, rng=None):
    """indptr, indices, data; with ``rng`` the columns of each row are shuffled and some zeros are stored."""
    indptr, indices, data = [0], [], []
    for row in dense:
        columns = np.flatnonzero(row)
        if rng is not None:
            zeros = np.flatnonzero(row == 0)
            columns = rng.permutation(np.concatenate([columns, rng.permutation(zeros)[:2]]))
        indices.append(columns)
        data.append(row[columns])
        indptr.append(indptr[-1] + len(columns))
    return np.array(indptr), np.concatenate(indices).astype(np.int32), np.concatenate(data).astype(dense.dtype)


def _split(values, lengths):
    return [part.tolist() for part in np.split(np.asarray(values), np.cumsum(lengths)[:-1])]


def _problem(rng, n_rows=40, n_columns=300, n_genes=200, dtype="float32", density=0.3, n_medians=50):
    dense = rng.poisson(2.0, (n_rows, n_columns)) * (rng.random((n_rows, n_columns)) < density)
    if np.dtype(dtype).kind == "f":
        dense = dense * rng.choice([1.0, 1.0, 0.37, 12.75], (n_rows, n_columns))
    dense[n_rows // 2] = 0
    column_to_gene = np.where(rng.random(n_columns) < 0.1, -1, rng.integers(0, n_genes, n_columns))
    medians = rng.choice(rng.lognormal(0, 2, n_medians), n_genes)  # shared medians make ties
    return dense.astype(dtype), column_to_gene, rng.permutation(n_genes * 3)[:n_genes].astype(np.int32), medians


# Each pair of dtypes is compiled for itself. With float32 on one side numpy computes now in float32, now in float64:
# small and large integers are shown by one dtype each. Otherwise it always computes in float64: of those pairs two are
# enough. The rest are slow tests.
PAIRS = [
    pytest.param(dtype, n_dtype, marks=() if is_shown else pytest.mark.slow)
    for dtype in ("float32", "float64", "int32", "int64", "uint16", "uint8", "int16")
    for n_dtype in ("float64", "float32", "int64")
    for is_shown in [
        dtype == "float32"
        or (n_dtype == "float32" and dtype in ("float64", "int32", "uint8"))
        or (dtype, n_dtype) in (("float64", "float64"), ("uint8", "int64"))
    ]
]


@pytest.mark.parametrize("is_division", [False, True])
@pytest.mark.parametrize(("dtype", "n_dtype"), PAIRS)
def test_every_dtype_as_numpy_computes_it(dtype, n_dtype, is_division):
    rng = np.random.default_rng(len(dtype) * 7 + len(n_dtype))
    dense, column_to_gene, token_ids, medians = _problem(rng, dtype=dtype)
    # Ratios of small integers: scores that are equal but for the rounding of exactly these steps.
    medians = rng.integers(1, 13, len(medians)) / 7
    column_to_gene = np.where(np.arange(len(column_to_gene)) < len(token_ids), np.arange(len(column_to_gene)), -1)
    n_counts = (dense.sum(1).astype("float64") * 1.37 + 1).astype(n_dtype)
    want = _oracle(dense, n_counts, column_to_gene, token_ids, medians, is_division=is_division, keep=1000)
    values, lengths = host.rank_block(
        *_csr(dense, rng), n_counts, host.prepare_columns(column_to_gene, token_ids, medians),
        is_division=is_division, keep=1000,
    )  # fmt: skip
    assert _split(values, lengths) == want


@pytest.mark.parametrize("keep", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("specials", [(-1, -1), (900, 901)])
def test_truncation_and_specials(keep, specials):
    rng = np.random.default_rng(keep)
    dense, column_to_gene, token_ids, medians = _problem(rng)
    n_counts = dense.sum(1).astype("float64") + 1
    first, last = specials
    want = _oracle(
        dense, n_counts, column_to_gene, token_ids, medians, is_division=False, keep=keep, first=first, last=last
    )
    values, lengths = host.rank_block(
        *_csr(dense, rng), n_counts, host.prepare_columns(column_to_gene, token_ids, medians),
        is_division=False, keep=keep, first=first, last=last, out_dtype=np.int16,
    )  # fmt: skip
    assert values.dtype == np.int16
    assert _split(values, lengths) == want
    assert lengths[len(dense) // 2] == 0, "an empty cell has no tokens, not even specials"


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 5), min_size=30, max_size=30), min_size=1, max_size=6),
    medians=st.lists(st.sampled_from([0.5, 1.0, 1.0000000000000002, 2.0, 3.3e-7, 289.0]), min_size=20, max_size=20),
    seed=st.integers(0, 2**31),
    keep=st.integers(1, 25),
    is_division=st.booleans(),
)
def test_any_counts_any_column_order(counts, medians, seed, keep, is_division):
    """Ties, shared genes, dropped columns, cuts through ties; and a permutation of the columns changes nothing."""
    rng = np.random.default_rng(seed)
    dense, medians = np.array(counts, dtype="float32"), np.array(medians)
    column_to_gene, token_ids = rng.integers(-1, 20, 30), rng.permutation(20).astype(np.int32)
    n_counts = dense.sum(1).astype("float64") + rng.integers(1, 50)
    want = _oracle(dense, n_counts, column_to_gene, token_ids, medians, is_division=is_division, keep=keep)
    for order in (np.arange(30), rng.permutation(30)):
        columns = host.prepare_columns(column_to_gene[order], token_ids, medians)
        values, lengths = host.rank_block(
            *_csr(dense[:, order], rng), n_counts, columns, is_division=is_division, keep=keep
        )
        assert _split(values, lengths) == want


@pytest.mark.parametrize("n", [47, 48, 49, 50, 257, 5000])
def test_long_runs_of_equal_scores(n):
    """More equal or nearly equal scores than insertion sorts: all of one value, and neighbours one rounding apart."""
    rng = np.random.default_rng(n)
    token_ids = rng.permutation(n).astype(np.int32)
    for medians in (np.ones(n), 1 + rng.integers(0, 3, n) * 2.0**-52, np.where(rng.random(n) < 0.9, 1.0, 1e-30)):
        dense = np.ones((2, n), dtype="float32")
        n_counts = np.array([float(n), 3.0])
        want = _oracle(dense, n_counts, np.arange(n), token_ids, medians, is_division=True, keep=n - 3)
        columns = host.prepare_columns(np.arange(n), token_ids, medians)
        values, lengths = host.rank_block(*_csr(dense), n_counts, columns, is_division=True, keep=n - 3)
        assert _split(values, lengths) == want


def test_sums_of_float_columns_do_not_depend_on_column_order():
    """Genes of five columns each, whose exact sums differ by one rounding of float64 or not at all."""
    rng = np.random.default_rng(3)
    parts = rng.lognormal(0, 2, (50, 1, 5)) * np.ones((1, 12, 1))
    parts[:, ::3, 0] *= 1 + 2.0**-52
    dense = parts.reshape(50, 60)
    column_to_gene, token_ids, medians = np.repeat(np.arange(12), 5), rng.permutation(12), np.ones(12)
    ranked = set()
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(60)
        values, _ = host.rank_block(
            *_csr(dense[:, order], rng), np.ones(50), host.prepare_columns(column_to_gene[order], token_ids, medians),
            is_division=False, keep=12,
        )  # fmt: skip
        ranked.add(values.tobytes())
    assert len(ranked) == 1


@pytest.mark.parametrize("impl", ["numba", "reference"])
@pytest.mark.parametrize("is_division", [False, True])
@pytest.mark.parametrize(("dtype", "n_dtype"), [("float32", "float32"), ("float32", "float64"), ("int32", "int64")])
def test_public_function(impl, is_division, dtype, n_dtype):
    rng = np.random.default_rng(11)
    dense, column_to_gene, token_ids, medians = _problem(rng, dtype=dtype)
    column_to_gene[:150] = np.arange(150)
    n_counts = (dense.sum(1) + 1.0).astype(n_dtype)
    if dtype == "float32":
        dense = np.round(dense)  # sums in any order are exact
    want = _oracle(
        dense, n_counts, column_to_gene, token_ids, medians, is_division=is_division, keep=60, first=998, last=999
    )
    values, cu_seqlens = rank_genes(
        *(torch.from_numpy(part) for part in _csr(dense, rng)), torch.from_numpy(n_counts),
        column_to_gene=torch.from_numpy(column_to_gene), token_ids=torch.from_numpy(token_ids),
        medians=torch.from_numpy(medians), keep=60, first=998, last=999, is_division=is_division, impl=impl,
    )  # fmt: skip
    assert values.dtype == cu_seqlens.dtype == torch.int64
    assert _split(values, np.diff(cu_seqlens)) == want


def test_no_cells_and_no_entries():
    columns = host.prepare_columns(np.arange(3), np.arange(3), np.ones(3))
    empty = np.zeros(0, dtype="float32")
    values, lengths = host.rank_block(
        np.zeros(1, int), empty.astype("i4"), empty, empty, columns, is_division=False, keep=5
    )
    assert len(values) == len(lengths) == 0
    values, lengths = host.rank_block(
        np.zeros(4, int), empty.astype("i4"), empty, np.zeros(3), columns, is_division=False, keep=5, first=1, last=2
    )
    assert len(values) == 0
    assert lengths.tolist() == [0, 0, 0]


GENES = dict(column_to_gene=[0, 1, 2], token_ids=[0, 1, 2], medians=[1.0, 1.0, 1.0])
every_implementation = pytest.mark.parametrize(
    "impl",
    ["numba", "reference", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled here"))],
)


def _rank(impl, indptr=(0, 2), indices=(0, 1), n_counts=(5.0,), data=None, **changes):
    """The public function on a small block that is fine but for ``changes``; the tokens of each cell."""
    genes = {name: torch.as_tensor(value) for name, value in (GENES | changes).items()}
    data = torch.ones(len(indices)) if data is None else torch.as_tensor(data)
    block = torch.tensor(indptr), torch.tensor(indices, dtype=torch.int64), data, torch.tensor(n_counts)
    values, cu_seqlens = rank_genes(*block, **genes, keep=5, impl=impl)
    return _split(values, np.diff(cu_seqlens))


@every_implementation
def test_wrong_blocks_and_genes(impl):
    assert _rank(impl) == [[0, 1]]
    for indptr, indices, row in (((0, 3), (2, 0, 2), 0), ((0, 1, 4), (1, 2, 0, 2), 1), ((0, 3), (0, 1, 1), 0)):
        with pytest.raises(host.RepeatedColumnError, match=f"row {row} names a column twice"):
            _rank(impl, indptr, indices, (5.0,) * (len(indptr) - 1))
    for indices in ([0, 3], [-1, 1], [0, 2**32 + 1]):
        with pytest.raises(ValueError, match="row 0: a column index is out of range"):
            _rank(impl, indices=indices)
    for indptr in ([0, 9], [1, 0], [-1, 2]):
        with pytest.raises(ValueError, match="row 0: indptr does not fit"):
            _rank(impl, indptr)
    for n in (0.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="row 0 has entries but n_counts"):
            _rank(impl, n_counts=[n])
    for wrong in ([1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match="medians must be positive"):
            _rank(impl, medians=wrong)
    for wrong in ([4, 4, 5], [-1, 4, 5], [1, 2, 2**31], [1, 2, 2**32 + 4]):
        with pytest.raises(ValueError, match="unique"):
            _rank(impl, token_ids=wrong)
    with pytest.raises(ValueError, match="a gene that is not there"):
        _rank(impl, column_to_gene=[0, 1, 3])


@every_implementation
def test_cells_with_nothing_to_rank_need_no_total(impl):
    """Cells without entries, and such whose entries are stored zeros or columns that are left out."""
    assert _rank(impl, (0, 0), (), (0.0,)) == [[]]
    for n in (0.0, float("nan")):
        options = dict(n_counts=(n, n, 3.0), data=[0, 0, 4, 0, 2], column_to_gene=[0, 1, -1])
        assert _rank(impl, (0, 2, 4, 5), (0, 1, 2, 0, 1), **options) == [[], [], [1]]


@every_implementation
def test_rows_need_not_begin_with_the_first_entry(impl):
    assert _rank(impl, (1, 3), (2, 0, 1, 2)) == [[0, 1]]


@every_implementation
@pytest.mark.parametrize(
    ("dtype", "addends", "other", "is_greater"),
    [
        ("int32", [2**30] * 3, 2**31 - 1, True),  # more than the dtype holds
        ("int64", [2**62] * 3, 2**63 - 1, True),
        ("float64", [0.1, 0.2, 0.3], 0.6, False),  # added one after another they are more
        ("float32", [2.0**24, 1.0, 1.0], 2.0**24, True),  # and these are not
        ("bfloat16", [256.0, 0.5, 0.5], 256.0, True),  # rounded to float32
    ],
)
def test_sums_of_columns_that_share_a_gene(impl, dtype, addends, other, is_greater):
    """Three columns are gene 1; the fourth is gene 0, which goes first if both are equal."""
    for sum_of in (addends, addends[::-1]):
        data = torch.tensor([*sum_of, other], dtype=getattr(torch, dtype))
        genes = dict(column_to_gene=[1, 1, 1, 0], token_ids=[0, 1], medians=[1.0, 1.0])
        assert _rank(impl, (0, 4), (0, 1, 2, 3), (1.0,), data, **genes) == [[1, 0] if is_greater else [0, 1]]


@pytest.mark.parametrize("signs", [[1, -1], [-1, -1], [-1, 1, 1]])
def test_negative_counts_do_no_harm(signs):
    """They are not allowed, and where nobody looks the order means nothing, but each gene comes once."""
    for n_genes in (2, 4000):  # many columns to a gene, and one
        columns = host.prepare_columns(np.arange(4000) % n_genes, np.arange(n_genes), np.ones(n_genes))
        data = np.resize(signs, 4000) * np.resize([1.0, 2.5, 3e-300, 1e300], 4000)
        block = np.array([0, 4000]), np.arange(4000), data, np.ones(1)
        values, lengths = host.rank_block(*block, columns, is_division=False, keep=4000, is_checked=True)
        assert sorted(values.tolist()) == list(range(n_genes))
        assert lengths.tolist() == [n_genes]


def test_what_is_refused():
    columns = host.prepare_columns(np.arange(3), np.arange(3), np.ones(3))

    def rank(indptr, indices, n_counts=(5.0,)):
        data = np.ones(len(indices), dtype="float32")
        return host.rank_block(
            np.array(indptr), np.array(indices), data, np.array(n_counts), columns, is_division=False, keep=5
        )

    with pytest.raises(host.RepeatedColumnError, match="row 0 names a column twice"):
        rank([0, 3], [2, 0, 2])
    for indices in ([0, 3], [-1, 1]):
        with pytest.raises(ValueError, match="column index is out of range"):
            rank([0, 2], indices)
    with pytest.raises(ValueError, match="indptr does not fit"):
        rank([0, 9], [0, 1])
    for n in (0.0, -3.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="row 0 has entries but n_counts"):
            rank([0, 2], [0, 1], [n])
    with pytest.raises(ValueError, match="unique"):
        host.prepare_columns(np.arange(2), [4, 4], [1.0, 1.0])
    with pytest.raises(ValueError, match="positive"):
        host.prepare_columns(np.arange(2), [4, 5], [1.0, 0.0])
    with pytest.raises(ValueError, match="at most"):
        plan(widest_row=1 << 23, keep=5)
    with pytest.raises(ValueError, match="keep"):
        plan(widest_row=3, keep=0)


def test_the_compiled_loop_is_for_the_cpu():
    assert choose("rank_genes", "float64", CARDS["H100"]).impl != "numba"
    with pytest.raises(ImplUnavailableError, match="CPU only"):
        choose("rank_genes", "float64", CARDS["H100"], "numba")
