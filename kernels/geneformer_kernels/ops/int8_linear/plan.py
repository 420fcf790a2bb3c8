"""How a linear layer with int8 weights is launched on a target."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from geneformer_kernels.dispatch import Candidate, Impl, compiled_int8_candidate, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, pointer, precision_of
from geneformer_kernels.target import Target

OP = "int8_linear"
ACTIVATIONS = ("relu", "gelu", "gelu_tanh")
MODES = ("dynamic", "weight_only")
#: Rows up to which ``mode=None`` leaves activations as they are: so few rows wait for the weights to be read, so
#: quantising them saves nothing and costs accuracy and a launch. By arithmetic, not measured.
WEIGHT_ONLY_ROWS = 32
#: Columns of the largest step of a product; other widths are padded to a multiple. Rows that begin anywhere would be
#: read byte by byte, whose addresses alone spill 880 bytes of the large tile.
WIDTH_STEP = 128
# What the cases are compiled for: output channels that are a multiple of 16, and the genes of Geneformer V1's
# vocabulary, which are not.
CASE_WIDTH, CASE_COLUMNS = 768, (3072, 25_426)
# One width per size of a block of columns; and widths that are no multiple of 16.
QUANTIZE_WIDTHS = (128, 256, 512, 768, 2048, 3072, 8192)
UNEVEN_QUANTIZE_WIDTHS = (100, 250, 500, 769, 2047, 3420, 8193)


def quantize_candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations of quantising rows, best first: there is no product in it, so Triton compiles it everywhere."""
    triton = triton_candidate("quantize_rows", dtype, target, "one Triton kernel")
    if dtype == "float64":
        triton = Candidate(Impl.TRITON, False, "the Triton kernel computes in float32")
    torch = Candidate(Impl.TORCH, True, "torch, several passes over the rows")
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype")
    if target.kind == "cuda":
        return (triton, torch, reference)
    return (compiled_int8_candidate(target, "rows in one pass"), torch, reference, triton)


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype of activations on a target, best first."""
    triton = triton_candidate(OP, dtype, target)
    if dtype == "float64":
        triton = Candidate(Impl.TRITON, False, "the Triton kernel computes in float32")
    how = "integer products by torch._int_mm" if target.has_int8_product else "torch products of dequantised weights"
    torch = Candidate(Impl.TORCH, True, how)
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype, products in float64")
    if target.kind == "cuda":
        return (triton, torch, reference)
    return (compiled_int8_candidate(target, "integer products"), torch, reference, triton)


def mode_for(n_rows: int, has_product: bool) -> str:
    """The mode that ``mode=None`` stands for; ``has_product`` as ``Target.has_int8_product``."""
    return "weight_only" if n_rows <= WEIGHT_ONLY_ROWS or not has_product else "dynamic"


@dataclass(frozen=True)
class QuantizePlan:
    """Rows and columns of a block; ``is_one_block``: a row fits into one."""

    block_rows: int
    block_c: int
    is_one_block: bool
    launch: Launch


@dataclass(frozen=True)
class ProductPlan:
    """Tile of a product; ``group`` blocks of rows are walked through together."""

    block_rows: int
    block_n: int
    block_k: int
    group: int
    launch: Launch


def quantize_plan(width: int) -> QuantizePlan:
    """32 elements per thread or 64, and few warps, so that none waits for another to know the largest of a row.

    On an H200 that is 4 to 18 % faster than 16 elements per thread on 4 or 8 warps (32,768 rows of 256 to 3,072,
    2026-11). No fused multiply-add: the kernel rounds where the reference rounds.
    """
    block_c = min(max(128, 1 << (width - 1).bit_length()), 4096)
    num_warps = 2 if block_c <= 512 or block_c == 4096 else 1
    launch = Launch(num_warps=num_warps, num_stages=1, enable_fp_fusion=False)
    return QuantizePlan(max(1, 32 * 32 * num_warps // block_c), block_c, width <= block_c, launch)


def dynamic_plan(dtype: str, n_rows: int, n_columns: int, activation: str | None, target: Target) -> ProductPlan:
    """128 x 128 x 128: of 128 x 256 the sums spill below sm_90. Smaller where multiprocessors would be idle."""
    if -(-n_rows // 128) * -(-n_columns // 128) < target.n_sms:
        return ProductPlan(64, 64, 128, 8, Launch(num_warps=4, num_stages=3))
    if target.sm >= 90:
        # Two programs fit on a multiprocessor, and one stores while the other multiplies: on an H200 1.4 and 1.3 times
        # as fast as 8 warps and 128 columns at a time. Wide epilogues spill with 4 warps, and so do rows of the result
        # that begin anywhere, stored element by element (up to 1,808 bytes).
        if dtype == "float32" or activation == "gelu" or n_columns % 16:
            return ProductPlan(128, 128, 64, 8, Launch(num_warps=8, num_stages=4))
        return ProductPlan(128, 128, 128, 8, Launch(num_warps=4, num_stages=3))
    # Three stages of 32 KB: 96 KB, within what sm_86 and sm_89 have.
    return ProductPlan(128, 128, 128, 8, Launch(num_warps=8, num_stages=3))


def weight_only_plan(dtype: str, n_rows: int, n_columns: int, activation: str | None) -> ProductPlan:
    """Few rows: 64 channels, the fewest of a Hopper instruction, so that many programs read weights at once."""
    block_k = 64 if dtype == "float32" else 128
    if n_rows <= WEIGHT_ONLY_ROWS:
        return ProductPlan(16 if n_rows <= 16 else 32, 64, block_k, 1, Launch(num_warps=4, num_stages=4))
    if dtype == "float32":
        return ProductPlan(64, 64, 32, 1, Launch(num_warps=4, num_stages=2))
    if activation == "gelu" and n_columns % 16:  # the large tile spills 164 bytes on sm_90
        return ProductPlan(64, 64, 64, 1, Launch(num_warps=4, num_stages=3))
    return ProductPlan(128, 128, 64, 1, Launch(num_warps=8, num_stages=3))


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel under every plan; before sm_80, where int8 products do not compile, evidence of it."""
    dtypes = ("float16", "bfloat16", "float32") if target.sm >= 75 else ("float16", "float32")
    widths = (*QUANTIZE_WIDTHS, *UNEVEN_QUANTIZE_WIDTHS)
    quantize_cases = [_quantize_case(dtype, width, target) for dtype in dtypes for width in widths]
    if target.sm < 80:
        return (
            *quantize_cases,
            *(_dynamic_case(dtype, None, target, CASE_COLUMNS[0]) for dtype in dtypes),
            *(_weight_only_case(dtype, None, target, 16, CASE_COLUMNS[0]) for dtype in dtypes),
        )
    cases = quantize_cases
    for dtype, activation, n_columns in itertools.product(dtypes, (None, *ACTIVATIONS), CASE_COLUMNS):
        cases += [_dynamic_case(dtype, activation, target, n_columns, is_small=is_small) for is_small in (False, True)]
        cases += [_weight_only_case(dtype, activation, target, n_rows, n_columns) for n_rows in (16, 32, 64)]
    return tuple(cases)


