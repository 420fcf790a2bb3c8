"""Ranking on a GPU: every kernel and branch against the reference, token for token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cells_to_rank import (
    BORDERS,
    Cells,
    assert_same,
    assert_same_padded,
    cells_of_lengths,
    csr_cells,
    launched,
    near_ties,
    random_cells,
    small_plan,
)
from geneformer_kernels import rank_genes
from geneformer_kernels.ops.rank_genes import device as on_device
from geneformer_kernels.ops.rank_genes import launches
from geneformer_kernels.ops.rank_genes.plan import IS_OPEN
from geneformer_kernels.tiles import in_order, place_of, position_of, sorted_places


@triton.jit
def _network_kernel(x_ptr, placed_ptr, out_ptr, LOG_N: tl.constexpr, LOG_EACH: tl.constexpr):
    o = tl.arange(0, 1 << LOG_N)
    x = sorted_places(tl.load(x_ptr + o), LOG_N, LOG_EACH)
    tl.store(placed_ptr + position_of(o, LOG_N, LOG_EACH), x)
    tl.store(out_ptr + place_of(position_of(o, LOG_N, LOG_EACH), LOG_N, LOG_EACH), in_order(x, LOG_N, LOG_EACH))


@pytest.mark.parametrize(("log_n", "warps"), [(1, 1), (4, 1), (5, 1), (6, 1), (8, 1), (8, 4), (10, 2)])
def test_network(device, log_n, warps):
    rng = np.random.default_rng(log_n)
    for x in (
        rng.integers(-(2**63), 2**63 - 1, 1 << log_n, dtype=np.int64, endpoint=True),
        rng.choice(np.array([-(2**63), -1, 0, 2**63 - 1]), 1 << log_n),
        np.arange(1 << log_n)[::-1].copy(),
    ):
        source = torch.from_numpy(x).to(device)
        placed, out = torch.zeros_like(source), torch.zeros_like(source)
        log_each = max(0, log_n - 5 - (warps.bit_length() - 1))
        _network_kernel[(1,)](source, placed, out, LOG_N=log_n, LOG_EACH=log_each, num_warps=warps)
        np.testing.assert_array_equal(out.cpu(), np.sort(x))
        np.testing.assert_array_equal(placed.cpu(), np.sort(x))


@pytest.mark.parametrize(
    ("dtype", "n_dtype", "is_division"),
    [
        *((dtype, "float32", True) for dtype in ("float64", "float16", "int64", "uint8", "int8", "uint16", "int16")),
        *((dtype, "float64", False) for dtype in ("float64", "int64", "uint16", "int8")),
        *(("float32", n, division) for n in ("float32", "float64", "int64") for division in (False, True)),
        *(("int32", n, division) for n in ("float32", "float64") for division in (False, True)),
        *((dtype, "float32", False) for dtype in ("uint8", "int16", "float16")),
    ],
)
def test_every_dtype(device, poisoned, dtype, n_dtype, is_division):
    cells = random_cells(len(dtype) * 7 + len(n_dtype), dtype=dtype, n_dtype=n_dtype)
    assert_same(cells, device, small_plan(), keep=40, is_division=is_division, first=998, last=999)
    near = near_ties(len(dtype), dtype, n_dtype)
    assert_same(near, device, small_plan(), keep=100, is_division=is_division)
    if n_dtype == "float32" or dtype == "float32":  # every dtype once, and every arithmetic
        near = near_ties(len(dtype), dtype, n_dtype, n_cells=1)
        assert_same(near, device, small_plan(select_above=16), keep=60, is_division=is_division)


def test_float32_steps_change_the_order():
    """Or else the cases above would not tell float32 from float64 arithmetic."""
    single = random_cells(3, n_cells=30, n_dtype="float32")
    double = dataclasses.replace(single, n_counts=single.n_counts.double())
    assert not torch.equal(single.reference(keep=100)[0], double.reference(keep=100)[0])


@pytest.mark.parametrize(
    ("dtype", "widened", "index_dtype"),
    [
        ("bool", "uint8", "int64"),
        ("uint32", "int64", "int16"),
        ("uint64", "float64", "int64"),
        ("bfloat16", "float32", "int64"),
    ],
)
def test_what_is_widened(device, dtype, widened, index_dtype):
    cells = random_cells(5, dtype="uint8", n_dtype="float32")
    want, _ = random_cells(5, dtype="uint8" if dtype == "bool" else "int32", n_dtype="float32").reference(keep=50)
    if dtype == "bool":
        cells.data = cells.data > 0
        want, _ = cells.reference(keep=50)
    if dtype == "bfloat16":
        want, _ = dataclasses.replace(cells, data=cells.data.float()).reference(keep=50)
    cells.data = cells.data.to(getattr(torch, dtype))
    cells.indices = cells.indices.to(getattr(torch, index_dtype))
    cells.indptr = cells.indptr.to(torch.int32)
    # The interpreter loads anything; a compiled kernel is made for COUNT_DTYPES.
    assert launches.CountBlock.of(*cells.block).data.dtype == getattr(torch, widened)
    values, _, _ = launched(cells.on(device), small_plan(), keep=50)
    assert torch.equal(values, want)


@pytest.mark.parametrize(
    ("keep", "specials"),
    [(1, {}), (2, {"first": 0}), (7, {"last": 5}), (16, {"first": 9, "last": 9}), (17, {}), (1000, {"first": 900})],
)
def test_truncation_and_specials(device, keep, specials):
    assert_same(random_cells(keep), device, small_plan(), keep=keep, **specials)


@pytest.mark.parametrize(
    ("keep", "specials", "has_shared"),
    [(200, {}, True), (13, {"first": 900}, False), (16, {"first": 900, "last": 901}, True)],
)
def test_borders_of_buckets(device, poisoned, keep, specials, has_shared):
    """Rows as wide as a sort and one entry wider, in no order, more of them than programs or one block of the list."""
    rng = np.random.default_rng(keep)
    column_to_gene = np.arange(70) if not has_shared else rng.permutation(70) % 60
    medians = np.append(np.ones(30), rng.lognormal(0, 1, 40))[: 60 if has_shared else 70]
    cells = cells_of_lengths(BORDERS, 70, column_to_gene, medians, seed=keep)
    assert tuple(cells.indptr.diff().tolist()) == BORDERS
    assert_same(cells, device, small_plan(), keep=keep, **specials)
    assert_same_padded(cells, device, small_plan(), keep=keep, **specials)


def test_borders_of_the_own_plan(device, poisoned):
    lengths = (8193, 512, 8192, 513, 0, 2048)
    rng = np.random.default_rng(0)
    column_to_gene = np.where(rng.random(9000) < 0.1, -1, np.arange(9000) % 8990)
    cells = cells_of_lengths(lengths, 9000, column_to_gene, rng.integers(1, 9, 8990) / 4.0)
    want, want_ends = cells.reference(keep=600, first=3)
    on = cells.on(device)
    values, cu_seqlens = rank_genes(*on.block, **on.genes, keep=600, first=3, impl="triton")
    assert torch.equal(cu_seqlens.cpu(), want_ends)
    assert torch.equal(values.cpu(), want)


@pytest.mark.parametrize("specials", [{}, {"first": 900, "last": 901}])
@pytest.mark.parametrize("n_kept", [0, 1])
def test_rows_that_are_mostly_dropped(device, poisoned, n_kept, specials):
    """A bucket's width of entries and hardly a gene: a cell without any has no special tokens, however wide its row."""
    column_to_gene = np.where(np.arange(70) < 69, -1, 0)
    dense = np.zeros((6, 70), "float32")
    for row, length in zip(dense, (16, 32, 64, 65, 69, 17), strict=True):
        row[:length] = 2.0
        row[69] = n_kept * 3.0
    cells = csr_cells(dense, column_to_gene, [5], [1.5])
    assert cells.reference(keep=4)[1][-1] == 6 * n_kept
    assert_same(cells, device, small_plan(), keep=4, **specials)
    assert_same_padded(cells, device, small_plan(), keep=4, **specials)


