"""How one kernel is launched, and how it is compiled where no card is at hand: plain data that plans are made of."""

from __future__ import annotations

from dataclasses import dataclass, field

#: dtype name -> what Triton calls a scalar of it.
TRITON_TYPES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "int8": "i8",
    "uint8": "u8",
    "int16": "i16",
    "uint16": "u16",
    "int32": "i32",
    "int64": "i64",
}


#: Columns that share a scale where a row of int8 has several.
SCALE_GROUP = 128
#: Widest product of which sums of int8 products, each 127 squared at most, stay below 2**31.
MAX_DYNAMIC_WIDTH = (2**31 - 1) // 127**2
#: Widest row of the kernels that hold a row in the registers of one block.
MAX_WIDTH = 4096


@dataclass(frozen=True)
class Launch:
    """The options every plan carries beside its block sizes.

    ``enable_fp_fusion`` is always said, because its default differs between versions of Triton. ``max_registers`` per
    thread lets more programs share a multiprocessor; the compiler otherwise takes what it likes.
    """

    num_warps: int = 4
    num_stages: int = 2
    enable_fp_fusion: bool = True
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        options: dict[str, int | bool] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.enable_fp_fusion,
        }
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True)
class KernelCase:
    """One kernel as one plan launches it, in a form that compiles ahead of time for any architecture.

    Attributes
    ----------
    op, kernel
        Operation, and the function's name in ``ops/<op>/kernel.py``.
    problem
        What distinguishes this row from others of the kernel, such as ``"D=64 dropout"``.
    dtype
        Name of the compute dtype.
    signature
        Argument name -> Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``), without the constexprs.
    constexprs
        Compile-time argument name -> value (None for pointers that are absent).
    launch
        Warps, stages, fusion.
    divisible
        Arguments that are multiples of 16 in practice: aligned pointers, strides and sizes. Compiling without saying so
        loses wide loads and asynchronous copies.
    has_dot
        Whether a matrix instruction must come out.
    is_default
        Whether ``choose`` would launch it on this target by itself; only then are spills and scalar dots errors.
    """

    op: str
    kernel: str
    problem: str
    dtype: str
    signature: dict[str, str]
    constexprs: dict[str, int | float | bool | str | None]
    launch: Launch
    divisible: frozenset[str] = field(default_factory=frozenset)
    has_dot: bool = False
    is_default: bool = True


def too_wide(width: int) -> str:
    """Why kernels that hold a row in one block cannot take rows of a width; empty where they can."""
    return "" if width <= MAX_WIDTH else f"the Triton kernel takes rows up to {MAX_WIDTH:,} wide, not {width:,}"


def check_width(width: int) -> None:
    """Raise ValueError for rows that are too wide for kernels that hold a row in one block."""
    if why := too_wide(width):
        raise ValueError(f'{why}: ask for impl="torch"')


def precision_of(dtype: str) -> str:
    """How a product multiplies: float32 as three tf32 products, near float32's own accuracy; ignored for halves."""
    return "tf32x3" if dtype == "float32" else "tf32"


def pointer(dtype: str) -> str:
    """Triton's name of a pointer to a dtype."""
    return "*" + TRITON_TYPES[dtype]
