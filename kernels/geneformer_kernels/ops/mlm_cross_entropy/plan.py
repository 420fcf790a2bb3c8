"""How the loss of masked gene prediction is launched on a target.

Rows named for Hopper were measured on an H200; every other number follows from registers and shared memory as compiled
for each architecture, and from how many bytes each tile reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from geneformer_kernels.dispatch import Candidate, Impl, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, pointer
from geneformer_kernels.target import Target

OP = "mlm_cross_entropy"

#: The gradient of the logits exists in chunks of the vocabulary of at most a quarter of it all and so many bytes ...
MAX_WORKSPACE_BYTES = 256 * 2**20
#: ... but chunks smaller than this would only cost launches.
MIN_WORKSPACE_BYTES = 16 * 2**20

#: What the torch path's float32 logits of one chunk of rows may take. On a CPU one chunk should stay in its cache:
#: 256 to 512 rows of 25,426 logits are the fastest on an EPYC with 32 MB (2026-11).
MAX_LOGIT_BYTES = {"cpu": 32 * 2**20}
MAX_LOGIT_BYTES_ELSEWHERE = 128 * 2**20

#: Splits of the vocabulary beyond this make the partial results cost more than they gain.
MAX_SPLITS = 256
#: Widths that kernels are given are multiples of it, others are padded with zeros: rows that begin anywhere are read
#: element by element, whose addresses spill up to 1,376 bytes per thread.
WIDTH_STEP = 16
#: Widths that kernels are compiled for ahead of time: narrow and wide rows.
CASE_WIDTHS = (256, 768)


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel with a matrix product, and how many of its programs one SM holds."""

    block_r: int
    block_v: int
    block_k: int
    launch: Launch
    programs_per_sm: int
    group_r: int = 16

    @property
    def constexprs(self) -> dict[str, int | float | bool | str | None]:
        """Compile-time arguments."""
        return {
            "BLOCK_R": self.block_r,
            "BLOCK_V": self.block_v,
            "BLOCK_K": self.block_k,
            "GROUP_R": self.group_r,
        }


@dataclass(frozen=True)
class ForwardPlan:
    """Tiles, and how the vocabulary is cut so that every SM has work when there are few rows."""

    tiles: Tiles
    n_splits: int
    blocks_per_split: int


@dataclass(frozen=True)
class BackwardPlan:
    """Tiles, and how many entries of the vocabulary one chunk holds (a multiple of block_v)."""

    tiles: Tiles
    chunk_v: int


@dataclass(frozen=True)
class CombinePlan:
    """Block sizes of the kernel that puts the splits together: rows, splits, width."""

    block_r: int = 16
    block_s: int = 32
    block_k: int = 128
    launch: Launch = field(default_factory=Launch)

    @property
    def constexprs(self) -> dict[str, int | float | bool | str | None]:
        """Compile-time arguments."""
        return {"BLOCK_R": self.block_r, "BLOCK_S": self.block_s, "BLOCK_K": self.block_k}


