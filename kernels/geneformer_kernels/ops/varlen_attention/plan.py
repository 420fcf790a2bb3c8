"""How attention over packed cells is launched on a target."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from geneformer_kernels.dispatch import Candidate, Impl, compiled_float32_candidate, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, pointer
from geneformer_kernels.target import Target

OP = "varlen_attention"
#: Widest head the Triton kernels serve.
MAX_HEAD_DIM = 128
#: Head dimensions they are given are multiples of it, others are padded: rows that begin anywhere are read element by
#: element, whose addresses spill up to 1,000 bytes per thread (at 72 and 120, sm_86).
HEAD_DIM_STEP = 16
#: Cells of more tokens than this are long: no family over ranked genes has any.
LONG = 4096
#: Cells that one program of the tile list looks at at a time.
BLOCK_CELLS = 256


@dataclass(frozen=True)
class TilePlan:
    """Attributes
    ----------
    block_m, block_n
        Queries and keys of a tile of scores: powers of two, at least 16, because one call of the random number
        generator serves a patch of 16 by 16, and keys at least 32 for the matrix instruction.
    precision
        Of matrix products of float32: ``"tf32x3"``, on tensor cores with almost all of float32's accuracy. Without
        meaning for other dtypes.
    launch
        Warps, stages, fusion.
    """

    block_m: int
    block_n: int
    launch: Launch
    precision: str = "tf32"


@dataclass(frozen=True)
class AttentionPlan:
    """Attributes
    ----------
    block_d
        The head dimension, padded to a power of two of at least 16.
    fwd, dq, dkdv
        Tiles of the forward kernel, of the kernel for the gradient of queries, and of the one for keys and values.
    """

    block_d: int
    fwd: TilePlan
    dq: TilePlan
    dkdv: TilePlan


def _tile(
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    precision: str = "tf32",
    max_registers: int | None = None,
) -> TilePlan:
    launch = Launch(num_warps, num_stages, enable_fp_fusion=True, max_registers=max_registers)
    return TilePlan(block_m, block_n, launch, precision)


# (fwd, dq, dkdv) by the widest head dimension they serve.
# Chosen without a card: the largest tiles whose registers do not spill with dropout (Triton 3.7, 2026-11; registers
# without and with dropout beside each), and shared memory below the limit of the smallest card of the family.
_SMALL = {  # sm_80, 86, 89 and newer cards with less than 160 KB: at most 80 KB
    32: (_tile(128, 64, 4, 3), _tile(128, 64, 8, 2), _tile(64, 128, 8, 2)),  # 168/253, 136/172, 171/187
    64: (_tile(128, 64, 4, 3), _tile(128, 64, 8, 2), _tile(64, 128, 8, 2)),  # 255/255, 186/183, 245/254
    128: (_tile(128, 64, 8, 2), _tile(64, 64, 8, 2), _tile(64, 64, 8, 2)),  # 255/255, 160/170, 197/220
}
# sm_90 and newer, timed on an H200 (32 cells of 2,048 tokens, 768 channels, bfloat16; 10 to 30 tiles of each kernel,
# 2026-11): milliseconds without and with dropout over each. Two programs on a multiprocessor, or three, hide each
# other's exponentials; tiles twice as large are up to 1.6 times as slow.
_LARGE = {
    # 1.42/2.54, 1.47/2.65, 2.15/3.24
    32: (_tile(64, 64, 4, 3), _tile(64, 64, 4, 3), _tile(32, 128, 4, 3)),
    # 0.99/1.56, 1.09/1.78, 1.75/2.48
    64: (_tile(128, 64, 8, 3), _tile(128, 64, 8, 3, max_registers=128), _tile(32, 64, 4, 3)),
    # 0.95/1.31, 1.14/1.46, 1.58/2.06
    128: (_tile(128, 64, 8, 4), _tile(128, 64, 8, 3), _tile(32, 64, 4, 3)),
}
# The same with dropout, where these spill.
_SMALL_DROPOUT = _SMALL | {64: (_tile(128, 64, 8, 2), _tile(128, 64, 8, 2), _tile(64, 128, 8, 2))}
# The same with dropout, where another tile is faster by more than noise.
_LARGE_DROPOUT = _LARGE | {
    32: (_tile(128, 64, 8, 3), _tile(128, 64, 8, 3), _tile(32, 128, 4, 3)),  # 2.39, 2.57, 3.24
    64: (_tile(128, 64, 8, 3), _tile(128, 32, 8, 4), _tile(32, 64, 4, 3)),  # 1.56, 1.70, 2.48
}
# Three-fold TF32 holds two halves of every operand in registers, so these tiles are small, and wide heads spill all the
# same: with dropout on sm_80 0, 0 and 564 bytes per thread at 64, and 284, 776 and 5,456 at 128 (tiles of 32 x 64 spill
# 19 KB). torch's kernel is what float32 gets unless somebody asks for Triton.
_FLOAT32 = {
    32: (_tile(64, 32, 4, 2, "tf32x3"), _tile(64, 32, 4, 2, "tf32x3"), _tile(32, 64, 8, 2, "tf32x3")),
    64: (_tile(32, 32, 4, 2, "tf32x3"), _tile(16, 32, 4, 2, "tf32x3"), _tile(16, 32, 8, 2, "tf32x3")),
    128: (_tile(16, 32, 4, 2, "tf32x3"), _tile(16, 32, 8, 2, "tf32x3"), _tile(32, 32, 8, 2, "tf32x3")),
}


def plan(dtype: str, head_dim: int, target: Target, *, has_dropout: bool = False) -> AttentionPlan:
    """Tiles of the Triton kernels."""
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"the Triton kernels serve head dimensions up to {MAX_HEAD_DIM}, not {head_dim}")
    is_large = target.sm >= 90 and target.smem_bytes >= 200 * 1024
    plain, dropping = (_LARGE, _LARGE_DROPOUT) if is_large else (_SMALL, _SMALL_DROPOUT)
    rows = dropping if has_dropout else plain
    if dtype == "float32":
        rows = _FLOAT32
    widest = min(width for width in rows if width >= head_dim)
    return AttentionPlan(max(16, 1 << (head_dim - 1).bit_length()), *rows[widest])


@dataclass(frozen=True)
class TorchPlan:
    """Attributes
    ----------
    route
        ``"varlen"``: torch's flash attention over packed sequences. ``"efficient"``: the memory-efficient kernel that
        nested tensors use. ``"cells"``: scaled_dot_product_attention, one call per cell. ``"blocked"``: batched matrix
        products around a softmax of our own, a block of rows at a time. ``"registers"``: as ``"blocked"``, but products
        and softmax are one compiled loop wherever it serves the head dimension. ``"tiles"``: as ``"registers"``, with
        products on AMX tiles, and ``"cells"`` where the loop does not serve.
    reason
        Why this one.
    block_rows
        Most rows of scores per block of the blocked route, which is also what ``"registers"`` falls back to, and
        ``"tiles"`` for cells whose weights leave float32.
    """

    route: str
    reason: str
    block_rows: int = 0


def torch_plan(
    dtype: str,
    target: Target,
    *,
    is_inference: bool,
    has_dropout: bool = False,
    torch: tuple[int, int] | None = None,
) -> TorchPlan:
    """The route through torch, of version (major, minor) ``torch`` (None: the installed one).

    Torch's fused CPU attention multiplies bfloat16 through MKL, which without AMX runs no faster than float32, while
    oneDNN's batched product uses avx512_bf16: 100 against 340 GFLOP/s on 2 cores of an EPYC with avx512_bf16
    (4 heads of 64, 1,024 tokens, 2026-11-21). With dropout torch's CPU attention writes float32 weights of all pairs:
    forward and backward pass of 12 real cells with 2 % dropout took 1.10 s on one core, blocked 0.29 s (2026-11-26).
    Of inference with avx512_bf16 the blocked route takes 6.4 us a token and layer, registers 5.3 (``host_avx512``);
    with amx_bf16 tiles are 2.4 times as fast as torch's way, cell by cell (``host_amx``).
    """
    torch = torch_version() if torch is None else torch
    if target.kind == "cpu":
        has_amx = "amx_bf16" in target.features
        if dtype == "bfloat16" and is_inference and has_amx:
            return TorchPlan("tiles", "a compiled loop on AMX tiles with the softmax beside them", block_rows=384)
        if dtype == "bfloat16" and is_inference and "avx512_bf16" in target.features:
            return TorchPlan("registers", "a compiled loop that keeps scores in registers", block_rows=384)
        if dtype == "bfloat16" and (has_dropout or not has_amx):
            return TorchPlan(
                "blocked", "oneDNN's products by blocks of rows, cell by cell", block_rows=384 if is_inference else 256
            )
        return TorchPlan("cells", "torch per cell on the CPU, sdpa for inference")
    is_ampere = target.kind == "cuda" and target.sm >= 80
    # varlen_attn came with 2.10 and learned of scale in 2.11; it has no dropout.
    if is_ampere and dtype in ("float16", "bfloat16") and not has_dropout and torch >= (2, 11):
        return TorchPlan("varlen", "torch's flash attention over packed sequences")
    if (is_ampere and dtype == "bfloat16") or (target.kind == "cuda" and dtype in ("float16", "float32")):
        return TorchPlan("efficient", "torch's memory-efficient attention over packed sequences, from Volta on")
    return TorchPlan("cells", "torch scaled_dot_product_attention per cell")


def is_for_cudnn(dtype: str, head_dim: int, length: int, target: Target) -> bool:
    """Whether cells that are all ``length`` tokens long are left to cuDNN, in inference.

    On an H200 it takes 0.86 ms where the Triton kernel takes 1.0 (12 heads of 64, 32 cells of 2,048 tokens, bfloat16,
    2026-11). It makes a plan for every new shape, so that only lengths pay that come again and again: those at which
    cells are cut off. Its backward pass adds up in any order, and cells of different lengths need a mask.
    """
    is_half = dtype in ("float16", "bfloat16")
    is_hopper = target.kind == "cuda" and target.sm == 90
    return is_hopper and is_half and head_dim in (64, 128) and length > 0 and length % 1024 == 0


def is_for_loops(dtype: str, length: int, target: Target) -> bool:
    """Whether cells of ``length`` tokens are left to the compiled loops of float32 where torch is first otherwise.

    With AVX-512 their tiles are as wide as the library's, and they keep scores near: a head of 32 over 19,266 tokens
    takes 0.38 s of a core, torch's fused attention 0.48. Shorter cells gain as much, but less than compiling costs once
    (a Xeon with AVX-512, processor time on a busy machine, 2026-11-30).
    """
    return dtype == "float32" and target.kind == "cpu" and target.has_float32_loops and length > LONG


@functools.cache
def torch_version() -> tuple[int, int]:
    """(major, minor) of the installed torch, from its metadata; (0, 0) where there is none."""
    try:
        major, minor = version("torch").split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    reason = torch_plan(dtype, target, is_inference=True).reason
    reference = "plain torch, any device and dtype, memory grows with the square of the length"
    by_torch = Candidate(Impl.TORCH, True, reason)
    by_reference = Candidate(Impl.REFERENCE, True, reference)
    by_triton = triton_candidate(OP, dtype, target, "Triton flash attention over packed cells")
    if target.kind == "cpu":
        loops = compiled_float32_candidate(dtype, target, "tiles of six rows, scores near")
        first = (loops, by_torch) if target.prefers_float32_loops else (by_torch, loops)
        return *first, by_reference, by_triton
    if dtype == "float32":
        # Both halves of every operand of three-fold TF32 in registers: the kernels spill, CUTLASS's do not.
        return by_torch, by_triton, by_reference
    return by_triton, by_torch, by_reference


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel under every plan that this target could launch."""
    if target.sm < 80:
        # No tensor cores come out below sm_80, so these are never launched: one row shows it.
        return (_case("fwd", "float16", 64, False, target, is_default=False), *_tiles_cases(target))
    cases = _tiles_cases(target)
    halves = range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP)  # all that operators are given
    for dtype, head_dims in (("bfloat16", halves), ("float16", halves), ("float32", (32, 64, 128))):
        for head_dim in head_dims:
            for has_dropout in (False, True):
                for kernel in ("fwd", "dq", "dkdv"):
                    cases.append(_case(kernel, dtype, head_dim, has_dropout, target, is_default=dtype != "float32"))
    return tuple(cases)


