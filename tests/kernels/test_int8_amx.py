"""Products of int8 on the tiles of a CPU with amx_int8, bit for bit against sums in int64 and torch's own steps."""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numba
import numpy as np
import pytest
import torch
from geneformer_kernels.cpu import amx, int8_amx, int8_products
from geneformer_kernels.cpu.int8_amx import BFLOAT16_RESULT, FLOAT16_RESULT, FLOAT32_RESULT, SCRATCH_BYTES
from tiles_in_use import in_use, in_use_after_configuring

needs_amx = pytest.mark.skipif(int8_amx.why_not() is not None, reason=str(int8_amx.why_not()))

KINDS = {torch.float32: FLOAT32_RESULT, torch.bfloat16: BFLOAT16_RESULT, torch.float16: FLOAT16_RESULT}
#: Rows, columns and K around every step: tiles of 16, blocks of 32, widths of 64; more steps than rows of a block.
SIZES = [
    (1, 1, 1), (15, 15, 63), (16, 16, 64), (17, 17, 65), (32, 32, 128), (33, 33, 100), (64, 48, 256), (100, 80, 192),
    (31, 47, 2112), (65, 31, 3072),
]  # fmt: skip


def aligned(n_bytes: int) -> torch.Tensor:
    """Bytes from a multiple of 64 on, each 77."""
    buffer = torch.full((n_bytes + 64,), 77, dtype=torch.uint8)
    start = -buffer.data_ptr() % 64
    return buffer[start : start + n_bytes]


