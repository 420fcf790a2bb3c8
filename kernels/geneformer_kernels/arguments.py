"""What operations ask of their arguments, before anybody chooses who computes: the same errors from all of them.

TypeError for what is no tensor or no number, ValueError for dtypes, devices, shapes and values; the first word of the
message is the argument's name. The values of tensors are looked at on the CPU only: on a card that would wait for the
device, and a compiled graph cannot look.
"""

from __future__ import annotations

import itertools
import math
import numbers
from typing import Any

import torch

from geneformer_kernels.launch import SCALE_GROUP

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    *(torch.int8, torch.uint8, torch.int16, torch.uint16),
    *(torch.int32, torch.uint32, torch.int64, torch.uint64),
)
#: What may count.
COUNTS = (torch.bool, *INTEGERS, *FLOATS)
_UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_KINDS = {FLOATS: "float16, bfloat16, float32 or float64", INTEGERS: "integers", COUNTS: "real numbers"}


def check_tensor(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...], *, n_axes: int | None = None, device: torch.device | None = None
) -> None:
    """A tensor of one of the dtypes, with so many axes, on the device; None asks nothing."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.layout is not torch.strided:
        raise ValueError(f"{name} must be dense (strided), not of layout {x.layout}")
    if x.dtype not in dtypes:
        wanted = _KINDS.get(dtypes) or " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}, not {x.dtype}")
    if n_axes is not None and x.ndim != n_axes:
        raise ValueError(f"{name} must have {n_axes} {'axis' if n_axes == 1 else 'axes'}, not the shape {[*x.shape]}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, where the others are, not on {x.device}")


def check_optional(
    name: str, x: Any, dtypes: tuple[torch.dtype, ...], *, n_axes: int | None = None, device: torch.device | None = None
) -> None:
    """:func:`check_tensor`, or None."""
    if x is not None:
        check_tensor(name, x, dtypes, n_axes=n_axes, device=device)


def is_looked_into(x: torch.Tensor) -> bool:
    """Whether the values of a tensor may be looked at here."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_bounds(name: str, cu_seqlens: Any, n_tokens: int) -> int:
    """[B + 1] integers, by value on the CPU: cumulative lengths of cells, from 0 to ``n_tokens``.

    Returns
    -------
    int
        Tokens of the longest cell, 0 where nobody looks.
    """
    check_tensor(name, cu_seqlens, INTEGERS)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{name} must be [B + 1], not {[*cu_seqlens.shape]}")
    if len(cu_seqlens) == 1 and n_tokens > 0:  # on a card no program would run, and the result be whatever was there
        raise ValueError(f"{name} must run from 0 to {n_tokens} (the tokens), and has one number")
    if not is_looked_into(cu_seqlens):
        return 0
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != n_tokens:
        raise ValueError(f"{name} must run from 0 to {n_tokens} (the tokens), not {bounds[0]}..{bounds[-1]}")
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"{name} must not decrease")
    return max(lengths, default=0)


def check_ids(name: str, ids: torch.Tensor, n_rows: int, what: str) -> None:
    """By value on the CPU: every one from 0 to below ``n_rows``."""
    if ids.numel() and is_looked_into(ids):
        low, high = (int(each) for each in ids.aminmax())
        if low < 0 or high >= n_rows:
            raise ValueError(f"{name} must lie between 0 and {n_rows - 1} ({what}), not {low if low < 0 else high}")


def has_wrong_counts(x: torch.Tensor) -> torch.Tensor:
    """[] boolean on the device of ``x``: whether one is negative, NaN or infinite."""
    if x.dtype in _UNSIGNED or not x.numel():
        return torch.zeros((), dtype=torch.bool, device=x.device)
    low, high = x.aminmax()  # NaN where there is one
    return ~((low >= 0) & (high < math.inf))


def check_counts(name: str, x: torch.Tensor) -> None:
    """By value on the CPU: finite numbers that are not negative."""
    if is_looked_into(x) and bool(has_wrong_counts(x)):
        raise ValueError(WRONG_COUNTS.format(name))


#: What is said of an argument with such numbers.
WRONG_COUNTS = "{} must be finite and not negative"