def _tiles_cases(target: Target) -> list[KernelCase]:
    """Lists of the tiles of every size that a plan has."""
    sizes = set()
    for head_dim, has_dropout in itertools.product((32, 64, 128), (False, True)):
        whole = plan("float16", head_dim, target, has_dropout=has_dropout)
        sizes |= {whole.fwd.block_m, whole.dq.block_m, whole.dkdv.block_n}
    return [_tiles_case(block_rows) for block_rows in sorted(sizes)]


def _tiles_case(block_rows: int) -> KernelCase:
    return KernelCase(
        op=OP,
        kernel="varlen_attention_tiles_kernel",
        problem=f"list of tiles of {block_rows} rows",
        dtype="int32",
        signature=dict(cu_seqlens_ptr="*i32", tiles_ptr="*i32", n_cells="i32", n_tokens="i32", n_slots="i32"),
        constexprs=dict(BLOCK_ROWS=block_rows, BLOCK_CELLS=BLOCK_CELLS),
        launch=TILES_LAUNCH,
        divisible=frozenset({"cu_seqlens_ptr", "tiles_ptr"}),
    )


TILES_LAUNCH = Launch(num_warps=4, num_stages=1, enable_fp_fusion=True)

# Pointers of the kernels, in order; those not named here point to values of the compute dtype.
_POINTERS = {
    "fwd": ("q", "k", "v", "out", "lse", "tiles", "seed"),
    "dq": ("q", "k", "v", "out", "d_out", "dq", "lse", "delta", "tiles", "seed"),
    "dkdv": ("q", "k", "v", "d_out", "dk", "dv", "lse", "delta", "tiles", "seed"),
}
_POINTER_TYPES = {"lse": "*fp32", "delta": "*fp32", "tiles": "*i32", "seed": "*i64"}
_KERNELS = {
    "fwd": "varlen_attention_fwd_kernel",
    "dq": "varlen_attention_bwd_dq_kernel",
    "dkdv": "varlen_attention_bwd_dkdv_kernel",
}


