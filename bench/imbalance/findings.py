"""What was published of unequal classes, beside what the rows of a result say; nothing here needs torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

#: Differences of means that are larger than this many standard errors count.
CERTAIN = 2.0
#: A model whose macro-F1 with nothing cut is below this share of the baseline's has learned too little: what a sampler
#: changes of it is chance, whichever way it goes, and judges nothing.
LEARNED = 0.5
TITLES = {"geneformer": "Geneformer", "scgpt": "scGPT", "scbert": "scBERT", "pca": "PCA + logistic regression"}
METRIC = "macro_f1"

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]


def findings(rows: Rows, models: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every published finding with ``"verdict"`` (True: confirmed, False: not, None: rows are missing, or learned
    too little to judge by) and ``"ours"``.

    Parameters
    ----------
    rows
        Model -> share of the rare class that is left -> way -> ``{"macro_f1": {"folds": [...]}, ...}``.
    models
        The encoders -> ``"peak_bytes"`` and ``"seconds_per_epoch"``, where they are known.
    """
    names = [name for name in TITLES if name != "pca"]
    over = {name: difference(rows.get(name, {}), "over-sampled") for name in names}
    under = {name: difference(rows.get(name, {}), "under-sampled") for name in names}
    judges = {name for name in names if has_learned(rows, name)}
    found: list[dict[str, Any]] = [
        {
            "published": "over-sampling helps all three models",
            "verdict": _all(
                [None if one is None or name not in judges else one[0] > CERTAIN * one[1] for name, one in over.items()]
            ),
            "ours": _told(over, judges),
        },
        {
            "published": "under-sampling helps none",
            "verdict": _all(
                [
                    None if one is None or name not in judges else one[0] <= CERTAIN * one[1]
                    for name, one in under.items()
                ]
            ),
            "ours": _told(under, judges),
        },
    ]
    for published, wanted, key in (
        ("scBERT needs least memory", "scbert", "peak_bytes"),
        ("scGPT is fastest", "scgpt", "seconds_per_epoch"),
    ):
        values = {name: models.get(name, {}).get(key) for name in names}
        is_whole = all(value is not None for value in values.values())
        others = [value for name, value in values.items() if name != wanted]
        found.append(
            {
                "published": published,
                "verdict": values[wanted] < min(others) if is_whole else None,
                "ours": ", ".join(f"{TITLES[name]} {_shown(value, key)}" for name, value in values.items()),
            }
        )
    return found


def difference(table: Mapping[str, Mapping[str, Any]], way: str) -> tuple[float, float] | None:
    """Mean difference of macro-F1 from the plain way, fold by fold, over all shares; and its standard error.

    None where fewer than two pairs are there. Folds and shares have cells in common, so that the error is a lower
    bound.
    """
    pairs: list[float] = []
    for ways in table.values():
        plain, other = (_by_fold(ways.get(name)) for name in ("plain", way))
        pairs += [other[fold] - plain[fold] for fold in other if fold in plain]
    if len(pairs) < 2:
        return None
    mean = sum(pairs) / len(pairs)
    spread = math.sqrt(sum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1))
    return mean, spread / math.sqrt(len(pairs))


def has_learned(rows: Rows, name: str) -> bool:
    """Whether a model with nothing cut comes near enough to the baseline (:data:`LEARNED`) for differences to count."""
    found, baseline = (rows.get(model, {}).get("1", {}).get("plain", {}).get(METRIC) for model in (name, "pca"))
    return found is not None and baseline is not None and found["mean"] >= LEARNED * baseline["mean"]


def _by_fold(row: Mapping[str, Any] | None) -> dict[int, float]:
    """Fold number -> macro-F1; folds without a score (training failed, or not computed yet) are not there."""
    if row is None or METRIC not in row:
        return {}
    return dict(zip(row["fold_numbers"], row[METRIC]["folds"], strict=True))


def _all(verdicts: Sequence[bool | None]) -> bool | None:
    """False as soon as one model says so; True only if all are known."""
    if False in verdicts:
        return False
    return None if None in verdicts else True


def _told(found: Mapping[str, tuple[float, float] | None], judges: Set[str]) -> str:
    parts = []
    for name, one in found.items():
        told = "not measured" if one is None else f"{one[0]:+.3f} ± {one[1]:.3f}"
        less = "" if one is None or name in judges else ", but it has learned too little to judge by"
        parts.append(f"{TITLES[name]} {told}{less}")
    return f"macro-F1 against plain: {', '.join(parts)}"


def _shown(value: float | None, key: str) -> str:
    if value is None:
        return "not measured"
    return f"{value / 1e6:,.0f} MB" if key == "peak_bytes" else f"{value:.1f} s per epoch"
