"""The tables of ``imbalance.json``: scores, what each model needs, and what was published beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.imbalance.findings import TITLES

Result = Mapping[str, Any]
HEADER = ("", "", "F1 of the cut class", "macro-F1", "accuracy")
_KEYS = ("rare_f1", "macro_f1", "accuracy")
VERDICTS = {True: "confirmed", False: "not confirmed", None: "not known yet"}


def table(result: Result) -> tuple[str, tuple[str, ...], list[tuple[str, ...]], list[Result], str]:
    """Title, header, rows, results and the findings."""
    return _title(result), HEADER, _rows(result), [result], _note(result)


def _title(result: Result) -> str:
    asked = result["asked"]
    small = [TITLES[name] for name, model in result["models"].items() if model.get("is_given") is False]
    given = [TITLES[name] for name, model in result["models"].items() if model.get("is_given")]
    how = []
    if small:
        how.append(
            f"small encoders ({' and '.join(small)}: {asked['n_layers']} layers, width {asked['width']}), each "
            f"pretrained by its own objective for {asked['pretraining_steps']:,} steps on cells of other files"
        )
    if given:
        how.append(f"published weights ({' and '.join(given)})")
    ways = "; ".join(how)
    return (
        f"Unequal classes: {sum(result['n_by_class'].values()):,} cells of {len(result['n_by_class'])} classes "
        f"({asked['cells']}, {asked['label']}), {asked['folds']} folds, mean ± standard deviation over folds. Of the "
        f"training cells of {asked['rare']} only a share is left; the test cells keep all. "
        f"{ways[:1].upper()}{ways[1:]}; then {asked['steps']} steps of {asked['batch_cells']} cells, "
        f"whatever the sampler makes of an epoch."
    )


def _rows(result: Result) -> list[tuple[str, ...]]:
    """A row per share, model and way; of every share the best F1 of the cut class in bold."""
    found = []
    shares = sorted({share for tables in result["rows"].values() for share in tables}, key=float, reverse=True)
    for share in shares:
        there = {
            (model, way): row
            for model, tables in result["rows"].items()
            for way, row in tables.get(share, {}).items()
        }  # fmt: skip
        best = max((row["rare_f1"]["mean"] for row in there.values() if "rare_f1" in row), default=None)
        for number, ((model, way), row) in enumerate(there.items()):
            first = ""
            if number == 0:
                cells = f", {row['n_rare']:.0f} cells" if "n_rare" in row else ""
                first = f"{float(share):.0%} left{cells}"
            named = f"{TITLES[model]}, {way}"
            if "rare_f1" not in row:
                found.append((first, named, *["training failed"] * len(_KEYS)))
                continue
            told = [_shown(row[key]) for key in _KEYS]
            told[0] = f"**{told[0]}**" if row["rare_f1"]["mean"] == best else told[0]
            found.append((first, named, *told))
    return found


def _note(result: Result) -> str:
    parts = []
    if result["n_rows"] < result["n_rows_asked"]:
        parts.append(f"{result['n_rows']} of {result['n_rows_asked']} trainings were computed.")
    for name, model in result["models"].items():
        if "seconds_per_epoch" in model and "peak_bytes" in model:
            parts.append(
                f"{TITLES[name]}: {model['n_parameters'] / 1e6:.2f} M parameters, {model['mean_length']:.0f} positions "
                f"per cell (at most {model['longest']:,}), {model['seconds_per_epoch']:.1f} s per epoch, peak of the "
                f"process {model['peak_bytes'] / 1e6:,.0f} MB."
            )
    parts += [
        f"Published: {finding['published']}; here {VERDICTS[finding['verdict']]} ({finding['ours']})."
        for finding in result["findings"]
    ]
    return " ".join(parts)


def _shown(value: Mapping[str, Any]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["sd"] is None else f" ± {value['sd']:.3f}")