def test_cells_by_bucket(device, poisoned):
    """The list is what a stable sort gives, for all cells and for hard ones; what fits nowhere is not listed."""
    rng = np.random.default_rng(0)
    for n_cells in (1, 2, 9, 23):
        lengths = rng.choice(np.array(BORDERS), n_cells)
        indptr = torch.from_numpy(np.append(0, np.cumsum(lengths))).to(device)
        n_entries = int(indptr[-1])
        is_open = rng.random(n_cells) < 0.5
        buckets = np.searchsorted([0, 16, 32, 64], lengths)
        for select_above in (64, 32):
            buckets = np.where(lengths > select_above, 4, buckets)
            counts = dict(
                indptr_ptr=indptr, sizes_ptr=torch.full((n_cells,), -5, dtype=torch.int32, device=device),
                status_ptr=torch.from_numpy(np.where(is_open, IS_OPEN | 8, 8).astype("int32")).to(device),
            )  # fmt: skip
            for is_hard in (True, False):
                plan = small_plan(select_above=select_above)
                got = launches._in_buckets(plan, counts, n_entries, is_hard=is_hard)
                want = np.where(is_open | (buckets == 4), buckets, 0) if is_hard else buckets
                order = np.argsort(want, kind="stable")[(want == 0).sum() :]
                assert got["items_ptr"].tolist()[: len(order)] == order.tolist()
                bounds = np.searchsorted(np.sort(want[want > 0]), np.arange(6))
                assert got["bounds_ptr"].tolist()[:6] == bounds.tolist()
                assert (counts["sizes_ptr"] == (-5 if is_hard else 0)).all()
            assert (counts["status_ptr"] == 0).all()


