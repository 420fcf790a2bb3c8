"""What a report says of what is computed: for nothing, in the wrong precision, in batches of the wrong size."""

from __future__ import annotations

from geneformer_fast.profiling.figures import Finding
from geneformer_fast.profiling.findings.shares import (
    is_attention,
    is_known,
    is_training,
    number,
    padded_work,
    percent,
    told,
    whole_run,
    with_faster_products,
)
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.units import written

# Above which share of its whole something is worth a word.
PADDING, ATTENTION, SQUARES, MEMORY_BOUND, UNASKED = 0.1, 0.4, 0.2, 0.3, 0.2
#: What a change has to gain before it is named.
LEAST_GAIN = 1.05
# A dtype has to be so many times as fast before products in it are recommended.
_FASTER_DTYPE = 1.3
_EIGHT_BITS = ("int8", "fp8")


def padding(report: Report) -> Finding | None:
    """Positions that held no token."""
    useful = report.tokens.useful_share
    if not is_known(useful) or not 0 < useful < 1 - PADDING:
        return None
    share = 1 - useful
    work = padded_work(report)
    gain = whole_run(report, work)
    how = "sort cells by length before they are batched"
    if report.subject.engine == "transformers" and report.subject.geometry is not None:
        how += ", or use geneformer_fast.accelerate(model), which computes none of it"
    elif report.subject.engine == "torch":
        how += ", or pack them end to end"
    return Finding(
        "padding", f"{percent(share)} of computed positions were padding: {how}",
        {"padding_share": share, "work_ratio": work}, told(gain),
    )  # fmt: skip


def batch(report: Report) -> Finding | None:
    """Another token budget was faster."""
    tried = [(each.cells_per_s, each) for each in report.sweep if is_known(each.cells_per_s)]
    now, budget = report.cells.per_s, report.subject.settings.get("token_budget")
    if not tried or not isinstance(budget, int) or isinstance(budget, bool):
        return None
    # Settings were tried in one go: the one in use is compared as it was there, where it was.
    now = next((rate for rate, each in tried if each.token_budget == budget), now)
    rate, best = max(tried, key=lambda each: each[0])
    if not is_known(now) or now <= 0 or rate / now < LEAST_GAIN or best.token_budget == budget:
        return None
    free = f", and leaves {written(best.free_bytes, 'bytes')} of memory free" if is_known(best.free_bytes) else ""
    return Finding(
        "batch", f"batches of {best.token_budget:,} tokens reach {written(rate)} cells/s, those of {budget:,} in use "
        f"{written(now)}: set the token budget to {best.token_budget:,}{free}",
        {"token_budget": float(best.token_budget), "cells_per_s": rate, "cells_per_s_now": now}, told(rate / now),
    )  # fmt: skip


def small_batches(report: Report) -> Finding | None:
    """Products that wait for their weights."""
    reached, copied = report.ceilings.product(report.subject.dtype), report.ceilings.copy_gbps
    if report.sweep or not is_known(reached) or not is_known(copied) or reached <= 0 or copied <= 0:
        return None
    balance = reached * 1e12 / (copied * 1e9)
    bound = [
        each for each in report.operations
        if is_known(each.flops) and is_known(each.n_bytes) and each.n_bytes and not is_attention(each)
        and 0 < each.flops / each.n_bytes < balance
    ]  # fmt: skip
    share = sum(each.share for each in bound)
    if share < MEMORY_BOUND:
        return None
    largest = max(bound, key=lambda each: each.time_ms)
    intensity = number(largest.flops) / number(largest.n_bytes)
    return Finding(
        "small_batches", f"{percent(share)} of the time went into products that memory holds up ({largest.name}: "
        f"{written(intensity)} operations for each byte, where {written(balance)} would keep the units busy): larger "
        "batches read weights less often; --sweep finds the size",
        {"share": share, "operations_per_byte": intensity, "balance": balance},
    )  # fmt: skip


