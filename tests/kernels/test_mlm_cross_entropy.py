"""mlm_cross_entropy on the torch path and as the reference, against float64 and torch's own cross entropy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from geneformer_kernels import mlm_cross_entropy
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.ops.mlm_cross_entropy import op, plan, reference, row_chunks
from geneformer_kernels.target import CARDS, Target
from tolerance import Witness, assert_as_good_as
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IGNORED = -100


def inputs(n_rows: int, width: int, n_vocab: int, dtype: torch.dtype, *, seed: int = 0) -> list[torch.Tensor]:
    """hidden, weight, bias (parameters stay float32), targets: first and last entry, one row ignored where it fits."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden = (torch.randn(n_rows, width, generator=generator) + 0.3).to(dtype)
    weight = (torch.randn(n_vocab, width, generator=generator) * 0.3 + 0.1).to(wide)
    bias = torch.randn(n_vocab, generator=generator).to(wide) + 0.5
    targets = torch.randint(0, n_vocab, (n_rows,), generator=generator)
    for row, target in ((0, 0), (1, n_vocab - 1), (2, IGNORED)):
        if row < n_rows:
            targets[row] = target
    return [hidden, weight, bias, targets]


def gradients(
    function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], row_weights: torch.Tensor, **options: object
) -> list[torch.Tensor]:
    """Loss of every row, and the gradients of hidden, weight and bias for a weighted sum of them."""
    *leaves, targets = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    loss = function(*leaves, targets, reduction="none", **options)
    (loss * row_weights.to(loss.dtype)).sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def check(tensors: list[torch.Tensor], impl: str, row_weights: torch.Tensor, *, factor: float = 2.0) -> None:
    """Loss and every gradient are as near to float64 as plain torch in the same dtype."""
    values = gradients(mlm_cross_entropy, tensors, row_weights, impl=impl)
    plain = {"ignore_index": IGNORED}
    witnesses = Witness(gradients, reference.mlm_cross_entropy, tensors, row_weights, **plain)
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    truths = gradients(reference.mlm_cross_entropy, doubles, row_weights, **plain)
    for value, witness, truth, tensor in zip(values, witnesses, truths, [None, *tensors], strict=False):
        assert value.dtype == (witness.here.dtype if tensor is None else tensor.dtype)
        assert_as_good_as(value, witness, truth, factor=factor)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest storage any torch operation returned."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        self.n_bytes = max(self.n_bytes, *sizes, 0)
        return out


