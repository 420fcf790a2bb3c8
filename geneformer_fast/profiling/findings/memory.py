"""What a report says of memory: what fills it, and what of it is left."""

from __future__ import annotations

from geneformer_fast.profiling.figures import Finding, Missing
from geneformer_fast.profiling.findings.shares import (
    is_known,
    is_training,
    memory_of_device,
    number,
    percent,
    share_of,
    told,
    whole_run,
)
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.units import written

#: Above which share of the peak logits are worth a word.
LOGITS = 0.25
#: Below which share of the memory of a card, at the peak, it counts as unused.
UNUSED = 0.4


def logits(report: Report) -> Finding | None:
    """Logits that fill the memory."""
    share = share_of(report.memory.parts.get("logits", Missing("")), report.memory.peak_bytes)
    if share is None or share < LOGITS:
        return None
    how = "compute them for the rows that are asked for only"
    if report.subject.engine == "transformers" and is_training(report):
        how += ": geneformer_fast.accelerate(model) never writes those that only the loss needs"
    elif report.subject.engine == "transformers":
        how += ", or load the model without its head where embeddings are wanted (BertModel)"
    size = written(report.memory.parts["logits"], "bytes")
    return Finding(
        "logits", f"logits took {percent(share)} of the memory at its peak ({size}): {how}", {"logits_share": share}
    )


def recomputation(report: Report) -> Finding | None:
    """Blocks computed twice, with memory to spare."""
    if not report.subject.settings.get("recomputing"):
        return None
    peak, total = number(report.memory.peak_bytes), memory_of_device(report)
    if not peak or not total or peak / total > UNUSED:
        return None
    gain, model, hardware = None, report.flops.model, report.flops.hardware
    if is_known(model) and is_known(hardware) and model:
        gain = whole_run(report, 4 / 3) if hardware / model >= 4 / 3 else whole_run(report, hardware / model)
    return Finding(
        "recomputation", f"blocks were computed twice to save memory, of which {percent(peak / total)} was in use at "
        "the peak: turn recomputation off",
        {"peak_share": peak / total}, None if gain is None else told(gain),
    )  # fmt: skip


def memory(report: Report) -> Finding | None:
    """A card whose memory is mostly empty."""
    peak, total = number(report.memory.peak_bytes), memory_of_device(report)
    is_card = not report.subject.device.startswith("cpu")
    if not is_card or report.sweep or not peak or not total or peak / total > UNUSED:
        return None
    return Finding(
        "memory", f"{percent(peak / total)} of the card's memory was in use at the peak: larger batches fit, and "
        "--sweep tells whether they are faster",
        {"peak_share": peak / total},
    )  # fmt: skip
