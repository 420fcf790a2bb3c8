"""How the feed-forward half of a block is launched on a target."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from geneformer_kernels.dispatch import Candidate, Impl, compiled_float32_candidate, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, pointer, precision_of
from geneformer_kernels.target import Target

OP = "feed_forward"
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "swiglu")
#: Widths whose rows stay in the registers of one block from the input to the LayerNorm after it.
FUSED_WIDTHS = (128, 256, 512)
#: Columns of the largest step of the first linear layer's kernel; other widths are padded to a multiple.
WIDTH_STEP = 64
# What the cases are compiled for: hidden units beside a compact width, and a width that is not compact.
CASE_FF_WIDTH = 512
CASE_WIDE = (768, 3072)
# Hidden units that are no multiple of 16.
CASE_UNEVEN = (1280, 3420)


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    library = {"cpu": "oneDNN or MKL", "cuda": "cuBLAS", "hip": "hipBLASLt"}.get(target.kind, "the vendor's library")
    triton = triton_candidate(OP, dtype, target, _triton_reason(dtype, target))
    if dtype == "float64":
        triton = Candidate(Impl.TRITON, False, "the Triton kernel computes in float32")
    torch = Candidate(Impl.TORCH, True, f"torch linear through {library}")
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype")
    if target.kind != "cpu":
        return (triton, torch, reference) if target.kind == "cuda" else (torch, reference, triton)
    loops = compiled_float32_candidate(dtype, target, "both layers for blocks of rows")
    first = (loops, torch) if target.prefers_float32_loops else (torch, loops)
    return *first, reference, triton


def _triton_reason(dtype: str, target: Target) -> str:
    """What ``"triton"`` stands for, which on Hopper is cuBLAS's products where these are faster."""
    if not is_up_by_library(dtype, "relu", target):
        return "Triton kernel"
    return (
        "Triton kernels for SwiGLU, width 128 and gradients of activations; otherwise cuBLAS makes both forward "
        "products around ReLU or GELU, with ReLU and tanh-GELU in its epilogue (measured faster on an H200)"
    )


def is_one_kernel(
    dtype: str, width: int, ff_width: int, activation: str, target: Target, *, has_layernorm: bool
) -> bool:
    """Whether both layers, and the LayerNorm if there is one, should be one kernel on a target.

    On an H200 (65,536 rows, bfloat16, 2026-11) cuBLAS applies ReLU or tanh-GELU as it stores the first product, and two
    such products of 256 to 512 and back take 0.079 ms, a residual LayerNorm of its own 0.052; one kernel takes 0.084
    without the LayerNorm and 0.175 with it, which nothing else on the multiprocessor hides. At width 512 it takes three
    times as long as products. So on Hopper one kernel is left to width 128 and to activations that cuBLAS has not.
    """
    if fused_plan(dtype, width, ff_width, activation, target) is None:
        return False
    if target.sm < 90 or width == 128:
        return True
    return not has_layernorm and not is_up_by_library(dtype, activation, target)


def is_up_by_library(dtype: str, activation: str, target: Target) -> bool:
    """Whether cuBLAS multiplies the first layer: on Hopper, 1.3 to 1.4 times as fast as the kernel (on an H200).

    SwiGLU would take a pass of its own over twice the hidden units, and float32 three times as long.
    """
    return target.kind == "cuda" and target.sm >= 90 and dtype != "float32" and activation != "swiglu"


@dataclass(frozen=True)
class FusedPlan:
    """Rows per block, hidden units per step, and rows per LayerNorm of the kernel that does everything."""

    block_rows: int
    block_f: int
    launch: Launch
    block_norm: int


@dataclass(frozen=True)
class UpPlan:
    """Tile of the first linear layer with its activation; ``group`` blocks of rows are walked through together."""

    block_rows: int
    block_n: int
    block_k: int
    group: int
    launch: Launch


@dataclass(frozen=True)
class RowsPlan:
    """Blocks of the backward's elementwise kernels; ``n_programs`` share the rows, each with its part of the sums."""

    block_rows: int
    block_columns: int
    n_programs: int
    launch: Launch


