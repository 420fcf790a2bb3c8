"""The tables of fine-tuning on real cells, from ``finetune_real.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("macro-F1", "accuracy", "ROC AUC", "F1 of the rarest third")
_KEYS = ("macro_f1", "accuracy", "roc_auc")


def title(result: Mapping[str, Any]) -> str:
    """What was done, in a sentence or two."""
    size, known = result["size"], result["pretraining"]["losses"]
    return (
        f"Cell types of real cells, 5-fold cross-validation, mean ± standard deviation over folds. An encoder of "
        f"{size['n_layers']} layers, width {size['width']} ({result['n_parameters'] / 1e6:.1f} M parameters), the "
        f"first {size['max_len'] - 2} genes of a cell, pretrained for {size['pretraining_steps']:,} steps on the same "
        f"cells without labels (masked-gene loss {known[0]['loss']:.2f} after {known[0]['step']:.0f} steps, "
        f"{known[-1]['loss']:.2f} at the end), then {size['steps']} steps of {size['batch_cells']} cells per fold."
    )


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per set and way, sets in the order measured, the best macro-F1 of a set in bold."""
    found = []
    for name, table in result["sets"].items():
        n_cells = sum(next(row for row in table["rows"].values() if "n_by_class" in row)["n_by_class"].values())
        values = {way: row for way, row in table["rows"].items() if "macro_f1" in row}
        best = max(values, key=lambda way: values[way]["macro_f1"]["mean"])
        for number, (way, row) in enumerate(table["rows"].items()):
            named = way if way.startswith("PCA") else f"encoder, {way}"
            first = f"{name}, {table['label']}, {n_cells:,} cells" if number == 0 else ""
            if way not in values:
                found.append((first, named, *["training failed"] * len(_COLUMNS)))
                continue
            told = [_shown(row.get(key)) for key in _KEYS]
            told[0] = f"**{told[0]}**" if way == best else told[0]
            found.append((first, named, *told, f"{_rarest(row):.3f}"))
    return found


def header() -> Sequence[str]:
    """Names of the columns."""
    return ("", "", *_COLUMNS)


def _shown(value: Mapping[str, Any] | None) -> str:
    return "" if value is None else f"{value['mean']:.3f} ± {value['sd']:.3f}"


def _rarest(row: Mapping[str, Any]) -> float:
    """Mean F1 of the third of the classes with the fewest cells."""
    counts = row["n_by_class"]
    rare = sorted(counts, key=counts.get)[: max(1, len(counts) // 3)]
    return sum(row["f1_by_class"][name] for name in rare) / len(rare)
