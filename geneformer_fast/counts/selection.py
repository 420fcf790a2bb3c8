"""Tells counts from other values, and chooses which matrix of a file holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geneformer_fast.counts.block import CountMatrix, Sample
from geneformer_fast.counts.reading import reading
from geneformer_fast.errors import InputError

# log1p of counts per ten thousand or per million stays far below this; TPM and counts do not.
_LOG_MAX = 30.0
_SHOWN = 4
#: For messages: how a user says which matrix holds the counts.
CHOSEN_BY = "counts_layer= (--counts-layer)"


@dataclass
class Candidate:
    """One matrix of a file: what it is called and how to open it."""

    label: str
    open: Callable[[], CountMatrix]


def choose_counts(
    name: str, candidates: list[Candidate], *, layer: str | None, allow_float: bool
) -> tuple[str, CountMatrix]:
    """The label and matrix that hold the counts.

    With `layer` that layer; otherwise raw.X where it holds counts, else X. The values decide, at a sample of cells.

    Raises
    ------
    InputError
        No such layer, no matrix at all, or the chosen one holds something else than counts; shows values and names
        the matrices that would do.
    """
    by_label = {candidate.label: candidate for candidate in candidates}
    if layer is not None:
        label = next((key for key in (f"layers/{layer}", layer) if key in by_label), None)
        if label is None:
            raise InputError(f"{name}: no layer {layer!r}; there are {_listed(by_label)}")
    else:
        label = _first_with_counts(name, by_label, ("raw/X", "X"))
        if label is None:
            raise InputError(f"{name}: has no matrix X; choose one with {CHOSEN_BY}. There are {_listed(by_label)}")
    matrix = _open(name, by_label[label])
    problem = what_is_wrong(_sample(name, label, matrix), allow_float=allow_float)
    if problem is not None:
        others = [key for key in by_label if key != label and _holds_counts(name, by_label[key])]
        hint = f" {', '.join(others)} holds counts: choose it with {CHOSEN_BY}." if others else ""
        raise InputError(f"{name}: {label} does not hold counts: {problem}.{hint}")
    return label, matrix


def _first_with_counts(name: str, by_label: dict[str, Candidate], labels: tuple[str, ...]) -> str | None:
    present = [label for label in labels if label in by_label]
    for label in present[:-1]:
        if _holds_counts(name, by_label[label]):
            return label
    return present[-1] if present else None


def _open(name: str, candidate: Candidate) -> CountMatrix:
    with reading(name, candidate.label):
        return candidate.open()


def _sample(name: str, label: str, matrix: CountMatrix) -> Sample:
    with reading(name, label):
        return matrix.sample()


def _holds_counts(name: str, candidate: Candidate) -> bool:
    try:
        return what_is_wrong(_sample(name, candidate.label, _open(name, candidate)), allow_float=False) is None
    except InputError:
        return False


def _listed(by_label: dict[str, Candidate]) -> str:
    return ", ".join(by_label) or "none"


def what_is_wrong(sample: Sample, *, allow_float: bool) -> str | None:
    """Why these values are not counts, with examples, or None where they are (or are floats that may pass)."""
    values = sample.values
    if values.dtype.kind == "u" or values.size == 0:
        return None
    if values.dtype.kind == "f":
        if np.isnan(values).any():
            return f"{int(np.isnan(values).sum())} of {values.size} sampled values are NaN"
        if np.isinf(values).any():
            return f"{int(np.isinf(values).sum())} of {values.size} sampled values are infinite"
    negative = values < 0
    if negative.any():
        return f"negative values such as {shown(values[negative])}; these look scaled or regressed"
    if values.dtype.kind != "f":
        return None
    fractional = values != np.floor(values)
    if not fractional.any():
        return None
    examples = shown(values[fractional])
    if looks_log_transformed(sample):
        return f"values such as {examples}, at most {values.max():.4g}; these look log-transformed"
    if allow_float:
        return None
    return (
        f"values such as {examples} are not whole numbers. If these are TPM-like values and ranking them is what you "
        "want, pass --allow-float (allow_float=True)"
    )


def looks_log_transformed(sample: Sample) -> bool:
    """True where undoing a logarithm (base e, 2 or 10, of x + 1) gives whole numbers or equal totals of all cells."""
    values = sample.values.astype(np.float64)
    if values.max() > _LOG_MAX:
        return False
    for base in (np.e, 2.0, 10.0):
        undone = np.expm1(values * np.log(base))
        if np.all(np.abs(undone - np.rint(undone)) <= 1e-4 * np.maximum(undone, 1.0)):
            return True
        if sample.indptr is None:
            continue
        totals = _row_sums(undone, sample.indptr)
        plain = _row_sums(values, sample.indptr)
        if len(totals) > 2 and np.ptp(totals) < 1e-2 * totals.mean() and np.ptp(plain) > 1e-2 * plain.mean():
            return True
    return False


def _row_sums(values: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    running = np.concatenate([[0.0], np.cumsum(values)])
    return np.diff(running[indptr])[np.diff(indptr) > 0]


def shown(values: np.ndarray) -> str:
    """The first few values, for a message."""
    return ", ".join(f"{value:.6g}" for value in values[:_SHOWN].tolist())


def modalities_message(name: str, modalities: Iterable[str]) -> str:
    """How to take one modality of a MuData file."""
    names = sorted(modalities)
    first = next(
        (key for key in names if key.lower() in ("rna", "gex", "gene expression")), names[0] if names else "rna"
    )
    read = "read_zarr" if Path(name).is_dir() else "read_h5mu"
    return (
        f"{name}: is a MuData file of several modalities ({', '.join(names) or 'none'}). Take the one with counts of "
        f"genes: mudata.{read}({name!r}).mod[{first!r}].write_h5ad('{first}.h5ad')"
    )
