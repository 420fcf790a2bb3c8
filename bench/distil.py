"""What ``geneformer-fast profile --predict`` knows, distilled from ``bench/results``: ``python -m bench.distil``.

Taken are whole encoders of this project, embedding and training, what training consists of by itself, and tokenizing;
what is written is ``geneformer_fast/profiling/prediction/measured.json``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.config import PRESETS
from geneformer_fast.extract.encoding import TOKEN_BUDGET
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.prediction.measurements import FILE, Machine, Measured, Measurement, Timed, Tokenized
from geneformer_fast.training.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
# The family of a model's cells, which lie in shared/.
_FAMILIES = {"v1-10m": "V1", "v2-104m": "V2"}
# Candidates of results on CPUs: what they embed to (None: as the row says) and their dtype ("": as the machine has it).
_EMBED = {"ours": (None, ""), "ours-last": (None, ""), "ours-float32": (None, "float32")}
_QUANTIZED = {"auto": ("last", ""), "float32": ("last", "float32"), "int8": ("last", "int8")}
_TRAIN = {"ours": "", "ours-float32": "float32"}
_GPU_ROWS = {"ours": False, "ours-graph": True}
_MASKED = 0.15
# Of attention's candidates, which is with dropout: as the case has it, and the same without.
_ATTENTION_ROWS = {"ours": True, "ours-no-dropout": False}

Result = Mapping[str, Any]


def distilled(results: Path, sums_of_squares: Mapping[str, int]) -> Measured:
    """What is known of all machines.

    Parameters
    ----------
    results
        ``bench/results``.
    sums_of_squares
        As :func:`sums_of_real_cells` finds them.
    """
    machines = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
        rows = [row for path, result in found for row in _measurements(path, result, sums_of_squares)]
        tokenized = [row for path, result in found for row in _tokenized(path, result, dict(_tiles(results)))]
        if rows or tokenized:
            name, kind = _machine(next(result for _, result in found if "provenance" in result))
            operations = [row for path, result in found for row in _operations(path, result)]
            ceiling = next((r["ceilings"]["product_tflops"] for _, r in found if r.get("case") == "ceilings"), None)
            limits = [r["state"]["before"].get("power_limit_w") for _, r in found if r.get("suite") == "gpu"]
            limit = max((each for each in limits if each is not None), default=None)
            machines.append(Machine(name, kind, rows, operations, tokenized, ceiling, limit))
    return Measured(machines, dict(sums_of_squares))


def sums_of_real_cells(results: Path) -> dict[str, int]:
    """Squared lengths of the real cells of every result, added up; from shared/, beside the checkout.

    Raises
    ------
    FileNotFoundError
        It is not there.
    """
    from bench.cpu.embed_candidates import real_cells

    sums = {}
    for path in sorted(results.glob("*/*.json")):
        result = json.loads(path.read_text())
        if (key := _cells_of(result)) is not None and key not in sums:
            lengths = real_cells(*_family_and_number(key))["length"].to_numpy().astype(np.int64)
            assert int(lengths.sum()) == result["n_tokens"], path
            sums[key] = int((lengths**2).sum())
    return dict(sorted(sums.items()))


def _family_and_number(key: str) -> tuple[str, int]:
    family, number = key.split()
    return family, int(number)


def _cells_of(result: Result) -> str | None:
    """Which real cells a result is about; None of others."""
    if str(result.get("case", "")).startswith(("embed_", "quantized_", "train_")) and "geometry" in result:
        return f"{_FAMILIES[result['geometry']]} {result['n_cells']}"
    return None


def _machine(result: Result) -> tuple[str, str]:
    at = result["provenance"]
    if "gpu" in at:
        return at["gpu"]["name"], "cuda"
    return f"{at['machine']}, {at['n_cores']} cores", "cpu"


def _measurements(path: Path, result: Result, sums: Mapping[str, int]) -> Iterator[Measurement]:
    case = str(result.get("case", ""))
    if case.startswith("encoder_") and result.get("suite") == "gpu" and result["is_measurement"]:
        yield from _on_card(path, result)
    elif (key := _cells_of(result)) is not None and not result.get("held_to"):
        yield from _on_cpu(path, result, key, sums[key])


def _on_cpu(path: Path, result: Result, key: str, sum_of_squares: int) -> Iterator[Measurement]:
    at, case, preset = result["provenance"], result["case"], f"geneformer-{result['geometry']}"
    config, is_training = PRESETS[preset], case.startswith("train_")
    fastest = "bfloat16" if "avx512_bf16" in at["instructions"] else "float32"
    about = {
        "mode": "train" if is_training else "embed", "model": preset, "problem": f"{preset} on {key} cells",
        "n_cells": result["n_cells"], "n_tokens": result["n_tokens"], "sum_of_squares": sum_of_squares,
        "threads": result["threads"], **_source(path, result),
        "batch_tokens": Recipe().token_budget if is_training else TOKEN_BUDGET["cpu"],
    }  # fmt: skip
    about["n_batches"] = result.get("n_steps") or -(-about["n_tokens"] // about["batch_tokens"])
    rows = result["candidates"]
    if is_training:
        for name, dtype in _TRAIN.items():
            yield Measurement(
                **about, dtype=dtype or fastest, blocks=config.n_layers, seconds=rows[name]["seconds"]["p50"],
                peak_bytes=rows[name]["peak_bytes"], head_rows=_MASKED * result["n_tokens"],
            )  # fmt: skip
        return
    for name, (layer, dtype) in (_QUANTIZED if case.startswith("quantized_") else _EMBED).items():
        if (row := rows.get(name)) is not None:
            yield Measurement(
                **about, dtype=dtype or fastest, blocks=config.layer_index(layer or row["layer"]),
                seconds=row["seconds"]["p50"], peak_bytes=None if dtype == "int8" else row["peak_bytes"],
            )  # fmt: skip


def _on_card(path: Path, result: Result) -> Iterator[Measurement]:
    preset, mode = result["title"].split(", ")
    config, is_training = PRESETS[preset], mode == "training"
    for variant, measured in result["variants"].items():
        work = measured["work"]
        sum_of_squares, head_rows = _lengths_and_rows(config, work, is_training=is_training)
        for name, is_device_alone in _GPU_ROWS.items():
            row = measured["rows"].get(name)
            if row is None or not row["is_same"]:
                continue
            yield Measurement(
                mode="train" if is_training else "embed", model=preset, dtype="bfloat16",
                problem=f"{preset}, {variant}", blocks=config.n_layers, n_cells=work["cells"], n_tokens=work["tokens"],
                sum_of_squares=sum_of_squares, head_rows=head_rows, seconds=round(row["ms"]["p50"] / 1e3, 9),
                peak_bytes=row["peak_bytes"], batch_tokens=row["batch_tokens"], n_batches=row["batches"],
                is_device_alone=is_device_alone, host_seconds=None if is_device_alone else row["host_ms"] / 1e3,
                joules=row.get("joules"),
                **_source(path, result),
            )  # fmt: skip


def _operations(path: Path, result: Result) -> Iterator[Timed]:
    """What training consists of, each by itself, forward and backward."""
    if result.get("suite") != "gpu" or not result["is_measurement"]:
        return
    case = str(result["case"])
    for name, measured in result["variants"].items():
        rows = {key: row for key, row in measured["rows"].items() if row.get("is_same")}
        if case == "attention_d64_dropout":
            n_heads, head_dim = _numbers(r"([\d,]+) heads of ([\d,]+)", measured["what"])
            # Forward and backward are counted as 3.5 times the two products of the forward pass.
            pairs = measured["work"]["flops"] / 3.5 / (4 * head_dim)
            amounts = {"pairs": pairs, "rows": float(n_heads * measured["work"]["tokens"])}
            for key, has_dropout in _ATTENTION_ROWS.items():
                if key in rows:
                    about = {"head_dim": head_dim, "has_dropout": has_dropout}
                    yield _timed("varlen_attention", amounts, rows[key], path, result, **about)
        elif case == "residual_layernorm" and name.endswith("_backward") and "ours" in rows:
            n_rows, width = _numbers(r"([\d,]+) rows of ([\d,]+)", measured["what"])
            yield _timed("residual_layernorm", {"numbers": float(n_rows * width)}, rows["ours"], path, result)
        elif case == "mlm_cross_entropy" and name.endswith("_backward") and "ours" in rows:
            n_rows, _, n_words = _numbers(r"([\d,]+) masked rows of ([\d,]+), vocabulary ([\d,]+)", measured["what"])
            amounts = {"flops": float(measured["work"]["flops"]), "logits": float(n_rows * n_words)}
            yield _timed("mlm_cross_entropy", amounts, rows["ours"], path, result)


def _timed(operation: str, amounts: dict[str, float], row: Result, path: Path, result: Result, **about: Any) -> Timed:
    return Timed(operation, amounts, round(row["ms"]["p50"] / 1e3, 9), **_source(path, result), **about)


def _numbers(pattern: str, text: str) -> list[int]:
    """The numbers that a result says in words."""
    found = re.search(pattern, text)
    assert found is not None, text
    return [int(each.replace(",", "")) for each in found.groups()]


def _tiles(results: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """Preset to (cells, tokens) of the cells that all results of tokenizing are tiled from."""
    for path in sorted(results.glob("*/tokenize_*.json")):
        result = json.loads(path.read_text())
        yield path.stem.removeprefix("tokenize_"), (result["n_cells"], result["n_tokens"])


def _tokenized(path: Path, result: Result, tiles: Mapping[str, tuple[int, int]]) -> Iterator[Tokenized]:
    """Passes over tiled cells, all cores; those that say neither cells nor tokens are of the same tiles."""
    case = str(result.get("case", ""))
    if case.startswith("tokenize_"):
        preset, ours = case.removeprefix("tokenize_"), result["ours"]
        fresh = ours["fresh_process"]
        size = result["n_cells"], result["n_tokens"]
        yield _passed(preset, size, ours["wall_s"]["median"], None, path, result)
        yield _passed(preset, size, fresh["wall_s"], fresh["peak_bytes"], path, result)
    elif case == "verify_tokenize":
        yield _passed("v2", tiles["v2"], result["wall_s"]["with"]["median"], None, path, result)
    elif case == "memory_tokenize":
        n_cells, n_tokens = tiles["v2"]
        for words, row in result["by_n_cells"].items():
            size = int(words), round(int(words) * n_tokens / n_cells)
            yield _passed("v2", size, row["wall_s"], row["peak_bytes"], path, result)


def _passed(
    preset: str, size: tuple[int, int], seconds: float, peak_bytes: int | None, path: Path, result: Result
) -> Tokenized:
    """One pass; of a whole process where its memory was looked at."""
    return Tokenized(
        preset=preset, problem=f"{size[0]:,} cells, {preset}", n_cells=size[0], n_tokens=size[1],
        seconds=round(seconds, 4), is_whole_process=peak_bytes is not None, threads=result["provenance"]["n_cores"],
        peak_bytes=peak_bytes, **_source(path, result),
    )  # fmt: skip


def _lengths_and_rows(config: Any, work: Result, *, is_training: bool) -> tuple[int, float]:
    """(sum of squared lengths, rows of the head) from the operations that a result states."""
    if is_training:  # all cells are full there
        sum_of_squares = work["cells"] * config.max_len**2
        rest = work["flops"] / 3 - encoder_flops(config, work["tokens"], sum_of_squares)
        return sum_of_squares, rest / head_flops(config, 1)
    linear = encoder_flops(config, work["tokens"], 0)
    return round((work["flops"] - linear) / (encoder_flops(config, 0, 1))), 0.0


def _source(path: Path, result: Result) -> dict[str, str]:
    at = result["provenance"]
    return {"source": f"{path.parent.name}/{path.name}", "commit": at["commit"], "date": at["date"]}


def main() -> int:
    """Write the file."""
    found = distilled(RESULTS, sums_of_real_cells(RESULTS))
    FILE.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n", encoding="utf-8")
    rows = [row for each in found.machines for row in (*each.measurements, *each.operations, *each.tokenized)]
    print(f"{FILE}: {len(rows)} measurements")
    return 0


if __name__ == "__main__":
    sys.exit(main())
