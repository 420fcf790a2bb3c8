"""The pickles that the official package wrote in a scenario of the references, made again from their values."""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet


@cache
def scenarios(fixtures: Path) -> dict[str, Any]:
    """Name -> what is known of it; of runs that wrote something."""
    index = json.loads((fixtures / "index.json").read_text())["scenarios"]
    return {
        name: told for name, told in index.items() if told["kind"] == "isp" and told.get("file") and not told["error"]
    }


def write_pickles(fixtures: Path, name: str, folder: Path) -> None:
    """Write the files with the names, the division and the kinds of keys that the official package had."""
    told = scenarios(fixtures)[name]
    rows = parquet.read_table(fixtures / "outputs" / told.get("file")).to_pylist()
    is_list = rows[0]["rank"] < 0
    content: dict[tuple[int, bool], Any] = {}
    for row in rows:
        tokens = tuple(int(token) for token in row["perturbed"].split())
        if is_list and told["version"] == "V1":  # which the official tokens of a list are
            tokens = tuple(np.int16(token) for token in tokens)
        first = tokens[0] if len(tokens) == 1 else tokens
        affected = "cell_emb" if row["affected"] < 0 else row["affected"]
        of_file = content.setdefault((row["rank"], row["affected"] >= 0), defaultdict(list))
        if row["state"]:
            of_file = of_file.setdefault(row["state"], defaultdict(list))
        of_file[first, affected].append(row["value"])
    folder.mkdir(parents=True)
    kind = told["options"]["perturb_type"]
    for (rank, is_gene), effects in content.items():
        what = "gene" if is_gene else "cell"
        if is_list:
            listed = repr([*tokens])
            _dump(folder / f"in_silico_{kind}_x_{what}_embs_dict_{listed}_raw.pickle", effects)
            continue
        for number, part in ((-1, slice(0, 32)), (0, slice(32, None))):  # a batch of 32, then the rest
            _dump(folder / f"in_silico_{kind}_x_dict_{what}_embs_{rank}batch{number}_raw.pickle", _some(effects, part))


def _some(effects: dict[Any, Any], part: slice) -> dict[Any, Any]:
    if any(isinstance(value, dict) for value in effects.values()):
        return {state: _some(of_state, part) for state, of_state in effects.items()}
    return defaultdict(list, list(effects.items())[part])


def _dump(path: Path, effects: Any) -> None:
    nested = any(isinstance(value, dict) for value in effects.values())
    path.write_bytes(pickle.dumps(dict(effects) if nested else effects))


def official_values(folder: Path) -> dict[tuple[Any, ...], list[float]]:
    """All values of a folder as the official statistics gather them: state, key -> values of all files."""
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for path in sorted(folder.glob("*.pickle"), key=lambda path: [int(part) for part in _numbers(path.name)]):
        effects = pickle.loads(path.read_bytes())
        nested = any(isinstance(value, dict) for value in effects.values())
        for state, of_state in effects.items() if nested else [("", effects)]:
            for key, values in of_state.items():
                found[state, *key] += values
    return dict(found)


def _numbers(name: str) -> list[str]:
    import re

    return re.findall(r"embs_(\d+)batch(-?\d+)", name)[0] if "batch" in name else []
