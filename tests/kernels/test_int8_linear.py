"""int8_linear: integers exactly, the rest by its signal-to-noise ratio against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from geneformer_kernels import int8_linear, int8_rows, quantize_rows, quantize_weight
from geneformer_kernels.launch import MAX_DYNAMIC_WIDTH
from geneformer_kernels.ops.int8_linear import launches as operators
from geneformer_kernels.ops.int8_linear import plan, reference
from geneformer_kernels.target import CARDS, Target
from geneformer_kernels.target import target_of as real_target_of
from int8_inputs import IMPLS, dtypes_on, inputs, sqnr_db
from tolerance import Witness, assert_as_good_as

ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh"]
# Nothing is a multiple of anything; a multiple of every block; one of everything; less than a block; one column.
SHAPES = [(37, 131, 70), (64, 256, 128), (1, 1, 1), (3, 17, 5), (2, 1, 9)]


# Products


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 1030, 9)], ids=str)
def test_integers_are_exact(device: str, impl: str, shape: tuple[int, int, int], poisoned: None) -> None:
    """Rows that contain 127 quantise to themselves; with scales of one the output is the integer sum."""
    n_rows, width, n_columns = shape
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (n_rows, width), generator=generator)
    x[:, 0] = 127
    weight_q = torch.randint(-127, 128, (n_columns, width), generator=generator, dtype=torch.int8)
    exact = x @ weight_q.long().T
    one = torch.ones(n_columns, device=device)
    out = int8_linear(x.float().to(device), weight_q.to(device), one, mode="dynamic", impl=impl)
    assert exact.abs().max() < 2**24
    assert torch.equal(out.long().cpu(), exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_sums_do_not_overflow(device: str, impl: str) -> None:
    """The largest sum at a width of 2**16 is 2**30: it fits int32 exactly, and float32 after one rounding."""
    x = torch.full((1, 1 << 16), 127.0, device=device)
    weight_q = torch.full((2, 1 << 16), 127, dtype=torch.int8, device=device)
    weight_q[1] = -127
    weight_q[1, 0] = -126
    out = int8_linear(x, weight_q, torch.ones(2, device=device), mode="dynamic", impl=impl)
    exact = 127 * 127 * 65536
    assert out.tolist() == [torch.tensor([exact, -exact + 127], dtype=torch.int64).float().tolist()]


def test_sums_that_int32_cannot_hold() -> None:
    width = MAX_DYNAMIC_WIDTH
    assert width * 127**2 < 2**31 <= (width + 1) * 127**2
    x, scale = torch.ones(33, width + 1), torch.ones(1)
    weight_q = torch.full((1, width + 1), 127, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"133,145 products of int8 .* up to 133,144"):
        int8_linear(x, weight_q, scale, mode="dynamic")
    torch.testing.assert_close(int8_linear(x, weight_q, scale), torch.full((33, 1), 127.0 * (width + 1)))
    widest = int8_linear(x[:, 1:], weight_q[:, 1:], scale, mode="dynamic")
    torch.testing.assert_close(widest, torch.full((33, 1), 127.0 * width))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("mode", plan.MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(device: str, impl: str, mode: str, shape: tuple[int, int, int], poisoned: None) -> None:
    for dtype in dtypes_on(device):
        x, weight_q, weight_scale, bias = inputs(shape, dtype, device)
        if mode == "dynamic":  # the rounded x is exact in float64
            q, row_scale = int8_rows.quantize_rows(x)
            wide = q.double() * row_scale.double()[:, None]
        else:
            wide = x.double()
        for activation in ACTIVATIONS if shape == SHAPES[0] else ["gelu"]:
            for each in (bias, None):
                out = int8_linear(x, weight_q, weight_scale, each, activation=activation, mode=mode, impl=impl)
                weight = weight_q.double() * weight_scale.double()[:, None]
                exact = torch.nn.functional.linear(wide, weight, None if each is None else each.double())
                exact = int8_rows.activate(exact, activation)
                if mode == "dynamic":  # which must not depend on a narrow dtype at all but for the last rounding
                    witness = exact.to(dtype)
                    error = 1e-6 * exact.abs().max().item()
                    assert (out.double() - witness.double()).abs().max() <= error + 2 * torch.finfo(
                        dtype
                    ).eps * exact.abs().max()
                else:
                    assert_as_good_as(out, Witness(plain, x, weight, each, activation), exact)
                assert out.dtype == dtype


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """The layer without integers, in the dtype of x."""
    out = torch.nn.functional.linear(x, weight.to(x.dtype))
    return int8_rows.activate(out if bias is None else out + bias.to(x.dtype), activation)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", plan.MODES)
def test_signal_to_noise(device: str, impl: str, mode: str) -> None:
    """Against the layer before quantisation, on Gaussian data.

    Rounding to steps of m / 127, m the largest of K Gaussian numbers (3.0 deviations at K = 512), makes noise of
    (m / 127)**2 / 12: 43.3 dB below the signal, for each operand; both together 40.3 dB. The whole must come within
    1 dB of that, and above 35 dB.
    """
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 512, generator=generator)
    weight = torch.randn(128, 512, generator=generator)
    exact = x.double() @ weight.double().T
    weight_q, weight_scale = quantize_weight(weight)
    largest = [each.abs().amax(1).square().mean().item() for each in (x, weight)]
    noises = [each / 127**2 / 12 for each in largest]
    expected = -10 * torch.log10(torch.tensor(sum(noises) if mode == "dynamic" else noises[1])).item()
    values = [each.to(device) for each in (x, weight_q, weight_scale)]
    out = int8_linear(*values, mode=mode, impl=impl)
    found = sqnr_db(out.cpu(), exact)
    assert found > 35
    assert abs(found - expected) < 1.0, (found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_output_dtypes_and_leading_axes(device: str, impl: str) -> None:
    x, weight_q, weight_scale, bias = inputs((12, 33, 7), torch.float16, device)
    whole = int8_linear(x, weight_q, weight_scale, bias, mode="dynamic", out_dtype=torch.float32, impl=impl)
    parts = int8_linear(x.view(3, 4, 33), weight_q, weight_scale, bias, mode="dynamic", impl=impl)
    assert parts.shape == (3, 4, 7)
    torch.testing.assert_close(parts.view(12, 7), whole.half(), rtol=1e-3, atol=1e-3)
    strided = int8_linear(x.T.contiguous().T, weight_q, weight_scale, bias, mode="dynamic", impl=impl)
    assert torch.equal(strided, parts.view(12, 7))
    vector = int8_linear(x[0], weight_q, weight_scale, bias, mode="dynamic", impl=impl)
    assert torch.equal(vector, parts.view(12, 7)[0])
    for mode in plan.MODES:
        assert int8_linear(x[:0], weight_q, weight_scale, bias, mode=mode, impl=impl).shape == (0, 7)


@pytest.mark.parametrize("mode", plan.MODES)
def test_nothing_is_written_past_the_end(device: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    real = torch.empty

    def empty(size, **options):
        count = torch.Size(size).numel()
        buffer = real(count + 20_000, **options).fill_(7)
        kept.append((buffer, count))
        return buffer[:count].view(size)

    values = inputs((5, 131, 70), torch.float16, device)
    monkeypatch.setattr(torch, "empty", empty)
    int8_linear(*values, mode=mode, impl="triton")
    assert len(kept) == (3 if mode == "dynamic" else 1)
    assert all((buffer[count:] == 7).all() for buffer, count in kept)


def test_volta_multiplies_integers_exactly_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_rows, "target_of", lambda _: CARDS["V100"])
    q = torch.full((3, 2500), 127, dtype=torch.int8)
    weight_q = torch.full((2, 2500), -127, dtype=torch.int8)
    weight_q[0, 7] = 5
    assert torch.equal(int8_rows.fast_int8_product(q, weight_q), int8_rows.int8_product(q, weight_q))


@pytest.mark.parametrize("features", [{"avx2"}, {"avx2", "avx512"}, {"avx2", "int8_dot"}])
def test_a_cpu_without_an_instruction_for_it_multiplies_integers_exactly_too(
    features: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN adds pairs of products in 16 bits there, and cuts what does not fit: 127 times 127, twice, does not."""
    target = Target.cpu(features)
    assert target.has_int8_product == ("int8_dot" in features)
    if target.has_int8_product > real_target_of("cpu").has_int8_product:
        pytest.skip("this CPU has no such instruction")
    monkeypatch.setattr(int8_rows, "target_of", lambda _: target)
    q = torch.full((3, 2500), 127, dtype=torch.int8)
    assert torch.equal(int8_rows.fast_int8_product(q, q[:2]), int8_rows.int8_product(q, q[:2]))


