"""How residual addition with layer normalisation is launched on a target."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from geneformer_kernels.dispatch import (
    Candidate,
    Impl,
    compiled_float32_candidate,
    compiled_int8_candidate,
    triton_candidate,
)
from geneformer_kernels.launch import KernelCase, Launch, check_width, pointer
from geneformer_kernels.target import Target

OP = "residual_layernorm"
# One width per size of a block of columns; the published models are 256, 512, 640, 768, 896 and 1,280 wide.
CASE_WIDTHS = (128, 256, 512, 768, 1280, 4096)


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    triton = triton_candidate(OP, dtype, target)
    if dtype == "float64":
        triton = Candidate(Impl.TRITON, False, "the Triton kernel computes in float32")
    is_short = target.kind == "cpu" and dtype == "bfloat16"
    one_pass = ", one compiled pass for inference on up to two threads" if is_short else ""
    torch = Candidate(Impl.TORCH, True, f"torch add and layer_norm in float32{one_pass}")
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype")
    if target.kind != "cpu":
        return (triton, torch, reference) if target.kind == "cuda" else (torch, reference, triton)
    loops = compiled_float32_candidate(dtype, target, "one pass")
    first = (loops, torch) if target.prefers_float32_loops else (torch, loops)
    return *first, reference, triton


def int8_candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations of the LayerNorm that writes int8 rows, best first."""
    triton = triton_candidate("residual_layernorm_int8", dtype, target, "one Triton kernel, which rounds what it holds")
    if dtype == "float64":
        triton = Candidate(Impl.TRITON, False, "the Triton kernel computes in float32")
    torch = Candidate(Impl.TORCH, True, "torch add, layer_norm and several passes that round, in float32")
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype")
    if target.kind == "cuda":
        return (triton, torch, reference)
    loops = compiled_int8_candidate(target, "one pass")
    if dtype == "float64":
        loops = Candidate(Impl.NUMBA, False, "the compiled loops compute in float32")
    return (loops, torch, reference, triton)


@dataclass(frozen=True)
class ResidualLayernormPlan:
    """Tiles of whole rows, ``block_c`` columns wide; the backward's are smaller, as it holds more of them at once.

    ``n_programs`` run the backward, each with its part of the parameters' gradients.
    """

    block_c: int
    fwd_block_rows: int
    fwd_launch: Launch
    bwd_block_rows: int
    bwd_launch: Launch
    n_programs: int


