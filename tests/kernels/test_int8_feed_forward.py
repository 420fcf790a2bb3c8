"""int8_feed_forward: both layers of a block's second half on int8 rows, against what its integers stand for."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from geneformer_kernels import int8_feed_forward, int8_rows, quantize_rows, quantize_weight
from geneformer_kernels.dispatch import Impl, choose
from geneformer_kernels.ops.int8_feed_forward import op as operators
from geneformer_kernels.ops.int8_feed_forward import plan, reference
from geneformer_kernels.target import CARDS, Target

FP32 = torch.float32
IMPLS = ["triton", "torch", "reference"]
#: Rows, width, hidden units, columns of the result.
SHAPES = [(37, 70, 131, 70), (1, 1, 1, 1), (5, 16, 128, 24), (3, 33, 300, 9)]


def inputs(shape: tuple[int, int, int, int], activation: str, device: str) -> tuple[torch.Tensor, ...]:
    """x, then weights, scales and biases of both layers; gate rows for SwiGLU."""
    n_rows, width, ff_width, n_columns = shape
    generator = torch.Generator().manual_seed(width)

    def normal(*size: int, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(size, generator=generator) + mean

    up_width = ff_width * (2 if activation == "swiglu" else 1)
    x = normal(n_rows, width, mean=0.3)
    up, down = normal(up_width, width) * width**-0.5, normal(n_columns, ff_width) * ff_width**-0.5
    values = (x, *quantize_weight(up), normal(up_width, mean=0.2), *quantize_weight(down), normal(n_columns, mean=0.5))
    return tuple(each.to(device) for each in values)


def exactly(
    x: torch.Tensor, up_q, up_scale, up_bias, down_q, down_scale, down_bias, activation: str, *, has_groups: bool
) -> torch.Tensor:
    """In float64, but for the rounding of rows, whose scale is float32."""
    q, scale = int8_rows.quantize_rows(x)
    up, down = (q.double() * scale.double()[:, None] for q, scale in ((up_q, up_scale), (down_q, down_scale)))
    hidden = (q.double() * scale.double()[:, None]) @ up.T
    hidden = int8_rows.activate(hidden if up_bias is None else hidden + up_bias.double(), activation)
    width = hidden.shape[1]
    groups = hidden.split(128, 1) if has_groups else (hidden,)
    largest = torch.cat([group.abs().amax(1, keepdim=True).expand_as(group) for group in groups], 1)
    step = torch.where(largest > 0, largest / 127, 1.0)
    assert step.shape[1] == width
    out = (torch.round(hidden / step) * step) @ down.T
    return out if down_bias is None else out + down_bias.double()


def noise_db(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Signal over noise in decibel."""
    noise = (value.double() - truth).square().mean()
    return float(10 * torch.log10(truth.square().mean() / noise))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shape", "activation"),
    [*((SHAPES[0], activation) for activation in plan.ACTIVATIONS), *((shape, "gelu") for shape in SHAPES[1:])],
    ids=str,
)
def test_against_float64(device: str, impl: str, activation: str, shape: tuple[int, ...], poisoned: None) -> None:
    """A hidden unit that lies between two integers may be rounded to the other one: at most few do, by one step."""
    values = inputs(shape, activation, device)
    for biases in (True, False) if (shape, activation) == (SHAPES[0], "gelu") else (True,):
        x, up_q, up_scale, up_bias, down_q, down_scale, down_bias = values
        up_bias, down_bias = (up_bias, down_bias) if biases else (None, None)
        layers = (up_q, up_scale, up_bias, down_q, down_scale, down_bias)
        out = int8_feed_forward(x, *layers, activation=activation, impl=impl)
        exact = exactly(x, *layers, activation, has_groups=impl == "triton")
        assert (out.dtype, out.shape) == (FP32, exact.shape)
        assert noise_db(out, exact) > 70
        q, scale = quantize_rows(x)
        rows = int8_feed_forward(q, *layers, x_scale=scale, activation=activation, out_dtype=torch.float16, impl=impl)
        assert rows.dtype == torch.float16
        assert torch.equal(rows, out.half())


def test_hidden_units_with_several_scales() -> None:
    """What kernels do that spread a row over programs; it rounds less coarsely than one scale per row."""
    values = inputs((37, 70, 300, 40), "gelu", "cpu")
    out = reference.int8_feed_forward(values[0], None, *values[1:], "gelu", torch.float64, has_groups=True)
    assert noise_db(out, exactly(*values, "gelu", has_groups=True)) > 70
    assert noise_db(out, exactly(*values, "gelu", has_groups=False)) < 60


