"""What a report says should be changed: rules, each with its threshold, the numbers it rests on and what it may gain.

A rule looks at figures and finds something or nothing; where a figure is missing that it needs, it finds nothing. Gains
are how many times as fast the whole run would be (Amdahl: what a change does not touch stays), and are left out where
they cannot be told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from geneformer_fast.profiling.figures import Figure, Finding, Missing, Operation
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.units import written

Rule = Callable[[Report], Finding | None]

# Above which share of its whole something is worth a word.
PADDING, WAITING, GAPS, LOGITS, IDLE, ATTENTION, MEMORY_BOUND, UNASKED = 0.1, 0.1, 0.1, 0.25, 0.5, 0.4, 0.3, 0.2
#: Below which share of the memory of a card, at the peak, it counts as unused.
UNUSED = 0.4
#: What a change has to gain before it is named.
LEAST_GAIN = 1.05
# A dtype has to be so many times as fast before products in it are recommended.
_FASTER_DTYPE = 1.3
_EIGHT_BITS = ("int8", "fp8")
# Processors are said to be idle where so many cores were never used.
_IDLE_CORES = 0.6
_ATTENTION = ("attention", "softmax")


def findings(report: Report) -> list[Finding]:
    """What to change, that with the largest gain first; one that says so where there is nothing."""
    found = [each for rule in RULES if (each := rule(report)) is not None]
    found.sort(key=lambda each: -(each.gain or 1.0))
    return found or [_nothing(report)]


def padding(report: Report) -> Finding | None:
    """Positions that held no token."""
    useful = report.tokens.useful_share
    if not _is_known(useful) or not 0 < useful < 1 - PADDING:
        return None
    share = 1 - useful
    work = _padded_work(report)
    gain = _whole(report, work)
    how = "sort cells by length before they are batched"
    if report.subject.engine == "transformers" and report.subject.geometry is not None:
        how += ", or use geneformer_fast.accelerate(model), which computes none of it"
    elif report.subject.engine == "torch":
        how += ", or pack them end to end"
    return Finding(
        "padding", f"{_percent(share)} of computed positions were padding: {how}",
        {"padding_share": share, "work_ratio": work}, _told(gain),
    )  # fmt: skip


def data(report: Report) -> Finding | None:
    """The device waited for a batch."""
    share = _share_of_time(report, "data")
    if share is None or share < WAITING:
        return None
    return Finding(
        "data", f"{_percent(share)} of the time went by waiting for the next batch: let more workers read ahead "
        "(workers=, num_workers=), or keep tokens on a faster disk",
        {"data_share": share}, _told(1 / (1 - min(share, 0.99))),
    )  # fmt: skip


def gaps(report: Report) -> Finding | None:
    """The device had nothing to do."""
    share = _share_of_time(report, "host_gaps")
    if share is None or share < GAPS:
        return None
    return Finding(
        "host_gaps", f"for {_percent(share)} of the time the device had nothing to do while a step went on: give it "
        "larger batches, or torch.compile the model, so that the host has less to hand over",
        {"gap_share": share}, _told(1 / (1 - min(share, 0.99))),
    )  # fmt: skip


def copies(report: Report) -> Finding | None:
    """Copies between host and device."""
    share = _share_of_time(report, "copies")
    if share is None or share < WAITING:
        return None
    return Finding(
        "copies", f"{_percent(share)} of the time went into copies between host and device: pin the memory of batches, "
        "copy with non_blocking=True, and leave results on the device until they are needed",
        {"copy_share": share}, _told(1 / (1 - min(share, 0.99))),
    )  # fmt: skip


def batch(report: Report) -> Finding | None:
    """Another token budget was faster."""
    tried = [(each.cells_per_s, each) for each in report.sweep if _is_known(each.cells_per_s)]
    now, budget = report.cells.per_s, report.subject.settings.get("token_budget")
    if not tried or not isinstance(budget, int) or isinstance(budget, bool):
        return None
    # Settings were tried in one go: the one in use is compared as it was there, where it was.
    now = next((rate for rate, each in tried if each.token_budget == budget), now)
    rate, best = max(tried, key=lambda each: each[0])
    if not _is_known(now) or now <= 0 or rate / now < LEAST_GAIN or best.token_budget == budget:
        return None
    free = f", and leaves {written(best.free_bytes, 'bytes')} of memory free" if _is_known(best.free_bytes) else ""
    return Finding(
        "batch", f"batches of {best.token_budget:,} tokens reach {written(rate)} cells/s, those of {budget:,} in use "
        f"{written(now)}: set the token budget to {best.token_budget:,}{free}",
        {"token_budget": float(best.token_budget), "cells_per_s": rate, "cells_per_s_now": now}, _told(rate / now),
    )  # fmt: skip


def small_batches(report: Report) -> Finding | None:
    """Products that wait for their weights."""
    reached, copied = report.ceilings.product(report.subject.dtype), report.ceilings.copy_gbps
    if report.sweep or not _is_known(reached) or not _is_known(copied) or reached <= 0 or copied <= 0:
        return None
    balance = reached * 1e12 / (copied * 1e9)
    bound = [
        each for each in report.operations
        if _is_known(each.flops) and _is_known(each.n_bytes) and each.n_bytes and not _is_attention(each)
        and 0 < each.flops / each.n_bytes < balance
    ]  # fmt: skip
    share = sum(each.share for each in bound)
    if share < MEMORY_BOUND:
        return None
    largest = max(bound, key=lambda each: each.time_ms)
    intensity = _number(largest.flops) / _number(largest.n_bytes)
    return Finding(
        "small_batches", f"{_percent(share)} of the time went into products that memory holds up ({largest.name}: "
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
        if _is_known(rate):
            rates[other] = rate
    if not _is_known(own) or own <= 0 or not rates:
        return None
    best = max(rates, key=lambda each: rates[each])
    ratio = rates[best] / own
    if ratio < _FASTER_DTYPE:
        return None
    gain = _with_faster_products(report, ratio)
    return Finding(
        "dtype", f"products ran in {name}, and {best} is {written(ratio)} times as fast here ({written(rates[best])} "
        f"against {written(own)} T operations/s, measured): take dtype {best!r}, or torch.autocast in training",
        {"tflops": rates[best], "tflops_now": own, "ratio": ratio}, _told(gain),
    )  # fmt: skip


def eight_bits(report: Report) -> Finding | None:
    """Products of integers, where they are faster and nothing is trained."""
    name = report.subject.dtype
    if name is None or name in _EIGHT_BITS or _is_training(report):
        return None
    own, rate = report.ceilings.product(name), report.ceilings.product("int8")
    if not _is_known(own) or not _is_known(rate) or own <= 0 or rate / own < _FASTER_DTYPE:
        return None
    return Finding(
        "int8", f"products of int8 reach {written(rate)} T operations/s here, those of {name} {written(own)}: "
        "geneformer-fast quantize, and read in its report what it costs in accuracy",
        {"tops_int8": rate, "tflops_now": own}, _told(_with_faster_products(report, rate / own)),
    )  # fmt: skip


def logits(report: Report) -> Finding | None:
    """Logits that fill the memory."""
    share = _share(report.memory.parts.get("logits", Missing("")), report.memory.peak_bytes)
    if share is None or share < LOGITS:
        return None
    how = "compute them for the rows that are asked for only"
    if report.subject.engine == "transformers" and _is_training(report):
        how += ": geneformer_fast.accelerate(model) never writes those that only the loss needs"
    elif report.subject.engine == "transformers":
        how += ", or load the model without its head where embeddings are wanted (BertModel)"
    size = written(report.memory.parts["logits"], "bytes")
    return Finding(
        "logits", f"logits took {_percent(share)} of the memory at its peak ({size}): {how}", {"logits_share": share}
    )


def unasked(report: Report) -> Finding | None:
    """Rows of a head that nobody asked for: what was computed beyond the need, padding and recomputation aside."""
    model, hardware = report.flops.model, report.flops.hardware
    if not _is_known(model) or not _is_known(hardware) or not model or not report.tokens.n_real:
        return None
    ratio = hardware / model / _padded_work(report)
    if report.subject.settings.get("recomputing") or ratio < 1 / (1 - UNASKED):
        return None
    how = "compute the head for the rows that are asked for only"
    if report.subject.engine == "transformers":
        how += ", as geneformer_fast.accelerate(model) does for a loss of masked genes"
    share = 1 - 1 / ratio
    return Finding(
        "unasked", f"{_percent(share)} of the operations, padding aside, were for rows of the head that nobody asked "
        f"for: {how}", {"unasked_share": share, "work_ratio": ratio}, _told(_whole(report, ratio)),
    )  # fmt: skip


def recomputation(report: Report) -> Finding | None:
    """Blocks computed twice, with memory to spare."""
    if not report.subject.settings.get("recomputing"):
        return None
    peak, total = _number(report.memory.peak_bytes), _memory_of_device(report)
    if not peak or not total or peak / total > UNUSED:
        return None
    gain, model, hardware = None, report.flops.model, report.flops.hardware
    if _is_known(model) and _is_known(hardware) and model:
        gain = _whole(report, 4 / 3) if hardware / model >= 4 / 3 else _whole(report, hardware / model)
    return Finding(
        "recomputation", f"blocks were computed twice to save memory, of which {_percent(peak / total)} was in use at "
        "the peak: turn recomputation off",
        {"peak_share": peak / total}, None if gain is None else _told(gain),
    )  # fmt: skip


def memory(report: Report) -> Finding | None:
    """A card whose memory is mostly empty."""
    peak, total = _number(report.memory.peak_bytes), _memory_of_device(report)
    is_card = not report.subject.device.startswith("cpu")
    if not is_card or report.sweep or not peak or not total or peak / total > UNUSED:
        return None
    return Finding(
        "memory", f"{_percent(peak / total)} of the card's memory was in use at the peak: larger batches fit, and "
        "--sweep tells whether they are faster",
        {"peak_share": peak / total},
    )  # fmt: skip


def idle_power(report: Report) -> Finding | None:
    """Power drawn for doing nothing."""
    idle, drawn = report.energy.idle_watts, report.energy.watts
    share = _share(idle, drawn)
    if share is None or share < IDLE:
        return None
    return Finding(
        "idle_power", f"{_percent(min(share, 1.0))} of the power ({written(_number(idle), 'W')} of "
        f"{written(_number(drawn), 'W')}) is drawn by the idle device as well: the faster cells go through, the less "
        "of it each one costs; larger batches, or several jobs at a time",
        {"idle_share": share},
    )  # fmt: skip


def throttling(report: Report) -> Finding | None:
    """Clocks held down."""
    reasons = report.energy.state.get("throttle_reasons")
    if not isinstance(reasons, str) or reasons.strip().lower() in ("", "none", "0x0", "idle", "gpu idle"):
        return None
    clocks = {
        name: float(value) for name, value in report.energy.state.items()
        if isinstance(value, int | float) and name.endswith(("mhz", "celsius", "watts", "mhz_at_most"))
    }  # fmt: skip
    said = ", ".join(f"{name} {written(value)}" for name, value in clocks.items())
    return Finding(
        "throttling", f"clocks were held down ({reasons}){f' at {said}' if said else ''}: better cooling or "
        "a higher power limit makes it faster, and figures taken like this differ from day to day",
        clocks,
    )  # fmt: skip


def threads(report: Report) -> Finding | None:
    """Cores that nobody used."""
    cpu_s, wall_s, n_cores = report.time.cpu_s, report.time.wall_s, report.machine.get("n_cores")
    if not report.subject.device.startswith("cpu") or not _is_known(cpu_s) or not isinstance(n_cores, int):
        return None
    used = cpu_s / wall_s if wall_s else 0.0
    if n_cores < 2 or not 0 < used < _IDLE_CORES * n_cores:
        return None
    is_tokenizing = report.subject.mode == "tokenize"  # by workers: what torch has is of no account
    n_threads = report.subject.settings.get("workers" if is_tokenizing else "threads")
    what = "worker" if is_tokenizing else "torch thread"
    told, how = "", f"--threads {n_cores}" + ("" if is_tokenizing else f" (torch.set_num_threads({n_cores}))")
    if isinstance(n_threads, int):
        told = f" with {n_threads} {what}{'s' * (n_threads != 1)}"
        if n_threads >= n_cores:
            how = "there are enough of them, so look for other programs on the machine, and for waiting on the disk"
    return Finding(
        "threads", f"{written(used)} of {n_cores} cores worked{told}: {how}",
        {"cores_used": used, "n_cores": float(n_cores)},
    )  # fmt: skip


def attention(report: Report) -> Finding | None:
    """Attention is most of the work, because cells are long."""
    share = sum(each.share for each in report.operations if _is_attention(each))
    lengths = report.cells.lengths
    if share < ATTENTION or lengths is None:
        return None
    how = "fewer genes per cell (a smaller max_len) cost less by the square"
    if report.subject.engine == "transformers" and report.subject.geometry is not None:
        how = f"geneformer_fast.accelerate(model) computes each cell's own square only; {how}"
    return Finding(
        "attention", f"attention took {_percent(share)} of the time, in cells of {lengths.p50:,.0f} tokens (median; a "
        f"tenth has more than {lengths.p90:,.0f}): {how}",
        {"attention_share": share, "length_p50": lengths.p50, "length_p90": lengths.p90},
    )  # fmt: skip


def engine(report: Report) -> Finding | None:
    """The same cells through our engine were faster."""
    mine = report.cells.per_s
    if report.subject.engine == "geneformer_fast" or not _is_known(mine) or mine <= 0:
        return None
    rates = [each.cells.per_s for each in report.compared if each.subject.engine == "geneformer_fast"]
    rate = max((each for each in rates if _is_known(each)), default=0.0)
    if rate / mine < LEAST_GAIN:
        return None
    return Finding(
        "engine", f"the same cells ran at {written(rate)} cells/s through geneformer_fast, at {written(mine)} through "
        f"{report.subject.engine}: geneformer_fast.accelerate(model), or geneformer-fast embed",
        {"cells_per_s": rate, "cells_per_s_now": mine}, _told(rate / mine),
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    padding, data, gaps, copies, batch, small_batches, dtype, eight_bits, logits, unasked, recomputation, memory,
    idle_power, throttling, threads, attention, engine,
)  # fmt: skip


def _nothing(report: Report) -> Finding:
    numbers = {"mfu": report.flops.mfu, "useful_share": report.tokens.useful_share, "cells_per_s": report.cells.per_s}
    known = {name: value for name, value in numbers.items() if _is_known(value)}
    words = {"mfu": "MFU {}", "useful_share": "{} of computed positions were tokens", "cells_per_s": "{} cells/s"}
    said = ", ".join(
        words[name].format(written(value) if name == "cells_per_s" else _percent(value))
        for name, value in known.items()
    )
    return Finding("nothing", f"nothing to change was found{f': {said}' if said else ''}", known)


def _padded_work(report: Report) -> float:
    """Operations of what was computed over those of real tokens: rows of a geometry, and squares where it has one."""
    tokens, geometry = report.tokens, report.subject.geometry
    rows = tokens.n_positions / tokens.n_real
    if geometry is None or not tokens.n_real_squares or not tokens.n_position_squares:
        return rows
    from geneformer_fast.config import EncoderConfig
    from geneformer_fast.errors import GeneformerFastError
    from geneformer_fast.profiling.flops.work import encoder_flops

    try:
        config = EncoderConfig.from_dict(geometry)
    except GeneformerFastError:  # of another version
        return rows
    computed = encoder_flops(config, tokens.n_positions, tokens.n_position_squares)
    return computed / encoder_flops(config, tokens.n_real, tokens.n_real_squares)


def _whole(report: Report, ratio: float) -> float:
    """How many times as fast the run is where its computing is so many times: data and gaps stay."""
    stays = sum(_share_of_time(report, name) or 0.0 for name in ("data", "copies", "host_gaps", "optimizer"))
    return 1 / (stays + (1 - stays) / ratio)


def _with_faster_products(report: Report, ratio: float) -> float | None:
    """The same for faster products: of a known share of the time, or nobody knows."""
    share = sum(each.share for each in report.operations if _is_known(each.flops) and each.flops)
    return 1 / (1 - share + share / ratio) if 0 < share <= 1 else None


def _share_of_time(report: Report, part: str) -> float | None:
    return _share(report.time.parts.get(part, Missing("")), report.time.wall_s)


def _share(value: Figure, whole: Figure) -> float | None:
    if not _is_known(value) or not _is_known(whole) or whole <= 0:
        return None
    return value / whole


def _memory_of_device(report: Report) -> float:
    """Bytes of the card, or of the machine; 0 where nobody said."""
    gpu = report.machine.get("gpu")
    place = gpu if isinstance(gpu, dict) and not report.subject.device.startswith("cpu") else report.machine
    size = place.get("memory_gib")
    return float(size) * 2**30 if isinstance(size, int | float) else 0.0


def _is_training(report: Report) -> bool:
    return report.subject.mode == "train" or bool(report.subject.settings.get("training"))


def _is_attention(operation: Operation) -> bool:
    return any(word in operation.name for word in _ATTENTION)


def _is_known(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _number(value: Figure) -> float:
    return value if _is_known(value) else 0.0


def _told(gain: float | None) -> float | None:
    """A gain worth telling."""
    return gain if gain is not None and gain >= 1.005 else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
