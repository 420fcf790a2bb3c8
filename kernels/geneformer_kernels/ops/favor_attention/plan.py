"""How linear attention by random features is launched on a target."""

from __future__ import annotations

from dataclasses import dataclass

from geneformer_kernels.dispatch import Candidate, Impl, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, pointer, precision_of
from geneformer_kernels.target import Target

OP = "favor_attention"
STABILISERS = ("cell", "batch")
#: Head dimensions the Triton kernels are compiled for; others are padded to the next one.
HEAD_DIMS = (32, 64, 128)
#: Smallest eps of the kernels in float16: what features are divided by may be as small, and 1 / eps must be a number.
LEAST_EPS_OF_HALF = 2.0**-15


@dataclass(frozen=True)
class TilePlan:
    """Attributes
    ----------
    block_t, block_f
        Tokens and features of a tile: powers of two of at least 16.
    launch
        Warps, stages, fusion.
    """

    block_t: int
    block_f: int
    launch: Launch

    @property
    def constexprs(self) -> dict[str, int]:
        """Compile-time arguments of a launch."""
        return {"BLOCK_T": self.block_t, "BLOCK_F": self.block_f}


@dataclass(frozen=True)
class FavorPlan:
    """Attributes
    ----------
    head_dim
        Columns of a head as the kernels see it.
    n_parts
        Matrices whose sum is the projection.
    precision
        Of products of float32.
    top, sums, fwd, bwd
        Tiles of the kernels for the largest projection of every key, for sums over a cell's tokens, for queries, and
        for gradients.
    """

    head_dim: int
    n_parts: int
    precision: str
    top: TilePlan
    sums: TilePlan
    fwd: TilePlan
    bwd: TilePlan

    @property
    def constexprs(self) -> dict[str, int | str]:
        """Compile-time arguments that all kernels share."""
        return {"HEAD_DIM": self.head_dim, "N_PARTS": self.n_parts, "PRECISION": self.precision}


def _tile(block_t: int, block_f: int, num_warps: int, num_stages: int) -> TilePlan:
    return TilePlan(block_t, block_f, Launch(num_warps, num_stages, enable_fp_fusion=True))


# (top, sums, fwd, bwd) by head dimension. No card has timed them: the largest tiles whose registers do not spill
# (Triton 3.7, 2026-11), 64 features at a time, of which scBERT's 266 waste a sixth.
_HALF = {
    32: (_tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(64, 64, 4, 2)),
    64: (_tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(64, 64, 4, 2), _tile(64, 64, 4, 2)),
    128: (_tile(64, 64, 4, 2), _tile(64, 64, 8, 2), _tile(64, 64, 8, 2), _tile(64, 32, 8, 2)),
}
_FLOAT32 = {
    32: (_tile(64, 32, 4, 2), _tile(32, 32, 4, 2), _tile(32, 32, 4, 2), _tile(32, 32, 4, 2)),
    64: (_tile(32, 32, 4, 2), _tile(32, 32, 4, 2), _tile(32, 32, 4, 2), _tile(16, 32, 4, 2)),
    128: (_tile(16, 32, 4, 2), _tile(16, 32, 4, 2), _tile(16, 32, 4, 2), _tile(16, 32, 8, 2)),
}


def plan(dtype: str, head_dim: int, target: Target) -> FavorPlan:
    """Tiles of the Triton kernels."""
    if head_dim > HEAD_DIMS[-1]:
        raise ValueError(f"the Triton kernels serve head dimensions up to {HEAD_DIMS[-1]}, not {head_dim}")
    widest = min(width for width in HEAD_DIMS if width >= head_dim)
    rows = _FLOAT32 if dtype == "float32" else _HALF
    return FavorPlan(widest, 1 if dtype == "float32" else 2, precision_of(dtype), *rows[widest])


def why_not_triton(dtype: str, head_dim: int, eps: float) -> str:
    """Why the kernels do not serve a problem; empty where they do."""
    if head_dim > HEAD_DIMS[-1]:
        return f"the Triton kernels serve head dimensions up to {HEAD_DIMS[-1]}, not {head_dim}"
    if dtype == "float16" and eps < LEAST_EPS_OF_HALF:
        return f"in float16 the Triton kernels take eps from {LEAST_EPS_OF_HALF:.1e} on, not {eps}"
    return ""