@pytest.mark.parametrize("impl", IMPLS)
def test_poison_and_zeros(device: str, impl: str) -> None:
    x, *layers = inputs((6, 70, 131, 40), "relu", device)
    x[1, 3] = float("nan")
    x[2, 5] = float("inf")
    x[3] = 0
    out = int8_feed_forward(x, *layers, activation="relu", impl=impl)
    assert out.isnan().all(1).tolist() == [False, True, True, False, False, False]
    layers[2] = None
    out = int8_feed_forward(x, *layers, activation="relu", impl=impl)
    assert torch.equal(out[3], layers[-1])  # hidden units of a row of zeros are zeros too
    x[1:3] = 1
    layers[1] = layers[1] * 1e38 * 30  # hidden units that overflow, of rows that are finite
    out = int8_feed_forward(x, *layers, activation="relu", impl=impl)
    assert out.isnan().all(1).tolist() == [True, True, True, False, True, True]


def test_layout_of_inputs(device: str) -> None:
    """Every tensor with others between its elements."""
    q, scale = quantize_rows(inputs((9, 20, 40, 30), "relu", device)[0])
    plain = (q, *inputs((9, 20, 40, 30), "relu", device)[1:], scale)
    strided = [torch.stack([each, each.flip(0)], dim=-1)[..., 0] for each in plain]
    assert not any(each.is_contiguous() for each in strided)
    found = [
        int8_feed_forward(*values[:-1], x_scale=values[-1], activation="relu", out_dtype=FP32, impl="triton")
        for values in (plain, strided)
    ]
    assert torch.equal(*found)


def test_many_rows_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, of a row alone and among others."""
    values = inputs((37, 70, 131, 40), "swiglu", "cpu")
    whole = int8_feed_forward(*values, activation="swiglu", impl="torch")
    monkeypatch.setitem(plan.HIDDEN_AT_ONCE, "cpu", 5 * 262)
    sizes = []
    real = int8_rows.scaled_product
    monkeypatch.setattr(int8_rows, "scaled_product", lambda q, *of, **how: sizes.append(len(q)) or real(q, *of, **how))
    assert torch.equal(int8_feed_forward(*values, activation="swiglu", impl="torch"), whole)
    assert sizes == [5] * 14 + [2] * 2
    one = int8_feed_forward(values[0][7:8], *values[1:], activation="swiglu", impl="torch")
    assert torch.equal(one, whole[7:8])
    assert int8_feed_forward(values[0][:0], *values[1:], activation="swiglu", impl="torch").shape == (0, 40)


@pytest.mark.parametrize("n_sms", [1, 10**6])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_every_tile(device: str, n_sms: int, activation: str, monkeypatch: pytest.MonkeyPatch, guarded: None) -> None:
    """Small and large tiles; then blocks so small that groups end in a short one, and that walk through many."""
    monkeypatch.setattr(operators, "target_of", lambda _: Target.cuda(80, n_sms=n_sms))
    values = inputs((70, 30, 200, 90), activation, device)
    exact = exactly(*values, activation, has_groups=True)
    assert noise_db(int8_feed_forward(*values, activation=activation, impl="triton"), exact) > 70
    if n_sms == 1:
        up = plan.ProductPlan(16, 128, 32, 2, plan.Launch(4, 2))
        monkeypatch.setattr(operators, "up_plan", lambda *_: up)
        monkeypatch.setattr(operators, "down_plan", lambda *_: plan.ProductPlan(16, 16, 128, 2, plan.Launch(4, 2)))
        assert noise_db(int8_feed_forward(*values, activation=activation, impl="triton"), exact) > 70


def test_largest_numbers(device: str) -> None:
    """Every int8 is 127: sums of 128 of them leave 16 bits, and each group's sum is exact before it is scaled."""
    up_q = torch.full((256, 300), 127, dtype=torch.int8, device=device)
    down_q = torch.full((3, 256), 127, dtype=torch.int8, device=device)
    down_q[1] = -127
    down_q[2, ::2] = -127
    layers = (up_q, torch.full((256,), 2.0**-22, device=device), None, down_q, torch.ones(3, device=device), None)
    for impl in IMPLS:
        out = int8_feed_forward(
            up_q[:2], *layers, x_scale=torch.ones(2, device=device), activation="relu", out_dtype=FP32, impl=impl
        )
        exact = 127**2 * 300 * 2.0**-22 * 256 * 127
        torch.testing.assert_close(out, torch.tensor([[exact, -exact, 0.0]] * 2, device=device), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("activation", plan.ACTIVATIONS)
def test_gradients(impl: str, activation: str) -> None:
    """Those of the layers without rounding, at the hidden units that the rounded rows gave."""
    x, up_q, up_scale, up_bias, down_q, down_scale, down_bias = inputs((12, 33, 50, 21), activation, "cpu")
    leaves = [each.clone().requires_grad_() for each in (x, up_bias, down_bias)]
    out = int8_feed_forward(
        leaves[0], up_q, up_scale, leaves[1], down_q, down_scale, leaves[2], activation=activation, impl=impl
    )
    slopes = torch.linspace(-1, 2, out.numel()).view(out.shape)
    (out * slopes).sum().backward()
    true = [each.detach().double().requires_grad_() for each in leaves]
    q, scale = int8_rows.quantize_rows(x)
    seen = true[0] + (q.double() * scale.double()[:, None] - true[0]).detach()
    up, down = (q.double() * scale.double()[:, None] for q, scale in ((up_q, up_scale), (down_q, down_scale)))
    hidden = int8_rows.activate(seen @ up.T + true[1], activation)
    ((hidden @ down.T + true[2]) * slopes).sum().backward()
    for leaf, other in zip(leaves, true, strict=True):
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_the_house_of_torch() -> None:
    """As an operator, compiled, and under autocast."""
    x, *layers = inputs((5, 33, 50, 7), "gelu", "cpu")
    operator, tests = operators.int8_feed_forward_fwd.overload, ("test_schema", "test_faketensor")
    for impl in (*(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []), "torch", "reference"):
        for rows, of_rows in ((x.T.contiguous().T, None), quantize_rows(x)):
            arguments = (rows, of_rows, *layers, "gelu", torch.float16, impl)
            torch.library.opcheck(operator, arguments, test_utils=tests)

    def step(x):
        return int8_feed_forward(x, *layers, activation="gelu", impl="torch")

    torch._dynamo.reset()
    x.requires_grad_()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    compiled(x).sum().backward()
    assert x.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(step(x), compiled(x))


def test_sums_that_int32_cannot_hold() -> None:
    wide = torch.ones(1, 133_145, dtype=torch.int8)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="133,145 products of int8"):
        int8_feed_forward(wide.float(), wide, one, None, wide[:, :1], one, None, activation="relu")
    with pytest.raises(ValueError, match="133,145 products of int8"):
        int8_feed_forward(one[None], wide.T, one.expand(133_145), None, wide, one, None, activation="relu")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_choice(card: Target) -> None:
    assert choose("int8_feed_forward", "float16", card).impl == (Impl.TRITON if card.sm >= 80 else Impl.TORCH)
    assert choose("int8_feed_forward", "float64", card).impl == Impl.TORCH
    assert choose("int8_feed_forward", "float16", Target.cpu()).impl != Impl.TRITON


