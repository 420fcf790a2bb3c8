"""What ``geneformer-fast profile --predict`` knows, distilled from ``bench/results``: ``python -m bench.distil``.

Taken are whole encoders of this project, embedding and training; what is written is
``geneformer_fast/profiling/prediction/measured.json``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from geneformer_fast.config import PRESETS
from geneformer_fast.extract.encoding import TOKEN_BUDGET
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.prediction.measurements import FILE, Machine, Measured, Measurement
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
        if rows:
            name, kind = _machine(next(result for _, result in found if "provenance" in result))
            machines.append(Machine(name, kind, rows))
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
                is_device_alone=is_device_alone, **_source(path, result),
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
    print(f"{FILE}: {sum(len(machine.measurements) for machine in found.machines)} measurements")
    return 0


if __name__ == "__main__":
    sys.exit(main())
