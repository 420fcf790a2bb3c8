"""The torch side of choosing and launching that every operation shares."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

from geneformer_kernels.dispatch import Impl, asked_for, choose, is_forced
from geneformer_kernels.target import Target, target_of

Function = TypeVar("Function", bound=Callable[..., Any])
DTYPE_NAMES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.uint16: "uint16",
    torch.int32: "int32",
    torch.int64: "int64",
}


def choose_for(
    op: str,
    x: torch.Tensor,
    impl: Impl | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    shape: Mapping[str, int] | None = None,
    triton_cannot: str = "",
    numba_cannot: str = "",
) -> str:
    """Name of the implementation that runs ``op`` where ``x`` is, in ``dtype`` (default: that of ``x``).

    ``shape`` is what the host knows of the problem's sizes, ``triton_cannot`` and ``numba_cannot`` why kernels or loops
    do not serve it (:func:`geneformer_kernels.dispatch.choose`). A compiled function (``torch.compile``) keeps the
    choice that was made when it was compiled.
    """
    name = DTYPE_NAMES[x.dtype if dtype is None else dtype]
    sizes = tuple((key, int(value)) for key, value in shape.items()) if shape is not None else ()
    return _choice(
        op,
        name,
        x.device.type,
        x.device.index,
        None if impl is None else str(impl),
        sizes,
        (triton_cannot, numba_cannot),
    )


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether torch will want a gradient of any of them."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether tensors are memory and nothing else: no subclass, no transformation of functions, nobody who watches
    operators, so that loops which know addresses may take them."""
    return (
        all(each is None or type(each) is torch.Tensor for each in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def why_not_float32_loops(*tensors: torch.Tensor | None) -> str:
    """Why loops that know addresses of float32 cannot take these tensors, parameters among them; "" where they can."""
    if torch.compiler.is_compiling():
        return "a compiled function is made of torch's operators"
    if needs_gradient(*tensors) or forward_ad._current_level >= 0:
        return "the compiled loops have no gradient"
    given = [each for each in tensors if each is not None]
    if any(type(each) not in (torch.Tensor, torch.nn.Parameter) or each.layout != torch.strided for each in given):
        return "the compiled loops take plain tensors"
    if not is_plain():
        return "somebody watches torch's operators, or transforms functions of them"
    if any(each.dtype != torch.float32 or each.is_neg() for each in given):
        return "the compiled loops compute float32 from float32"
    if torch.is_autocast_enabled(given[0].device.type):
        return "autocast is on"
    return ""


#: Of a layer's K: torch multiplies wider rows faster (V2-104M's 768 on a Xeon held to AVX2, 2026-11-30: QKV 20.7 ms of
#: processor time in torch and 28.5 in the loops, feed-forward and LayerNorm 69 and 81).
WIDEST_OF_LOOPS = 512


def why_float32_loops_are_slow(op: str, impl: Impl | str | None, width: int) -> str:
    """Why torch is taken for rows this wide where nobody chooses; "" where the loops are faster, or somebody does."""
    if width <= WIDEST_OF_LOOPS or impl is not None or is_forced(op):
        return ""
    return f"torch multiplies rows of more than {WIDEST_OF_LOOPS} numbers faster than the compiled loops"


def constant_for_compiler(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``: a compiled graph holds what the function gave while it was compiled.

    torch's own decorator loads its compiler, which takes a second and changes the environment of the process; all it
    does besides is to set this mark (torch 2.0 to 2.13).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# Constant for the compiler: the choice looks at versions, environment and context, which would break graphs.
@constant_for_compiler
def _choice(
    op: str,
    dtype: str,
    device_type: str,
    device_index: int | None,
    impl: str | None,
    sizes: tuple[tuple[str, int], ...],
    cannot: tuple[str, str],
) -> str:
    target = target_of(device_type if device_index is None else f"{device_type}:{device_index}")
    return _chosen(op, dtype, target, impl, sizes, cannot, asked_for())


# A model asks the same a dozen times per block, and on a card the host must not be what everybody waits for.
@functools.lru_cache(maxsize=4096)
def _chosen(
    op: str,
    dtype: str,
    target: Target,
    impl: str | None,
    sizes: tuple[tuple[str, int], ...],
    cannot: tuple[str, str],
    asked: object,
) -> str:
    """``asked`` is what :func:`choose` looks at besides its arguments."""
    return str(choose(op, dtype, target, impl, dict(sizes), *cannot).impl)


def is_one_pass(x: torch.Tensor, out_dtype: torch.dtype, *others: torch.Tensor | None) -> bool:
    """Whether ``cpu.norm_rows.add_layer_norm`` computes this: bfloat16 on a CPU with float32 ``others``, no gradient.

    It stays in the calling thread, so torch's passes are left where they may take many cores.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == out_dtype == torch.bfloat16
        and all(t is None or t.dtype == torch.float32 for t in others)
        and not torch.compiler.is_compiling()
        and not needs_gradient(x, *others)
        and torch.get_num_threads() <= 2
    )


def target_for(x: torch.Tensor) -> Target:
    """The target a tensor lives on, for plans made inside a custom operator (where nothing is traced)."""
    return target_of(x.device)


def launching_on(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes a tensor's card the current one, which is where Triton launches."""
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def is_capturing(x: torch.Tensor) -> bool:
    """Whether what is launched on the device of ``x`` goes into a CUDA graph, whose replays read other values."""
    if not x.is_cuda:
        return False
    with launching_on(x):
        return torch.cuda.is_current_stream_capturing()


def plainly_on(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast off: the dtypes of the products are those of the tensors, in the backward pass as in the forward."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def draw_seed(device: torch.device) -> torch.Tensor:
    """[1] int64 seed of a counter-based dropout mask, drawn from torch's generator on the device.

    A tensor, so that nobody waits for the device, CUDA graphs draw a new one at every replay, and activation
    checkpointing, which restores the generator, draws the same one twice.
    """
    return torch.randint(0, 2**31 - 1, (1,), dtype=torch.int64, device=device)
