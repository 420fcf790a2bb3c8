"""Layers with weights of eight bits: what they compute, what they keep wherever they go, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from geneformer_kernels import quantize_rows, quantize_weight, quantize_weight_fp8
from torch import nn

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import QuantizedEmbedding, QuantizedLinear, Rows

SCHEMES = ("int8", "int8-weights", "fp8")


def linear_of(
    scheme: str, *, n_columns: int = 24, width: int = 40, has_smooth: bool = False, has_bias: bool = True
) -> QuantizedLinear:
    layer = QuantizedLinear(width, n_columns, scheme=scheme, has_bias=has_bias, has_smooth=has_smooth)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(n_columns, width, generator=generator) + 0.3
    layer.weight_q, layer.weight_scale = quantize_weight_fp8(weight) if scheme == "fp8" else quantize_weight(weight)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(n_columns, generator=generator) + 0.1)
        if layer.smooth is not None:
            layer.smooth.copy_(torch.rand(width, generator=generator) + 0.5)
    return layer


def table_of(n_rows: int = 12, width: int = 8) -> QuantizedEmbedding:
    table = QuantizedEmbedding(n_rows, width, scheme="int8-weights")
    weight = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(2)) + 0.2
    table.weight_q, table.weight_scale = quantize_weight(weight)
    return table


def rows_of(n_rows: int = 5, width: int = 40) -> torch.Tensor:
    return torch.randn(n_rows, width, generator=torch.Generator().manual_seed(3)) * 2 + 0.5


@pytest.mark.parametrize("has_smooth", [False, True])
def test_integers_are_multiplied(multiplying: Callable[[str], None], has_smooth: bool) -> None:
    """By int64, with the scales as they come: the only rounding is of rows."""
    multiplying("dynamic")
    layer, x = linear_of("int8", has_smooth=has_smooth), rows_of()
    q, scale = quantize_rows(x * layer.smooth if layer.smooth is not None else x)
    product = (q.long() @ layer.weight_q.long().T).double() * scale[:, None].double() * layer.weight_scale.double()
    expected = product + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer(x), layer(layer.rounded(x)))
    assert torch.equal(layer(Rows(q, scale)), layer(x))
    error = (layer(x) - F.linear(x, layer.weight, layer.bias)).abs().max()
    assert 1e-3 < error < 0.5  # rows are rounded


@pytest.mark.parametrize("has_smooth", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_stands_for_its_weight(scheme: str, has_smooth: bool, each_mode: str) -> None:
    layer, x = linear_of(scheme, has_smooth=has_smooth), rows_of()
    expected = F.linear(x, layer.weight, layer.bias)
    is_dynamic = scheme == "int8" and each_mode == "dynamic"
    assert layer.is_dynamic == is_dynamic
    tolerance = dict(rtol=0.02, atol=0.4) if is_dynamic else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), expected, **tolerance)
    torch.testing.assert_close(layer(x.view(5, 1, -1)), expected.view(5, 1, -1), **tolerance)
    hidden = layer(x, activation="gelu_tanh", out_dtype=torch.bfloat16)
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.float(), F.gelu(expected, approximate="tanh"), rtol=0.03, atol=0.4)


def test_a_mode_asked_for() -> None:
    layer, x, found = linear_of("int8"), rows_of(), {}
    for layer.mode in ("dynamic", "weight_only"):
        assert layer.is_dynamic == (layer.mode == "dynamic")
        found[layer.mode] = copy.deepcopy(layer)(x)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found["weight_only"], expected)
    assert (found["dynamic"] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_without_bias(scheme: str, each_mode: str) -> None:
    layer, x = linear_of(scheme, has_bias=False), rows_of()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=0.02, atol=0.4)


@pytest.mark.parametrize("has_smooth", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_a_frozen_weight(scheme: str, has_smooth: bool, each_mode: str) -> None:
    layer, x = linear_of(scheme, has_smooth=has_smooth), rows_of().requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, layer(x.detach()), rtol=1e-6, atol=1e-5)  # products are added up by others
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (dx,) = torch.autograd.grad(out, x, d_out)
    torch.testing.assert_close(dx, d_out @ layer.weight, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_rows_are_rounded_as_before_when_there_is_a_gradient(multiplying: Callable[[str], None]) -> None:
    multiplying("dynamic")
    for layer in (linear_of("int8"), linear_of("int8", has_smooth=True)):
        assert torch.equal(layer(rows_of().requires_grad_()), layer(rows_of()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_eight_bits_and_scales_survive_every_move(scheme: str) -> None:
    layer = linear_of(scheme, has_smooth=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert sorted(before) == ["bias", "smooth", "weight_q", "weight_scale"]
    x, out = rows_of(), layer(rows_of())
    for move in (
        lambda: layer.to(torch.bfloat16), lambda: layer.half(), lambda: layer.to("cpu", torch.float16),
        lambda: layer.float(), lambda: layer.share_memory(), lambda: copy.deepcopy(layer),
    ):  # fmt: skip
        moved = move()
        assert moved.weight.dtype == moved.compute_dtype == moved(x).dtype
        for name, tensor in moved.state_dict().items():
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.view(torch.int8), before[name].view(torch.int8))
    assert layer.compute_dtype == torch.float32
    assert torch.equal(layer(x), out)
    assert not layer.bias.requires_grad


def test_a_layer_goes_where_it_is_sent() -> None:
    layer = linear_of("fp8", has_smooth=True).to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert (layer.weight_q.dtype, layer.bias.dtype) == (torch.float8_e4m3fn, torch.float32)
    made = layer.to_empty(device="cpu")
    made.load_state_dict(linear_of("fp8", has_smooth=True).state_dict())
    assert torch.equal(made(rows_of()), linear_of("fp8", has_smooth=True)(rows_of()))


def test_dtypes_that_make_no_sense_are_refused() -> None:
    layer = linear_of("int8")
    with pytest.raises(UnsupportedError, match="not in float64"):
        layer.double()
    assert layer.compute_dtype == torch.float32
    with pytest.raises(UnsupportedError, match="not in float64"):
        QuantizedLinear(3, 2, scheme="int8", compute_dtype=torch.float64)


def test_autocast_says_what_comes_out(each_mode: str) -> None:
    layer = linear_of("int8")
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(rows_of())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(rows_of()), rtol=0.03, atol=0.2)


def test_weights_cannot_be_set_or_drawn() -> None:
    layer = linear_of("int8")
    with pytest.raises(UnsupportedError, match="another weight"):
        layer.weight = torch.zeros(24, 40)
    with pytest.raises(KeyError):
        layer.weight = nn.Parameter(torch.zeros(24, 40))
    for each in (layer, table_of()):
        with pytest.raises(UnsupportedError, match="fresh"):
            each.reset_parameters()


def test_what_is_written_into_a_wide_copy_is_not_lost_silently() -> None:
    """As adapters are merged, and as libraries draw weights."""
    layer, scale = linear_of("int8"), torch.full((24, 1), 2.0)

    def merge() -> None:
        layer.weight.data += scale

    def assign() -> None:
        layer.weight[0] = 3

    with torch.no_grad():
        for write in (merge, assign, lambda: layer.weight.mul_(scale), lambda: nn.init.normal_(layer.weight)):
            with pytest.raises(UnsupportedError, match="cannot be changed"):
                write()
    for read in (layer.weight * 2, layer.weight.data, layer.weight.detach(), layer.weight[1], layer.weight.double()):
        assert type(read) is torch.Tensor
    copied = torch.zeros(24, 40).copy_(layer.weight)
    assert torch.equal(copied, layer.weight)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.device.type) == (torch.float32, (24, 40), "cpu")


def test_a_table_widens_what_is_looked_up() -> None:
    table, ids = table_of(), torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(table(ids), table.weight[ids])
    assert torch.equal(table(ids.int()), table.weight[ids])
    assert table.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    for wrong in (12, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_is_widened_piece_by_piece(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    table, widened = table_of(), []
    plain = QuantizedEmbedding.widened

    def watched(self: QuantizedEmbedding, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        found = plain(self, dtype, rows)
        widened.append(len(found))
        return found

    monkeypatch.setattr("geneformer_fast.layers.DECODED_ROWS", 5)
    monkeypatch.setattr(QuantizedEmbedding, "widened", watched)
    x, bias = rows_of(4, 8).to(dtype), torch.arange(12.0)
    found = table.decoded(x, bias)
    assert widened == [5, 5, 2]
    torch.testing.assert_close(found, F.linear(x, plain(table, dtype), bias.to(dtype)))
    (dx,) = torch.autograd.grad(table.decoded(x.requires_grad_(), bias).float().sum(), x)
    torch.testing.assert_close(dx, plain(table, dtype).float().sum(0).expand(4, -1).to(dtype), rtol=0.02, atol=0.02)
