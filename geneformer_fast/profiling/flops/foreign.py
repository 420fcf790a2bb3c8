"""Operations of other people's models: counted operator by operator while a step runs, or said to be unknown.

As torch's ``FlopCounterMode`` does it, with its formulas for products and convolutions, and stricter. That mode knows
some operators and takes all others for free: attention on a CPU (pytorch issue 195460), products of integers, recurrent
layers, flex attention and everybody's own operators count as 0 there, padded nested tensors and grouped convolutions
too much, and what runs outside of torch's dispatcher (kernels launched directly, CUDA graphs, other threads) is not
seen at all. Here an operator that may hold a product and has no formula, and every sign of work that was not seen,
makes the count unknown.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from geneformer_fast.profiling.figures import Figure, Missing

#: How a count came about: ``Flops.basis``.
FORMULA, COUNTED, UNKNOWN = "formula", "counted", "unknown"

# Operators of torch that may hold a product, by name without underscores around it: all 1,554 of aten in torch 2.13
# were looked at. A new one that is not meant costs a count, one that is missed would cost a number its truth.
_MAY_MULTIPLY = re.compile(
    r"mm(_|\d|$)|matmul|conv(?!ert)|attention|linear|rnn|lstm|transformer|multi_head|einsum|tensordot|chain|matrix"
    r"|(^|_)(mv|dot|vdot|gru|qr|svd|lu|bilinear|trilinear|ger|inner|inverse|pinverse|det|slogdet|logdet|kron|outer|cov)"
    r"(_|$)|addmv|addr|fbgemm|int\dpack|euclidean|affine_grid|cdist|pdist|fft|(?<!re)solve|cholesky|linalg|orgqr|ormqr"
    r"|geqrf|lowrank"
)
# Those among them that hold none: norms, what surrounds a product that is an operator of its own, memory.
_ARE_FREE = re.compile(
    r"linalg_(vector_norm|diagonal|_powsum|cross|check_errors)|matrix_H|slice_inverse|thnn_fused_\w+_cell\w*"
    r"|upsample_\w+|convert_weight_\w+|\w*flatten_weight|cufft_\w+|fft_\w*(freq|shift)|mkldnn_reorder\w*"
)
# Namespaces whose operators multiply nothing: bookkeeping, and communication between processes.
_FREE_NAMESPACES = ("prim", "prims", "profiler", "c10d", "_c10d_functional", "c10d_functional", "fsdp")
# What looks at a tensor without reading its numbers.
_READS_NOTHING = re.compile(
    r"^(new_|.*_like$|is_|_is_|sym_|size|stride|numel|dim$|storage_offset|record_stream|resize|set_|_has_|layout|device)"
)
_MAKES_EMPTY = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
# Answered by a tensor that is a subclass with sizes of its own.
_METADATA = re.compile(
    r"^(sym_)?(is_contiguous|is_strides_like_format|is_non_overlapping|size|stride|storage_offset|numel|dim)$"
)


def may_multiply(name: str) -> bool:
    """Whether an operator of aten may hold a matrix product, a convolution or the like."""
    bare = name.strip("_")
    return bool(_MAY_MULTIPLY.search(bare)) and not _ARE_FREE.fullmatch(bare)


def count_foreign(model: nn.Module, call: Callable[[], Any]) -> tuple[Figure, str, str]:
    """Operations that one call computes, padding and recomputation included.

    Parameters
    ----------
    model
        What is called in it.
    call
        Runs one step: forward, maybe backward. It runs eagerly, and takes longer than usual.

    Returns
    -------
    flops, basis, note
        Missing, ``"unknown"`` and why; or the number, ``"counted"`` and how.
    """
    with ForeignCounter(model) as counter:
        call()
    return counter.result()


class ForeignCounter:
    """Counts the operations of one step of somebody's loop, between ``with`` and its end; never raises into it.

    What was compiled by ``torch.compile`` runs eagerly meanwhile.

    Parameters
    ----------
    model
        Called in the step, in the thread that counts.

    Attributes
    ----------
    flops, by_operator
        So far.
    doubts
        Why the count is not known; the first reason counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.flops = 0
        self.by_operator: dict[str, int] = {}
        self.doubts: list[str] = []
        self._depth = self._n_calls = 0
        self._thread = threading.get_ident()
        self._stack = contextlib.ExitStack()
        self._memory = _Memory(self.doubts)
        _look_at_modules(model, self.doubts)

    def __enter__(self) -> ForeignCounter:
        self._thread = threading.get_ident()
        with contextlib.ExitStack() as stack:
            for handle in (
                self.model.register_forward_pre_hook(self._enter_model),
                self.model.register_forward_hook(self._leave_model, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(_told_of_graphs(self.doubts))
            if "torch._dynamo" in sys.modules:  # what is not loaded has compiled nothing
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_Operators(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def result(self) -> tuple[Figure, str, str]:
        """Operations, basis and note, as :func:`count_foreign` returns them."""
        if not self._n_calls:
            self.doubts.append("the model was not called in the step that was counted")
        if self.doubts:
            return Missing(self.doubts[0]), UNKNOWN, self.doubts[0]
        largest = sorted(self.by_operator.items(), key=lambda each: -each[1])[:4]
        shares = ", ".join(f"{name} {flops / max(self.flops, 1):.0%}" for name, flops in largest)
        note = "counted operator by operator in one step, with padding and recomputed blocks"
        return float(self.flops), COUNTED, f"{note}: {shares}" if shares else note

    def ran(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Count an operator that has run."""
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        name, formula = _name_of(func), _FORMULAS.get(func._schema.name)
        self._memory.ran(func, tensors, args, kwargs, out, self._is_in_model())
        if formula is not None:
            if any(_has_own_sizes(each) for each in tensors):
                self.doubts.append(f"{func} was given tensors of a kind of their own, whose work is not known")
                return
            flops = formula(_named(func, args, kwargs), out)
            self.flops += flops
            self.by_operator[name] = self.by_operator.get(name, 0) + flops
        elif func.namespace not in _FREE_NAMESPACES and (func.namespace != "aten" or may_multiply(name)):
            self.doubts.append(f"{func} has no formula")

    def reads(self, func: Any, args: Any, kwargs: Any) -> None:
        """Look at what an operator is about to read."""
        self._memory.reads(func, args, kwargs)

    def _enter_model(self, *_: Any) -> None:
        self._depth += 1
        self._n_calls += 1
        if threading.get_ident() != self._thread:
            self.doubts.append("the model ran in another thread than the loop")

    def _leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        self._memory.check(tree_leaves(output), "who called the model")

    def _is_in_model(self) -> bool:
        """Within the model's forward pass, or in a backward pass."""
        return self._depth > 0 or torch._C._current_graph_task_id() != -1


class _Operators(TorchDispatchMode):
    """Tells a counter of every operator."""

    supports_higher_order_operators = True

    def __init__(self, counter: ForeignCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        kwargs, doubts = kwargs or {}, self.counter.doubts
        if not isinstance(func, torch._ops.OpOverload):
            doubts.append(f"{func} is an operator of operators, whose work is not known")
            return func(*args, **kwargs)
        is_own_kind = any(kind not in (torch.Tensor, nn.Parameter) for kind in types)  # nested tensors, say
        if is_own_kind and _METADATA.match(_name_of(func)):
            return NotImplemented
        if func._schema.name not in _FORMULAS and not is_own_kind:
            with self:  # in inference mode operators come as they were called
                taken_apart = func.decompose(*args, **kwargs)
            if taken_apart is not NotImplemented:
                return taken_apart
        self.counter.reads(func, args, kwargs)
        out = func(*args, **kwargs)
        try:
            self.counter.ran(func, args, kwargs, out)
        except Exception as error:  # a formula that does not fit is no reason to end somebody's training
            doubts.append(f"{func} could not be counted ({type(error).__name__}: {error})")
        return out


class _Memory:
    """Which memory operators have handed out without a number in it.

    What is read from there has been written by something that torch did not see.
    """

    def __init__(self, doubts: list[str]) -> None:
        self.doubts = doubts
        # By the address of its book-keeping, which something else may have once it is gone.
        self.unwritten: dict[int, StorageWeakRef] = {}

    def reads(self, func: Any, args: Any, kwargs: Any) -> None:
        """Look at what an operator is about to read."""
        if self.unwritten and not func.is_view and not _READS_NOTHING.match(_name_of(func)):
            self.check(_read_and_written(func, args, kwargs)[0], str(func))

    def check(self, values: Iterable[Any], where: str) -> None:
        """Doubt the count where one of these is memory without a number in it."""
        for each in values:
            if not isinstance(each, torch.Tensor) or not each.numel():
                continue
            key = _storage_of(each)
            if key in self.unwritten and not self.unwritten[key].expired():
                self.doubts.append(
                    f"{where} read {[*each.shape]} numbers of something that torch does not see (a kernel of its own?)"
                )

    def ran(self, func: Any, tensors: list[torch.Tensor], args: Any, kwargs: Any, out: Any, is_in_model: bool) -> None:
        """Note what an operator has written, or handed out empty."""
        written = tensors if func.namespace in _FREE_NAMESPACES else _read_and_written(func, args, kwargs)[1]
        for each in written:
            self.unwritten.pop(_storage_of(each) or 0, None)
        if func.is_view:
            return
        is_empty = func.namespace == "aten" and _name_of(func) in _MAKES_EMPTY
        for each in tree_leaves(out):
            key = _storage_of(each) if isinstance(each, torch.Tensor) else None
            if key is None:
                continue
            self.unwritten.pop(key, None)
            if is_empty and is_in_model and each.numel():
                self.unwritten[key] = StorageWeakRef(each.untyped_storage())


def _name_of(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def _look_at_modules(model: nn.Module, doubts: list[str]) -> None:
    """What can be seen of a model before it runs."""
    for name, module in model.named_modules():
        kind, where = type(module), name or "the model"
        is_packed = getattr(vars(module).get("forward"), "is_packed", False)
        if kind.__module__.startswith("geneformer_fast.") or is_packed:
            doubts.append(f"{where} ({kind.__qualname__}) runs on loops of geneformer_fast, which torch does not see")
        if isinstance(module, torch.jit.ScriptModule):
            doubts.append(f"{where} is a program of TorchScript, which may be fused")
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            doubts.append(f"{where} runs in a thread for every card (DataParallel)")


@contextlib.contextmanager
def _told_of_graphs(doubts: list[str]) -> Iterator[None]:
    """Note replays of CUDA graphs, whose operators are not called again."""
    stock = torch.cuda.CUDAGraph.replay

    def replay(graph: Any) -> Any:
        doubts.append("a CUDA graph was replayed, whose operators are not seen")
        return stock(graph)

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.cuda.CUDAGraph.replay = stock  # type: ignore[method-assign]


def _storage_of(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # tensors without memory of their own
        return None


def _has_own_sizes(tensor: torch.Tensor) -> bool:
    """Nested, sharded, quantized and other tensors of more than one plain one."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return (
        tensor.is_nested or tensor.is_sparse or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor)
    )


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by the names of the schema."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _read_and_written(func: Any, args: Any, kwargs: Any) -> tuple[list[Any], list[Any]]:
    """Tensors of the arguments that an operator reads, and those it writes into."""
    read: list[Any] = []
    written: list[Any] = []
    named = _named(func, args, kwargs)
    for argument in func._schema.arguments:
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        found = [each for each in tree_leaves(named.get(argument.name)) if isinstance(each, torch.Tensor)]
        (written if is_written else read).extend(found)
    return read, written


def _registered(name: str) -> Callable[[dict[str, Any], Any], int]:
    """torch's own formula."""

    def formula(named: dict[str, Any], out: Any) -> int:
        from torch.utils.flop_counter import flop_registry

        return flop_registry[getattr(torch.ops.aten, name)](*named.values(), out_val=out)

    return formula


def _product(first: str, second: str) -> Callable[[dict[str, Any], Any], int]:
    """[..., m, k] times [..., k, n] or [k]."""

    def formula(named: dict[str, Any], out: Any) -> int:
        a, b = named[first].shape, named[second].shape
        return 2 * prod(a) * (b[-1] if len(b) > 1 else 1)

    return formula


def _transposed_product(named: dict[str, Any], out: Any) -> int:
    return 2 * prod(named["self"].shape) * named["mat2"].shape[0]


def _attention(named: dict[str, Any], out: Any, *, times: int = 1) -> int:
    """Two products of every query with every key; ``times`` 2 in the backward pass, without the scores made again."""
    if named.get("is_causal"):
        raise ValueError("how much of causal attention a kernel leaves out is not known")
    if named.get("cum_seq_q") is not None and named["query"].ndim != 4:
        raise ValueError("cells of several lengths in one tensor")
    (n, heads, n_queries, width), value = named["query"].shape, named["value"].shape
    return times * 2 * n * heads * n_queries * value[-2] * (width + value[-1])


def _attention_backward(named: dict[str, Any], out: Any) -> int:
    return _attention(named, out, times=2)


def _convolution_size(named: dict[str, Any], x: torch.Size, y: torch.Size) -> int:
    """Of a convolution of ``x`` to ``y``: a product with the kernel at every place of ``y``, transposed of ``x``."""
    weight = named["weight"].shape  # [out, in / groups, ...], transposed [in, out / groups, ...]
    return 2 * prod(x if named["transposed"] else y) * prod(weight[1:])


def _convolution(named: dict[str, Any], out: Any) -> int:
    return _convolution_size(named, named["input"].shape, out.shape)


def _convolution_backward(named: dict[str, Any], out: Any) -> int:
    once = _convolution_size(named, named["input"].shape, named["grad_output"].shape)
    return once * sum(named["output_mask"][:2])


_FORMULAS: dict[str, Callable[[dict[str, Any], Any], int]] = {
    **{f"aten::{name}": _registered(name) for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")},
    "aten::_int_mm": _product("self", "mat2"),
    "aten::_weight_int8pack_mm": _transposed_product,
    "aten::_addmm_activation": _product("mat1", "mat2"),
    "aten::addbmm": _product("batch1", "batch2"),
    "aten::mv": _product("self", "vec"),
    "aten::addmv": _product("mat", "vec"),
    "aten::dot": _product("self", "tensor"),
    "aten::vdot": _product("self", "other"),
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    **{
        f"aten::_scaled_dot_product_{name}": _attention
        for name in (
            *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
            "fused_attention_overrideable",
        )
    },
    **{
        f"aten::_scaled_dot_product_{name}_backward": _attention_backward
        for name in (
            *("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"),
            "fused_attention_overrideable",
        )
    },
}
