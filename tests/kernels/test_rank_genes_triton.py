"""Ranking on a GPU: every kernel and branch against the reference, token for token."""

from __future__ import annotations

import dataclasses
import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from geneformer_kernels import rank_genes
from geneformer_kernels.dispatch import Impl, candidates
from geneformer_kernels.launch import Launch
from geneformer_kernels.ops.rank_genes import device as on_device
from geneformer_kernels.ops.rank_genes import kernel, kernel_hard, launches
from geneformer_kernels.ops.rank_genes.columns import RepeatedColumnError
from geneformer_kernels.ops.rank_genes.plan import (
    IS_OPEN,
    REPEATED_COLUMN,
    WRONG_COLUMN,
    WRONG_INDPTR,
    WRONG_TOTAL,
    DevicePlan,
    SortPlan,
    device_plan,
    kernel_cases,
)
from geneformer_kernels.target import CARDS, Target
from geneformer_kernels.tiles import in_order, place_of, position_of, sorted_places

_LAUNCH = Launch(num_warps=1, num_stages=1, enable_fp_fusion=False)


def _small_plan(widths=(16, 32, 64), select_above=64, **changes) -> DevicePlan:
    """Blocks so small that cells of some dozens of genes meet every loop and every bucket."""
    sorts = tuple(SortPlan(width, 2, _LAUNCH, _LAUNCH, _LAUNCH) for width in widths)
    plan = DevicePlan(
        sorts, select_above, n_select_programs=2, n_score_programs=2, settle_small=len(sorts) // 2, list_block=2,
        list_rows=2, score_block=32, sum_block=16, select_block=128, place_block=16, repeats_tile=(16, 32),
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


@dataclasses.dataclass
class _Cells:
    """A block of cells and its genes, on the CPU."""

    indptr: torch.Tensor
    indices: torch.Tensor
    data: torch.Tensor
    n_counts: torch.Tensor
    column_to_gene: torch.Tensor
    token_ids: torch.Tensor
    medians: torch.Tensor

    @property
    def block(self) -> tuple[torch.Tensor, ...]:
        return self.indptr, self.indices, self.data, self.n_counts

    @property
    def genes(self) -> dict[str, torch.Tensor]:
        return dict(column_to_gene=self.column_to_gene, token_ids=self.token_ids, medians=self.medians)

    def on(self, device: str) -> _Cells:
        return _Cells(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def reference(self, **options) -> tuple[torch.Tensor, torch.Tensor]:
        return rank_genes(*self.block, **self.genes, **options, impl="reference")


def _cells(dense, column_to_gene, token_ids, medians, n_counts=None, *, rng=None) -> _Cells:
    """CSR of a dense matrix; with ``rng`` rows are shuffled and some zeros stored."""
    indptr, indices, data = [0], [], []
    for row in dense:
        columns = np.flatnonzero(row)
        if rng is not None:
            columns = rng.permutation(np.concatenate([columns, rng.permutation(np.flatnonzero(row == 0))[:2]]))
        indices.append(columns)
        data.append(row[columns])
        indptr.append(indptr[-1] + len(columns))
    if n_counts is None:
        n_counts = dense.sum(1).astype("float64") + 1
    arrays = (
        np.array(indptr), np.concatenate(indices).astype("int32"), np.concatenate(data).astype(dense.dtype), n_counts,
        np.asarray(column_to_gene), np.asarray(token_ids), np.asarray(medians, dtype="float64"),
    )  # fmt: skip
    return _Cells(*(torch.from_numpy(array) for array in arrays))


def _random(seed=0, n_cells=4, n_columns=70, n_genes=60, dtype="float32", density=0.5, n_dtype="float64") -> _Cells:
    """Shared genes, dropped columns, shared medians, ratios of small integers, an empty cell, a cell of one gene."""
    rng = np.random.default_rng(seed)
    shape = (n_cells, n_columns)
    dense = rng.poisson(3.0, shape) * (rng.random(shape) < density * rng.uniform(0.1, 2, (n_cells, 1)))
    if np.dtype(dtype).kind == "f":
        dense = dense * rng.choice([1.0, 0.375, 12.75], shape)  # sums in any order are exact
    dense[n_cells // 2] = 0
    dense[-1] = 0
    dense[-1, 3] = 2
    column_to_gene = np.where(rng.random(n_columns) < 0.1, -1, rng.integers(0, n_genes, n_columns))
    column_to_gene[: 3 * n_genes // 4] = np.arange(3 * n_genes // 4)
    medians = np.where(rng.random(n_genes) < 0.5, rng.integers(1, 13, n_genes) / 7, rng.lognormal(0, 2, n_genes))
    token_ids = rng.permutation(3 * n_genes)[:n_genes]
    n_counts = (dense.sum(1) * 1.37 + 1).astype(n_dtype)
    return _cells(dense.astype(dtype), column_to_gene, token_ids, medians, n_counts, rng=rng)


def _near_ties(seed: int, dtype: str, n_dtype: str, n_cells: int = 2, n_genes: int = 50) -> _Cells:
    """Counts that are small multiples of the medians: scores differ by nothing but how each step is rounded."""
    rng = np.random.default_rng(seed)
    units = rng.integers(1, 40, n_genes)
    dense = units * rng.integers(1, 4, (n_cells, n_genes)) * (rng.random((n_cells, n_genes)) < 0.6)
    n_counts = (dense.sum(1) * 1.37 + 1).astype(n_dtype)
    return _cells(dense.astype(dtype), np.arange(n_genes), rng.permutation(n_genes), units / 7, n_counts, rng=rng)


def _launched(cells: _Cells, plan: DevicePlan, *, keep, first=-1, last=-1, is_division=False, is_checked=False):
    """values, cu_seqlens and status of one run of a plan, with a sentinel behind the values."""
    columns = on_device.prepare_columns(**cells.genes, is_division=is_division)
    n_specials = int(first >= 0) + int(last >= 0)
    capacity = on_device.capacity_of(len(cells.indices), len(cells.n_counts), keep, n_specials)
    buffer = torch.full((capacity + 64,), -77, dtype=torch.int64, device=cells.data.device)
    cu_seqlens, status = launches.launch(
        plan, launches.CountBlock.of(*cells.block), columns.tables, buffer[:capacity],
        keep=keep, first=first, last=last, is_checked=is_checked,
    )  # fmt: skip
    n_tokens = int(cu_seqlens[-1])
    assert (buffer[n_tokens:] == -77).all(), "nothing is written behind the last token"
    return buffer[:n_tokens].cpu(), cu_seqlens.cpu(), status.cpu()


def _assert_same(cells: _Cells, device: str, plan: DevicePlan, **options) -> torch.Tensor:
    want, want_ends = cells.reference(**options)
    values, cu_seqlens, status = _launched(cells.on(device), plan, **options)
    assert torch.equal(cu_seqlens, want_ends)
    assert torch.equal(values, want)
    return status


def _assert_same_padded(cells: _Cells, device: str, plan: DevicePlan, *, keep, first=-1, last=-1) -> None:
    """Rows of just the length that a cell can have, with a sentinel in and behind them."""
    want, want_ends = cells.reference(keep=keep, first=first, last=last)
    on = cells.on(device)
    n_cells, length = len(cells.n_counts), keep + int(first >= 0) + int(last >= 0)
    buffer = torch.full((n_cells * length + 64,), -77, dtype=torch.int64, device=device)
    columns = on_device.prepare_columns(**on.genes)
    cu_seqlens, _ = launches.launch(
        plan, launches.CountBlock.of(*on.block), columns.tables, buffer[: n_cells * length].view(n_cells, length),
        keep=keep, first=first, last=last, is_checked=False,
    )  # fmt: skip
    assert torch.equal(cu_seqlens.cpu(), want_ends)
    assert (buffer[n_cells * length :] == -77).all()
    rows, parts = buffer.cpu()[: n_cells * length].view(n_cells, length), want.split(want_ends.diff().tolist())
    for row, tokens in zip(rows, parts, strict=True):
        assert torch.equal(row[: len(tokens)], tokens)
        assert (row[len(tokens) :] == -77).all()


def _of_lengths(lengths, n_columns, column_to_gene, medians, *, seed=0, dtype="float32") -> _Cells:
    """Rows of so many entries each, in ascending columns; counts whose sums are exact in any order."""
    rng = np.random.default_rng(seed)
    dense = np.zeros((len(lengths), n_columns), dtype)
    for row, length in zip(dense, lengths, strict=True):
        row[rng.choice(n_columns, length, replace=False)] = rng.integers(1, 9, length)
    return _cells(dense, column_to_gene, rng.permutation(2 * len(medians))[: len(medians)], medians)


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
    cells = _random(len(dtype) * 7 + len(n_dtype), dtype=dtype, n_dtype=n_dtype)
    _assert_same(cells, device, _small_plan(), keep=40, is_division=is_division, first=998, last=999)
    near = _near_ties(len(dtype), dtype, n_dtype)
    _assert_same(near, device, _small_plan(), keep=100, is_division=is_division)
    if n_dtype == "float32" or dtype == "float32":  # every dtype once, and every arithmetic
        near = _near_ties(len(dtype), dtype, n_dtype, n_cells=1)
        _assert_same(near, device, _small_plan(select_above=16), keep=60, is_division=is_division)


def test_float32_steps_change_the_order():
    """Or else the cases above would not tell float32 from float64 arithmetic."""
    single = _random(3, n_cells=30, n_dtype="float32")
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
    cells = _random(5, dtype="uint8", n_dtype="float32")
    want, _ = _random(5, dtype="uint8" if dtype == "bool" else "int32", n_dtype="float32").reference(keep=50)
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
    values, _, _ = _launched(cells.on(device), _small_plan(), keep=50)
    assert torch.equal(values, want)


@pytest.mark.parametrize(
    ("keep", "specials"),
    [(1, {}), (2, {"first": 0}), (7, {"last": 5}), (16, {"first": 9, "last": 9}), (17, {}), (1000, {"first": 900})],
)
def test_truncation_and_specials(device, keep, specials):
    _assert_same(_random(keep), device, _small_plan(), keep=keep, **specials)


_BORDERS = (64, 0, 17, 16, 65, 1, 33, 31, 0, 32, 15, 66, 63, 2, 16, 64)


@pytest.mark.parametrize(
    ("keep", "specials", "has_shared"),
    [(200, {}, True), (13, {"first": 900}, False), (16, {"first": 900, "last": 901}, True)],
)
def test_borders_of_buckets(device, poisoned, keep, specials, has_shared):
    """Rows as wide as a sort and one entry wider, in no order, more of them than programs or one block of the list."""
    rng = np.random.default_rng(keep)
    column_to_gene = np.arange(70) if not has_shared else rng.permutation(70) % 60
    medians = np.append(np.ones(30), rng.lognormal(0, 1, 40))[: 60 if has_shared else 70]
    cells = _of_lengths(_BORDERS, 70, column_to_gene, medians, seed=keep)
    assert tuple(cells.indptr.diff().tolist()) == _BORDERS
    _assert_same(cells, device, _small_plan(), keep=keep, **specials)
    _assert_same_padded(cells, device, _small_plan(), keep=keep, **specials)


def test_borders_of_the_own_plan(device, poisoned):
    lengths = (8193, 512, 8192, 513, 0, 2048)
    rng = np.random.default_rng(0)
    column_to_gene = np.where(rng.random(9000) < 0.1, -1, np.arange(9000) % 8990)
    cells = _of_lengths(lengths, 9000, column_to_gene, rng.integers(1, 9, 8990) / 4.0)
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
    cells = _cells(dense, column_to_gene, [5], [1.5])
    assert cells.reference(keep=4)[1][-1] == 6 * n_kept
    _assert_same(cells, device, _small_plan(), keep=4, **specials)
    _assert_same_padded(cells, device, _small_plan(), keep=4, **specials)


@pytest.mark.parametrize("select_above", [16, 64])
@pytest.mark.parametrize("n_medians", [1, 60])
def test_shared_genes_of_a_cell(device, poisoned, n_medians, select_above):
    """Pairs, triples and a gene of five columns in one cell, far apart and in rows of any order, among other genes."""
    rng = np.random.default_rng(n_medians)
    column_to_gene = np.arange(64)
    column_to_gene[[3, 60]] = 3
    column_to_gene[[5, 6, 40]] = 5
    column_to_gene[[0, 63]] = 0
    column_to_gene[[10, 20, 30, 50, 55]] = 10
    column_to_gene[[21, 22]] = -1
    dense = rng.integers(0, 9, (4, 64)).astype("float32")
    dense[1, [3, 60, 5, 6, 40]] = 7  # all of them there
    dense[2, [60, 6, 40]] = 0  # one column of a gene of several
    dense[3] = 0
    dense[3, [5, 6, 40]] = 2  # nothing else in the cell
    medians = np.ones(64) if n_medians == 1 else rng.lognormal(0, 1, 64)
    plan = _small_plan(select_above=select_above)
    for shuffled, keep in ((None, 7), (rng, 64)):
        cells = _cells(dense, column_to_gene, rng.permutation(64), medians, rng=shuffled)
        status = _assert_same(cells, device, plan, keep=keep, first=99)
    if select_above == 64:
        _assert_same_padded(cells, device, plan, keep=20, last=98)
    assert n_medians > 1 or not (status & IS_OPEN).any(), "these were settled where they were scored"


@pytest.mark.parametrize("select_above", [16, 64])
@pytest.mark.parametrize("keep", [9, 64])
def test_open_pairs_of_shared_genes(device, poisoned, keep, select_above):
    """Sums that tie with other genes of other medians, and are added up once more where the cell is settled."""
    rng = np.random.default_rng(keep)
    column_to_gene = np.where(np.arange(64) < 40, np.arange(64), rng.permutation(64) % 20)
    dense = rng.integers(0, 4, (3, 64)).astype("float32")
    dense[1] = 0
    cells = _cells(dense, column_to_gene, rng.permutation(40), rng.choice([1.0, 1.5, 2.0, 3.0], 40), rng=rng)
    status = _assert_same(cells, device, _small_plan(select_above=select_above), keep=keep, first=99)
    assert keep == 9 or ((status & IS_OPEN) != 0)[[0, 2]].all()
    if keep == 9:
        _assert_same_padded(cells, device, _small_plan(select_above=select_above), keep=keep, last=98)


def test_cells_by_bucket(device, poisoned):
    """The list is what a stable sort gives, for all cells and for hard ones; what fits nowhere is not listed."""
    rng = np.random.default_rng(0)
    for n_cells in (1, 2, 9, 23):
        lengths = rng.choice(np.array(_BORDERS), n_cells)
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
                plan = _small_plan(select_above=select_above)
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
    _assert_same(_random(1, n_cells=5), device, _small_plan(), keep=30)


@pytest.mark.parametrize(
    ("case", "is_selected"),
    [
        *((case, False) for case in ("alike", "two", "one rounding apart", "ratios", "tiny", "fine")),
        *((case, True) for case in ("alike", "one rounding apart", "fine")),
    ],
)
def test_ties(device, case, is_selected):
    """Equal and nearly equal scores, cut anywhere; which of them one sort settles, and which need two more."""
    rng = np.random.default_rng(1)
    n = 40
    token_ids, dense = rng.permutation(1000)[:n], rng.integers(1, 4, (2, n)).astype("float32")
    medians = {
        "alike": np.full(n, 1.7),
        "two": np.where(rng.random(n) < 0.5, 1.0, 1e-30),
        "one rounding apart": 1 + rng.integers(0, 3, n) * 2.0**-52,
        "ratios": rng.integers(1, 9, n) / 6,
        "tiny": np.full(n, 1.5e308),  # scores are subnormal, and differ in few bits
        "fine": np.full(n, 1.0),
    }[case]
    n_counts = np.array([1000.0, 5.0])
    if case == "tiny":
        n_counts *= 1e17
        dense[:] = rng.integers(1, 1000, dense.shape)
    if case == "fine":  # counts that differ less than leading bits can tell
        dense = 3.0 + rng.integers(0, 9, dense.shape) * 2.0**-51
    cells = _cells(dense, np.arange(n), token_ids, medians, n_counts)
    plan = _small_plan(select_above=16) if is_selected else _small_plan()
    cuts = ((5, True), (33, False), (40, True))
    for keep, is_division in cuts[:2] if is_selected else cuts:  # all of a selected cell: test_selection
        status = _assert_same(cells, device, plan, keep=keep, is_division=is_division, first=1)
        is_open = ((status & IS_OPEN) != 0).any()
        if case in ("alike", "two"):
            assert not is_open, "settled by one sort"
        else:
            assert is_open or keep == 5


@pytest.mark.parametrize("select_above", [16, 64])
def test_a_score_that_underflows_to_zero(device, poisoned, select_above):
    """It is the least there is, and yet stands before what lies behind the cell; no open pair has it sorted again."""
    rng = np.random.default_rng(5)
    dense, medians = rng.integers(1, 9, (1, 20)).astype("float64"), np.ones(20)
    dense[0, 7], medians[7] = 2.0**-100, 2.0**1000
    cells = _cells(dense, np.arange(20), np.arange(20), medians)
    status = _assert_same(cells, device, _small_plan(select_above=select_above), keep=20)
    assert not (status & IS_OPEN).any()
    assert cells.reference(keep=20)[0][-1] == 7


def test_neighbours(device):
    """One open pair, anywhere in words of which a thread holds eight, as on a card."""
    rng = np.random.default_rng(3)
    n = 230
    for better, worse in ((0, 1), (7, 8), (102, 103), (228, 229)):
        medians = 1.0 + np.arange(n) / 8
        medians[worse] = medians[better] * (1 + 2.0**-50)
        token_ids = np.arange(n)[::-1].copy()  # would rank them the other way round
        order = rng.permutation(n)
        cells = _cells(np.ones((1, n), "float32"), order, token_ids, medians)
        status = _assert_same(cells, device, _small_plan((256,), select_above=256, settle_small=0), keep=n)
        assert (status & IS_OPEN).all()


@pytest.mark.parametrize("keep", [1, 20, 1000])
def test_selection(device, poisoned, keep):
    """Cells that are cut to slabs first, one or many, beside cells that are not; cuts through ties and near ties."""
    cells = _random(keep, n_columns=100, n_genes=95, density=0.7)
    _assert_same(cells, device, _small_plan((16, 32), select_above=20), keep=keep, first=998)
    cells.medians = torch.ones_like(cells.medians)
    _assert_same(cells, device, _small_plan((16, 32), select_above=32, select_block=32), keep=min(keep, 40), last=999)


def test_selection_of_the_greatest_rank(device, poisoned):
    """As many genes as their ranks' bits can number, and all scores equal: the last entry has the greatest rank."""
    rng = np.random.default_rng(2)
    cells = _cells(np.ones((1, 32), "float32"), rng.permutation(32), rng.permutation(32), np.ones(32))
    _assert_same(cells, device, _small_plan((16,), select_above=16), keep=32)


def test_more_genes_than_a_sort_takes(device):
    rng = np.random.default_rng(0)
    n = 9000
    dense = rng.poisson(2.0, (2, n)).astype("int32") + 1
    dense[1, 100:] = 0
    cells = _cells(dense, np.arange(n), rng.permutation(n), rng.lognormal(0, 1, n)).on(device)
    want, want_ends = cells.reference(keep=20)
    values, cu_seqlens = rank_genes(*cells.block, **cells.genes, keep=20, impl="triton")
    assert torch.equal(values, want)
    assert torch.equal(cu_seqlens, want_ends)


def _two_sum_tokens(cells: _Cells) -> list[list[int]]:
    """Tokens where the sums of shared genes are made as ``host.py`` says: in order of the row, in twice float64."""
    out = []
    for row in range(len(cells.n_counts)):
        sums: dict[int, tuple[float, float]] = {}
        for p in range(int(cells.indptr[row]), int(cells.indptr[row + 1])):
            gene, x = int(cells.column_to_gene[cells.indices[p]]), float(cells.data[p])
            if gene >= 0 and x:
                old, error = sums.get(gene, (0.0, 0.0))
                new = old + x
                part = new - old
                sums[gene] = new, error + ((old - (new - part)) + (x - part))
        genes = np.array(list(sums))
        dtype = "float32" if cells.data.dtype in (torch.float16, torch.float32) else "float64"
        x = np.array([np.float64(total + error).astype(dtype) for total, error in sums.values()])
        n, medians = cells.n_counts[row].numpy(), cells.medians.numpy()[genes]
        score = ((x * (1 / n)) * 10000).astype("float64") * (1 / medians)
        tokens = cells.token_ids.numpy()[genes]
        out.append(tokens[np.lexsort((tokens, -score))].tolist())
    return out


@pytest.mark.parametrize(
    ("dtype", "n_dtype"),
    [("float32", "float32"), ("float32", "float64"), ("float64", "float64"), ("float16", "float32")],
)
@pytest.mark.parametrize("select_above", [16, 64])
def test_sums_of_shared_genes(device, poisoned, dtype, n_dtype, select_above):
    """Genes of eight columns, whose sums differ by a rounding or not at all; more than one block of them."""
    rng = np.random.default_rng(4)
    dense = np.repeat(rng.lognormal(0, 1, (2, 1, 8)), 6, axis=1)  # six genes of the same eight counts
    dense[:, 1, 0] *= 1 + 2.0 ** {"float16": -9, "float32": -22, "float64": -51}[dtype]
    dense[:, 2, 0] *= 1 + 2.0 ** {"float16": -9, "float32": -22, "float64": -51}[dtype]
    dense = np.append(dense.reshape(2, 48), [[1.0, 2.0], [3.0, 0.0]], axis=1)
    column_to_gene = np.append(np.repeat(np.arange(6), 8), [7, 8])
    cells = _cells(
        dense.astype(dtype), column_to_gene, rng.permutation(60)[:10], np.ones(10), np.full(2, 7.0, n_dtype), rng=rng
    )
    values, cu_seqlens, _ = _launched(cells.on(device), _small_plan(select_above=select_above), keep=1000)
    assert [part.tolist() for part in values.split(cu_seqlens.diff().tolist())] == _two_sum_tokens(cells)


def test_sums_outgrow_the_dtype_of_the_counts(device):
    dense = np.full((2, 30), 250, dtype="uint8")
    dense[:, 20:] = 1
    _assert_same(_cells(dense, np.arange(30) % 7, np.arange(7), np.arange(1.0, 8)), device, _small_plan(), keep=9)


def test_more_shared_entries_than_threads(device, poisoned):
    """The first columns of genes stand in every block of shared entries."""
    dense = np.random.default_rng(0).integers(1, 9, (2, 60)).astype("float32")
    _assert_same(_cells(dense, np.arange(60) // 2, np.arange(30), np.arange(1.0, 31)), device, _small_plan(), keep=30)


def test_known_to_share_no_gene(device):
    """Without shared genes preparation says so, and the kernel that sums them is not launched."""
    cells = _random(2)
    cells.column_to_gene = torch.where(torch.arange(70) < 60, torch.arange(70), -1)
    columns = on_device.prepare_columns(**cells.genes)
    assert not columns.tables.has_shared
    assert on_device.prepare_columns(**_random(2).genes).tables.has_shared
    assert on_device.prepare_columns(**cells.genes, waits=False).tables.has_shared
    _assert_same(cells, device, _small_plan(), keep=30)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_public_function(device, poisoned, impl):
    """The plan of the device itself, packed and padded."""
    cells = _random(8, n_cells=3)
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
        cells = _random(seed)
        want, want_ends = rank_genes(*cells.block, **cells.genes, keep=50, first=3, impl="numba")
        values, cu_seqlens, _ = _launched(cells.on(device), _small_plan(), keep=50, first=3)
        assert torch.equal(values, want)
        assert torch.equal(cu_seqlens, want_ends)


def test_no_cells_no_entries_no_genes(device):
    cells = _random(0).on(device)
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


def test_what_is_refused(device):
    genes = dict(column_to_gene=[0, 1, 2], token_ids=[0, 1, 2], medians=[1.0, 1.0, 1.0])

    def rank(indptr=(0, 2), indices=(0, 1), n_counts=(5.0,), **changes):
        table = {name: torch.tensor(value, device=device) for name, value in (genes | changes).items()}
        block = (torch.tensor(indptr), torch.tensor(indices), torch.ones(len(indices)), torch.tensor(n_counts))
        return rank_genes(*(part.to(device) for part in block), **table, keep=5, impl="triton")

    assert rank()[0].tolist() == [0, 1]
    assert rank(indices=(2, 0))[0].tolist() == [0, 2]
    with pytest.raises(RepeatedColumnError, match="row 1 names a column twice"):
        rank((0, 1, 4), (1, 2, 0, 2), (5.0, 5.0))
    with pytest.raises(RepeatedColumnError, match="row 0 names a column twice"):
        rank((0, 3), (0, 1, 1))
    many = np.random.default_rng(0).permutation(120)
    for i, j in ((0, 119), (40, 110), (50, 51)):
        columns = np.where(np.arange(120) == j, many[i], many)
        with pytest.raises(RepeatedColumnError, match="row 0 names a column twice"):
            rank((0, 120), columns.tolist(), column_to_gene=[0] + [-1] * 119)
    for indices in ([0, 3], [-1, 1]):
        with pytest.raises(ValueError, match="row 0: a column index is out of range"):
            rank(indices=indices)
    for indptr in ([0, 9], [1, 0], [-1, 2]):
        with pytest.raises(ValueError, match="row 0: indptr does not fit"):
            rank(indptr)
    for n in (0.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="row 0 has entries but n_counts"):
            rank(n_counts=[n])
    with pytest.raises(ValueError, match="row 1: indptr does not fit"):  # the first, whatever else is wrong
        rank((0, 1, 0, 4), (1, 2, 0, 2), (5.0, 5.0, 0.0))
    for wrong in ([1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match="medians must be positive"):
            rank(medians=wrong)
    for wrong in ([4, 4, 5], [-1, 4, 5], [1, 2, 2**31]):
        with pytest.raises(ValueError, match="unique"):
            rank(token_ids=wrong)
    with pytest.raises(ValueError, match="a gene that is not there"):
        rank(column_to_gene=[0, 1, 3])
    for n_genes in (1, 0):
        with pytest.raises(ValueError, match="a gene that is not there"):
            on_device.prepare_columns(torch.tensor([5]), torch.arange(n_genes), torch.ones(n_genes))
    with pytest.raises(ValueError, match="at most 262144 genes"):
        on_device.prepare_columns(torch.zeros(1), torch.arange(2**18 + 1), torch.ones(2**18 + 1))
    with pytest.raises(ValueError, match="keep"):
        rank_genes(*_random(0).block, **_random(0).genes, keep=0, impl="triton")


@pytest.mark.parametrize("plan", [_small_plan(), _small_plan((16,), select_above=16)])
def test_no_block_writes_outside_of_the_arrays(device, plan):
    """Rows that overlap could have more tokens than the buffer holds; ``_launched`` has a sentinel behind it."""
    cells = _random(6)
    n = 30
    cells.indices, cells.data = cells.indices[:n], cells.data[:n]
    cells.indptr, cells.n_counts = torch.tensor([0, n] * 3), torch.ones(5, dtype=torch.float64)
    columns = on_device.prepare_columns(**cells.on(device).genes)
    block = launches.CountBlock.of(*cells.on(device).block)
    for first, last in ((-1, -1), (1, 2)):
        buffer = torch.full((n + 64,), -77, dtype=torch.int64, device=device)
        _, status = launches.launch(
            plan, block, columns.tables, buffer[:n], keep=n, first=first, last=last, is_checked=False
        )
        assert (buffer[n:] == -77).all()
        assert status.any()


def test_padded_rows_that_are_too_short(device, poisoned):
    """Only the public function looks at the length; rows then run into each other, but not out of the buffer."""
    on = _random(6).on(device)
    columns = on_device.prepare_columns(**on.genes)
    buffer = torch.full((4 * 5 + 64,), -77, dtype=torch.int64, device=device)
    launches.launch(
        _small_plan(), launches.CountBlock.of(*on.block), columns.tables, buffer[:20].view(4, 5),
        keep=60, first=1, last=2, is_checked=True,
    )  # fmt: skip
    assert (buffer[20:] == -77).all()
    assert (buffer[:20] != -77).any()


@pytest.mark.parametrize("select_above", [8, 64])
@pytest.mark.parametrize(
    "wrong", [[0, 10, 25, 20, 40], [0, 10, 900, 900, 40], [0, 10, -3, -3, 40], [0, 10, 25, 41, 41]]
)
def test_a_wrong_indptr_in_the_middle(device, poisoned, wrong, select_above):
    """Just the rows that do not fit are told, also one without entries; those before them are ranked."""
    cells = _of_lengths((10, 10, 10, 10), 70, np.arange(70), np.linspace(1, 2, 70))
    want, _ = cells.reference(keep=70)
    cells.indptr = torch.tensor(wrong)
    values, cu_seqlens, status = _launched(cells.on(device), _small_plan(select_above=select_above), keep=70)
    begins, ends = cells.indptr[:-1], cells.indptr[1:]
    is_wrong = (begins < 0) | (ends < begins) | (ends > 40)
    assert is_wrong.any()
    assert torch.equal((status & WRONG_INDPTR) != 0, is_wrong)
    assert torch.equal(cu_seqlens.diff() == 0, is_wrong | (begins == ends))
    assert torch.equal(values[:10], want[:10])


@pytest.mark.parametrize("select_above", [16, 64])
def test_what_is_wrong_with_each_cell(device, poisoned, select_above):
    """Every bit of the status, from the pass over the counts and from the kernel that scores what it does not take."""
    cells = _of_lengths((20,) * 7, 70, np.arange(70), np.ones(70), dtype="float64")
    indices, data = cells.indices.view(7, 20), cells.data.view(7, 20)
    indices[1] = indices[1].flip(0)
    indices[2, 5] = indices[2, 9]  # and so the columns do not ascend
    indices[3, 19] = 70
    cells.n_counts[4] = 0
    data[5, 7] = 1 + 2.0**-50
    indices[6, 0] = -1
    _, _, status = _launched(cells.on(device), _small_plan(select_above=select_above), keep=70)
    wrong = status & (WRONG_COLUMN | WRONG_TOTAL | REPEATED_COLUMN | WRONG_INDPTR)
    assert wrong.tolist() == [0, 0, REPEATED_COLUMN, WRONG_COLUMN, WRONG_TOTAL, 0, WRONG_COLUMN]
    assert ((status & kernel.NOT_ASCENDING.value) != 0).tolist() == [False, True, True, False, False, False, True]
    assert ((status & kernel.IS_FINE.value) != 0).tolist() == [False] * 5 + [True, False]


@pytest.mark.parametrize("select_above", [16, 64])
def test_negative_counts_do_no_harm(device, poisoned, select_above):
    """They are not allowed, and nobody looks for them; the order means nothing, but each gene comes once."""
    for step in (2, 1):
        cells = _random(6)
        cells.data[::step] *= -1
        values, cu_seqlens, _ = _launched(cells.on(device), _small_plan(select_above=select_above), keep=40)
        assert cu_seqlens[-1] > 0
        for row, tokens in enumerate(values.split(cu_seqlens.diff().tolist())):
            genes = cells.column_to_gene[cells.indices[cells.indptr[row] : cells.indptr[row + 1]]]
            assert torch.isin(tokens, cells.token_ids[genes[genes >= 0]]).all()
            assert len(tokens.unique()) == len(tokens)


def test_checked_blocks_are_not_compared(device):
    """``is_checked`` only leaves out looking for repeated columns."""
    cells = _random(3)
    want, want_ends = cells.reference(keep=64)
    values, cu_seqlens, _ = _launched(cells.on(device), _small_plan(), keep=64, is_checked=True)
    assert torch.equal(values, want)
    assert torch.equal(cu_seqlens, want_ends)


def test_custom_operator(device):
    cells = _random(1, n_cells=3, n_columns=60, n_genes=50).on(device)
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
        cells = _Cells(*(torch.from_numpy(np.asarray(array)) for array in arrays)).on(device)
        first, last = (vocabulary.special.get(name, -1) if preset == "v2" else -1 for name in ("cls", "eos"))
        keep = vocabulary.max_len - (2 if preset == "v2" else 0)
        values, cu_seqlens = rank_genes(*cells.block, **cells.genes, keep=keep, first=first, last=last, impl="triton")
        path = shared_dir / f"data/reference_official/pbmc_facs_test100__{preset.upper()}.parquet"
        official = parquet.read_table(path, columns=["input_ids"])["input_ids"].to_pylist()[:n_cells]
        assert [part.tolist() for part in values.cpu().split(cu_seqlens.diff().tolist())] == official


@pytest.mark.parametrize("card", CARDS)
def test_plans(card):
    target = CARDS[card]
    plan = device_plan(target)
    widths = [sort.width for sort in plan.sorts]
    assert all(after == 2 * before for before, after in pairwise(widths))
    assert plan.select_above == widths[-1] == (4096 if card in ("T4", "V100") else 8192)
    assert widths[plan.settle_small] == 2048
    for sort in plan.sorts:
        for launch in (sort.rows, sort.scored, sort.settled):
            threads, constexprs = 32 * launch.num_warps, sort.constexprs(launch)
            assert threads << constexprs["LOG_EACH"] == sort.width == 1 << constexprs["LOG_N"]
            assert threads * (launch.max_registers or 0) <= 65536
        assert 8 * sort.width < target.smem_bytes
        assert sort.n_programs >= target.n_sms
    assert plan.sort_of_selected(100).width == widths[0]
    assert plan.sort_of_selected(2048).width == 2048
    assert plan.sort_of_selected(10**6).width == widths[-1]
    for launch in (plan.score, plan.sum, *(sort.rows for sort in plan.sorts), *(sort.scored for sort in plan.sorts)):
        assert not launch.enable_fp_fusion, "contraction changes scores"
    options = candidates("rank_genes", "float64", target)
    assert [option.impl for option in options] == [Impl.TRITON, Impl.REFERENCE, Impl.NUMBA]
    assert not options[-1].can_run


def test_cases_name_the_arguments_of_their_kernels():
    cases = kernel_cases(CARDS["A100"])
    kernels = {name: found for name, found in vars(kernel).items() if name.endswith("_kernel")}
    kernels |= {name: found for name, found in vars(kernel_hard).items() if name.endswith("_kernel")}
    assert {case.kernel for case in cases} == kernels.keys()
    for case in cases:
        arguments = list(inspect.signature(kernels[case.kernel].fn).parameters)
        assert sorted(arguments) == sorted([*case.signature, *case.constexprs]), case.kernel
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)


def test_on_the_cpu_triton_comes_last():
    interpreted = Target.cpu(["triton_interpreter"])
    assert candidates("rank_genes", "float64", interpreted)[-1].impl == Impl.TRITON
    assert not candidates("rank_genes", "float64", Target.cpu())[-1].can_run


def _many(n_cells, n_columns, n_genes, density, dtype="float32", seed=0, n_medians=None) -> _Cells:
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.lognormal(np.log(density * n_columns), 0.5, n_cells).astype(int), n_columns)
    sizes[n_cells // 3] = 0
    indptr = np.concatenate([[0], np.cumsum(sizes)])
    indices = np.concatenate([np.sort(rng.choice(n_columns, size, replace=False)) for size in sizes])
    data = (rng.geometric(0.4, len(indices)) % 255 + 1).astype(dtype)
    column_to_gene = np.where(rng.random(n_columns) < 0.2, -1, np.arange(n_columns) % n_genes)
    medians = rng.lognormal(0, 1, n_genes)
    if n_medians is not None:
        medians = rng.choice(medians[:n_medians], n_genes)
    arrays = (
        indptr, indices.astype("int32"), data, np.add.reduceat(np.append(data, 0), indptr[:-1]).astype("float64") + 1,
        column_to_gene, rng.permutation(2 * n_genes)[:n_genes], medians,
    )  # fmt: skip
    return _Cells(*(torch.from_numpy(array) for array in arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint16", "uint8", "float64"])
@pytest.mark.parametrize(
    ("n_columns", "n_genes", "density"), [(20_000, 20_000, 0.03), (36_000, 20_000, 0.1), (20_000, 20_000, 0.4)]
)
def test_full_size(n_columns, n_genes, density, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cells = _many(300, n_columns, n_genes, density, dtype)
    sizes = [(2048, False), (n_columns, False)]
    if dtype in ("float32", "int32"):  # another five sorts to compile
        sizes.append((4094, True))
    for keep, is_division in sizes:
        options = dict(keep=keep, first=20_001, last=20_002, is_division=is_division)
        want, want_ends = cells.reference(**options)
        on = cells.on("cuda")
        values, cu_seqlens = rank_genes(*on.block, **on.genes, **options, impl="triton")
        assert torch.equal(cu_seqlens.cpu(), want_ends)
        assert torch.equal(values.cpu(), want)
        again, _ = rank_genes(*on.block, **on.genes, **options, impl="triton")
        assert torch.equal(values, again)
        same, _ = rank_genes(*on.block, **on.genes, **options, impl="reference")
        assert torch.equal(values, same)


@pytest.mark.gpu
@pytest.mark.parametrize("n_medians", [1, 3, None])
def test_sixty_thousand_genes(n_medians):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cells = _many(9, 60_000, 60_000, 0.9, n_medians=n_medians)
    on = cells.on("cuda")
    for keep in (1, 2048, 8192, 20_000, 60_000):
        want, _ = cells.reference(keep=keep)
        values, _ = rank_genes(*on.block, **on.genes, keep=keep, impl="triton")
        assert torch.equal(values.cpu(), want)


@pytest.mark.gpu
def test_never_waits_and_can_be_captured():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cells = _many(2000, 20_000, 20_000, 0.1).on("cuda")
    columns = on_device.prepare_columns(**cells.genes)
    first = on_device.rank_cells(*cells.block, columns, keep=2048)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device.prepare_columns(**cells.genes, waits=False)
        on_device.rank_cells(*cells.block, columns, keep=2048)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on_device.rank_cells(*cells.block, columns, keep=2048)
    graph.replay()
    torch.cuda.synchronize()
    n = int(first.cu_seqlens[-1])
    assert torch.equal(captured.cu_seqlens, first.cu_seqlens)
    assert torch.equal(captured.values[:n], first.values[:n])