def dtype(report: Report) -> Finding | None:
    """Products in float32 where narrower ones are faster."""
    name = report.subject.dtype
    if name not in ("float32", "float64"):
        return None
    own, rates = report.ceilings.product(name), {}
    for other in ("bfloat16", "float16"):
        rate = report.ceilings.product(other)
        if is_known(rate):
            rates[other] = rate
    if not is_known(own) or own <= 0 or not rates:
        return None
    best = max(rates, key=lambda each: rates[each])
    ratio = rates[best] / own
    if ratio < _FASTER_DTYPE:
        return None
    gain = with_faster_products(report, ratio)
    return Finding(
        "dtype", f"products ran in {name}, and {best} is {written(ratio)} times as fast here ({written(rates[best])} "
        f"against {written(own)} T operations/s, measured): take dtype {best!r}, or torch.autocast in training",
        {"tflops": rates[best], "tflops_now": own, "ratio": ratio}, told(gain),
    )  # fmt: skip


def eight_bits(report: Report) -> Finding | None:
    """Products of integers, where they are faster and nothing is trained."""
    name = report.subject.dtype
    if name is None or name in _EIGHT_BITS or is_training(report):
        return None
    own, rate = report.ceilings.product(name), report.ceilings.product("int8")
    if not is_known(own) or not is_known(rate) or own <= 0 or rate / own < _FASTER_DTYPE:
        return None
    return Finding(
        "int8", f"products of int8 reach {written(rate)} T operations/s here, those of {name} {written(own)}: "
        "geneformer-fast quantize, and read in its report what it costs in accuracy",
        {"tops_int8": rate, "tflops_now": own}, told(with_faster_products(report, rate / own)),
    )  # fmt: skip


def unasked(report: Report) -> Finding | None:
    """Rows of a head that nobody asked for: what was computed beyond the need, padding and recomputation aside."""
    model, hardware = report.flops.model, report.flops.hardware
    if not is_known(model) or not is_known(hardware) or not model or not report.tokens.n_real:
        return None
    ratio = hardware / model / padded_work(report)
    if report.subject.settings.get("recomputing") or ratio < 1 / (1 - UNASKED):
        return None
    how = "compute the head for the rows that are asked for only"
    if report.subject.engine == "transformers":
        how += ", as geneformer_fast.accelerate(model) does for a loss of masked genes"
    share = 1 - 1 / ratio
    return Finding(
        "unasked", f"{percent(share)} of the operations, padding aside, were for rows of the head that nobody asked "
        f"for: {how}", {"unasked_share": share, "work_ratio": ratio}, told(whole_run(report, ratio)),
    )  # fmt: skip


def attention(report: Report) -> Finding | None:
    """Attention is most of the work, because cells are long."""
    share = sum(each.share for each in report.operations if is_attention(each))
    lengths = report.cells.lengths
    flops = sum(number(each.flops) for each in report.operations)
    squares = sum(number(each.flops) for each in report.operations if is_attention(each))
    # Of short cells it is not the squares that take the time.
    if share < ATTENTION or lengths is None or (flops and squares < SQUARES * flops):
        return None
    how = "fewer genes per cell (a smaller max_len) cost less by the square"
    if report.subject.engine == "transformers" and report.subject.geometry is not None:
        how = f"geneformer_fast.accelerate(model) computes each cell's own square only; {how}"
    return Finding(
        "attention", f"attention took {percent(share)} of the time, in cells of {lengths.p50:,.0f} tokens (median; a "
        f"tenth has more than {lengths.p90:,.0f}): {how}",
        {"attention_share": share, "length_p50": lengths.p50, "length_p90": lengths.p90},
    )  # fmt: skip


def engine(report: Report) -> Finding | None:
    """The same cells through our engine were faster."""
    mine = report.cells.per_s
    if report.subject.engine == "geneformer_fast" or not is_known(mine) or mine <= 0:
        return None
    rates = [each.cells.per_s for each in report.compared if each.subject.engine == "geneformer_fast"]
    rate = max((each for each in rates if is_known(each)), default=0.0)
    if rate / mine < LEAST_GAIN:
        return None
    return Finding(
        "engine", f"the same cells ran at {written(rate)} cells/s through geneformer_fast, at {written(mine)} through "
        f"{report.subject.engine}: geneformer_fast.accelerate(model), or geneformer-fast embed",
        {"cells_per_s": rate, "cells_per_s_now": mine}, told(rate / mine),
    )  # fmt: skip