def test_lists_stay_within_their_arrays(device, guarded):
    """The last block of cells is not full."""
    assert_same(random_cells(1, n_cells=5), device, small_plan(), keep=30)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_public_function(device, poisoned, impl):
    """The plan of the device itself, packed and padded."""
    cells = random_cells(8, n_cells=3)
    options = dict(keep=30, first=998, last=999, is_division=True)
    want, want_ends = cells.reference(**options)
    on = cells.on(device)
    values, cu_seqlens = rank_genes(*on.block, **on.genes, **options, impl=impl)
    assert values.dtype == cu_seqlens.dtype == torch.int64
    assert torch.equal(values.cpu(), want)
    assert torch.equal(cu_seqlens.cpu(), want_ends)

    rows, cu_seqlens = rank_genes(*on.block, **on.genes, **options, padded_length=40, pad_id=7, impl=impl)
    assert torch.equal(cu_seqlens.cpu(), want_ends)
    lengths = want_ends.diff().tolist()
    assert rows.shape == (3, 40)
    for row, length, tokens in zip(rows.cpu(), lengths, want.split(lengths), strict=True):
        assert torch.equal(row[:length], tokens)
        assert (row[length:] == 7).all()
    with pytest.raises(ValueError, match="padded_length 31 is less than the 32 tokens"):
        rank_genes(*on.block, **on.genes, **options, padded_length=31, impl=impl)


def test_same_as_the_compiled_loop(device):
    pytest.importorskip("numba")
    for seed in range(3):  # of one dtype: the loop is compiled for each, and meets the others in its own tests
        cells = random_cells(seed)
        want, want_ends = rank_genes(*cells.block, **cells.genes, keep=50, first=3, impl="numba")
        values, cu_seqlens, _ = launched(cells.on(device), small_plan(), keep=50, first=3)
        assert torch.equal(values, want)
        assert torch.equal(cu_seqlens, want_ends)


