"""residual_layernorm_int8: the LayerNorm whose value to compute on leaves as int8 rows."""

from __future__ import annotations

import os

import pytest
import torch
from geneformer_kernels import int8_rows, residual_layernorm, residual_layernorm_int8
from geneformer_kernels.dispatch import Impl, ImplUnavailableError, choose
from geneformer_kernels.ops.residual_layernorm import int8 as operators
from geneformer_kernels.ops.residual_layernorm import reference
from geneformer_kernels.target import CARDS, Target

IMPLS = ["triton", "torch", "reference"]
#: No multiple of anything, one of everything, a published width, and one that no block of columns holds exactly.
SHAPES = [(37, 131), (1, 1), (5, 256), (3, 769)]


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """x, residual, weight, bias, smooth: means away from zero."""
    generator = torch.Generator().manual_seed(shape[1])
    x, residual = (torch.randn(shape, generator=generator) + mean for mean in (0.7, -2.0))
    weight, bias = (torch.randn(shape[1], generator=generator) + mean for mean in (1.0, 0.3))
    smooth = torch.rand(shape[1], generator=generator) + 0.1
    return tuple(each.to(device) for each in (x.to(dtype), residual, weight, bias, smooth))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(device: str, impl: str, norm: str, shape: tuple[int, int], poisoned: None) -> None:
    """The stream is the LayerNorm's own, and the rows are within half a step of its value in float64."""
    for dtype in (torch.float32, torch.float16):
        x, residual, weight, bias, smooth = inputs(shape, dtype, device)
        for there, scaled in ((residual, smooth), (None, None)):
            stream, q, scale = residual_layernorm_int8(
                x, there, weight, bias, eps=1e-5, norm=norm, smooth=scaled, impl=impl
            )
            wide = (x, there, weight, bias)
            exact = reference.residual_layernorm(
                *(None if each is None else each.double() for each in wide), 1e-5, norm, torch.float64
            )
            assert (stream.dtype, q.dtype, scale.dtype) == (torch.float32, torch.int8, torch.float32)
            assert (stream.shape, q.shape, scale.shape) == (x.shape, x.shape, x.shape[:1])
            torch.testing.assert_close(stream.double(), exact[0], rtol=1e-5, atol=1e-5)
            value = exact[1] if scaled is None else exact[1] * scaled.double()
            error = (q.double() * scale.double()[:, None] - value).abs()
            # Half a step, and what float32 is off before the rounding.
            assert (error <= 0.501 * scale.double()[:, None] + 1e-5).all()
            assert (q.abs().amax(1) == 127).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_rows_are_those_of_the_layernorm(device: str, impl: str) -> None:
    x, residual, weight, bias, smooth = inputs((21, 131), torch.float32, device)
    stream, out = residual_layernorm(x, residual, weight, bias, eps=1e-12, norm="pre", impl=impl)
    expected = int8_rows.quantize_rows(out, smooth)
    found = residual_layernorm_int8(
        x[None], residual[None], weight, bias, eps=1e-12, norm="pre", smooth=smooth, impl=impl
    )
    for value, other in zip(found, (stream, *expected), strict=True):
        assert torch.equal(value[0], other)


@pytest.mark.parametrize("impl", IMPLS)
def test_poison_and_zeros(device: str, impl: str) -> None:
    x, residual, weight, bias, _ = inputs((5, 70), torch.float32, device)
    x[1, 3] = float("nan")
    residual[2, 69] = float("inf")
    _, q, scale = residual_layernorm_int8(x, residual, weight, bias, eps=1e-5, norm="post", impl=impl)
    assert scale.isnan().tolist() == [False, True, True, False, False]
    zeros = torch.zeros_like(bias)
    stream, q, scale = residual_layernorm_int8(x, residual, weight * 0, zeros, eps=1e-5, norm="post", impl=impl)
    assert (stream[0] == 0).all()
    assert (q[[0, 3, 4]] == 0).all()
    assert scale[[0, 3, 4]].tolist() == [1.0] * 3
    empty = residual_layernorm_int8(x[:0], None, weight, bias, eps=1e-5, norm="post", impl=impl)
    assert [each.shape for each in empty] == [(0, 70), (0, 70), (0,)]


def test_no_gradient_is_lost_silently() -> None:
    x, residual, weight, bias, _ = inputs((5, 70), torch.float32, "cpu")
    options = dict(eps=1e-5, norm="post")
    with pytest.raises(RuntimeError, match="residual_layernorm_int8 has no gradient"):
        residual_layernorm_int8(x, residual.requires_grad_(), weight, bias, **options)
    with torch.no_grad():
        residual_layernorm_int8(x, residual, weight, bias, **options)


def test_the_house_of_torch() -> None:
    x, residual, weight, bias, smooth = inputs((5, 33), torch.float32, "cpu")
    operator, tests = operators.residual_layernorm_int8_op.overload, ("test_schema", "test_faketensor")
    for impl in (*(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []), "torch", "reference"):
        for rows, there, is_post in ((x, residual, True), (x.T.contiguous().T, None, False), (x, None, False)):
            arguments = (rows, there, weight, bias, smooth, 1e-5, is_post, impl)
            torch.library.opcheck(operator, arguments, test_utils=tests)

    def step(x):
        return residual_layernorm_int8(x, None, weight, bias, eps=1e-5, norm="pre", smooth=smooth, impl="torch")

    torch._dynamo.reset()
    for value, other in zip(torch.compile(step, backend="aot_eager", fullgraph=True)(x), step(x), strict=True):
        assert torch.equal(value, other)


def test_what_a_kernel_cannot_hold() -> None:
    card = CARDS["H100"]
    assert choose("residual_layernorm_int8", "bfloat16", card).impl == Impl.TRITON
    assert choose("residual_layernorm_int8", "float16", CARDS["V100"]).impl == Impl.TRITON  # there is no product in it
    assert choose("residual_layernorm_int8", "float64", card).impl == Impl.TORCH
    assert choose("residual_layernorm_int8", "float16", Target.cpu()).impl != Impl.TRITON
    x = torch.ones(1, 5000)
    with pytest.raises(ImplUnavailableError, match="rows up to 4,096 wide"):
        residual_layernorm_int8(x, None, x[0], x[0], eps=1e-5, norm="post", impl="triton")


def test_nothing_is_written_past_the_end(device: str, guarded: None) -> None:
    x, residual, weight, bias, smooth = inputs((9, 300), torch.float16, device)
    found = residual_layernorm_int8(x, residual, weight, bias, eps=1e-5, norm="post", smooth=smooth, impl="triton")
    expected = reference.residual_layernorm_int8(x, residual, weight, bias, 1e-5, "post", smooth)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert ((found[1].int() - expected[1].int()).abs() <= 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("width", [256, 768, 1280, 769, 4096])
def test_full_size(norm: str, width: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for dtype in (torch.float16, torch.float32):
        x, residual, weight, bias, smooth = inputs((16389, width), dtype, "cuda")
        stream, q, scale = residual_layernorm_int8(
            x, residual, weight, bias, eps=1e-5, norm=norm, smooth=smooth, impl="triton"
        )
        exact = reference.residual_layernorm(
            x.double(), residual.double(), weight.double(), bias.double(), 1e-5, norm, torch.float64
        )
        torch.testing.assert_close(stream.double(), exact[0], rtol=1e-4, atol=1e-4)
        error = (q.double() * scale.double()[:, None] - exact[1] * smooth.double()).abs()
        assert (error <= 0.51 * scale.double()[:, None] + 1e-4).all()
