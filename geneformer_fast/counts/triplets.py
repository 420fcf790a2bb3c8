"""The three files of a MatrixMarket count matrix, under the names that Cell Ranger, GEO and kb-python give them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from geneformer_fast.errors import InputError

_MATRIX = re.compile(r"(?P<stem>.+)\.mtx(?:\.gz)?$")
_FEATURES = ("features", "genes")
_BARCODES = ("barcodes",)
# kb-python --workflow nac writes several matrices for the same cells_x_genes.barcodes.txt and .genes.txt.
KB_PART = re.compile(r"(?<=cells_x_genes)\.(?:mature|nascent|ambiguous|total|cell|nucleus)$")


@dataclass(frozen=True)
class Triplet:
    """A matrix and what its rows and columns are.

    Attributes
    ----------
    matrix, features, barcodes
        The files.
    is_bustools
        Whether bustools (kb-python) wrote it: one line per cell in the first place, where 10x has features.
    """

    matrix: Path
    features: Path
    barcodes: Path
    is_bustools: bool = False


def matrix_files(folder: Path) -> list[Path]:
    """Every MatrixMarket file directly in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if is_matrix_file(path))


def is_matrix_file(path: Path) -> bool:
    """Whether this file is named like a MatrixMarket file."""
    return _MATRIX.match(path.name) is not None and path.is_file()


def has_companions(matrix: Path) -> bool:
    """Whether features and barcodes lie beside a matrix file."""
    return all(_find(matrix, words) is not None for words in (_FEATURES, _BARCODES))


def is_kb_file(path: Path) -> bool:
    """Whether this file is named as kb-python names what it writes about one matrix."""
    return path.name.startswith("cells_x_genes.")


def expected_companions(matrix: Path) -> tuple[str, str]:
    """The likeliest names of the features and the barcodes of a matrix file."""
    return _candidates(matrix, _FEATURES)[0].name, _candidates(matrix, _BARCODES)[0].name


def triplet_at(path: Path, name: str) -> Triplet:
    """The files of a matrix file, or of the only matrix in a folder.

    Raises
    ------
    InputError
        Companions are missing, or the folder holds several matrices; names the files expected.
    """
    matrix = _only_matrix(path, name) if path.is_dir() else path
    found = {words: _find(matrix, words) for words in (_FEATURES, _BARCODES)}
    for words, companion in found.items():
        if companion is None:
            expected = " or ".join(file.name for file in _candidates(matrix, words)[: len(words)])
            raise InputError(f"{name}: {expected} (or .gz) is missing beside the matrix {matrix.name}")
    features, barcodes = found[_FEATURES], found[_BARCODES]
    assert features is not None
    assert barcodes is not None
    is_bustools = "matrix" not in matrix.name and ".txt" in features.suffixes and ".txt" in barcodes.suffixes
    return Triplet(matrix, features, barcodes, is_bustools)


def _only_matrix(folder: Path, name: str) -> Path:
    plain = [folder / file for file in ("matrix.mtx", "matrix.mtx.gz") if (folder / file).is_file()]
    matrices = plain[:1] or matrix_files(folder)
    if len(matrices) > 1:
        listed = ", ".join(file.name for file in matrices[:5]) + ", ..." * (len(matrices) > 5)
        raise InputError(f"{name}: the folder holds several matrices ({listed}); give one of them")
    return matrices[0]


def _find(matrix: Path, words: tuple[str, ...]) -> Path | None:
    return next((path for path in _candidates(matrix, words) if path.is_file()), None)


def _candidates(matrix: Path, words: tuple[str, ...]) -> list[Path]:
    """The files that may describe a matrix, the likeliest first."""
    match = _MATRIX.match(matrix.name)
    stem = matrix.name if match is None else match["stem"]
    head, found, tail = stem.rpartition("matrix")
    if found:  # GSM1_matrix, GSM1_matrix_a
        stems = [f"{head}{word}{tail}" for word in words]
    else:  # cells_x_genes, cells_x_genes.mature, GSM1_counts
        bases = dict.fromkeys((stem, KB_PART.sub("", stem)))
        stems = [f"{base}{mark}{word}" for base in bases for mark in (".", "_", "-", "") for word in words]
    suffixes = (".tsv", ".tsv.gz", ".txt", ".txt.gz")
    return [matrix.parent / f"{stem}{suffix}" for suffix in suffixes for stem in stems]