@dataclass
class Product:
    """Int8 of both sides, as they are and as they are laid out, and what goes with rows and columns."""

    q: torch.Tensor
    weight: torch.Tensor
    row_scale: torch.Tensor
    column_scale: torch.Tensor
    bias: torch.Tensor | None

    def __post_init__(self) -> None:
        (n_rows, width), n_columns = self.q.shape, len(self.weight)
        self.width = width + -width % 64
        # Rows up to the next block are read, and what they hold means nothing.
        self.rows = aligned((n_rows + -n_rows % 32) * self.width).view(torch.int8).view(-1, self.width)
        self.rows[:n_rows] = 0
        self.rows[:n_rows, :width] = self.q
        n_panels = -(-n_columns // 16)
        even = torch.zeros(16 * n_panels, self.width, dtype=torch.int8)
        even[:n_columns, :width] = self.weight
        self.panels = aligned(even.numel()).view(torch.int8)
        self.panels.copy_(even.view(n_panels, 16, self.width // 4, 4).transpose(1, 2).flatten())

    def exact(self, dtype: torch.dtype, *, relu: bool = False) -> torch.Tensor:
        """Sums in int64, wrapped to int32, and then step by step what torch makes of them."""
        sums = (self.q.long() @ self.weight.long().T).to(torch.int32)
        out = sums.float() * self.row_scale[:, None] * self.column_scale
        out = out if self.bias is None else out + self.bias
        return (out.relu() if relu else out).to(dtype)

    def compute(self, dtype: torch.dtype, *, relu: bool = False) -> torch.Tensor:
        n_rows, n_columns = len(self.q), len(self.weight)
        # A row below and five columns to the right belong to somebody else.
        out = torch.full((n_rows + 1, n_columns + 5), 7.5, dtype=dtype)
        scratch = aligned(SCRATCH_BYTES)
        int8_amx.multiply_rows_amx(
            self.rows.data_ptr(), self.width, n_rows, self.row_scale.data_ptr(), self.panels.data_ptr(),
            self.width // 4, n_columns, self.column_scale.data_ptr(), 0 if self.bias is None else self.bias.data_ptr(),
            np.float32(0 if relu else -np.inf), KINDS[dtype], out.data_ptr(), out.stride(0) * out.element_size(),
            scratch.data_ptr(),
        )  # fmt: skip
        assert (out[n_rows:] == 7.5).all()
        assert (out[:, n_columns:] == 7.5).all()
        return out[:n_rows, :n_columns]


def drawn(n_rows: int, n_columns: int, width: int, *, has_bias: bool = True) -> Product:
    """Numbers of all sizes, with means away from zero."""
    generator = torch.Generator().manual_seed(n_rows + n_columns + width)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    def floats(n: int) -> torch.Tensor:
        return torch.rand(n, generator=generator)

    return Product(
        integers(n_rows, width),
        integers(n_columns, width).clamp(-100),
        floats(n_rows) * 0.01 + 0.001,
        floats(n_columns) * 0.01 + 0.001,
        floats(n_columns) - 0.3 if has_bias else None,
    )


def bits(x: torch.Tensor) -> torch.Tensor:
    """What tells -0 from 0; one NaN is as good as another."""
    return x.nan_to_num(nan=123.0, posinf=torch.inf, neginf=-torch.inf).view(
        torch.int32 if x.dtype == torch.float32 else torch.int16
    )


@needs_amx
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_bits_as_in_int64(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for has_bias, relu in itertools.product((True, False), (True, False)):
        product = drawn(*size, has_bias=has_bias)
        assert torch.equal(bits(product.compute(dtype, relu=relu)), bits(product.exact(dtype, relu=relu)))


@needs_amx
@pytest.mark.parametrize(("a", "b"), [(127, 127), (-127, 127), (-128, -128), (127, -128)])
def test_sums_of_the_largest_products(a: int, b: int) -> None:
    """No 16 bits are in the way; 70,000 products of one sign leave float32's integers, 140,000 those of int32."""
    for width in (70_000, 140_000):
        product = Product(
            torch.full((2, width), a, dtype=torch.int8), torch.full((3, width), b, dtype=torch.int8),
            torch.ones(2), torch.ones(3), None,
        )  # fmt: skip
        assert torch.equal(product.compute(torch.float32), product.exact(torch.float32))


@needs_amx
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("scale", [1e-38, 1e-43, -0.5, 3e34, torch.inf, -torch.inf, torch.nan], ids=str)
def test_results_of_any_size(scale: float, dtype: torch.dtype) -> None:
    """Subnormal numbers, infinity and NaN, of one row in each block of rows; ReLU lets NaN pass."""
    for n_rows, relu in itertools.product((40, 97), (True, False)):
        product = drawn(n_rows, 70, 192, has_bias=False)
        product.row_scale[3::32] = scale
        product.q[3, :] = 0
        product.__post_init__()
        found, expected = product.compute(dtype, relu=relu), product.exact(dtype, relu=relu)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(bits(found), bits(expected))


@needs_amx
@pytest.mark.parametrize("column", [0, 15, 16, 31, 38])
def test_one_subnormal_result(column: int) -> None:
    product = drawn(35, 40, 64, has_bias=False)
    product.column_scale[column] = 1e-42
    assert 0 < product.exact(torch.float32)[:, column].abs().max() < torch.finfo(torch.float32).tiny
    for dtype in KINDS:
        assert torch.equal(bits(product.compute(dtype)), bits(product.exact(dtype)))


@needs_amx
@pytest.mark.parametrize("nan", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0x7F800001], ids=hex)
def test_a_bias_of_nan(nan: int) -> None:
    product = drawn(5, 40, 64)
    assert product.bias is not None
    product.bias.view(torch.int32)[33] = np.array(nan, np.uint32).view(np.int32).item()
    for dtype in KINDS:
        assert product.compute(dtype, relu=True).isnan().any(0).nonzero().flatten().tolist() == [33]


@needs_amx
def test_nothing_to_compute() -> None:
    assert drawn(0, 20, 64).compute(torch.bfloat16).shape == (0, 20)
    assert drawn(20, 0, 64).compute(torch.bfloat16).shape == (20, 0)


@pytest.mark.parametrize("name", int8_products.instruction_sets())
@pytest.mark.parametrize("width", [64, 100, 256])
def test_rows_that_come_given(width: int, name: str) -> None:
    """Multiplied where they are, or laid out anew: by how many there are, how wide, and from where on."""
    for n_rows, offset in itertools.product((31, 32, 33, 96, 100, 192), (0, 1, 64)):
        product = drawn(n_rows, 40, width)
        rows = torch.full((n_rows * width + 128,), 77, dtype=torch.int8)
        rows = rows[offset : offset + n_rows * width].view(n_rows, width).copy_(product.q)
        with int8_products.forced(name):
            out = int8_products.linear(
                rows, product.row_scale, product.weight, product.column_scale, product.bias, "relu", torch.bfloat16
            )
        assert torch.equal(bits(out), bits(product.exact(torch.bfloat16, relu=True)))


@needs_amx
def test_tiles_are_released() -> None:
    assert in_use_after_configuring()  # the question can be answered with yes
    for size in SIZES:
        drawn(*size).compute(torch.bfloat16)
        assert not in_use()


@needs_amx
def test_beside_the_tiles_of_onednn() -> None:
    """Torch's own products of bfloat16 and int8, which configure tiles in their own way, between ours and after."""
    x, w = torch.randn(70, 192).bfloat16(), torch.randn(80, 192).bfloat16()
    alone = torch.nn.functional.linear(x, w)
    for size in SIZES:
        product = drawn(*size)
        assert torch.equal(product.compute(torch.bfloat16), product.exact(torch.bfloat16))
        assert torch.equal(torch.nn.functional.linear(x, w), alone)
        sums = torch._int_mm(product.rows, product.rows[:32].T)
        assert torch.equal(sums.long(), product.rows.long() @ product.rows[:32].long().T)


@needs_amx
def test_threads_at_once() -> None:
    products = [drawn(*size) for size in SIZES]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda product: product.compute(torch.bfloat16), products * 8))
    for out, product in zip(found, products * 8, strict=True):
        assert torch.equal(out, product.exact(torch.bfloat16))


@needs_amx
def test_a_forked_process() -> None:
    """It may use tiles when its parent may, whether it asks again or not."""
    product = drawn(33, 33, 100)
    expected = product.compute(torch.float32).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, none of which the child needs
        process = os.fork()
    if process == 0:
        is_right = product.compute(torch.float32).tolist() == expected and int8_amx.why_not() is None
        os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


class Refusing:
    """A system that answers no."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.asked: list[tuple[int, ...]] = []

    def syscall(self, *asked: int) -> int:
        self.asked.append(asked)
        ctypes.set_errno(self.code)
        return -1


@pytest.mark.parametrize(
    ("code", "why"),
    [(errno.ENOSPC, "stack for signals is too small"), (errno.EINVAL, "Invalid argument"), (errno.EPERM, "permitted")],
)
def test_a_system_that_refuses(code: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Refusing(code)
    monkeypatch.setattr(amx, "why_not_compilable", lambda *_: None)
    monkeypatch.setattr(amx.ctypes, "CDLL", lambda *_, **__: libc)
    monkeypatch.setattr(amx, "_why_refused", functools.cache(amx._why_refused.__wrapped__))
    for _ in range(2):
        answer = int8_amx.why_not()
        assert answer is not None
        assert "the operating system refuses AMX" in answer
        assert why in answer
    assert libc.asked == [(158, 0x1023, 18)]  # once a process


def test_a_numba_for_a_lesser_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (("CPU_NAME", "generic"), ("CPU_FEATURES", "+sse2"), ("ENABLE_AVX", 0)):
        with monkeypatch.context() as changed:
            changed.setattr(numba.config, setting, value)
            assert int8_amx.why_not() == "numba is told to compile for another CPU"


def test_a_cpu_without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, value in (("CPU_NAME", None), ("CPU_FEATURES", None), ("ENABLE_AVX", 1)):
        monkeypatch.setattr(numba.config, setting, value)
    monkeypatch.setattr(amx, "get_host_cpu_features", lambda: {"avx512bw": True, "amx-tile": False})
    assert int8_amx.why_not() == "the CPU lacks amx_tile, amx_int8, avx512_bf16"
