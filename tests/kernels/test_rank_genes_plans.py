"""Which plan ranks genes on which card, and cells of full size on the card that is here."""

from __future__ import annotations

import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from cells_to_rank import Cells
from geneformer_kernels import rank_genes
from geneformer_kernels.dispatch import Impl, candidates
from geneformer_kernels.ops.rank_genes import device as on_device
from geneformer_kernels.ops.rank_genes import kernel, kernel_hard
from geneformer_kernels.ops.rank_genes.plan import device_plan, kernel_cases
from geneformer_kernels.target import CARDS, Target


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


def _many(n_cells, n_columns, n_genes, density, dtype="float32", seed=0, n_medians=None) -> Cells:
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
    return Cells(*(torch.from_numpy(array) for array in arrays))


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
