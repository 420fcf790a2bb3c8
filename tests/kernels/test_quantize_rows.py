"""quantize_rows and quantize_weight: numbers rounded to int8, to the bit whoever does it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from geneformer_kernels import int8_linear, int8_rows, quantize_rows, quantize_weight
from geneformer_kernels.dispatch import Impl, choose
from geneformer_kernels.ops.int8_linear import launches as operators
from geneformer_kernels.ops.int8_linear import plan
from geneformer_kernels.target import CARDS, Target
from int8_inputs import IMPLS, dtypes_on, inputs, sqnr_db


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(5, 33), (64, 128), (3, 4100), (1, 1), (0, 8), (2, 9000)], ids=str)
def test_quantize_rows(device: str, impl: str, shape: tuple[int, int], poisoned: None) -> None:
    for dtype in dtypes_on(device):
        x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3 + 1).to(dtype).to(device)
        q, scale = quantize_rows(x, impl=impl)
        assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float32, x.shape, x.shape[:1])
        expected_q, expected_scale = int8_rows.quantize_rows(x)
        assert torch.equal(q, expected_q)
        assert torch.equal(scale, expected_scale)
        if x.numel():
            largest = x.double().abs().amax(1, keepdim=True)
            assert ((q * scale.double()[:, None] - x.double()).abs() <= largest / 254 * (1 + 1e-5)).all()
            assert (q.abs().amax(1) == 127).all()


def test_wide_rows_of_which_a_program_takes_several(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan of today: rows that one block of columns does not hold come alone."""
    x = inputs((5, 150, 1), torch.float32, device)[0]
    monkeypatch.setattr(operators, "quantize_plan", lambda _: plan.QuantizePlan(4, 64, False, plan.Launch(1, 1)))
    q, scale = quantize_rows(x, impl="triton")
    q_true, scale_true = int8_rows.quantize_rows(x)
    assert torch.equal(q, q_true)
    assert torch.equal(scale, scale_true)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_even(device: str, impl: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0, 126.5, 0.49999997]], device=device)
    q, scale = quantize_rows(x, impl=impl)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127, 126, 0]]
    assert scale.tolist() == [1.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_and_rows_that_are_not_finite(device: str, impl: str) -> None:
    x = torch.ones(6, 40, device=device)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 39] = float("inf")
    x[3] = 1e-38
    x[4, 0] = -float("inf")
    q, scale = quantize_rows(x, impl=impl)
    assert scale.isnan().tolist() == [False, True, True, False, True, False]
    assert (q[[0, 3]] == 0).all()
    assert scale[[0, 3]].tolist() == [1.0, 1.0]
    assert (q[5] == 127).all()
    wide = torch.ones(2, 4200, device=device)
    wide[1, 4150] = float("nan")
    assert quantize_rows(wide, impl=impl)[1].isnan().tolist() == [False, True]
    _, weight_q, weight_scale, bias = inputs((1, 40, 3), torch.float32, device)
    out = int8_linear(x, weight_q, weight_scale, bias, activation="relu", mode="dynamic", impl=impl)
    assert out.isnan().all(1).tolist() == [False, True, True, False, True, False]
    torch.testing.assert_close(out[0], bias.relu())


@pytest.mark.parametrize("impl", IMPLS)
def test_smoothed_rows(device: str, impl: str, poisoned: None) -> None:
    """The rows are those of x times smooth; a column that is large costs the others nothing once it is smoothed."""
    x = inputs((21, 150, 1), torch.float16, device)[0]
    x[:, 7] *= 100
    smooth = torch.ones(150, device=device)
    smooth[7] = 0.01
    q, scale = quantize_rows(x, smooth=smooth, impl=impl)
    expected = int8_rows.quantize_rows(x.float() * smooth)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])
    assert torch.equal(quantize_rows(x, smooth=torch.ones_like(smooth), impl=impl)[0], quantize_rows(x)[0])
    smooth[7] = float("inf")
    assert quantize_rows(x, smooth=smooth, impl=impl)[1].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_transposed_rows(device: str, impl: str) -> None:
    """Results are contiguous whatever the strides of the rows, which is what the compiler is told."""
    x = torch.randn(33, 6, generator=torch.Generator().manual_seed(1)).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize_rows(x, impl=impl), backend="aot_eager", fullgraph=True)
    for q, scale in (quantize_rows(x.T, impl=impl), compiled(x.T)):
        assert q.is_contiguous()
        assert torch.equal(q, quantize_rows(x.T.contiguous(), impl=impl)[0])
        assert torch.equal(scale, quantize_rows(x.T.contiguous(), impl=impl)[1])


def test_quantize_weight() -> None:
    weight = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    q, scale = quantize_weight(weight.requires_grad_())
    assert not q.requires_grad
    assert not scale.requires_grad
    assert sqnr_db(q * scale[:, None], weight.detach()) > 40
    weight.data[2, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(weight)
    with pytest.raises(ValueError, match=r"must be \[N, K\]"):
        quantize_weight(weight[0])


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_rows_are_quantised_by_triton_on_every_card(card: Target) -> None:
    """There is no product in it: Volta and Turing have the kernel too."""
    for dtype in ("float16", "float32", "bfloat16") if card.sm >= 75 else ("float16", "float32"):
        assert choose("quantize_rows", dtype, card).impl == Impl.TRITON
        assert choose("quantize_rows", dtype, card, "triton").impl == Impl.TRITON
        assert choose("quantize_rows", dtype, dataclasses.replace(card, triton=None)).impl == Impl.TORCH
    assert choose("quantize_rows", "float64", card).impl == Impl.TORCH
    assert choose("quantize_rows", "float16", Target.cpu()).impl == Impl.TORCH
