"""Compiled loops of int8 on the CPU: exact sums, and the same bits on every instruction set, thread count and batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from geneformer_kernels import (
    int8_feed_forward,
    int8_linear,
    int8_rows,
    quantize_rows,
    residual_layernorm,
    residual_layernorm_int8,
)
from geneformer_kernels.cpu import int8_products
from geneformer_kernels.cpu.int8_pack import pack
from geneformer_kernels.dispatch import ImplUnavailableError, choose
from geneformer_kernels.measured_int8 import MEASURED_INT8
from geneformer_kernels.target import INT8_INSTRUCTIONS, Target, is_left_to_numba

from bench.cpu import int8 as int8_cpu

SETS = int8_products.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason="this CPU has no AVX2")
each_set = pytest.mark.parametrize("name", SETS)
#: Rows, K, N: whole tiles, tails in each, one of everything, several blocks of rows.
SHAPES = [(12, 64, 64), (7, 63, 65), (1, 1, 1), (5, 130, 17), (200, 70, 30), (33, 256, 80)]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """The same bits, but for which NaN it is."""
    return bool(torch.equal(x.isnan(), y.isnan()) and torch.equal(bits(x.nan_to_num(7)), bits(y.nan_to_num(7))))


def weights(n_columns: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, (n_columns, width), generator=generator, dtype=torch.int8)
    return q, torch.rand(n_columns, generator=generator) * 0.02, torch.randn(n_columns, generator=generator)


def rows(n_rows: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(n_rows, width, generator=torch.Generator().manual_seed(n_rows)) + 0.3).to(dtype)


def by_oracle(q: torch.Tensor, scale: torch.Tensor, weight: tuple[torch.Tensor, ...], is_relu: bool) -> np.ndarray:
    """Sums in int64, and what follows one rounding after the other, in numpy."""
    sums = q.numpy().astype(np.int64) @ weight[0].numpy().astype(np.int64).T
    assert abs(sums).max(initial=0) < 2**31
    out = sums.astype(np.int32).astype(np.float32) * scale.numpy()[:, None] * weight[1].numpy() + weight[2].numpy()
    return np.maximum(out, np.float32(0)) if is_relu else out


@each_set
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_int64(name: str, shape: tuple[int, int, int]) -> None:
    n_rows, width, n_columns = shape
    q = torch.randint(-128, 128, (n_rows, width), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    scale, weight = rows(n_rows, 1)[:, 0], weights(n_columns, width)
    with int8_products.forced(name):
        for activation, dtype in itertools.product((None, "relu"), (torch.float32, torch.bfloat16, torch.float16)):
            got = int8_linear(q, *weight, x_scale=scale, activation=activation, out_dtype=dtype, impl="numba")
            truth = torch.from_numpy(by_oracle(q, scale, weight, activation == "relu")).to(dtype)
            assert same(got, truth)


@each_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_the_references(name: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    n_rows, width, n_columns = shape
    x = rows(n_rows, width, dtype)
    x[0] = 0
    x[-1, -1] = float("inf") if n_rows > 1 else 1.0
    x[n_rows // 2, 0] = float("nan") if n_rows > 2 else 2.0
    smooth = rows(1, width)[0].abs() + 0.5
    weight = weights(n_columns, width)
    with int8_products.forced(name):
        for factors in (None, smooth):
            for got, wanted in zip(
                quantize_rows(x, smooth=factors, impl="numba"), int8_rows.quantize_rows(x, factors), strict=True
            ):
                assert same(got, wanted)
        got = int8_linear(x, *weight, mode="dynamic", impl="numba")
        assert same(got, int8_linear(x, *weight, mode="dynamic", impl="reference"))


@each_set
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_saturate(name: str, sign: int) -> None:
    """What adds two products in 16 bits has 32,767 for 2 x 127 x 255."""
    width = 133_144 if sign > 0 else 131_072 - 64
    q = torch.full((7, width), 127 if sign > 0 else -128, dtype=torch.int8)
    weight = torch.full((3, width), 127, dtype=torch.int8)
    with int8_products.forced(name):
        out = int8_linear(q, weight, torch.ones(3), x_scale=torch.ones(7), out_dtype=torch.float32, impl="numba")
        layers = (torch.full((512, 8), 127, dtype=torch.int8), torch.ones(512), None)
        layers += (torch.full((3, 512), -128, dtype=torch.int8), torch.ones(3), None)
        behind_relu = int8_feed_forward(torch.ones(7, 8), *layers, activation="relu", impl="numba")
    assert (out == torch.tensor(int(q[0, 0]) * 127 * width).float()).all()
    assert same(behind_relu, int8_feed_forward(torch.ones(7, 8), *layers, activation="relu", impl="reference"))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "swiglu"])
def test_instruction_sets_threads_and_batches_give_the_same_bits(activation: str) -> None:
    n_rows, width, ff_width, n_columns = 203, 70, 130, 37
    x = rows(n_rows, width)
    n_units = ff_width * (2 if activation == "swiglu" else 1)
    up, down = weights(n_units, width), weights(n_columns, ff_width, 1)
    layer = None if activation == "swiglu" else activation

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        return [
            int8_linear(x, *up, activation=layer, mode="dynamic", impl="numba"),
            int8_feed_forward(x, *up, *down, activation=activation, impl="numba"),
            int8_feed_forward(x, *up, *down, activation=activation, out_dtype=torch.bfloat16, impl="numba"),
            *residual_layernorm_int8(x, x.flip(0), up[1][:width], up[2][:width], eps=1e-12, norm="post", impl="numba"),
        ]

    n_threads, found = torch.get_num_threads(), []
    try:
        for name, threads in itertools.product(SETS, (1, 2, 3)):
            torch.set_num_threads(threads)
            with int8_products.forced(name):
                found.append(compute(x))
    finally:
        torch.set_num_threads(n_threads)
    for others in found[1:]:
        assert all(same(one, other) for one, other in zip(found[0], others, strict=True))
    for i in (0, 95, 96, n_rows - 1):
        alone = compute(x[i : i + 1])[:3]
        assert all(same(one, other[i : i + 1]) for one, other in zip(alone, found[0], strict=False))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_activations_against_float64(activation: str) -> None:
    """Ten times as far from it as float32 can be: the polynomials' own error."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 3e38, -3e38])])
    one = torch.ones(1, dtype=torch.int8)
    q, scale = torch.ones(len(x), 1, dtype=torch.int8), x
    if activation == "swiglu":
        up = torch.ones(2, 1, dtype=torch.int8)
        got = int8_feed_forward(
            q, up, torch.ones(2), torch.tensor([0.0, 0.0]), one[None], torch.ones(1), None, x_scale=scale,
            activation="swiglu", out_dtype=torch.float32, impl="numba",
        )[:4001, 0]  # fmt: skip
        x = x[:4001]
        truth = torch.nn.functional.silu(x.double()) * x.double()
    else:
        got = int8_linear(
            q, one[None], torch.ones(1), x_scale=scale, activation=activation, out_dtype=torch.float32, impl="numba"
        )[:, 0]
        truth = int8_rows.activate(x.double(), activation)
    bound = 1e-6 * x.abs().clamp(max=1e30) * (x.abs() if activation == "swiglu" else 1) + 1e-37
    finite = truth.abs() < 3e38
    assert ((got.double() - truth).abs()[finite] <= bound[finite].clamp(min=0) + 1e-7 * truth.abs()[finite]).all()


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
def test_nan_and_infinite_rows_stay_among_themselves(activation: str | None) -> None:
    x, weight = rows(6, 40), weights(20, 40)
    x[1, 3], x[4, 0] = float("nan"), float("-inf")
    with int8_products.forced(SETS[0]):
        out = int8_linear(x, *weight, activation=activation, mode="dynamic", impl="numba")
        both = int8_feed_forward(
            x, *weight, *weights(9, 20, 2), activation=activation or "swiglu", impl="numba"
        ) if activation else out  # fmt: skip
    for result in (out, both):
        assert result[[1, 4]].isnan().all()
        assert result[[0, 2, 3, 5]].isfinite().all()