def test_no_cells_no_entries_no_genes(device):
    cells = random_cells(0).on(device)
    none = dataclasses.replace(cells, indptr=cells.indptr[:1], indices=cells.indices[:0], data=cells.data[:0])
    none.n_counts = none.n_counts[:0]
    empty = dataclasses.replace(none, indptr=torch.zeros(4, dtype=torch.int64, device=device))
    empty.n_counts = cells.n_counts[:3]
    no_genes = dataclasses.replace(
        cells,
        token_ids=cells.token_ids[:0],
        medians=cells.medians[:0],
        column_to_gene=cells.column_to_gene.clamp(max=-1),
    )
    for part in (none, empty, no_genes):
        values, cu_seqlens = rank_genes(*part.block, **part.genes, keep=5, first=1, impl="triton")
        assert len(values) == 0
        assert cu_seqlens.tolist() == [0] * len(part.indptr)


def test_custom_operator(device):
    cells = random_cells(1, n_cells=3, n_columns=60, n_genes=50).on(device)
    columns = on_device.prepare_columns(**cells.genes)
    arguments = (*cells.block, *columns.tables, 20, 7, -1)
    for padded_length in (None, 30):
        # What lies behind the tokens is not initialised, so only the schema and the shapes can be compared.
        torch.library.opcheck(
            on_device.rank_genes_fwd.overload, (*arguments, padded_length, 0, False),
            test_utils=("test_schema", "test_faketensor") if padded_length else ("test_faketensor",),
        )  # fmt: skip

    @torch.compile(fullgraph=True, backend="eager")
    def rank(indptr, indices, data, n_counts):
        ranked = on_device.rank_cells(indptr, indices, data, n_counts, columns, keep=20, first=7)
        return ranked.values + 1, ranked.cu_seqlens

    values, cu_seqlens = rank(*cells.block)
    want, want_ends = cells.reference(keep=20, first=7)
    assert torch.equal(cu_seqlens, want_ends)
    assert torch.equal(values[: len(want)], want + 1)


def test_real_cells_as_the_official_tokenizer_ranks_them(device, shared_dir):
    h5py, parquet = pytest.importorskip("h5py"), pytest.importorskip("pyarrow.parquet")
    from geneformer_fast.tokenization.genes import map_genes
    from geneformer_fast.tokenization.vocabulary import Vocabulary

    n_cells = 8
    with h5py.File(shared_dir / "data/pbmc_facs/pbmc_facs_test100.h5ad") as file:
        indptr = file["X/indptr"][: n_cells + 1]
        indices, data = file["X/indices"][: indptr[-1]], file["X/data"][: indptr[-1]]
        n_counts = file["obs/n_counts"][:n_cells]
        ids = file["var/ensembl_id"].asstr()[:]
    for preset in ("v1", "v2"):
        vocabulary = Vocabulary.from_folder(shared_dir / "data/dicts", preset)
        genes = map_genes(ids, vocabulary, source_name="cells")
        arrays = (indptr, indices, data, n_counts, genes.column_to_gene, genes.token_ids, genes.medians)
        cells = Cells(*(torch.from_numpy(np.asarray(array)) for array in arrays)).on(device)
        first, last = (vocabulary.special.get(name, -1) if preset == "v2" else -1 for name in ("cls", "eos"))
        keep = vocabulary.max_len - (2 if preset == "v2" else 0)
        values, cu_seqlens = rank_genes(*cells.block, **cells.genes, keep=keep, first=first, last=last, impl="triton")
        path = shared_dir / f"data/reference_official/pbmc_facs_test100__{preset.upper()}.parquet"
        official = parquet.read_table(path, columns=["input_ids"])["input_ids"].to_pylist()[:n_cells]
        assert [part.tolist() for part in values.cpu().split(cu_seqlens.diff().tolist())] == official