def plan(n_rows: int, width: int, target: Target) -> ResidualLayernormPlan:
    """16 elements per thread forward and 8 backward; as many backward programs as fit on the card at once."""
    check_width(width)
    block_c = max(128, 1 << (width - 1).bit_length())
    fwd_warps = 4 if block_c <= 2048 else 8
    # 8 elements per thread are 64 to 80 registers, 16 are 128 to 176: too few warps to hide the memory behind.
    bwd_warps = max(4, block_c // (8 * 32))
    bwd_block_rows = 8 * 32 * bwd_warps // block_c
    n_resident = target.n_sms * {4: 6, 8: 2, 16: 1}[bwd_warps]
    return ResidualLayernormPlan(
        block_c=block_c,
        fwd_block_rows=16 * 32 * fwd_warps // block_c,
        fwd_launch=Launch(num_warps=fwd_warps, num_stages=1),
        bwd_block_rows=bwd_block_rows,
        bwd_launch=Launch(num_warps=bwd_warps, num_stages=1),
        n_programs=max(1, min(-(-n_rows // bwd_block_rows), n_resident)),
    )


def int8_launch(chosen: ResidualLayernormPlan) -> Launch:
    """The forward launch for int8 rows: without fused multiply-add, so that they are what ``quantize_rows`` gives."""
    return replace(chosen.fwd_launch, enable_fp_fusion=False)


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Both kernels for every block width and dtype, post- and pre-norm, with everything and with nothing optional."""
    dtypes = ("float16", "bfloat16", "float32") if target.sm >= 75 else ("float16", "float32")
    cases = []
    for dtype, width, is_post, is_full in itertools.product(dtypes, CASE_WIDTHS, (True, False), (True, False)):
        cases.append(_fwd_case(dtype, width, target, is_post=is_post, is_full=is_full))
        cases.append(_bwd_case(dtype, width, target, is_post=is_post, is_full=is_full))
    for dtype, width, is_post, has_smooth in itertools.product(dtypes, CASE_WIDTHS, (True, False), (True, False)):
        cases.append(_int8_case(dtype, width, target, is_post=is_post, has_smooth=has_smooth))
    cases.append(_int8_case("float32", 768, target, is_post=False, has_smooth=True, has_residual=False))
    cases.append(_int8_case("float32", 769, target, is_post=True, has_smooth=True))
    # A head's LayerNorm and the first one of a pre-norm encoder have no residual; an odd width has no wide loads.
    cases.append(_fwd_case("float32", 768, target, is_post=True, is_full=True, has_residual=False))
    cases.append(_fwd_case("float32", 769, target, is_post=True, is_full=True))
    cases.append(_bwd_case("float32", 769, target, is_post=True, is_full=True))
    return tuple(cases)


def _fwd_case(
    dtype: str, width: int, target: Target, *, is_post: bool, is_full: bool, has_residual: bool = True
) -> KernelCase:
    # Full: training with dropout. Otherwise: inference.
    own, wide = pointer(dtype), pointer("float32")
    pointers = {
        "x_ptr": own,
        "residual_ptr": wide if has_residual else None,
        "weight_ptr": wide,
        "bias_ptr": wide,
        "seed_ptr": pointer("int64") if is_full else None,
        "stream_ptr": wide,
        "out_ptr": None if is_post and dtype == "float32" else own,
        "total_ptr": wide if is_full and is_post else None,
        "mean_ptr": wide if is_full else None,
        "rstd_ptr": wide if is_full else None,
    }
    scalars = {"n_rows": "i32", "width": "i32", "eps": "fp32", "threshold": "i32", "keep_scale": "fp32"}
    problem = f"C={width} {'post' if is_post else 'pre'} {'training, dropout' if is_full else 'inference'}"
    if not has_residual:
        problem += ", no residual"
    return _case("residual_layernorm_fwd_kernel", problem, dtype, width, target, is_post, pointers, scalars)


def _int8_case(
    dtype: str, width: int, target: Target, *, is_post: bool, has_smooth: bool, has_residual: bool = True
) -> KernelCase:
    wide = pointer("float32")
    pointers = {
        "x_ptr": pointer(dtype),
        "residual_ptr": wide if has_residual else None,
        "weight_ptr": wide,
        "bias_ptr": wide,
        "smooth_ptr": wide if has_smooth else None,
        "stream_ptr": wide,
        "q_ptr": pointer("int8"),
        "scale_ptr": wide,
    }
    scalars = {"n_rows": "i32", "width": "i32", "eps": "fp32", "tiny": "fp32"}
    problem = f"C={width} {'post' if is_post else 'pre'}{' smoothed' if has_smooth else ''}"
    if not has_residual:
        problem += ", no residual"
    return _case("residual_layernorm_int8_kernel", problem, dtype, width, target, is_post, pointers, scalars)


def _bwd_case(dtype: str, width: int, target: Target, *, is_post: bool, is_full: bool) -> KernelCase:
    # Full: both gradients come in, all go out, with dropout. Otherwise: one comes in and one goes out.
    own, wide = pointer(dtype), pointer("float32")
    is_one = not is_full and dtype == "float32"
    pointers = {
        "d_stream_ptr": wide if is_full or is_post else None,
        "d_out_ptr": own if is_full or not is_post else None,
        "total_ptr": wide,
        "mean_ptr": wide,
        "rstd_ptr": wide,
        "weight_ptr": wide,
        "seed_ptr": pointer("int64") if is_full else None,
        "dx_ptr": None if is_one else own,
        "d_residual_ptr": wide if is_full or is_one else None,
        "partial_ptr": wide if is_full else None,
    }
    scalars = {"n_rows": "i32", "width": "i32", "threshold": "i32", "keep_scale": "fp32"}
    problem = f"C={width} {'post' if is_post else 'pre'} {'dropout' if is_full else 'one gradient, frozen parameters'}"
    return _case("residual_layernorm_bwd_kernel", problem, dtype, width, target, is_post, pointers, scalars)


def _case(
    kernel: str,
    problem: str,
    dtype: str,
    width: int,
    target: Target,
    is_post: bool,
    pointers: dict[str, str | None],
    scalars: dict[str, str],
) -> KernelCase:
    chosen = plan(1 << 16, width, target)
    is_fwd = not kernel.endswith("bwd_kernel")
    fwd_launch = int8_launch(chosen) if kernel.endswith("int8_kernel") else chosen.fwd_launch
    present = {name: kind for name, kind in pointers.items() if kind is not None}
    absent = {name: None for name, kind in pointers.items() if kind is None}
    return KernelCase(
        op=OP,
        kernel=kernel,
        problem=problem,
        dtype=dtype,
        signature=present | scalars,
        constexprs={
            **absent,
            "IS_POST": is_post,
            "BLOCK_ROWS": chosen.fwd_block_rows if is_fwd else chosen.bwd_block_rows,
            "BLOCK_C": chosen.block_c,
        },
        launch=fwd_launch if is_fwd else chosen.bwd_launch,
        divisible=frozenset(present) | (frozenset({"width"}) if width % 16 == 0 else frozenset()),
    )