def fused_plan(dtype: str, width: int, ff_width: int, activation: str, target: Target) -> FusedPlan | None:
    """The plan of the fused kernel; None where the matrix product takes over.

    64 float32 sums per thread leave room for an epilogue without spills. SwiGLU reads two blocks of weights per step,
    and cards with 99 KB of shared memory hold half a block.

    On Hopper blocks of 128 rows are the fastest at width 256 (of 20 tiles on an H200, 2026-11); their sums fill the
    registers, so the LayerNorm takes 16 rows at a time, through the first-level cache. At width 512 a block has 32
    rows, and there is none on Hopper, whose matrix instruction wants 64: it took three times as long as cuBLAS.
    """
    if width not in FUSED_WIDTHS or dtype not in ("float16", "bfloat16"):
        return None
    is_roomy = target.smem_bytes >= 160 * 1024
    is_hopper = target.sm >= 90 and target.smem_bytes >= 200 * 1024
    if width == 512 and target.sm >= 90:
        return None
    if width == 512:
        block_rows, block_f, block_norm = 32, 32 if is_roomy else 16, 32
    elif width == 256 and is_hopper:
        block_rows, block_f, block_norm = 128, 32 if activation == "swiglu" else 64, 16
    else:
        block_rows, block_f = 64, 64 if activation != "swiglu" and (is_roomy or width == 128) else 32
        block_norm = block_rows
    if ff_width % block_f:
        return None
    return FusedPlan(block_rows, block_f, Launch(num_warps=4 if width == 128 else 8, num_stages=2), block_norm)


