"""What rules rest on: shares of a whole, and how many times as fast the whole run would be."""

from __future__ import annotations

from typing import TypeGuard

from geneformer_fast.profiling.figures import Figure, Missing, Operation
from geneformer_fast.profiling.report import Report

_ATTENTION = ("attention", "softmax")


def padded_work(report: Report) -> float:
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


def whole_run(report: Report, ratio: float) -> float:
    """How many times as fast the run is where its computing is so many times: data and gaps stay."""
    stays = sum(
        share_of_time(report, name) or 0.0 for name in ("data", "copies", "communication", "host_gaps", "optimizer")
    )
    return 1 / (stays + (1 - stays) / ratio)


def with_faster_products(report: Report, ratio: float) -> float | None:
    """The same for faster products: of a known share of the time, or nobody knows."""
    share = sum(each.share for each in report.operations if is_known(each.flops) and each.flops)
    return 1 / (1 - share + share / ratio) if 0 < share <= 1 else None


def share_of_time(report: Report, part: str) -> float | None:
    return share_of(report.time.parts.get(part, Missing("")), report.time.wall_s)


def share_of(value: Figure, whole: Figure) -> float | None:
    if not is_known(value) or not is_known(whole) or whole <= 0:
        return None
    return value / whole


def memory_of_device(report: Report) -> float:
    """Bytes of the card, or of the machine; 0 where nobody said."""
    gpu = report.machine.get("gpu")
    place = gpu if isinstance(gpu, dict) and not report.subject.device.startswith("cpu") else report.machine
    size = place.get("memory_gib")
    return float(size) * 2**30 if isinstance(size, int | float) else 0.0


def is_training(report: Report) -> bool:
    return report.subject.mode == "train" or bool(report.subject.settings.get("training"))


def is_attention(operation: Operation) -> bool:
    return any(word in operation.name for word in _ATTENTION)


def is_known(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


def number(value: Figure) -> float:
    return value if is_known(value) else 0.0


def told(gain: float | None) -> float | None:
    """A gain worth telling."""
    return gain if gain is not None and gain >= 1.005 else None


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
