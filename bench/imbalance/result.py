"""The rows of a study, summed up over folds, as they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.imbalance.findings import findings
from bench.imbalance.study import MODELS, PLAIN, SHARES, Row, Study
from geneformer_fast.tokenization.manifest import read_json

_METRICS = ("accuracy", "macro_f1", "rare_f1")


def content(study: Study) -> dict[str, Any]:
    """The result of what is there."""
    found = study.found()
    rows = tables(found)
    models = {name: _model(study, name, found) for name in MODELS}
    codes, names = study.labels()
    asked = dataclasses.asdict(study.asked)
    for key in ("cells", "unlabelled", "weights"):  # places on this machine say nothing elsewhere
        asked[key] = _named(asked[key])
    return {
        "what": "cell types with one class of the training cells cut; the test cells keep all of it",
        "asked": asked,
        "n_by_class": dict(zip(names, np.bincount(codes).tolist(), strict=True)),
        "n_rows": len(found),
        "n_rows_asked": sum(1 for _ in study.rows()),
        "models": models,
        "rows": rows,
        "findings": findings(rows, models),
    }


def tables(found: Mapping[Row, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> share -> way -> mean, standard deviation and values over the folds that are there."""
    grouped: dict[tuple[str, float, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for row, scores in found.items():
        grouped.setdefault(row[:3], []).append((row.fold, scores))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for (model, share, way), parts in grouped.items():
        good = [(fold, scores) for fold, scores in parts if "error" not in scores]
        told: dict[str, Any] = {"fold_numbers": [fold for fold, _ in good]}
        if good:
            told |= {key: _over([scores[key] for _, scores in good]) for key in _METRICS}
            told["n_rare"] = round(float(np.mean([scores["n_rare"] for _, scores in good])), 1)
            told["seconds"] = round(float(np.mean([scores["seconds"] for _, scores in good])), 3)
        if errors := [scores["error"] for _, scores in parts if "error" in scores]:
            told["errors"] = errors
        rows.setdefault(model, {}).setdefault(f"{share:g}", {})[way] = told
    return rows


def _over(values: Sequence[float]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": spread, "folds": list(values)}


def _model(study: Study, name: str, found: Mapping[Row, Mapping[str, Any]]) -> dict[str, Any]:
    """What is known of an encoder: its size and pretraining, peak memory, and seconds per epoch of all its cells."""
    told: dict[str, Any] = {}
    folder = study.work / name
    if (folder / "model.json").exists():
        told |= read_json(folder / "model.json")
    for file in ("pretraining", "memory"):
        if (folder / f"{file}.json").exists():
            told[file] = read_json(folder / f"{file}.json")
    if "memory" in told:
        told["peak_bytes"] = told.pop("memory")["peak_bytes"]
    times = [
        scores["seconds_per_epoch"]
        for row, scores in found.items()
        if (row.model, row.share, row.way) == (name, SHARES[0], PLAIN) and "seconds_per_epoch" in scores
    ]
    if times:
        told["seconds_per_epoch"] = float(np.median(times))
    return told


def _named(places: Any) -> Any:
    if isinstance(places, Mapping):
        return {key: Path(place).name for key, place in places.items()}
    return Path(places).name if isinstance(places, str) else [Path(place).name for place in places]