def test_padding_for_cublas_changes_nothing() -> None:
    x, weight_q, *_ = inputs((3, 13, 5), torch.float32, "cpu")
    q, _ = quantize_rows(x)
    padded = int8_rows.padded(q, 17, 16), int8_rows.padded(weight_q, 8, 16)
    assert [[*each.shape] for each in padded] == [[17, 16], [8, 16]]
    assert torch.equal(int8_rows.int8_product(*padded)[:3, :5], int8_rows.int8_product(q, weight_q))
    assert int8_rows.padded(q, 3, 13) is q


# Rows that come as integers


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_that_were_rounded_before(device: str, impl: str, shape: tuple[int, int, int], poisoned: None) -> None:
    x, weight_q, weight_scale, bias = inputs(shape, torch.float32, device)
    q, scale = quantize_rows(x)
    for activation, each in (("gelu", bias), (None, None)):
        options = dict(activation=activation, impl=impl)
        expected = int8_linear(x, weight_q, weight_scale, each, mode="dynamic", **options)
        out = int8_linear(q, weight_q, weight_scale, each, x_scale=scale, out_dtype=torch.float32, **options)
        assert torch.equal(out, expected)
    half = int8_linear(q[None], weight_q, weight_scale, x_scale=scale[None], out_dtype=torch.float16, impl=impl)
    assert half.shape == (1, shape[0], shape[2])
    assert half.dtype == torch.float16


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("width", [1, 127, 128, 129, 300, 384])
def test_rows_with_a_scale_for_every_128_columns(device: str, impl: str, width: int, poisoned: None) -> None:
    """Against float64 of what the integers stand for."""
    x, weight_q, weight_scale, bias = inputs((21, width, 19), torch.float32, device)
    x = x * torch.logspace(-2, 2, width, device=device)  # groups of very different size
    q, scale = int8_rows.quantize_groups(x)
    assert scale.shape == (21, -(-width // 128))
    wide = q.double() * scale.double().repeat_interleave(128, 1)[:, :width]
    assert ((wide - x.double()).abs() <= 0.5 * scale.double().repeat_interleave(128, 1)[:, :width] * (1 + 1e-5)).all()
    exact = torch.nn.functional.gelu(wide @ (weight_q.double() * weight_scale.double()[:, None]).T + bias.double())
    out = int8_linear(
        q, weight_q, weight_scale, bias, x_scale=scale, activation="gelu", out_dtype=torch.float32, impl=impl
    )
    terms = wide.abs() @ (weight_q.double().abs() * weight_scale.double()[:, None]).T + bias.double().abs()
    assert ((out.double() - exact).abs() <= 1e-6 * terms).all()
    scale[3, -1] = float("nan")
    out = int8_linear(q, weight_q, weight_scale, bias, x_scale=scale, out_dtype=torch.float32, impl=impl)
    assert out.isnan().all(1).tolist() == [i == 3 for i in range(21)]


def test_rows_as_integers_need_what_belongs_to_them() -> None:
    x, weight_q, weight_scale, bias = inputs((5, 300, 7), torch.float32, "cpu")
    q, scale = quantize_rows(x)
    with pytest.raises(ValueError, match="x_scale must be given"):
        int8_linear(q, weight_q, weight_scale, bias, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="out_dtype must be said"):
        int8_linear(q, weight_q, weight_scale, bias, x_scale=scale)
    with pytest.raises(ValueError, match='mode must be "dynamic" or None'):
        int8_linear(q, weight_q, weight_scale, bias, x_scale=scale, out_dtype=torch.float32, mode="weight_only")
    with pytest.raises(ValueError, match=r"x_scale \[4\] must be \[5\] or \[5, 3\]"):
        int8_linear(q, weight_q, weight_scale, bias, x_scale=scale[1:], out_dtype=torch.float32)
    with pytest.raises(ValueError, match="x_scale belongs to int8 rows"):
        int8_linear(x, weight_q, weight_scale, bias, x_scale=scale)


# Gradients


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", plan.MODES)
def test_gradients(device: str, impl: str, activation: str | None, mode: str) -> None:
    x, weight_q, weight_scale, bias = inputs((37, 131, 70), torch.float32, device)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    out = int8_linear(x, weight_q, weight_scale, bias, activation=activation, mode=mode, impl=impl)
    slopes = torch.linspace(-1, 2, out.numel(), device=device).view(out.shape)
    (out * slopes).sum().backward()
    true_x, true_bias = (each.detach().double().requires_grad_() for each in (x, bias))
    seen = true_x
    if mode == "dynamic":  # rounded forward, passed through backward
        q, row_scale = int8_rows.quantize_rows(x.detach())
        seen = true_x + (q.double() * row_scale.double()[:, None] - true_x).detach()
    weight = weight_q.double() * weight_scale.double()[:, None]
    pre = seen @ weight.T + true_bias
    (int8_rows.activate(pre, activation) * slopes).sum().backward()
    torch.testing.assert_close(x.grad.double(), true_x.grad, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad.double(), true_bias.grad, rtol=1e-5, atol=1e-4)


def test_gradient_of_a_half_keeps_its_dtype(device: str) -> None:
    x, weight_q, weight_scale, _ = inputs((37, 131, 70), torch.float16, device)
    x, weight_scale = x.requires_grad_(), weight_scale * 1e-3
    int8_linear(x, weight_q, weight_scale, None, activation="relu", impl="triton").sum().backward()
    assert x.grad.dtype == torch.float16
    assert (x.grad != 0).any()


# The house of torch


@pytest.mark.parametrize(
    ("n_rows", "impl"),
    [
        (3, "triton"),
        (40, "torch"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, "torch"), (40, "triton"))),
    ],
)
def test_compiles_without_a_graph_break(device: str, n_rows: int, impl: str) -> None:
    x, weight_q, weight_scale, bias = inputs((n_rows, 33, 7), torch.float32, device)

    def step(x):
        return (
            int8_linear(x, weight_q, weight_scale, bias, activation="gelu", impl=impl)
            * quantize_rows(x, impl=impl)[1][:, None]
        )

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


