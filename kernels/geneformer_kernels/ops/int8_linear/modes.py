"""What a layer with int8 weights does on a device: integer products, or weights widened to the compute dtype.

Of a layer, not of a batch: the answer does not depend on how many rows there are, so a cell has the same numbers alone
and among others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from geneformer_kernels.launch import MAX_DYNAMIC_WIDTH
from geneformer_kernels.measured_int8 import MEASURED_INT8
from geneformer_kernels.target import Target

#: How much faster than torch's products of floats integer products must be, rounding of their rows included.
LEAST_GAIN = 1.0


class Mode(NamedTuple):
    """``"dynamic"`` (integer products) or ``"weight_only"``, and why."""

    mode: str
    reason: str


class ModeRow(NamedTuple):
    """One answer: for devices with ``feature`` (a CPU's instruction set, a card's name; "" for any) that compute in
    ``dtype`` ("" for any), from ``least_width`` columns of the input on."""

    kind: str
    feature: str
    dtype: str
    least_width: int
    mode: str
    reason: str


#: The first row that fits decides, where no CPU like it is in ``measured_int8.py``.
MODES_HERE: tuple[ModeRow, ...] = (
    # One core of a Xeon with amx_int8, 4,096 rows that come as int8, beside oneDNN's bfloat16 (2026-11-30, a busy
    # machine, medians): 1.0 to 1.1 times at 256 -> 256, 1.5 at 256 -> 768, 1.6 at 768 -> 2,304, 1.8 at 768 -> 3,072,
    # 2.5 back; both halves of a feed-forward 1.5 and 2.1. Widening the weights would cost more than a product. Of whole
    # models with attention, 3,572 tokens: V1-10M 1.1 times bfloat16, V2-104M 1.3.
    ModeRow("cpu", "amx_int8", "", 0, "dynamic", "integer products on AMX tiles, 1.0 to 2.5 times bfloat16's"),
    # Torch's products on two cores with AMX, GFLOP/s: int8 665, bfloat16 2,143 at width 256; 1,962 and 1,379 at 2,048.
    ModeRow("cpu", "amx_bf16", "bfloat16", 2048, "dynamic", "integer products, 1.4 times bfloat16's on AMX at 2,048"),
    ModeRow("cpu", "amx_bf16", "bfloat16", 0, "weight_only", "bfloat16 products are faster on AMX below width 2,048"),
    ModeRow("cpu", "avx512_bf16", "bfloat16", 0, "weight_only", "bfloat16 products, as this CPU has them"),
    ModeRow("cpu", "arm_bf16", "bfloat16", 0, "weight_only", "bfloat16 products, as this CPU has them"),
    ModeRow("cpu", "int8_dot", "", 0, "dynamic", "integer products, which this CPU has an instruction for"),
    # A Xeon held to AVX2, one core, layers one by one beside MKL's float32 (2,048 rows, rounding included): 0.8 to 1.1
    # times at width 256, 1.1 to 1.3 at 768. But layers of integers throughout hand each other rows that never leave the
    # cache; whole models with attention, 3,572 tokens (2026-11-30): V1-10M 1.2 times float32, V2-104M 1.7.
    ModeRow(
        "cpu", "avx2", "", 0, "dynamic", "integer products of AVX2, whole models 1.2 to 1.7 times as fast as float32"
    ),
    ModeRow("cpu", "", "", 0, "weight_only", "widened weights: this CPU has no exact instruction for int8"),
    # A row with a card's name and the measured ratio goes here.
    ModeRow("cuda", "", "", 0, "weight_only", "widened weights: int8 products are not measured on a card yet"),
)


def mode_here(width: int, n_columns: int, dtype: str, target: Target) -> Mode:
    """What a layer [n_columns, width] whose activations are of a dtype does on a target, and why."""
    if width > MAX_DYNAMIC_WIDTH:
        return Mode("weight_only", f"sums of {width:,} products of int8 may leave int32")
    if target.kind == "cuda" and not target.has_int8_product:
        return Mode("weight_only", f"sm_{target.sm} has no product of int8")
    measured = _measured_on_cpu(width, n_columns, dtype, target) if target.kind == "cpu" else None
    if measured is not None:
        return measured
    for row in MODES_HERE:
        fits = row.feature in ("", target.name) or row.feature in target.features
        if row.kind == target.kind and fits and row.dtype in ("", dtype) and width >= row.least_width:
            return Mode(row.mode, row.reason)
    return Mode("weight_only", "widened weights: integer products are for CPUs and NVIDIA cards")


def _measured_on_cpu(width: int, n_columns: int, dtype: str, target: Target) -> Mode | None:
    """By the layer most like this one that was measured with the CPU's instructions; the compiled loops' time."""
    name = target.int8_instructions
    if name == "avx2" and "avx512" in target.features:
        # Floats have registers twice as wide there, integers would need instructions that these loops do not use.
        return Mode("weight_only", "widened weights: float32 products of AVX-512, which has no VNNI here")
    if name in ("avx2", "amx_int8"):
        return None  # whose rows are above: what layers save each other outweighs what one of them gains or loses
    # What has no products of its own is computed in float32.
    rows, source = MEASURED_INT8.get((name or "", dtype)) or MEASURED_INT8.get((name or "", "float32"), ((), ""))
    if not rows:
        return None
    like = min(rows, key=lambda row: abs(math.log2(row[0] / width)) + abs(math.log2(row[1] / n_columns)))
    width, n_columns, in_int8, in_floats = like
    how = f"with {name} are {in_floats / in_int8:.2f} times as fast as {dtype} ({width} -> {n_columns}; {source})"
    return Mode("dynamic" if in_floats >= LEAST_GAIN * in_int8 else "weight_only", f"integer products {how}")