# Registers per thread and shared memory, as compiled, stand beside each row; with the card they say how many programs
# one SM holds. Two should: one's exponentials and first loads then run beside the other's matrix product. Larger tiles,
# or rows that stay in shared memory, leave room for one only.
INTERPRETED = Tiles(32, 64, 32, Launch(4, 2), 1, group_r=2)  # small: a few programs on odd shapes cover every branch
HOPPER = Tiles(128, 128, 64, Launch(8, 3), 2)  # forward 124 r, backward 126 r, 96 KB
# Faster by 5 % and by 8 % on an H200 (16,384 rows, 25,426 genes, bfloat16, 2026-11): forward for wide rows, backward
# for narrow ones.
HOPPER_WIDE_FORWARD = Tiles(128, 256, 64, Launch(8, 4), 1)  # 231 r, 192 KB
HOPPER_NARROW_BACKWARD = Tiles(128, 128, 64, Launch(4, 3), 2)  # 220 r, 96 KB
AMPERE = Tiles(128, 128, 32, Launch(4, 4), 2)  # forward 255 r, backward 245 r, 48 KB; with 8 warps only one fits
FLOAT32 = Tiles(64, 64, 32, Launch(4, 3), 2)  # three products per logit (tf32x3): at most 239 r, 48 KB


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for a dtype on a target, best first."""
    library = {"cpu": "oneDNN or MKL", "cuda": "cuBLAS"}.get(target.kind, "the vendor's library")
    triton = triton_candidate(OP, dtype, target, "logits tile by tile, never written")
    torch = Candidate(Impl.TORCH, True, f"logits of a chunk at a time, through {library}")
    reference = Candidate(Impl.REFERENCE, True, "plain torch with all logits in memory, any device and dtype")
    return (triton, torch, reference) if target.kind == "cuda" else (torch, reference, triton)


def tiles_for(dtype: str, width: int, target: Target, *, is_forward: bool) -> Tiles:
    """Tiles of the kernels that multiply matrices."""
    if target.kind != "cuda":
        return INTERPRETED
    if dtype == "float32":
        return FLOAT32
    if target.sm < 90:
        return AMPERE
    if is_forward:
        return HOPPER_WIDE_FORWARD if width >= 512 and target.smem_bytes >= 200 * 1024 else HOPPER
    return HOPPER_NARROW_BACKWARD if width <= 512 else HOPPER


def forward_plan(n_rows: int, n_vocab: int, width: int, dtype: str, target: Target) -> ForwardPlan:
    """Tiles, and the number of splits that keeps all SMs busy for the shortest time."""
    tiles = tiles_for(dtype, width, target, is_forward=True)
    n_row_blocks, n_blocks = _ceil(n_rows, tiles.block_r), _ceil(n_vocab, tiles.block_v)
    n_slots = target.n_sms * tiles.programs_per_sm

    def time(blocks_per_split: int) -> float:
        # Half a block's time to start and end a program; programs run in waves.
        n_programs = n_row_blocks * _ceil(n_blocks, blocks_per_split)
        return _ceil(n_programs, n_slots) * (blocks_per_split + 0.5)

    fewest = _ceil(n_blocks, MAX_SPLITS)
    # A group of row blocks shares its splits' weights in the L2 cache, so at least 8 programs should share rows.
    most = max(fewest, n_blocks // 8)
    blocks_per_split = min(range(fewest, most + 1), key=time)
    return ForwardPlan(tiles, _ceil(n_blocks, blocks_per_split), blocks_per_split)


def backward_plan(n_rows: int, n_vocab: int, width: int, dtype: str, target: Target) -> BackwardPlan:
    """Tiles, and chunks of equal size within the workspace; one block of columns is always allowed."""
    tiles = tiles_for(dtype, width, target, is_forward=False)
    row_bytes = max(n_rows, 1) * (4 if dtype == "float32" else 2)
    workspace = min(MAX_WORKSPACE_BYTES, max(MIN_WORKSPACE_BYTES, row_bytes * n_vocab // 4))
    n_blocks = _ceil(n_vocab, tiles.block_v)
    blocks_per_chunk = max(1, min(n_blocks, workspace // (row_bytes * tiles.block_v)))
    n_chunks = _ceil(n_blocks, blocks_per_chunk)
    return BackwardPlan(tiles, _ceil(n_blocks, n_chunks) * tiles.block_v)


def combine_plan() -> CombinePlan:
    """Block sizes of the kernel that puts the splits together."""
    return CombinePlan()


def rows_per_chunk(n_vocab: int, target: Target) -> int:
    """Rows whose logits the torch path holds at a time."""
    return max(1, MAX_LOGIT_BYTES.get(target.kind, MAX_LOGIT_BYTES_ELSEWHERE) // (4 * max(n_vocab, 1)))


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel under every plan, for the ahead-of-time compiler."""
    dtypes = ("float16", "bfloat16", "float32")
    if target.sm < 80:  # scalar arithmetic there: choose takes cuBLAS, and these rows are the evidence
        return tuple(_forward_case(dtype, CASE_WIDTHS[0], target, is_default=False) for dtype in dtypes)
    return tuple(
        case
        for dtype in dtypes
        for case in (
            *(_forward_case(dtype, width, target) for width in CASE_WIDTHS),
            _combine_case(dtype, target),
            *(_backward_case(dtype, width, target) for width in CASE_WIDTHS),
        )
    )


