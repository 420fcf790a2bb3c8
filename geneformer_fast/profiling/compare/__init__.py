"""The same cells by transformers as it comes: padded batches of stock parts, in the same dtype, on the same device.

Its batches are cut as ours are, longest cells first and of as many positions as ours have tokens, so that it pads as
little as stock parts can; attention is SDPA, and no mask is passed where nothing is padded. Training is a plain loop
around ``BertForMaskedLM``, which computes the logits of all positions: that is how stock parts have it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from geneformer_fast.checkpoints import hf, save
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.compare.embedding import StockEmbedding
from geneformer_fast.profiling.compare.training import StockTraining
from geneformer_fast.profiling.figures import Finding
from geneformer_fast.profiling.findings import findings
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.scenarios import Embedding, Training

#: How often both compute the same cells, one after the other.
N_TURNS = 3


def compared(ours: Embedding | Training, report: Report, trace: Path | None = None) -> Report:
    """A report with that of transformers on the same cells within it.

    Parameters
    ----------
    ours
        What was measured.
    report
        What it came to.
    trace
        Where torch's profiler writes what it saw of transformers.

    Raises
    ------
    UnsupportedError
        BERT cannot express the model, or it is quantized; transformers is not installed.
    ProfileError
        The two do not compute the same.
    """
    check_comparable(ours.encoder)
    with stock_of(ours) as stock:
        if isinstance(stock, StockEmbedding):
            stock.check_agreement(cast(Embedding, ours))
        theirs = stock.report(trace)
        turns = in_turns(ours.cells_per_s, stock.cells_per_s)
    whole = dataclasses.replace(report, compared=[theirs])
    return dataclasses.replace(whole, findings=[_finding(turns), *findings(whole)])


def check_comparable(encoder: Encoder) -> None:
    """Refuse what stock parts cannot compute, before anything is measured.

    Raises
    ------
    UnsupportedError
        Says what it is.
    """
    if encoder.quantization is not None:
        raise UnsupportedError(
            "--compare stock: this model is quantized, and stock transformers would multiply it in floats; compare the "
            "model before it was quantized"
        )
    if not hf.is_bert(encoder):
        raise UnsupportedError(
            "--compare stock: transformers' BERT is post-norm over tokens with relu or gelu, and cannot express this "
            "encoder: there is nothing to compare with"
        )
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "--compare stock needs transformers, which is not installed: pip install 'geneformer-fast[hf]'"
        ) from None


@contextlib.contextmanager
def stock_of(ours: Embedding | Training) -> Iterator[StockEmbedding | StockTraining]:
    """The same model by transformers, with the same weights."""
    with tempfile.TemporaryDirectory(prefix="geneformer-fast-") as place:
        folder = Path(place) / "model"
        save(ours.encoder, folder)
        yield StockEmbedding(ours, folder) if isinstance(ours, Embedding) else StockTraining(ours, folder)


def in_turns(ours: Callable[[], float], theirs: Callable[[], float]) -> list[tuple[float, float]]:
    """Cells/s of both, one after the other, so that noise on the machine hits both."""
    return [(ours(), theirs()) for _ in range(N_TURNS)]


def _finding(turns: list[tuple[float, float]]) -> Finding:
    ratios = sorted(ours / theirs for ours, theirs in turns)
    middle = statistics.median(ratios)
    ours, theirs = (statistics.median(each) for each in zip(*turns, strict=True))
    said = "times as fast as" if middle >= 1 else "times the speed of"
    return Finding(
        "stock",
        f"on these cells this project is {middle:.2f} {said} stock transformers: {ours:,.3g} cells/s and {theirs:,.3g} "
        f"(medians of {len(turns)} turns; {ratios[0]:.2f} to {ratios[-1]:.2f} times)",
        {
            "ratio": middle,
            "ratio_least": ratios[0],
            "ratio_most": ratios[-1],
            "ours_per_s": ours,
            "stock_per_s": theirs,
        },
    )