@pytest.fixture
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows on the torch path."""
    monkeypatch.setattr(plan, "rows_per_chunk", lambda n_vocab, target: 3)


def test_reference_means_what_torch_means() -> None:
    hidden, weight, bias, targets = inputs(7, 6, 11, torch.float64)
    for reduction in op.REDUCTIONS:
        value = mlm_cross_entropy(hidden, weight, bias, targets, reduction=reduction, impl="reference")
        expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction)
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.usefixtures("three_rows", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_rows", "width", "n_vocab"), [(10, 20, 37), (3, 16, 64), (1, 1, 1)])
def test_torch_path(device: str, dtype: torch.dtype, n_rows: int, width: int, n_vocab: int) -> None:
    row_weights = torch.linspace(-1, 2, n_rows, device=device)
    check([tensor.to(device) for tensor in inputs(n_rows, width, n_vocab, dtype)], "torch", row_weights)


@pytest.mark.usefixtures("three_rows")
def test_torch_path_gradcheck(device: str) -> None:
    hidden, weight, bias, targets = (tensor.to(device) for tensor in inputs(5, 4, 6, torch.float64))
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    for reduction in op.REDUCTIONS:
        assert torch.autograd.gradcheck(
            lambda *a, reduction=reduction: mlm_cross_entropy(*a, targets, reduction=reduction, impl="torch"), leaves
        )


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_reductions(impl: str) -> None:
    hidden, weight, bias, targets = inputs(9, 8, 12, torch.float32)
    rows, total, mean = (
        mlm_cross_entropy(hidden, weight, bias, targets, reduction=reduction, impl=impl)
        for reduction in ("none", "sum", "mean")
    )
    assert rows[2] == 0
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(mean, rows.sum() / 8)
    by_default = mlm_cross_entropy(hidden, weight, bias, targets)
    torch.testing.assert_close(by_default, mean)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("n_rows", [0, 3])
def test_no_rows_that_count(impl: str, n_rows: int) -> None:
    hidden, weight, bias, _ = (
        leaf.requires_grad_(leaf.is_floating_point()) for leaf in inputs(n_rows, 8, 12, torch.float32)
    )
    loss = mlm_cross_entropy(hidden, weight, bias, torch.full((n_rows,), 4), ignore_index=4, impl=impl)
    loss.backward()
    assert loss == 0
    for leaf in (hidden, weight, bias):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def test_without_bias() -> None:
    hidden, weight, _, targets = inputs(9, 8, 12, torch.float32)
    values, expected = (
        mlm_cross_entropy(hidden, weight, bias, targets, reduction="none") for bias in (None, torch.zeros(12))
    )
    assert torch.equal(values, expected)
    torch.testing.assert_close(
        values, mlm_cross_entropy(hidden, weight, None, targets, reduction="none", impl="reference")
    )


def test_only_gradients_that_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backward = row_chunks.backward
    monkeypatch.setattr(row_chunks, "backward", lambda *a: asked.append(a[7]) or backward(*a))
    hidden, weight, bias, targets = inputs(5, 8, 12, torch.float32)
    mlm_cross_entropy(hidden.requires_grad_(), weight, bias, targets).backward()
    alone = hidden.grad.clone()
    hidden.grad = None
    mlm_cross_entropy(hidden, weight.requires_grad_(), bias, targets).backward()
    assert asked == [(True, False, False), (True, True, False)]
    assert torch.equal(hidden.grad, alone)
    assert bias.grad is None


def test_small_gradients_survive_half_precision() -> None:
    """A mean over many rows gives every row a gradient below what float16 holds; a loss scale, one above it."""
    tensors = inputs(10, 20, 37, torch.float16)
    reference_gradients = gradients(mlm_cross_entropy, tensors, torch.full((10,), 1.0), impl="torch")
    for factor in (2.0**-30, 2.0**16):
        scaled = gradients(mlm_cross_entropy, tensors, torch.full((10,), factor), impl="torch")
        # float32 parameters: exact, since factor is a power of two.
        assert torch.equal(scaled[2], reference_gradients[2] * factor)
        assert torch.equal(scaled[3], reference_gradients[3] * factor)


def test_infinite_loss_scale_is_seen() -> None:
    tensors = inputs(10, 20, 37, torch.float16)
    found = gradients(mlm_cross_entropy, tensors, torch.full((10,), float("inf")), impl="torch")
    assert not found[2].isfinite().all()


@pytest.mark.usefixtures("three_rows")
def test_memory_is_a_chunk_of_rows() -> None:
    n_rows, width, n_vocab = 40, 4, 200
    hidden, weight, bias, targets = inputs(n_rows, width, n_vocab, torch.bfloat16)
    weight = weight.bfloat16()
    with LargestTensor() as largest:
        _, *statistics = row_chunks.forward(hidden, weight, bias, targets, IGNORED, 3)
        row_chunks.backward(hidden, weight, bias, targets, *statistics, torch.ones(n_rows), (True, True, True), 3)
    assert largest.n_bytes == 4 * max(3 * n_vocab, n_vocab * width)
    assert largest.n_bytes < 2 * n_rows * n_vocab / 4


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [12, -1, 2**32 + 5])
def test_bad_target_is_named(dtype: torch.dtype, impl: str, wrong: int) -> None:
    hidden, weight, bias, targets = inputs(5, 8, 12, dtype)
    targets[3] = wrong
    with pytest.raises(ValueError, match=f"target {wrong} is outside the vocabulary of 12"):
        mlm_cross_entropy(hidden, weight, bias, targets, impl=impl)


@pytest.mark.parametrize("wrong", [12, -1, 2**32 + 5])
def test_bad_target_has_no_gradient(wrong: int) -> None:
    """The torch path on a card: nobody raises there, and the backward pass must not take another target for it."""
    hidden, weight, bias, targets = inputs(5, 8, 12, torch.float32)
    statistics = op.mlm_cross_entropy_fwd(hidden, weight, bias, targets, IGNORED, "torch")[1:]
    targets[3] = wrong
    d_hidden, d_weight, d_bias = op.mlm_cross_entropy_bwd(
        hidden, weight, bias, targets, *statistics, torch.ones(5), IGNORED, "torch", True, True, True
    )
    assert d_hidden.isnan().any(-1).tolist() == [row == 3 for row in range(5)]
    assert d_weight.isnan().all()
    assert d_bias.isnan().all()


def test_bad_arguments() -> None:
    hidden, weight, bias, targets = inputs(5, 8, 12, torch.float32)
    with pytest.raises(ValueError, match="reduction must be"):
        mlm_cross_entropy(hidden, weight, bias, targets, reduction="median")
    with pytest.raises(ValueError, match=r"must be \[R, C\] and \[V, C\]"):
        mlm_cross_entropy(hidden, weight[:, 1:], bias, targets)
    with pytest.raises(ValueError, match=r"targets must be int64 \[5\]"):
        mlm_cross_entropy(hidden, weight, bias, targets.int())
    with pytest.raises(ValueError, match=r"targets must be int64 \[5\]"):
        mlm_cross_entropy(hidden, weight, bias, targets[1:])
    with pytest.raises(ValueError, match=r"bias \[11\] must be \[12\]"):
        mlm_cross_entropy(hidden, weight, bias[1:], targets)
    with pytest.raises(ValueError, match="ignore_index must be between"):
        mlm_cross_entropy(hidden, weight, bias, targets, ignore_index=2**40)


def test_compiles_without_graph_break() -> None:
    tensors = inputs(10, 20, 37, torch.bfloat16)

    def loss_and_gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        *leaves, targets = tensors
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        loss = function(*leaves, targets)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    eager = loss_and_gradients(mlm_cross_entropy)
    compiled = loss_and_gradients(torch.compile(mlm_cross_entropy, fullgraph=True, backend="aot_eager"))
    for value, expected in zip(compiled, eager, strict=True):
        assert torch.equal(value, expected)


def test_autocast_does_not_reach_inside() -> None:
    """The compute dtype is that of hidden, forward and backward, whatever autocast would choose."""
    tensors = inputs(10, 20, 37, torch.float32)
    row_weights = torch.linspace(-1, 2, 10)
    expected = gradients(mlm_cross_entropy, tensors, row_weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(mlm_cross_entropy, tensors, row_weights)
    for value, other in zip(found, expected, strict=True):
        assert torch.equal(value, other)


def test_operators_are_registered_well() -> None:
    hidden, weight, bias, targets = inputs(5, 8, 12, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    torch.library.opcheck(op.mlm_cross_entropy_fwd.overload, (*leaves, targets, IGNORED, "torch"))
    detached = [leaf.detach() for leaf in leaves]
    rows = torch.rand(5)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            op.mlm_cross_entropy_bwd.overload, (*detached, targets, rows, rows + 1, rows, IGNORED, "torch", *needs)
        )


@pytest.mark.parametrize("target", [Target.cpu(), *CARDS.values(), Target("hip"), Target("mps")], ids=lambda t: t.name)
def test_candidates(target: Target) -> None:
    able = {
        dtype: [c.impl for c in plan.candidates(dtype, target) if c.can_run]
        for dtype in ("float32", "float16", "float64")
    }
    assert able["float64"] == [Impl.TORCH, Impl.REFERENCE]
    expected = [Impl.TRITON] if target.sm >= 80 else []
    assert able["float16"] == able["float32"] == [*expected, Impl.TORCH, Impl.REFERENCE]