_POINTERS = {
    "targets_ptr": "int64",
    **dict.fromkeys(("bias_ptr", "partial_max_ptr", "partial_sum_ptr", "partial_dbias_ptr"), "float32"),
    **dict.fromkeys(("row_max_ptr", "row_sum_ptr", "loss_ptr", "row_scale_ptr"), "float32"),
}
_DIVISIBLE = {"width", "stride_dlogits_r"}
# A chunk of the vocabulary may begin at any entry: its bias is not aligned.
_UNALIGNED = {("mlm_cross_entropy_bwd_dlogits_kernel", "bias_ptr")}


def _signature(dtype: str, names: str) -> dict[str, str]:
    return {name: pointer(_POINTERS.get(name, dtype)) if name.endswith("_ptr") else "i32" for name in names.split()}


def _divisible(kernel: str, signature: dict[str, str]) -> frozenset[str]:
    return frozenset(
        name for name in signature if (name.endswith("_ptr") or name in _DIVISIBLE) and (kernel, name) not in _UNALIGNED
    )


def _forward_case(dtype: str, width: int, target: Target, *, is_default: bool = True) -> KernelCase:
    tiles = forward_plan(6_000, 25_426, width, dtype, target).tiles
    signature = _signature(
        dtype,
        "hidden_ptr weight_ptr bias_ptr partial_max_ptr partial_sum_ptr n_rows n_vocab width n_splits blocks_per_split",
    )
    return KernelCase(
        op=OP,
        kernel="mlm_cross_entropy_fwd_kernel",
        problem=f"C={width}",
        dtype=dtype,
        signature=signature,
        constexprs=tiles.constexprs,
        launch=tiles.launch,
        divisible=_divisible("mlm_cross_entropy_fwd_kernel", signature),
        has_dot=True,
        is_default=is_default,
    )


def _combine_case(dtype: str, target: Target) -> KernelCase:
    plan = combine_plan()
    signature = _signature(
        dtype,
        "hidden_ptr weight_ptr bias_ptr targets_ptr partial_max_ptr partial_sum_ptr row_max_ptr row_sum_ptr loss_ptr "
        "n_rows n_vocab width n_splits ignore_index",
    )
    return KernelCase(
        op=OP,
        kernel="mlm_cross_entropy_fwd_combine_kernel",
        problem="any C",
        dtype=dtype,
        signature=signature,
        constexprs=plan.constexprs,
        launch=plan.launch,
        divisible=_divisible("mlm_cross_entropy_fwd_combine_kernel", signature),
    )


def _backward_case(dtype: str, width: int, target: Target) -> KernelCase:
    tiles = backward_plan(6_000, 25_426, width, dtype, target).tiles
    signature = _signature(
        dtype,
        "hidden_ptr weight_ptr bias_ptr targets_ptr row_max_ptr row_sum_ptr row_scale_ptr "
        "dlogits_ptr partial_dbias_ptr n_rows n_columns width first_vocab stride_dlogits_r",
    )
    return KernelCase(
        op=OP,
        kernel="mlm_cross_entropy_bwd_dlogits_kernel",
        problem=f"C={width}",
        dtype=dtype,
        signature=signature,
        constexprs=tiles.constexprs,
        launch=tiles.launch,
        divisible=_divisible("mlm_cross_entropy_bwd_dlogits_kernel", signature),
        has_dot=True,
    )


def _ceil(n: int, size: int) -> int:
    return -(-n // size)