@each_set
def test_layers_take_any_memory(name: str) -> None:
    """Rows out of a wider matrix, every other column, a weight that is one row again and again, and no rows at all."""
    wide, weight, scale = rows(9, 128), weights(20, 64), torch.rand(1).expand(20)
    with int8_products.forced(name):
        for x in (wide[:, :64], wide[:, ::2], wide.T[:64].T, wide[::2, 64:]):
            got = int8_linear(x, weight[0], scale, mode="dynamic", impl="numba")
            assert same(got, int8_linear(x.contiguous(), weight[0], scale, mode="dynamic", impl="reference"))
        alike = weight[0][:1].expand(20, 64)
        got = int8_linear(wide[:, :64], alike, scale, mode="dynamic", impl="numba")
        assert same(got, int8_linear(wide[:, :64], alike, scale, mode="dynamic", impl="reference"))
        assert int8_linear(wide[:0, :64], *weight, mode="dynamic", impl="numba").shape == (0, 20)
        assert quantize_rows(wide[:0], impl="numba")[0].shape == (0, 128)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize(("width", "dtype"), [(256, torch.bfloat16), (70, torch.float32), (1, torch.float16)], ids=str)
def test_layernorm_against_float64(norm: str, width: int, dtype: torch.dtype) -> None:
    x, residual = rows(50, width, dtype), rows(50, width).roll(1, 0) * 3 + 1
    weight, bias, smooth = rows(1, width)[0], rows(2, width)[1], rows(3, width)[2].abs() + 0.1
    for before in (residual, None):
        stream, q, scale = residual_layernorm_int8(
            x, before, weight, bias, eps=1e-12, norm=norm, smooth=smooth, impl="numba"
        )
        truth, out = residual_layernorm(
            x.double(), None if before is None else before.double(), weight.double(), bias.double(),
            eps=1e-12, norm=norm, out_dtype=torch.float64,
        )  # fmt: skip
        assert stream.dtype == torch.float32
        assert torch.allclose(stream.double(), truth, rtol=1e-5, atol=2e-5)
        step = (out * smooth).abs().amax(1) / 127
        assert torch.allclose(scale.double(), torch.where(step > 1e-35, step, 1.0), rtol=1e-4)
        apart = (q.double() * scale.double()[:, None] - out * smooth).abs()
        assert (apart <= 0.51 * scale.double()[:, None] + 1e-4).all()