def _quantize_case(dtype: str, width: int, target: Target) -> KernelCase:
    planned = quantize_plan(width)
    pointers: dict[str, str | None] = {
        "x_ptr": pointer(dtype),
        "q_ptr": pointer("int8"),
        "scale_ptr": pointer("float32"),
    }
    constexprs: dict[str, int | float | bool | str | None] = {
        "IS_ONE_BLOCK": planned.is_one_block,
        "BLOCK_ROWS": planned.block_rows,
        "BLOCK_C": planned.block_c,
    }
    scalars = {"n_rows": "i32", "width": "i32", "tiny": "fp32"}
    sizes = {"width"} if width % 16 == 0 else set()
    return _case(
        "quantize_rows_kernel", f"K={width}", dtype, target, pointers, scalars, constexprs, planned.launch, sizes, False
    )


def _dynamic_case(
    dtype: str, activation: str | None, target: Target, n_columns: int, *, is_small: bool = False
) -> KernelCase:
    # Which tile depends on the number of multiprocessors, of which cards of one architecture have different ones.
    planned = dynamic_plan(dtype, 1 if is_small else 1 << 20, n_columns, activation, replace(target, n_sms=1000))
    wide = pointer("float32")
    pointers: dict[str, str | None] = {
        "q_ptr": pointer("int8"),
        "row_scale_ptr": wide,
        "weight_ptr": pointer("int8"),
        "scale_ptr": wide,
        "bias_ptr": wide,
        "out_ptr": pointer(dtype),
    }
    return _product_case(
        "int8_linear_dynamic_kernel", dtype, activation, target, planned, pointers, n_columns, {"GROUP": 8}
    )


def _weight_only_case(dtype: str, activation: str | None, target: Target, n_rows: int, n_columns: int) -> KernelCase:
    planned = weight_only_plan(dtype, n_rows, n_columns, activation)
    pointers: dict[str, str | None] = {
        "x_ptr": pointer(dtype),
        "weight_ptr": pointer("int8"),
        "scale_ptr": pointer("float32"),
        "bias_ptr": pointer("float32"),
        "out_ptr": pointer(dtype),
    }
    return _product_case(
        "int8_linear_weight_only_kernel", dtype, activation, target, planned, pointers, n_columns,
        {"PRECISION": precision_of(dtype)},
    )  # fmt: skip


def _product_case(
    kernel: str,
    dtype: str,
    activation: str | None,
    target: Target,
    planned: ProductPlan,
    pointers: dict[str, str | None],
    n_columns: int,
    more: dict[str, int | str],
) -> KernelCase:
    constexprs: dict[str, int | float | bool | str | None] = {
        "ACTIVATION": activation,
        "BLOCK_ROWS": planned.block_rows,
        "BLOCK_N": planned.block_n,
        "BLOCK_K": planned.block_k,
        **more,
    }
    scalars = {"n_rows": "i32", "n_columns": "i32", "width": "i32"}
    problem = (
        f"K={CASE_WIDTH} N={n_columns} {activation or 'no activation'} tile {planned.block_rows} x {planned.block_n}"
    )
    sizes = {"width"} if n_columns % 16 else {"width", "n_columns"}
    return _case(kernel, problem, dtype, target, pointers, scalars, constexprs, planned.launch, sizes, True)


def _case(
    kernel: str,
    problem: str,
    dtype: str,
    target: Target,
    pointers: dict[str, str | None],
    scalars: dict[str, str],
    constexprs: dict[str, int | float | bool | str | None],
    launch: Launch,
    sizes: set[str],
    has_dot: bool,
) -> KernelCase:
    present = {name: kind for name, kind in pointers.items() if kind is not None}
    return KernelCase(
        op=OP,
        kernel=kernel,
        problem=problem,
        dtype=dtype,
        signature=present | scalars,
        constexprs=constexprs,
        launch=launch,
        divisible=frozenset(present) | frozenset(sizes),
        has_dot=has_dot,
        is_default=target.sm >= 80 or not has_dot,
    )
