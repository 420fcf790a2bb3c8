"""What the tests of the kernels watch on the side, in Triton's interpreter: each watch can fail."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def copy_kernel(x_ptr, out_ptr, n_read, n_written, shift, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + shift + o, mask=o < n_read, other=0.0)
    tl.store(out_ptr + shift + o, b_x, mask=o < n_written)


@triton.jit
def one_kernel(x_ptr, out_ptr, i_x, i_out):
    tl.store(out_ptr + i_out, tl.load(x_ptr + i_x))


@triton.jit
def add_kernel(out_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + o, 1.0, mask=o < n)


@triton.jit
def swap_kernel(out_ptr, i_out):
    tl.atomic_cas(out_ptr + i_out, 0, 1)


@triton.jit
def tile_kernel(x_ptr, out_ptr, n_rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_r, o_c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    b_x = tl.load(x_ptr + o_r * stride + o_c, mask=o_r < n_rows, other=0.0)
    tl.store(out_ptr + (o_r + o_c) * 0, b_x, mask=o_r + o_c < 1)


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest) -> None:
    if "nothing_outside" not in request.fixturenames:
        pytest.skip("kernels are compiled for the card in this process")


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def quadruple_kernel(x_ptr, out_ptr, i_out, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = doubled(doubled(tl.load(x_ptr + o)))
    tl.store(out_ptr + i_out + o, tl.maximum(b_x, tl.zeros_like(b_x)))


OUTSIDE = pytest.raises(Exception, match="outside of every tensor")


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Five elements each, with more memory of the process behind them and before."""
    return torch.ones(3, 5, dtype=dtype)[1], torch.zeros(3, 5, dtype=dtype)[1]


def test_what_is_inside_passes():
    x, out = tensors()
    copy_kernel[(1,)](x, out, 5, 5, 0, BLOCK=8)
    assert torch.equal(x, out)
    one_kernel[(1,)](x, out, 4, 4)
    add_kernel[(1,)](out, 5, BLOCK=8)
    assert torch.equal(out, x + 1)
    swap_kernel[(1,)](out.int(), 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.int64])
@pytest.mark.parametrize(
    ("n_read", "n_written", "shift"), [(6, 5, 0), (5, 6, 0), (8, 0, 0), (0, 8, 0), (5, 0, -1), (0, 5, -1)]
)
def test_one_element_outside_fails(dtype, n_read, n_written, shift):
    with OUTSIDE:
        copy_kernel[(1,)](*tensors(dtype), n_read, n_written, shift, BLOCK=8)


@pytest.mark.parametrize(("i_x", "i_out"), [(5, 0), (-1, 0), (0, 5), (0, -1)])
def test_without_a_mask(i_x, i_out):
    with OUTSIDE:
        one_kernel[(1,)](*tensors(), i_x, i_out)


def test_atomics():
    with OUTSIDE:
        add_kernel[(1,)](tensors()[1], 6, BLOCK=8)
    with OUTSIDE:
        swap_kernel[(1,)](tensors(torch.int32)[1], 5)


def test_a_launch_does_not_remember_the_tensors_of_the_one_before():
    x, out = torch.ones(8).split(4)
    copy_kernel[(1,)](x, out, 4, 4, 0, BLOCK=4)
    with OUTSIDE:
        copy_kernel[(1,)](x, torch.zeros(4), 8, 0, 0, BLOCK=8)
    copy_kernel[(1,)](x, out_ptr=out, n_read=8, n_written=0, shift=0, BLOCK=8)  # from one of its own into the other


def test_a_view_reaches_to_its_own_last_element():
    out = torch.zeros(1)
    view = torch.ones(4, 8)[:3, :4]
    tile_kernel[(1,)](view, out, 3, 8, ROWS=4, COLUMNS=4)
    for n_rows, n_columns in ((4, 4), (3, 8)):
        with OUTSIDE:
            tile_kernel[(1,)](view, out, n_rows, 8, ROWS=4, COLUMNS=n_columns)
    tile_kernel[(1,)](torch.ones(1).expand(3, 4), out, 1, 0, ROWS=4, COLUMNS=1)


@triton.jit
def same_place_kernel(out_ptr, step, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o * 0, o * step)


def test_several_values_for_one_address_fail():
    out = torch.zeros(1, dtype=torch.int32)
    same_place_kernel[(1,)](out, 0, BLOCK=4)
    with pytest.raises(Exception, match="one address several values"):
        same_place_kernel[(1,)](out, 1, BLOCK=4)


def test_the_language_is_put_back_after_every_launch():
    """The interpreter searches it once (``quick_interpreter``): it is interpreted in launches, and only there."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    assert hasattr(interpreter._patch_lang, "__wrapped__"), "the interpreter is arranged otherwise, and slow"
    # Not tl.core: Triton itself leaves that changed, once a launch has called one of its own jitted functions.
    places = (tl, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    before = [{name: getattr(place, name) for name in dir(place)} for place in places]
    x, out = tensors()
    for i_out in (0, 5 << 20, 0):
        out.zero_()
        if i_out:
            with OUTSIDE:
                quadruple_kernel[(1,)](x, out, i_out, BLOCK=4)
            assert (out == 0).all()
        else:
            quadruple_kernel[(3,)](x, out, i_out, BLOCK=4)
            assert out.tolist() == [4, 4, 4, 4, 0]
        for place, members in zip(places, before, strict=True):
            now = {name: getattr(place, name) for name in members}
            assert [name for name, value in members.items() if now[name] is not value and now[name] != value] == []