def up_plan(dtype: str, n_rows: int, ff_width: int, activation: str, target: Target) -> UpPlan:
    """The tile of the first linear layer; smaller where large tiles would leave multiprocessors idle."""
    is_swiglu = activation == "swiglu"
    n_large = -(-n_rows // 128) * -(-ff_width // (64 if is_swiglu else 128))
    if dtype == "float32" or n_large < target.n_sms:
        return UpPlan(64, 32 if is_swiglu else 64, 32 if dtype == "float32" else WIDTH_STEP, 8, Launch(4, 2))
    # Three stages of 32 KB: 96 KB, within what sm_86 and sm_89 have.
    return UpPlan(128, 64 if is_swiglu else 128, WIDTH_STEP, 8, Launch(8, 3))


def activation_plan(n_rows: int, ff_width: int, activation: str, target: Target) -> RowsPlan:
    """Eight blocks per multiprocessor share the rows of all columns.

    Of 16 plans the fastest on an H200: 3.6 to 3.9 TB/s at 512 and 3,072 hidden units (65,536 rows, 2026-11). SwiGLU
    reads three numbers where others read two, and 32 rows of them spill; so do 32 rows that begin anywhere.
    """
    block_rows = 16 if activation == "swiglu" or ff_width % 16 else 32
    n_column_blocks = -(-ff_width // 128)
    n_programs = max(1, min(-(-n_rows // block_rows), 8 * target.n_sms // n_column_blocks))
    return RowsPlan(block_rows, 128, n_programs, Launch(num_warps=4, num_stages=1))


def layernorm_plan(n_rows: int, width: int, target: Target) -> RowsPlan:
    """16 rows, the fewest a mask is regenerated for, and 16 elements per thread; two blocks per multiprocessor."""
    n_programs = max(1, min(-(-n_rows // 16), 2 * target.n_sms))
    return RowsPlan(16, width, n_programs, Launch(num_warps=max(4, width // 32), num_stages=1))


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel under every plan; before sm_80, where products become scalar arithmetic, evidence of it."""
    has_tensor_cores = target.sm >= 80
    dtypes = ("float16", "bfloat16", "float32") if target.sm >= 75 else ("float16", "float32")
    if not has_tensor_cores:
        return (
            _fused_case("float16", 128, "relu", target, "inference", is_post=True),
            *(_up_case(dtype, *CASE_WIDE, "relu", target) for dtype in dtypes),
            *(_activation_case(dtype, "relu", target, CASE_WIDE[1]) for dtype in dtypes),
            _layernorm_case("float16", 256, target, is_post=True, is_full=True),
        )
    cases = []
    fused = [width for width in FUSED_WIDTHS if fused_plan("float16", width, CASE_FF_WIDTH, "relu", target)]
    for dtype, activation in itertools.product(dtypes, ACTIVATIONS):
        for width, ff_width in (CASE_WIDE, CASE_UNEVEN):
            cases.append(_activation_case(dtype, activation, target, ff_width))
            cases.append(_up_case(dtype, width, ff_width, activation, target, is_small=True))
            if dtype != "float32":
                cases.append(_up_case(dtype, width, ff_width, activation, target))
        for width in fused if dtype != "float32" else ():
            cases.append(_fused_case(dtype, width, activation, target, "no norm", is_post=True))
            cases.append(_fused_case(dtype, width, activation, target, "training, dropout", is_post=True))
    for dtype, width, is_post in itertools.product(("float16", "bfloat16"), fused, (True, False)):
        cases.append(_fused_case(dtype, width, "relu", target, "inference", is_post=is_post))
        cases.append(_layernorm_case(dtype, width, target, is_post=is_post, is_full=True))
        cases.append(_layernorm_case(dtype, width, target, is_post=is_post, is_full=False))
    cases += [_fused_case("bfloat16", width, "relu", target, "training, dropout", is_post=False) for width in fused]
    return tuple(cases)


def _fused_case(dtype: str, width: int, activation: str, target: Target, use: str, *, is_post: bool) -> KernelCase:
    planned = fused_plan(dtype, width, CASE_FF_WIDTH, activation, target)
    assert planned is not None
    own, wide = pointer(dtype), pointer("float32")
    has_norm, is_training = use != "no norm", use == "training, dropout"
    pointers = {
        "x_ptr": own,
        "residual_ptr": wide if has_norm else None,
        "up_weight_ptr": own,
        "up_bias_ptr": wide,
        "down_weight_ptr": own,
        "down_bias_ptr": wide,
        "weight_ptr": wide if has_norm else None,
        "bias_ptr": wide if has_norm else None,
        "seed_ptr": pointer("int64") if is_training else None,
        "stream_ptr": wide if has_norm else None,
        "out_ptr": own,
        "total_ptr": wide if is_training and is_post else None,
        "mean_ptr": wide if is_training else None,
        "rstd_ptr": wide if is_training else None,
    }
    scalars = {"n_rows": "i32", "ff_width": "i32", "eps": "fp32", "threshold": "i32", "keep_scale": "fp32"}
    constexprs: dict[str, int | float | bool | str | None] = {
        "ACTIVATION": activation,
        "IS_POST": is_post,
        "PRECISION": precision_of(dtype),
        "WIDTH": width,
        "BLOCK_ROWS": planned.block_rows,
        "BLOCK_F": planned.block_f,
        "BLOCK_NORM": planned.block_norm if has_norm else planned.block_rows,
    }
    problem = f"C={width} {activation} {use if not has_norm else f'{use}, ' + ('post' if is_post else 'pre')}"
    # Somebody who asks for both layers and the LayerNorm gets one kernel wherever there is one.
    is_launched = has_norm or is_one_kernel(dtype, width, CASE_FF_WIDTH, activation, target, has_layernorm=False)
    return _case(
        "feed_forward_fwd_kernel", problem, dtype, target, pointers, scalars, constexprs, planned.launch,
        sizes={"ff_width"}, has_dot=True, is_launched=is_launched,
    )  # fmt: skip


def _up_case(
    dtype: str, width: int, ff_width: int, activation: str, target: Target, *, is_small: bool = False
) -> KernelCase:
    # Which tile depends on the number of multiprocessors, of which cards of one architecture have different ones.
    planned = up_plan(dtype, 1 if is_small else 1 << 20, ff_width, activation, replace(target, n_sms=100))
    own = pointer(dtype)
    pointers: dict[str, str | None] = {"x_ptr": own, "weight_ptr": own, "bias_ptr": pointer("float32"), "out_ptr": own}
    constexprs: dict[str, int | float | bool | str | None] = {
        "ACTIVATION": activation,
        "PRECISION": precision_of(dtype),
        "BLOCK_ROWS": planned.block_rows,
        "BLOCK_N": planned.block_n,
        "BLOCK_K": planned.block_k,
        "GROUP": planned.group,
    }
    return _case(
        "feed_forward_up_kernel", f"C={width} F={ff_width} {activation} tile {planned.block_rows}", dtype, target,
        pointers, {"n_rows": "i32", "n_columns": "i32", "width": "i32"}, constexprs, planned.launch,
        sizes={"width"} if ff_width % 16 else {"width", "n_columns"}, has_dot=True,
        is_launched=not is_up_by_library(dtype, activation, target),
    )  # fmt: skip


def _activation_case(dtype: str, activation: str, target: Target, ff_width: int) -> KernelCase:
    planned = activation_plan(1 << 16, ff_width, activation, target)
    own, wide = pointer(dtype), pointer("float32")
    pointers: dict[str, str | None] = {"hidden_ptr": own, "d_hidden_ptr": own, "bias_ptr": wide, "partial_ptr": wide}
    constexprs: dict[str, int | float | bool | str | None] = {
        "ACTIVATION": activation,
        "BLOCK_ROWS": planned.block_rows,
        "BLOCK_F": planned.block_columns,
    }
    return _case(
        "feed_forward_bwd_activation_kernel", f"F={ff_width} {activation}", dtype, target, pointers,
        {"n_rows": "i32", "ff_width": "i32"}, constexprs, planned.launch,
        sizes=set() if ff_width % 16 else {"ff_width"}, has_dot=False,
    )  # fmt: skip


def _layernorm_case(dtype: str, width: int, target: Target, *, is_post: bool, is_full: bool) -> KernelCase:
    # Full: both gradients come in, all go out, with dropout. Otherwise: one comes in and one goes out.
    planned = layernorm_plan(1 << 16, width, target)
    own, wide = pointer(dtype), pointer("float32")
    pointers = {
        "d_stream_ptr": wide if is_full or is_post else None,
        "d_out_ptr": own if is_full or not is_post else None,
        "total_ptr": wide,
        "mean_ptr": wide,
        "rstd_ptr": wide,
        "weight_ptr": wide,
        "seed_ptr": pointer("int64") if is_full else None,
        "dy_ptr": own,
        "d_residual_ptr": wide if is_full else None,
        "partial_ptr": wide if is_full else None,
    }
    constexprs: dict[str, int | float | bool | str | None] = {
        "IS_POST": is_post,
        "WIDTH": width,
        "BLOCK_ROWS": planned.block_rows,
    }
    problem = f"C={width} {'post' if is_post else 'pre'} {'dropout' if is_full else 'one gradient, frozen parameters'}"
    return _case(
        "feed_forward_bwd_layernorm_kernel", problem, dtype, target, pointers,
        {"n_rows": "i32", "threshold": "i32", "keep_scale": "fp32"}, constexprs, planned.launch,
        sizes=set(), has_dot=False,
    )  # fmt: skip


def _case(
    kernel: str,
    problem: str,
    dtype: str,
    target: Target,
    pointers: dict[str, str | None],
    scalars: dict[str, str],
    constexprs: dict[str, int | float | bool | str | None],
    launch: Launch,
    *,
    sizes: set[str],
    has_dot: bool,
    is_launched: bool = True,
) -> KernelCase:
    present = {name: kind for name, kind in pointers.items() if kind is not None}
    absent = {name: None for name, kind in pointers.items() if kind is None}
    return KernelCase(
        op=OP,
        kernel=kernel,
        problem=problem,
        dtype=dtype,
        signature=present | scalars,
        constexprs={**absent, **constexprs},
        launch=launch,
        divisible=frozenset(present) | frozenset(sizes),
        has_dot=has_dot,
        is_default=target.sm >= 80 and is_launched,
    )
