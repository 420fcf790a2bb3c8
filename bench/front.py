"""The README's one table: six rows, each of two programs that were given the same cells and asked for the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import report as gpu_report

Result = Mapping[str, Any]
HEADER = ("task", "machine", "this project", "compared with", "its speed", "faster", "peak memory, ours / theirs")
NOTHING = "No results yet."
#: Instructions that decide how fast 16-bit products are, as machines are named.
_EXTRAS = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    task
        What both do.
    place
        ``machine/case`` of the result, without ``.json``.
    ours, rival
        Candidates of that result; of a card the variant, and nothing.
    against
        What the rival is, in words.
    """

    task: str
    place: str
    ours: str
    rival: str
    against: str


#: Same weights, same cells, same layer and same width of numbers on both sides of every row.
ROWS = (
    Row(
        "embed cells, V1-10M, float32, last layer, processor held to AVX2",
        "intel-r-xeon-r-processor-2-cores/embed_v1-10m_2-threads_avx2",
        "float32",
        "stock-float32",
        "the fastest way through transformers: BertModel, SDPA, no head",
    ),
    Row(
        "embed cells, V1-10M, int8, last layer, processor held to AVX2",
        "intel-r-xeon-r-processor-2-cores/quantized_v1-10m_2-threads_avx2",
        "int8",
        "quantize-dynamic",
        "torch's quantize_dynamic on BertModel, SDPA",
    ),
    Row(
        "pretrain, V1-10M, bfloat16, optimizer included",
        "amd-epyc-2-cores/train_v1-10m_all-threads",
        "ours",
        "trainer-bfloat16",
        "transformers' Trainer, bf16=True, at its fastest batch size",
    ),
    Row(
        "delete genes one by one, V1-10M, float32, second-to-last layer",
        "intel-r-xeon-r-processor-2-cores/perturb_v1-10m_2-threads",
        "float32",
        "plain",
        "transformers as the official tool calls it, at its fastest batch size",
    ),
    Row(
        "tokenize, V2 dictionaries, .h5ad to a token folder",
        "amd-epyc-2-cores/tokenize_v2",
        "",
        "",
        "one cell after another, as the official tokenizer works",
    ),
    Row(
        "embed cells of 300 to 2,048 tokens, V1-10M, bfloat16, last layer",
        "nvidia-h200/encoder_10m_inference",
        "uniform",
        "",
        "transformers BERT, SDPA",
    ),
)


def render(results: Path, rows: tuple[Row, ...] = ROWS) -> str:
    """The table; rows whose result is not there are left out."""
    found = [(row, results / f"{row.place}.json") for row in rows]
    lines = [_line(row, json.loads(path.read_text())) for row, path in found if path.exists()]
    if not lines:
        return NOTHING
    head = [f"| {' | '.join(HEADER)} |", f"| --- | --- | ---: | --- | {' | '.join(['---:'] * 3)} |"]
    return "\n".join([*head, *lines])


def _line(row: Row, result: Result) -> str:
    if gpu_report.is_gpu(result):
        cells = _of_card(row, result)
    elif "candidates" in result:
        cells = _of_candidates(row, result)
    else:
        cells = _of_tokenizing(result)
    speed, its_speed, faster, memory = cells
    return f"| {' | '.join((row.task, _machine(result), speed, row.against, its_speed, faster, memory))} |"


def _of_candidates(row: Row, result: Result) -> tuple[str, str, str, str]:
    ours, rival = result["candidates"][row.ours], result["candidates"][row.rival]
    memory = f"{_megabytes(ours['peak_bytes'])} / {_megabytes(rival['peak_bytes'])}"
    ratio = result["ratios"][f"{row.ours} / {row.rival}"]
    rate = "perturbed_cells_per_s" if "perturbed_cells_per_s" in ours else "cells_per_s"
    return _rate(ours[rate]["p50"]), _rate(rival[rate]["p50"]), _times(ratio), memory


def _of_card(row: Row, result: Result) -> tuple[str, str, str, str]:
    found = result["variants"][row.ours]
    ours, rival = gpu_report.fastest_of_ours(found), gpu_report.fastest_rival(found)
    per_s = [one["cells_per_s"] for one in (ours, rival)]
    # A graph's memory is set aside when it is captured, which no run of it shows: the run without it has it.
    ours_bytes = found["rows"]["ours"]["peak_bytes"]
    memory = f"{_megabytes(ours_bytes)} / {_megabytes(rival['peak_bytes'])}"
    return _rate(per_s[0]), _rate(per_s[1]), _times(rival["ms"]["p50"] / ours["ms"]["p50"]), memory


def _of_tokenizing(result: Result) -> tuple[str, str, str, str]:
    its_rate = result["n_cells"] / result["rival"]["at_n_cells"]["wall_s"]
    memory = f"{_megabytes(result['ours']['fresh_process']['peak_bytes'])} / not measured"
    return _rate(result["ours"]["cells_per_s"]), _rate(its_rate), _times(result["ratio"]), memory


def _machine(result: Result) -> str:
    at = result["provenance"]
    if gpu_report.is_gpu(result):
        return str(at["gpu"]["name"])
    name = at["machine"].replace("(R)", "").replace(" Processor", "")
    extras = [extra for extra in _EXTRAS if extra in at["instructions"] and not result.get("held_to")]
    return ", ".join([name, f"{at['n_cores']} cores", *extras[-1:]])


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f} cells/s" if per_s >= 100 else f"{per_s:.1f} cells/s"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.1f}x"


def _megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.0f} MB"
