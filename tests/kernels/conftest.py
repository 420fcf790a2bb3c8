"""Where the Triton kernels of these tests run: interpreted on the CPU, and with ``-m gpu`` on a card."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import interpreted
import numpy as np
import pytest
import torch

INTERPRETED = interpreted.settle()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device a kernel test runs on: ``"cpu"`` means Triton's interpreter (use float16 and float32 there only)."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled for the card in this process; -m gpu runs them there")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=INTERPRETED)
def one_value_per_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels fail where one store gives an address several values: on a card any of them may win.

    The interpreter stores element after element, and would hide that a mask keeps the wrong ones out.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    store = interpreter.InterpreterBuilder.create_masked_store

    def checked(self, ptrs, value, mask, *options):
        is_stored = np.asarray(mask.data)
        if is_stored.shape != ptrs.data.shape:
            is_stored = np.broadcast_to(is_stored, ptrs.data.shape)
        addresses = ptrs.data[is_stored]
        if (addresses[1:] > addresses[:-1]).all():  # as most of them are
            return store(self, ptrs, value, mask, *options)
        order = np.argsort(addresses, kind="stable")
        addresses = addresses[order]
        is_again = addresses[1:] == addresses[:-1]
        if is_again.any():
            values = np.ascontiguousarray(np.broadcast_to(value.data, ptrs.data.shape)[is_stored][order])
            values = values.view(f"u{values.itemsize}")
            assert (values[1:] == values[:-1])[is_again].all(), "a store gives one address several values"
        return store(self, ptrs, value, mask, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked)


@pytest.fixture(autouse=INTERPRETED)
def nothing_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels fail where they read or write outside of the tensors of their launch, whatever lies there.

    A tensor is what lies from its first element to its last, by shape and strides. To stray from one into another of
    the same launch is not noticed here: tests of results must see that.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    starts, ends = [], []  # of the launch that runs, in bytes: ascending, disjoint

    def reaches(argument):
        argument = getattr(argument, "base", argument)  # of descriptors, and of tensors under another type
        if isinstance(argument, tuple):
            for inner in argument:
                yield from reaches(inner)
        elif isinstance(argument, torch.Tensor) and argument.numel() > 0:
            last = sum((n - 1) * stride for n, stride in zip(argument.shape, argument.stride(), strict=True))
            yield argument.data_ptr(), argument.data_ptr() + (last + 1) * argument.element_size()

    def launched(self, arguments, named, copied=executor._init_args_hst):
        arguments, named = copied(self, arguments, named)
        starts.clear()
        ends.clear()
        for start, end in sorted(reaches((*arguments, *named.values()))):
            if ends and start < ends[-1]:
                ends[-1] = max(end, ends[-1])
            else:
                starts.append(start)
                ends.append(end)
        return arguments, named

    def check(ptrs, mask=None):
        addresses = ptrs.data
        if mask is not None and not (is_asked := np.asarray(mask.data)).all():
            addresses = addresses[np.broadcast_to(is_asked, addresses.shape)]
        if addresses.size == 0:
            return
        n_bytes = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        lowest = int(addresses.min())
        i_span = bisect.bisect_right(starts, lowest) - 1
        if i_span >= 0 and int(addresses.max()) + n_bytes <= ends[i_span]:
            return
        # Not all in one tensor, which is no fault yet.
        i_spans = np.searchsorted(np.array(starts, np.uint64), addresses, side="right")
        is_outside = addresses + np.uint64(n_bytes) > np.array([0, *ends], np.uint64)[i_spans]
        assert not is_outside.any(), f"{is_outside.sum()} addresses lie outside of every tensor of the launch"

    def checked(name, i_ptrs, i_mask):
        function = getattr(builder, name)

        def call(self, *options):
            check(options[i_ptrs], None if i_mask is None else options[i_mask])
            return function(self, *options)

        monkeypatch.setattr(builder, name, call)

    monkeypatch.setattr(executor, "_init_args_hst", launched)
    checked("create_masked_load", 0, 1)  # what loads and stores of all kinds end in
    checked("create_masked_store", 0, 2)
    checked("create_atomic_rmw", 1, 3)
    checked("create_atomic_cas", 0, None)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what ``torch.empty`` and its kin hand out with NaN (or the lowest integer): unwritten elements show."""

    def poisoning(function):
        def allocate(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoning(getattr(torch, name)))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As ``poisoned``, for ``torch.empty``; behind each of its tensors lies more poison, which must survive."""
    plain, tails = torch.empty, []

    def allocate(*args, **kwargs):
        wanted = plain(*args, **kwargs)
        poison = float("nan") if wanted.is_floating_point() else torch.iinfo(wanted.dtype).min
        buffer = plain(wanted.numel() + 8192, dtype=wanted.dtype, device=wanted.device).fill_(poison)
        tails.append(buffer[wanted.numel() :])
        return buffer[: wanted.numel()].view(wanted.shape)

    monkeypatch.setattr(torch, "empty", allocate)
    yield
    for tail in tails:
        is_whole = tail.isnan() if tail.is_floating_point() else tail == torch.iinfo(tail.dtype).min
        assert bool(is_whole.all()), "something was written behind the end of a tensor"
