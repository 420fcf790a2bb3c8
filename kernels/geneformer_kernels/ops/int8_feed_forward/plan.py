"""How the feed-forward half of a block with int8 weights is launched on a target."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from geneformer_kernels.dispatch import Candidate, Impl, compiled_int8_candidate, triton_candidate
from geneformer_kernels.launch import SCALE_GROUP, KernelCase, Launch, pointer
from geneformer_kernels.target import Target

OP = "int8_feed_forward"
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu")
#: Hidden units that torch's passes hold at once, as integers and as floats.
HIDDEN_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}
#: Columns of a step of either product; other widths are padded to a multiple.
WIDTH_STEP = SCALE_GROUP
# Columns of the result that the cases are compiled for: a multiple of 16, and none.
CASE_COLUMNS = (768, 770)


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype of activations on a target, best first."""
    triton = triton_candidate(OP, dtype, target, "Triton kernels, the first of which rounds hidden units as it stores")
    if dtype == "float64":
        triton = Candidate(Impl.TRITON, False, "the Triton kernels compute in float32")
    how = "integer products by torch._int_mm" if target.has_int8_product else "exact products of integers as float32"
    torch = Candidate(Impl.TORCH, True, f"{how}, rows rounded by torch's passes")
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype, products in float64")
    if target.kind == "cuda":
        return (triton, torch, reference)
    loops = compiled_int8_candidate(target, "hidden units rounded where they are computed,")
    return (loops, torch, reference, triton)


@dataclass(frozen=True)
class ProductPlan:
    """Tile of a product; ``group`` blocks of rows are walked through together."""

    block_rows: int
    block_n: int
    block_k: int
    group: int
    launch: Launch


def up_plan(n_rows: int, ff_width: int, activation: str, target: Target) -> ProductPlan:
    """A program has the 128 hidden units that share a scale. Two sums per unit for SwiGLU, so half as many rows."""
    if activation == "swiglu":
        # Three operands of 64 columns in four stages: 80 KB, within what sm_86 and sm_89 have.
        return ProductPlan(64, SCALE_GROUP, 64, 8, Launch(num_warps=8, num_stages=4))
    if -(-n_rows // 128) * -(-ff_width // SCALE_GROUP) < target.n_sms:
        return ProductPlan(64, SCALE_GROUP, 128, 8, Launch(num_warps=8, num_stages=3))
    # Three stages of 32 KB: 96 KB, within what sm_86 and sm_89 have. 64 sums per thread leave room for the epilogue.
    return ProductPlan(128, SCALE_GROUP, 128, 8, Launch(num_warps=8, num_stages=3))


def down_plan(n_rows: int, n_columns: int, target: Target) -> ProductPlan:
    """128 columns at a time, which share a scale; sums are held twice, as int32 and as float32."""
    if -(-n_rows // 128) * -(-n_columns // 128) < target.n_sms:
        return ProductPlan(64, 64, SCALE_GROUP, 8, Launch(num_warps=4, num_stages=3))
    return ProductPlan(128, 128, SCALE_GROUP, 8, Launch(num_warps=8, num_stages=3))


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Both kernels under every plan; before sm_80, where int8 products do not compile, evidence of it."""
    dtypes = ("float16", "bfloat16", "float32") if target.sm >= 75 else ("float16", "float32")
    if target.sm < 80:
        return tuple(_down_case(dtype, target, CASE_COLUMNS[0], is_small=False) for dtype in dtypes)
    cases = []
    for dtype, is_small in itertools.product(dtypes, (False, True)):
        for activation in ACTIVATIONS if not is_small else ACTIVATIONS[:-1]:  # SwiGLU has one tile
            cases.append(_up_case(dtype, activation, target, is_small=is_small))
        cases += [_down_case(dtype, target, n_columns, is_small=is_small) for n_columns in CASE_COLUMNS]
    return tuple(cases)


def _up_case(dtype: str, activation: str, target: Target, *, is_small: bool) -> KernelCase:
    # Which tile depends on the number of multiprocessors, of which cards of one architecture have different ones.
    planned = up_plan(1 if is_small else 1 << 20, 3072, activation, replace(target, n_sms=1000))
    wide, short = pointer("float32"), pointer("int8")
    pointers = {
        "q_ptr": short,
        "row_scale_ptr": wide,
        "weight_ptr": short,
        "scale_ptr": wide,
        "bias_ptr": wide,
        "hidden_ptr": short,
        "hidden_scale_ptr": wide,
    }
    scalars = {"n_rows": "i32", "ff_width": "i32", "width": "i32", "tiny": "fp32"}
    return _case(
        "int8_feed_forward_up_kernel", activation, dtype, target, pointers, scalars, planned,
        {"ACTIVATION": activation}, {"width"},
    )  # fmt: skip


def _down_case(dtype: str, target: Target, n_columns: int, *, is_small: bool) -> KernelCase:
    planned = down_plan(1 if is_small else 1 << 20, n_columns, replace(target, n_sms=1000))
    wide, short = pointer("float32"), pointer("int8")
    pointers = {
        "hidden_ptr": short,
        "hidden_scale_ptr": wide,
        "weight_ptr": short,
        "scale_ptr": wide,
        "bias_ptr": wide,
        "out_ptr": pointer(dtype),
    }
    scalars = {"n_rows": "i32", "n_columns": "i32", "n_groups": "i32"}
    sizes = {"n_columns"} if n_columns % 16 == 0 else set()
    return _case(
        "int8_feed_forward_down_kernel", f"N={n_columns}", dtype, target, pointers, scalars, planned, {}, sizes
    )


def _case(
    kernel: str,
    problem: str,
    dtype: str,
    target: Target,
    pointers: dict[str, str],
    scalars: dict[str, str],
    planned: ProductPlan,
    more: dict[str, int | float | bool | str | None],
    sizes: set[str],
) -> KernelCase:
    return KernelCase(
        op=OP,
        kernel=kernel,
        problem=f"{problem} tile {planned.block_rows} x {planned.block_n}",
        dtype=dtype,
        signature=pointers | scalars,
        constexprs={
            **more,
            "BLOCK_ROWS": planned.block_rows,
            "BLOCK_N": planned.block_n,
            "BLOCK_K": planned.block_k,
            "GROUP": planned.group,
        },
        launch=planned.launch,
        divisible=frozenset(pointers) | frozenset(sizes),
        has_dot=True,
        is_default=target.sm >= 80,
    )