def n_splits(longest: int, n_groups: int, block_t: int, target: Target) -> int:
    """Parts of a cell's tokens that are summed by programs of their own.

    ``n_groups`` programs are there without. Four programs per multiprocessor hide each other's waiting; a part has 8
    tiles at least, so that its sums, written in float32, are less than what is read.
    """
    wanted = -(-4 * max(target.n_sms, 1) // max(n_groups, 1))
    return max(1, min(wanted, longest // (8 * block_t)))


def rows_per_chunk(n_heads: int, n_features: int, itemsize: int, target: Target) -> int:
    """Tokens whose features torch holds at a time: on a CPU so few that they stay in its caches, on a card enough work.

    The sizes are guesses that nobody has timed against others.
    """
    chunk_bytes = 2 * 1024**2 if target.kind == "cpu" else 64 * 1024**2
    return max(16, chunk_bytes // (n_heads * n_features * itemsize))


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    by_triton = triton_candidate(OP, dtype, target, "Triton, features in registers")
    by_torch = Candidate(Impl.TORCH, True, "products of torch by chunks of tokens, memory linear in the length")
    by_reference = Candidate(Impl.REFERENCE, True, "plain torch, features of all tokens of a cell in memory")
    if target.kind == "cpu" or dtype == "float32":
        return by_torch, by_triton, by_reference
    return by_triton, by_torch, by_reference


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel under every plan that this target could launch."""
    if target.sm < 80:
        # No tensor cores come out below sm_80, so these are never launched: one row shows it.
        return (_case("sums", "float16", 64, target, "keys", is_default=False),)
    return tuple(
        _case(kernel, dtype, head_dim, target, what, is_default=dtype != "float32")
        for dtype in ("bfloat16", "float16", "float32")
        for head_dim in HEAD_DIMS
        for kernel, what in _KINDS
    )


_KINDS = (
    ("top", ""),
    ("sums", "keys"),
    ("sums", "queries"),
    ("fwd", "inference"),
    ("fwd", "training"),
    ("bwd", "keys"),
    ("bwd", "queries"),
)
_KERNELS = {name: f"favor_attention_{name}_kernel" for name in ("top", "sums", "fwd", "bwd")}
# In order: pointers to the compute dtype, those to float32, sizes. An optional pointer is named below.
_OWN = {
    "top": ("k", "weight"),
    "sums": ("x", "y", "weight"),
    "fwd": ("q", "weight", "context", "out"),
    "bwd": ("x", "y", "weight", "context", "dx", "dv"),
}
_WIDE = {
    "top": ("top",),
    "sums": ("largest", "total", "delta", "partial", "partial_sum"),
    "fwd": ("sums", "largest", "total"),
    "bwd": ("sums", "factor", "largest", "total", "delta", "flow"),
}
_SIZES = {"top": (), "sums": ("n_blocks", "n_splits"), "fwd": ("n_tiles",), "bwd": ("n_tiles",)}
_STRIDED = {"top": ("k",), "sums": ("x", "y"), "fwd": ("q",), "bwd": ("x", "y")}
_ABSENT = {
    ("sums", "keys"): {"total", "delta"},
    ("fwd", "inference"): {"largest", "total"},
    ("bwd", "keys"): {"total", "delta"},
    ("bwd", "queries"): {"factor", "dv", "flow"},
}


def _case(kernel: str, dtype: str, head_dim: int, target: Target, what: str, *, is_default: bool) -> KernelCase:
    whole = plan(dtype, head_dim, target)
    tile: TilePlan = getattr(whole, kernel)
    absent = _ABSENT.get((kernel, what), set())
    pointers = {name: pointer(dtype) for name in _OWN[kernel]} | dict.fromkeys(_WIDE[kernel], pointer("float32"))
    if kernel != "top":
        pointers["cu_seqlens"] = pointer("int32")
    signature = {f"{name}_ptr": kind for name, kind in pointers.items() if name not in absent}
    strides = [f"stride_{name}_{axis}" for name in _STRIDED[kernel] for axis in "th"]
    signature |= dict.fromkeys([*strides, "n_tokens", "n_features", *_SIZES[kernel]], "i32")
    signature |= dict.fromkeys(["scale"] if kernel == "top" else ["scale", "eps"], "fp32")
    return KernelCase(
        op=OP,
        kernel=_KERNELS[kernel],
        problem=f"D={whole.head_dim}{f' {what}' if what else ''}",
        dtype=dtype,
        signature=signature,
        constexprs={**{f"{name}_ptr": None for name in sorted(absent)}, **whole.constexprs, **tile.constexprs},
        launch=tile.launch,
        divisible=frozenset({name for name in signature if name.endswith("_ptr")} | set(strides)),
        has_dot=True,
        is_default=is_default,
    )