def test_operators_are_registered_properly(device: str) -> None:
    x, weight_q, weight_scale, bias = inputs((5, 33, 7), torch.float32, device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for rows, impl in itertools.product((x, x.T), IMPLS):
        for smooth in (None, torch.ones(rows.shape[1], device=device)):
            torch.library.opcheck(operators.quantize_rows_op.overload, (rows, smooth, impl), test_utils=tests)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    for mode in plan.MODES:
        for impl in IMPLS:
            arguments = (x, None, weight_q, weight_scale, bias, "gelu", mode, torch.float16, impl, impl)
            torch.library.opcheck(operators.int8_linear_fwd.overload, arguments, test_utils=tests)


@pytest.mark.parametrize("mode", plan.MODES)
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("card", [None, "V100"])
def test_autocast_does_not_reach_inside(
    card: str | None, impl: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the float32 products that stand for integers on Volta nor those of the gradients become half."""
    if card is not None:
        monkeypatch.setattr(operators, "target_of", lambda _: CARDS[card])
    x, weight_q, weight_scale, bias = inputs((40, 2048, 9), torch.float32, "cpu")

    def results() -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        out = int8_linear(leaf, weight_q, weight_scale, bias, activation="gelu", mode=mode, impl=impl)
        out.sum().backward()
        return [out.detach(), leaf.grad]

    expected = results()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = results()
        for value, other in zip(found, expected, strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, other)


def test_bad_arguments() -> None:
    x, weight_q, weight_scale, bias = inputs((5, 33, 7), torch.float32, "cpu")
    with pytest.raises(ValueError, match="activation must be"):
        int8_linear(x, weight_q, weight_scale, bias, activation="swiglu")
    with pytest.raises(ValueError, match="mode must be"):
        int8_linear(x, weight_q, weight_scale, bias, mode="static")
    with pytest.raises(ValueError, match="do not fit"):
        int8_linear(x[:, :5], weight_q, weight_scale, bias)
    with pytest.raises(ValueError, match="weight_q must be int8"):
        int8_linear(x, weight_q.float(), weight_scale, bias)
    with pytest.raises(ValueError, match="bias"):
        int8_linear(x, weight_q, weight_scale, bias[:2])
    with pytest.raises(ValueError, match="weight_scale"):
        int8_linear(x, weight_q, weight_scale[:2], bias)


# On a card, at full size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16389, 768, 3072), (4099, 3072, 768), (7, 1024, 4096), (32, 769, 1001)], ids=str)
def test_full_size(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = inputs(shape, dtype, "cuda")
    for mode in plan.MODES:
        out = int8_linear(*values, activation="gelu", mode=mode, impl="triton")
        true = reference.int8_linear(values[0], None, *values[1:], "gelu", mode, torch.float64)
        assert sqnr_db(out, true) > {torch.float16: 60, torch.bfloat16: 45, torch.float32: 90}[dtype]
    for got, expected in zip(quantize_rows(values[0], impl="triton"), int8_rows.quantize_rows(values[0]), strict=True):
        assert torch.equal(got, expected)