def _case(kernel: str, dtype: str, head_dim: int, has_dropout: bool, target: Target, *, is_default: bool) -> KernelCase:
    whole = plan(dtype, head_dim, target, has_dropout=has_dropout)
    tile: TilePlan = getattr(whole, kernel)
    signature, constexprs = {}, constants(whole, tile, head_dim, has_dropout)
    for name in _POINTERS[kernel]:
        if name == "seed" and not has_dropout:
            constexprs["seed_ptr"] = None
        else:
            signature[f"{name}_ptr"] = _POINTER_TYPES.get(name, pointer(dtype))
    strided = [name for name in _POINTERS[kernel] if name not in _POINTER_TYPES]
    strides = [f"stride_{name}_{axis}" for name in strided for axis in "th"]
    signature |= dict.fromkeys([*strides, "n_tokens"], "i32")
    floats = ("scale_log2", "dropout_p") if kernel == "fwd" else ("scale", "scale_log2", "dropout_p")
    signature |= dict.fromkeys(floats, "fp32")
    pointers = {name for name in signature if name.endswith("_ptr")}
    return KernelCase(
        op=OP,
        kernel=_KERNELS[kernel],
        problem=f"D={head_dim}{' dropout' if has_dropout else ''}",
        dtype=dtype,
        signature=signature,
        constexprs=constexprs,
        launch=tile.launch,
        divisible=frozenset(pointers | set(strides)),
        has_dot=True,
        is_default=is_default,
    )


def constants(
    whole: AttentionPlan, tile: TilePlan, head_dim: int, has_dropout: bool
) -> dict[str, int | float | bool | str | None]:
    """Compile-time arguments of a kernel."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": whole.block_d,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PRECISION": tile.precision,
        "HAS_DROPOUT": has_dropout,
    }
