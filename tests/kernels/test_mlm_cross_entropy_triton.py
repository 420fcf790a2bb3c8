"""The Triton kernels of mlm_cross_entropy against float64, interpreted on the CPU or compiled for a card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from geneformer_kernels import mlm_cross_entropy
from geneformer_kernels.ops.mlm_cross_entropy import op, plan, reference
from geneformer_kernels.target import CARDS, Target
from test_mlm_cross_entropy import IGNORED, LargestTensor, check, gradients, inputs

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")  # rows past the end, in numpy

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# Rows of one program, of several, and of a short last group of programs; a width within one block, in several, and one
# that fills its blocks; a vocabulary within one block, of full blocks, and with a rest.
SHAPES = [(70, 100, 200), (1, 20, 37), (33, 64, 128)]


def on(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    return [tensor.to(device) for tensor in inputs(*shape, dtype)]


def factor_for(device: str, dtype: torch.dtype) -> float:
    """Three TF32 products keep 21 bits of float32's 24; Triton's interpreter computes plain float32."""
    return 4.0 if device == "cuda" and dtype == torch.float32 else 2.0


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients(device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tensors = on(device, dtype, shape)
    row_weights = torch.linspace(-1, 2, shape[0], device=device)
    check(tensors, "triton", row_weights, factor=factor_for(device, dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("blocks_per_split", [1, 2, 3, 4])
def test_every_split_of_the_vocabulary(device: str, blocks_per_split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of the vocabulary, the last one short, in splits of which the last is short too; nothing changes."""
    monkeypatch.setattr(plan, "combine_plan", lambda: plan.CombinePlan(block_r=16, block_s=2, block_k=16))
    tensors = on(device, torch.float32, (40, 20, 200))
    tiles = replace(plan.INTERPRETED, block_v=64)
    found = plan.ForwardPlan(tiles, -(-4 // blocks_per_split), blocks_per_split)
    monkeypatch.setattr(plan, "forward_plan", lambda *a: found)
    check(tensors, "triton", torch.ones(40, device=device), factor=factor_for(device, torch.float32))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n_vocab", [200, 197])  # a last chunk of a multiple of 8, and one that begins earlier
@pytest.mark.parametrize("chunk_v", [64, 128, 256])
def test_every_chunk_of_the_vocabulary(
    device: str, chunk_v: int, n_vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "backward_plan", lambda *a: plan.BackwardPlan(plan.INTERPRETED, chunk_v))
    tensors = on(device, torch.float16, (40, 20, n_vocab))
    check(tensors, "triton", torch.linspace(1, 2, 40, device=device))


def test_huge_logits(device: str) -> None:
    hidden, weight, bias, targets = on(device, torch.float32, (33, 20, 129))
    hidden = hidden * 3000
    logits = hidden.double() @ weight.double().T + bias
    assert logits.max() > 1e4
    assert logits.min() < -1e4
    targets[5:20] = logits.argmax(-1)[5:20]  # where the loss is next to nothing
    tensors = [hidden, weight, bias, targets]
    check(tensors, "triton", torch.ones(33, device=device), factor=factor_for(device, torch.float32))
    assert (gradients(mlm_cross_entropy, tensors, torch.ones(33, device=device), impl="triton")[0] >= 0).all()


def test_small_losses(device: str) -> None:
    """Between 0.01 and 0.9, as they are late in training."""
    hidden, weight, bias, targets = on(device, torch.float32, (33, 20, 129))
    hidden = hidden * 3
    logits = hidden.double() @ weight.double().T + bias
    targets = torch.where(targets == IGNORED, targets, logits.argmax(-1))
    losses = logits.logsumexp(-1) - logits.amax(-1)
    assert ((losses > 0.01) & (losses < 0.9)).sum() > 10
    check(
        [hidden, weight, bias, targets],
        "triton",
        torch.ones(33, device=device),
        factor=factor_for(device, torch.float32),
    )


def test_entries_that_are_switched_off(device: str) -> None:
    """A bias of -inf takes an entry out, be it a whole block of them."""
    hidden, weight, bias, targets = on(device, torch.float32, (33, 20, 129))
    bias[:70] = -torch.inf
    targets = torch.where(targets == IGNORED, targets, targets.clamp(min=70))
    tensors = [hidden, weight, bias, targets]
    check(tensors, "triton", torch.ones(33, device=device), factor=factor_for(device, torch.float32))
    _, _, d_weight, d_bias = gradients(mlm_cross_entropy, tensors, torch.ones(33, device=device), impl="triton")
    assert not d_weight[:70].any()
    assert not d_bias[:70].any()


def test_ignored_rows_count_for_nothing(device: str) -> None:
    tensors = on(device, torch.float16, (40, 20, 100))
    tensors[3][::3] = IGNORED
    row_weights = torch.ones(40, device=device)
    loss, d_hidden, *parameters = gradients(mlm_cross_entropy, tensors, row_weights, impl="triton")
    counted = tensors[3] != IGNORED
    assert not loss[~counted].any()
    assert not d_hidden[~counted].any()
    assert d_hidden[counted].any(-1).all()
    tensors[0] = torch.where(counted[:, None], tensors[0], 1000)  # whatever their hidden states are
    again = gradients(mlm_cross_entropy, tensors, row_weights, impl="triton")
    for value, expected in zip(again[2:], parameters, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("ignore_index", [-100, 0, 99, -1])
def test_all_rows_ignored(device: str, ignore_index: int) -> None:
    hidden, weight, bias, targets = on(device, torch.float16, (5, 20, 100))
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    loss = mlm_cross_entropy(*leaves, torch.full_like(targets, ignore_index), ignore_index=ignore_index, impl="triton")
    loss.backward()
    assert loss == 0
    assert not any(leaf.grad.any() for leaf in leaves)


def test_no_rows(device: str) -> None:
    leaves = [leaf.requires_grad_(leaf.is_floating_point()) for leaf in on(device, torch.float16, (0, 20, 100))]
    loss = mlm_cross_entropy(*leaves, impl="triton")
    loss.backward()
    assert loss == 0
    assert not any(leaf.grad.any() for leaf in leaves[:3])


@pytest.mark.parametrize("wrong", [100, -1, 2**32 + 5])
def test_bad_target_makes_its_row_nan(device: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """... where nobody looks, and reads nothing outside the weight, behind which zeros would make a number of it."""
    monkeypatch.setattr(op, "is_looked_into", lambda x: False)
    hidden, weight, bias, targets = on(device, torch.float16, (5, 20, 100))
    weight = torch.cat([weight.half(), weight.new_zeros(50, 20).half()])[:100]
    bias = torch.cat([bias, bias.new_zeros(50)])[:100]
    right = mlm_cross_entropy(hidden, weight, bias, targets, reduction="none", impl="triton")
    targets[3] = wrong
    loss = mlm_cross_entropy(hidden, weight, bias, targets, reduction="none", impl="triton")
    assert loss[3].isnan()
    right[3] = loss[3]
    torch.testing.assert_close(loss, right, equal_nan=True, rtol=0, atol=0)
    row_weights = torch.ones(5, device=device)
    _, d_hidden, d_weight, d_bias = gradients(
        mlm_cross_entropy, [hidden, weight, bias, targets], row_weights, impl="triton"
    )
    assert d_hidden.isnan().all(-1).tolist() == d_hidden.isnan().any(-1).tolist() == [row == 3 for row in range(5)]
    assert d_weight.isnan().all()
    assert d_bias.isnan().all()


def test_reductions(device: str) -> None:
    hidden, weight, bias, targets = on(device, torch.float16, (9, 20, 100))
    rows, total, mean = (
        mlm_cross_entropy(hidden, weight, bias, targets, reduction=reduction, impl="triton")
        for reduction in ("none", "sum", "mean")
    )
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(mean, rows.sum() / 8)


def test_twice_the_same(device: str) -> None:
    tensors = on(device, torch.float16, (70, 20, 200))
    row_weights = torch.linspace(-1, 2, 70, device=device)
    first, second = (gradients(mlm_cross_entropy, tensors, row_weights, impl="triton") for _ in range(2))
    for value, other in zip(first, second, strict=True):
        assert torch.equal(value, other)


def test_strided_inputs(device: str) -> None:
    hidden, weight, bias, targets = on(device, torch.float16, (9, 20, 100))
    expected = mlm_cross_entropy(hidden, weight, bias, targets, impl="triton")
    strided = (
        hidden.T.contiguous().T,
        weight.T.contiguous().T,
        bias.repeat_interleave(2)[::2],
        targets.repeat_interleave(2)[::2],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(mlm_cross_entropy(*strided, impl="triton"), expected)


def test_nothing_is_written_past_the_end(device: str) -> None:
    """Every output is a view into a larger buffer, whose rest keeps its value."""
    from geneformer_kernels.ops.mlm_cross_entropy import kernel

    (n_rows, width, n_vocab), sentinel = (40, 20, 100), 7.0
    hidden, weight, bias, targets = on(device, torch.float32, (n_rows, width, n_vocab))
    dims = {"n_rows": n_rows, "width": width}
    reads = {"hidden_ptr": hidden, "weight_ptr": weight, "bias_ptr": bias}
    tiles, combine = plan.INTERPRETED, plan.combine_plan()
    buffers = {}

    def out(name: str, *shape: int) -> torch.Tensor:
        buffers[name] = torch.full((shape[0] + 64, *shape[1:]), sentinel, device=device), shape
        return buffers[name][0][: shape[0]]

    partials = {"partial_max_ptr": out("max", 2, n_rows), "partial_sum_ptr": out("sum", 2, n_rows)}
    kernel.mlm_cross_entropy_fwd_kernel[4,](
        **reads, **partials, **dims, n_vocab=n_vocab, n_splits=2, blocks_per_split=1, **tiles.constexprs
    )
    statistics = {"row_max_ptr": out("row_max", n_rows), "row_sum_ptr": out("row_sum", n_rows)}
    kernel.mlm_cross_entropy_fwd_combine_kernel[3,](
        **reads, **partials, **statistics, **dims, targets_ptr=targets, loss_ptr=out("loss", n_rows),
        n_vocab=n_vocab, n_splits=2, ignore_index=IGNORED, **combine.constexprs,
    )  # fmt: skip
    dlogits = out("dlogits", n_rows, 144)
    kernel.mlm_cross_entropy_bwd_dlogits_kernel[4,](
        **reads, **statistics, **dims, targets_ptr=targets, row_scale_ptr=torch.ones(n_rows, device=device),
        dlogits_ptr=dlogits, partial_dbias_ptr=out("dbias", 2, n_vocab),
        n_columns=n_vocab, first_vocab=0, stride_dlogits_r=144, **tiles.constexprs,
    )  # fmt: skip
    assert (dlogits[:, n_vocab:128] == 0).all()
    assert (dlogits[:, 128:] == sentinel).all()
    dlogits[:, 128:] = 0
    for name, (buffer, shape) in buffers.items():
        assert (buffer[shape[0] :] == sentinel).all(), name
        assert (buffer[: shape[0]] != sentinel).all(), name


def test_memory_is_a_chunk_of_the_vocabulary(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "backward_plan", lambda *a: plan.BackwardPlan(plan.INTERPRETED, 64))
    n_rows, width, n_vocab = 256, 16, 600
    hidden, weight, bias, targets = on(device, torch.float16, (n_rows, width, n_vocab))
    weight = weight.half()
    with LargestTensor() as largest:
        _, *statistics = op._launch_fwd(hidden, weight, bias, targets, IGNORED)
        op._launch_bwd(
            hidden, weight, bias, targets, *statistics, torch.ones(n_rows, device=device), (True, True, True)
        )
    assert largest.n_bytes == max(2 * 64 * n_rows, 4 * n_vocab * width)
    assert largest.n_bytes < 2 * n_rows * n_vocab / 4


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("n_rows", [1, 100, 1_500, 6_000, 50_000])
@pytest.mark.parametrize("n_vocab", [25_426, 20_275, 7])
def test_plans(card: Target, n_rows: int, n_vocab: int) -> None:
    for dtype, itemsize, width in (("float16", 2, 256), ("float16", 2, 768), ("float32", 4, 256)):
        forward = plan.forward_plan(n_rows, n_vocab, width, dtype, card)
        n_blocks = -(-n_vocab // forward.tiles.block_v)
        assert (
            (forward.n_splits - 1) * forward.blocks_per_split < n_blocks <= forward.n_splits * forward.blocks_per_split
        )
        assert forward.n_splits <= plan.MAX_SPLITS
        n_programs = -(-n_rows // forward.tiles.block_r) * forward.n_splits
        if n_vocab > 1000:
            assert n_programs >= min(card.n_sms * forward.tiles.programs_per_sm, n_blocks) / 2
        backward = plan.backward_plan(n_rows, n_vocab, width, dtype, card)
        assert backward.chunk_v % backward.tiles.block_v == 0
        row_bytes = n_rows * itemsize
        bound = min(plan.MAX_WORKSPACE_BYTES, max(plan.MIN_WORKSPACE_BYTES, row_bytes * n_vocab / 4))
        assert row_bytes * backward.chunk_v <= max(bound, row_bytes * backward.tiles.block_v)
        assert backward.chunk_v < n_vocab + backward.tiles.block_v


def test_torch_path_rows() -> None:
    assert plan.rows_per_chunk(25_426, Target.cpu()) == 329
    assert plan.rows_per_chunk(25_426, CARDS["T4"]) == 1319
    assert plan.rows_per_chunk(10**9, Target.cpu()) == 1


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_kernel_cases(card: Target) -> None:
    from geneformer_kernels.ops.mlm_cross_entropy import kernel

    cases = plan.kernel_cases(card)
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        arguments = getattr(kernel, case.kernel).arg_names
        assert sorted([*case.signature, *case.constexprs]) == sorted(arguments)
        assert case.divisible <= set(case.signature)
        assert case.is_default == (card.sm >= 80)
    if card.sm >= 80:
        assert {case.kernel for case in cases} == {name for name in vars(kernel) if name.endswith("_kernel")}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("n_rows", "width", "n_vocab"), [(6_000, 256, 25_426), (3_001, 768, 20_275), (777, 1152, 20_275)]
)
def test_full_size(dtype: torch.dtype, n_rows: int, width: int, n_vocab: int) -> None:
    tensors = on("cuda", dtype, (n_rows, width, n_vocab))
    tensors[1] *= 0.2
    for row_weight in (1.0, 1 / n_rows):
        row_weights = torch.full((n_rows,), row_weight, device="cuda")
        check(tensors, "triton", row_weights, factor=factor_for("cuda", dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_full_size_memory(impl: str) -> None:
    n_rows, width, n_vocab = 20_000, 256, 25_426
    hidden, weight, bias, targets = on("cuda", torch.bfloat16, (n_rows, width, n_vocab))
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    mlm_cross_entropy(*leaves, targets, impl=impl).backward()  # libraries take their workspaces
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mlm_cross_entropy(*leaves, targets, impl=impl).backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < n_rows * n_vocab * 2 / 2, f"{extra / 2**20:.0f} MiB beside inputs, gradients included"


@pytest.mark.gpu
def test_compiles_and_trains_on_the_card() -> None:
    tensors = on("cuda", torch.bfloat16, (300, 256, 1_000))
    eager = gradients(mlm_cross_entropy, tensors, torch.ones(300, device="cuda"))
    compiled = gradients(torch.compile(mlm_cross_entropy, fullgraph=True), tensors, torch.ones(300, device="cuda"))
    for value, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, expected)
    assert reference.mlm_cross_entropy(*tensors, IGNORED, "mean").isfinite()
