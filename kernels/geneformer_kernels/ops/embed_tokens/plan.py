"""How the embedding front is launched on a target."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from geneformer_kernels.dispatch import Candidate, Impl, triton_candidate
from geneformer_kernels.launch import KernelCase, Launch, check_width, pointer
from geneformer_kernels.target import Target

OP = "embed_tokens"
# One width per size of a block of columns; the published models are 256, 512, 640, 768, 896 and 1,280 wide.
CASE_WIDTHS = (128, 256, 512, 768, 1280, 4096)


def candidates(dtype: str, target: Target) -> tuple[Candidate, ...]:
    """Implementations for the dtype of ``out`` on a target, best first."""
    triton = triton_candidate(OP, dtype, target)
    if dtype == "float64":
        triton = Candidate(Impl.TRITON, False, "the Triton kernel computes in float32")
    torch = Candidate(Impl.TORCH, True, "torch embedding and layer_norm in float32")
    reference = Candidate(Impl.REFERENCE, True, "plain torch, any device and dtype")
    return (triton, torch, reference) if target.kind == "cuda" else (torch, reference, triton)


@dataclass(frozen=True)
class EmbedTokensPlan:
    """Block sizes of all kernels.

    Attributes
    ----------
    block_c
        Columns of the tiles of whole rows, in the kernels over tokens.
    fwd_block_rows, bwd_block_rows
        Their rows; the backward's are fewer, as it holds more tiles at once.
    n_programs
        Programs of the backward over tokens, each with its part of the small parameters' gradients.
    table_block_rows, table_block_c
        Tile of the kernels that sum listed rows into a table.
    chunk
        How many rows one program of theirs adds up at most; table rows met more often are summed in two stages.
    fwd_launch, bwd_launch, table_launch
        Their options.
    """

    block_c: int
    fwd_block_rows: int
    fwd_launch: Launch
    bwd_block_rows: int
    bwd_launch: Launch
    n_programs: int
    table_block_rows: int
    table_block_c: int
    table_launch: Launch
    chunk: int


def plan(n_rows: int, width: int, target: Target) -> EmbedTokensPlan:
    """16 elements per thread forward and 8 backward; as many backward programs as fit on the card at once.

    A chunk is about the square root of the number of rows, so that both stages of the longest sum take as long.
    """
    check_width(width)
    block_c = max(128, 1 << (width - 1).bit_length())
    fwd_warps = 4 if block_c <= 2048 else 8
    # 8 elements per thread are about 96 registers, 16 are 168: too few warps to hide the memory behind.
    bwd_warps = max(4, block_c // (8 * 32))
    bwd_block_rows = 8 * 32 * bwd_warps // block_c
    n_resident = target.n_sms * {4: 5, 8: 2, 16: 1}[bwd_warps]
    table_block_c = min(block_c, 256)
    return EmbedTokensPlan(
        block_c=block_c,
        fwd_block_rows=16 * 32 * fwd_warps // block_c,
        fwd_launch=Launch(num_warps=fwd_warps, num_stages=1),
        bwd_block_rows=bwd_block_rows,
        bwd_launch=Launch(num_warps=bwd_warps, num_stages=1),
        n_programs=max(1, min(-(-n_rows // bwd_block_rows), n_resident)),
        table_block_rows=2048 // table_block_c,
        table_block_c=table_block_c,
        table_launch=Launch(num_warps=4, num_stages=2),
        chunk=min(max(32, 1 << (math.isqrt(n_rows) - 1).bit_length()), 2048),
    )


def kernel_cases(target: Target) -> tuple[KernelCase, ...]:
    """Every kernel for every block width; those over tokens with everything and with nothing optional."""
    dtypes = ("float16", "bfloat16", "float32") if target.sm >= 75 else ("float16", "float32")
    cases = []
    for dtype, width, is_full in itertools.product(dtypes, CASE_WIDTHS, (True, False)):
        cases.append(_fwd_case(dtype, width, target, is_full=is_full))
        cases.append(_bwd_rows_case(dtype, width, target, is_full=is_full))
    # An odd width has no wide loads.
    cases += [_fwd_case("float32", 769, target, is_full=True), _bwd_rows_case("float32", 769, target, is_full=True)]
    for width in (128, 256, 769):
        cases += _table_cases(width, target)
    return tuple(cases)


def _fwd_case(dtype: str, width: int, target: Target, *, is_full: bool) -> KernelCase:
    # Full: training of BERT. Otherwise: inference without type row and normalisation.
    wide = pointer("float32")
    pointers = {
        "token_ids_ptr": pointer("int64" if is_full else "int32"),
        "cu_seqlens_ptr": pointer("int32"),
        "token_ptr": wide,
        "position_ptr": wide,
        "type_ptr": wide if is_full else None,
        "weight_ptr": wide if is_full else None,
        "bias_ptr": wide if is_full else None,
        "seed_ptr": pointer("int64") if is_full else None,
        "stream_ptr": wide,
        "out_ptr": None if dtype == "float32" else pointer(dtype),
        "positions_ptr": pointer("int32") if is_full else None,
        "mean_ptr": wide if is_full else None,
        "rstd_ptr": wide if is_full else None,
    }
    scalars = dict.fromkeys(("n_rows", "n_cells", "n_steps", "n_vocabulary", "n_positions", "width"), "i32")
    scalars |= {"eps": "fp32", "threshold": "i32", "keep_scale": "fp32"}
    problem = f"C={width} {'norm, training, dropout' if is_full else 'no norm, inference'}"
    return _rows_case("embed_tokens_fwd_kernel", problem, dtype, width, target, pointers, scalars, {})


def _bwd_rows_case(dtype: str, width: int, target: Target, *, is_full: bool) -> KernelCase:
    wide = pointer("float32")
    pointers = {
        "d_stream_ptr": wide,
        "d_out_ptr": pointer(dtype) if is_full else None,
        "token_ids_ptr": pointer("int64" if is_full else "int32"),
        "positions_ptr": pointer("int32"),
        "token_ptr": wide,
        "position_ptr": wide,
        "type_ptr": wide if is_full else None,
        "weight_ptr": wide if is_full else None,
        "mean_ptr": wide if is_full else None,
        "rstd_ptr": wide if is_full else None,
        "seed_ptr": pointer("int64") if is_full else None,
        "d_total_ptr": wide,
        "partial_ptr": wide if is_full else None,
    }
    scalars = {"n_rows": "i32", "n_vocabulary": "i32", "width": "i32", "threshold": "i32", "keep_scale": "fp32"}
    problem = f"C={width} {'norm, dropout' if is_full else 'no norm'}"
    constants = {"N_PARTIALS": 3 if is_full else 0}
    return _rows_case("embed_tokens_bwd_rows_kernel", problem, dtype, width, target, pointers, scalars, constants)


def _rows_case(
    kernel: str,
    problem: str,
    dtype: str,
    width: int,
    target: Target,
    pointers: dict[str, str | None],
    scalars: dict[str, str],
    constants: dict[str, int],
) -> KernelCase:
    chosen, is_fwd = plan(1 << 16, width, target), kernel.endswith("fwd_kernel")
    block_rows = chosen.fwd_block_rows if is_fwd else chosen.bwd_block_rows
    present = {name: kind for name, kind in pointers.items() if kind is not None}
    absent = {name: None for name, kind in pointers.items() if kind is None}
    return KernelCase(
        op=OP,
        kernel=kernel,
        problem=problem,
        dtype=dtype,
        signature=present | scalars,
        constexprs={**absent, **constants, "BLOCK_ROWS": block_rows, "BLOCK_C": chosen.block_c},
        launch=chosen.fwd_launch if is_fwd else chosen.bwd_launch,
        divisible=_divisible(present, width),
    )


def _table_cases(width: int, target: Target) -> list[KernelCase]:
    chosen = plan(1 << 16, width, target)
    wide = pointer("float32")
    listed = {"order_ptr": pointer("int64"), "bounds_ptr": pointer("int32"), "partial_ptr": wide}
    chunks = {"d_total_ptr": wide, "keys_ptr": pointer("int32"), **listed}
    table = {"d_total_ptr": wide, **listed, "d_table_ptr": wide}
    sizes = {"chunk": "i32", "width": "i32"}
    kernels = (
        ("embed_tokens_bwd_chunks_kernel", chunks, {"n_rows": "i32"} | sizes),
        ("embed_tokens_bwd_table_kernel", table, sizes),
    )
    return [
        KernelCase(
            op=OP,
            kernel=kernel,
            problem=f"C={width}",
            dtype="float32",
            signature=pointers | scalars,
            constexprs={"BLOCK_ROWS": chosen.table_block_rows, "BLOCK_C": chosen.table_block_c},
            launch=chosen.table_launch,
            divisible=_divisible(pointers, width),
        )
        for kernel, pointers, scalars in kernels
    ]


def _divisible(pointers: dict[str, str], width: int) -> frozenset[str]:
    return frozenset(pointers) | (frozenset({"width"}) if width % 16 == 0 else frozenset())