# Plans

KERNELS = importlib.import_module("geneformer_kernels.ops.int8_feed_forward.kernel")


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_cases_name_the_kernels_arguments(card: Target) -> None:
    cases = plan.kernel_cases(card)
    assert len({(case.kernel, case.problem, case.dtype) for case in cases}) == len(cases)
    for case in cases:
        assert sorted([*case.signature, *case.constexprs]) == sorted(getattr(KERNELS, case.kernel).arg_names)
        assert case.divisible <= set(case.signature)
        assert case.is_default == (card.sm >= 80)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_plans(card: Target) -> None:
    for n_rows in (1, 1 << 20):
        for activation in plan.ACTIVATIONS:
            up = plan.up_plan(n_rows, 3072, activation, card)
            assert up.block_n == 128  # the hidden units that share a scale
            operands = up.block_rows + up.block_n * (2 if activation == "swiglu" else 1)
            assert card.sm < 80 or operands * up.block_k * up.launch.num_stages <= card.smem_bytes
        down = plan.down_plan(n_rows, 768, card)
        assert down.block_k == 128
        assert card.sm < 80 or (down.block_rows + down.block_n) * 128 * down.launch.num_stages <= card.smem_bytes
        assert plan.WIDTH_STEP % up.block_k == plan.WIDTH_STEP % down.block_k == 0


# On a card, at full size


@pytest.mark.gpu
@pytest.mark.parametrize("activation", plan.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(16389, 768, 3072, 768), (33, 250, 513, 250)], ids=str)
def test_full_size(shape: tuple[int, ...], activation: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = inputs(shape, activation, "cuda")
    exact = exactly(*values, activation, has_groups=True)
    q, scale = quantize_rows(values[0])
    for dtype, least in ((torch.float16, 60), (torch.bfloat16, 45), (FP32, 70)):
        if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (7, 5):
            continue
        out = int8_feed_forward(q, *values[1:], x_scale=scale, activation=activation, out_dtype=dtype, impl="triton")
        assert noise_db(out, exact) > least