def test_packed_weights_are_as_large_as_weights() -> None:
    weight = weights(256, 512)
    assert pack(*weight, is_wide=False, is_shifted=True).panels.nbytes == 256 * 512
    shift = pack(*weight, is_wide=False, is_shifted=True).shift
    assert torch.equal(torch.from_numpy(shift), 128 * weight[0].sum(1, dtype=torch.int32))


def test_choice_and_its_limits() -> None:
    on_avx2 = Target.cpu({"avx2"})
    for op in ("int8_linear", "quantize_rows", "int8_feed_forward", "residual_layernorm_int8"):
        chosen = choose(op, "float32", on_avx2)
        assert (chosen.impl, "avx2" in chosen.reason) == ("numba", True)
        assert choose(op, "float32", Target.cpu({"int8_dot"})).impl == "torch"
    assert choose("residual_layernorm_int8", "float64", on_avx2).impl == "torch"
    assert Target.cpu({"avx2", "avx512_vnni"}).int8_instructions == "avx512_vnni"
    assert Target.cpu({"avx512"}).int8_instructions is None
    x, weight = rows(3, 200), weights(5, 200)
    with pytest.raises(ImplUnavailableError, match="one scale per row"):
        int8_linear(
            x.to(torch.int8), *weight, x_scale=torch.ones(3, 2), out_dtype=torch.float32, impl="numba"
        )  # fmt: skip
    with pytest.raises(ImplUnavailableError, match="multiply integers"):
        int8_linear(x, *weight, mode="weight_only", impl="numba")


def test_one_instruction_set_can_be_forced_and_no_other() -> None:
    with int8_products.forced(SETS[0]):
        assert int8_products.instruction_set() == SETS[0]
    assert int8_products.instruction_set() == SETS[-1]
    with pytest.raises(ValueError, match="'sse2' is not among"), int8_products.forced("sse2"):
        pass


@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({}, set(INT8_INSTRUCTIONS)),
        ({"NUMBA_ENABLE_AVX": "0"}, set()),
        ({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}, {"avx2"}),
        ({"NUMBA_CPU_NAME": "nocona", "NUMBA_CPU_FEATURES": ""}, set()),
        ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+avx,+avx2,+avxvnni"}, {"avx2", "avx_vnni"}),
    ],
    ids=["this CPU", "no AVX", "haswell", "nocona", "features"],
)
def test_what_numba_may_compile(environment: dict[str, str], left: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NUMBA_ENABLE_AVX", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert {name for name in INT8_INSTRUCTIONS if is_left_to_numba(name)} == left
    # Fused multiply-adds come with the name of a CPU that has AVX2, and features are taken at their word.
    assert is_left_to_numba("fma") == ("avx2" in left and "generic" not in environment.values())


def test_measured_rows_are_those_of_the_results() -> None:
    assert int8_cpu.render(int8_cpu.committed()) == int8_cpu.TARGET.read_text(), "run python -m bench.cpu.int8 --render"
    places = {key: rows for key, (rows, _) in MEASURED_INT8.items()}
    assert {name for name, _ in places} <= set(INT8_INSTRUCTIONS)
    assert all(ms > 0 for rows in places.values() for row in rows for ms in row[2:])