def check_real(name: str, value: Any) -> None:
    """A number, no boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")


def check_probability(name: str, value: Any, *, may_be_one: bool = True) -> None:
    """A number from 0 to 1."""
    check_real(name, value)
    if not (0 <= value <= 1 if may_be_one else 0 <= value < 1):
        raise ValueError(f"{name} must be in [0, 1{']' if may_be_one else ')'}, not {value}")


def check_positive(name: str, value: Any) -> None:
    """A positive finite number."""
    check_real(name, value)
    try:
        number = float(value)
    except OverflowError:  # an integer may be larger than any float
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}")


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """An integer, no boolean, of at least ``least`` and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if int(value) < least or (most is not None and int(value) > most):
        limits = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {limits}, not {value}")


def check_choice(name: str, value: Any, choices: tuple[str, ...], *, may_be_none: bool = False) -> None:
    """One of the names."""
    if not (value in choices if isinstance(value, str) else value is None and may_be_none):
        raise ValueError(f"{name} must be {'None or ' if may_be_none else ''}one of {choices}, not {value!r}")


def check_out_dtype(name: str, dtype: Any) -> None:
    """None, or a dtype that holds fractions."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} must be a dtype of torch, not {type(dtype).__name__}")
    if dtype not in FLOATS:
        raise ValueError(f"{name} must be {_KINDS[FLOATS]}, not {dtype}")


def check_device(name: str, device: Any) -> torch.device:
    """A device, or the name of one; returns it."""
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"{name} must be a device or the name of one, not {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError:
        raise ValueError(f"{name} must be the name of a device, not {device!r}") from None


def check_seed(name: str, seed: Any, device: torch.device) -> None:
    """None, or [1] int64 on the device."""
    check_optional(name, seed, (torch.int64,), device=device)
    if seed is not None and seed.numel() != 1:
        raise ValueError(f"{name} must be one number, not the shape {[*seed.shape]}")


def check_rows(name: str, x: Any) -> None:
    """Rows of floats [..., K]."""
    check_tensor(name, x, FLOATS)
    if x.ndim == 0:
        raise ValueError(f"{name} must be rows, not a single number")


def check_smooth(name: str, smooth: Any, x: torch.Tensor) -> None:
    """None, or what rows ``x`` [..., K] are multiplied by, column by column: [K]."""
    check_optional(name, smooth, FLOATS, device=x.device)
    if smooth is not None and smooth.shape != x.shape[-1:]:
        raise ValueError(f"{name} {[*smooth.shape]} must be [{x.shape[-1]}]")


def check_matrix(name: str, weight: Any) -> None:
    """A weight of floats [N, K]."""
    check_tensor(name, weight, FLOATS)
    if weight.ndim != 2:
        raise ValueError(f"{name} must be [N, K], not {[*weight.shape]}")


def check_channels(name: str, x: torch.Tensor | None, n_channels: int) -> None:
    """A tensor [N], one number per output channel, or None."""
    if x is not None and x.shape != (n_channels,):
        raise ValueError(f"{name} {[*x.shape]} must be [{n_channels}]")


def check_linear(
    x: torch.Tensor, weight_q: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """Shapes of a linear layer with weights of eight bits: x [..., K], [N, K], [N], and [N] or None."""
    if weight_q.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight_q.shape[1]:
        raise ValueError(f"x {[*x.shape]} and weight_q {[*weight_q.shape]} do not fit: [..., K] and [N, K] are needed")
    check_channels("weight_scale", weight_scale, weight_q.shape[0])
    check_channels("bias", bias, weight_q.shape[0])


def check_row_scales(
    name: str, scale: Any, x: torch.Tensor, out_dtype: torch.dtype | None, *, has_groups: bool = True
) -> None:
    """The float32 scales of int8 rows ``x`` [..., K]: [...], or with ``has_groups`` [..., ceil(K / 128)]; of floats
    None. Such rows say nothing of the dtype of a result, either."""
    if scale is None:
        if x.dtype == torch.int8:
            raise ValueError(f"{name} must be given where x is int8")
        return
    check_tensor(name, scale, (torch.float32,), device=x.device)
    if x.dtype != torch.int8:
        raise ValueError(f"{name} belongs to int8 rows, and x is {x.dtype}")
    shapes = [x.shape[:-1]] + ([torch.Size((*x.shape[:-1], -(-x.shape[-1] // SCALE_GROUP)))] if has_groups else [])
    if scale.shape not in shapes:
        wanted = " or ".join(str([*shape]) for shape in shapes)
        raise ValueError(f"{name} {[*scale.shape]} must be {wanted} for x {[*x.shape]}")
    if out_dtype is None:
        raise ValueError("out_dtype must be said where x is int8")
