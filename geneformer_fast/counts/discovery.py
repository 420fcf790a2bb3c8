"""Which inputs files, folders and patterns stand for; what a folder holds twice, and what in it is not read."""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from geneformer_fast.counts.triplets import (
    KB_PART,
    expected_companions,
    has_companions,
    is_kb_file,
    is_matrix_file,
    triplet_at,
)
from geneformer_fast.errors import InputError

SUFFIXES = (".h5ad", ".h5", ".hdf5", ".loom")
FORMATS = "AnnData .h5ad and .zarr, 10x .h5 and matrix folders (matrix.mtx), .loom"

_MOST_NAMED = 5
# What lies in a folder of tokens, or of several, as datasets writes them.
_OF_TOKENS = ("state.json", "dataset_dict.json")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z")
# Words that tell two matrices of the same cells apart.
_SAME_CELLS = frozenset(("raw", "filtered", "unfiltered", "h5", "spliced", "unspliced"))


def is_zarr(path: Path) -> bool:
    """True for a folder that is a zarr store, format 2 or 3."""
    return any((path / marker).is_file() for marker in (".zgroup", ".zattrs", ".zmetadata", "zarr.json"))


def is_tenx_folder(path: Path) -> bool:
    """True for a folder with matrix.mtx or matrix.mtx.gz."""
    return any((path / file).is_file() for file in ("matrix.mtx", "matrix.mtx.gz"))


def expand_inputs(inputs: str | Path | Iterable[str | Path]) -> list[Path]:
    """Every input among files, folders and globs, sorted by path, each once.

    A .zarr store or 10x matrix folder is one input; any other folder stands for the inputs directly inside it, among
    them every MatrixMarket file that has features and barcodes of its name beside it. What else a folder holds is
    named in a warning.

    Raises
    ------
    InputError
        A path or glob that leads to nothing, or a folder or glob that leads to the same cells twice.
    """
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    found: set[Path] = set()
    for entry in given:
        path = Path(entry)
        if path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(entry), recursive=True)]
            if not matches:
                raise InputError(f"{entry}: no such file or folder, and nothing matches it as a pattern")
            refuse_repeated(str(entry), matches)
        for match in matches:
            found.update(_inputs_at(match))
    if not found:
        raise InputError("no inputs given")
    return sorted(found)


def _inputs_at(path: Path) -> list[Path]:
    if not path.is_dir() or is_zarr(path):
        return [path]
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if is_tenx_folder(path):
        others = (entry for entry in entries if entry.name not in ("matrix.mtx", "matrix.mtx.gz"))
        _warn_of_skipped(path, [path], [entry for entry in others if _is_input(entry)])
        return [path]
    inside = [entry for entry in entries if _is_input(entry)]
    if not inside:
        raise InputError(f"{path}: the folder holds no input. Supported are {FORMATS}{_hint(path, entries)}")
    refuse_repeated(str(path), inside)
    matrices = [entry for entry in inside if is_matrix_file(entry)]
    used = {*inside, *(file for entry in matrices for file in _companions(entry))}
    if any(is_kb_file(entry) for entry in matrices):  # names of genes, prefixes of barcodes
        used.update(filter(is_kb_file, entries))
    _warn_of_skipped(path, inside, [entry for entry in entries if entry not in used])
    return inside


def _companions(matrix: Path) -> tuple[Path, Path]:
    files = triplet_at(matrix, str(matrix))
    return files.features, files.barcodes


def _is_input(entry: Path) -> bool:
    if entry.is_dir():
        return is_zarr(entry) or is_tenx_folder(entry)
    if entry.name.endswith("molecule_info.h5"):  # beside Cell Ranger's matrices: molecules, not counts
        return False
    return entry.suffix in SUFFIXES or (is_matrix_file(entry) and has_companions(entry))


def _hint(folder: Path, entries: list[Path]) -> str:
    if any((folder / name).is_file() for name in _OF_TOKENS):
        return ". It holds tokens already"
    if any(entry.suffix in COMPRESSED and Path(entry.stem).suffix in SUFFIXES for entry in entries):
        return ". It holds compressed files: decompress them first"
    modalities = [entry.name for entry in entries if entry.suffix == ".h5mu"]
    if modalities:
        return f". MuData ({_listed(modalities)}) is not read whole: save one modality of it as .h5ad"
    alone = next((entry for entry in entries if is_matrix_file(entry)), None)
    if alone is not None:
        features, barcodes = expected_companions(alone)
        return f". {alone.name} needs its features and barcodes beside it: name them {features} and {barcodes}"
    deeper = [entry.name for entry in entries if entry.is_dir()]
    return f". Its folders are not looked into: name one of them ({_listed(deeper)})" if deeper else ""


def _warn_of_skipped(folder: Path, inside: list[Path], skipped: list[Path]) -> None:
    names = [entry.name for entry in skipped]
    if not names:
        return
    what = f"only the matrix folder {folder} itself is read" if inside == [folder] else f"{len(inside)} inputs are read"
    hint = "; decompress what is compressed" if any(name.endswith(COMPRESSED) for name in names) else ""
    warnings.warn(f"{folder}: {what}, and what else lies there is left out: {_listed(names)}{hint}", stacklevel=2)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def refuse_repeated(where: str, found: Iterable[Path]) -> None:
    """Raise InputError where several of these hold the same cells by their names: raw and filtered, .h5 and folder."""
    same: dict[tuple[Path, str], list[Path]] = {}
    for path in found:
        is_folder = path.is_dir() and (is_zarr(path) or is_tenx_folder(path))
        if is_folder or (path.is_file() and (path.suffix in SUFFIXES or is_matrix_file(path))):
            same.setdefault((path.parent, _name_of_cells(path)), []).append(path)
    for paths in same.values():
        if len(paths) > 1:
            choices = ", ".join(str(path) for path in sorted(paths))
            raise InputError(
                f"{where}: holds the same cells more than once, by the names of {choices}. Give the one you want; for "
                "Cell Ranger's output that is the filtered matrix, as .h5 or as folder."
            )


def _name_of_cells(path: Path) -> str:
    """A name without what tells matrices of the same cells apart."""
    stem = path.name
    for suffix in (".gz", *SUFFIXES, ".zarr", ".mtx"):
        stem = stem.removesuffix(suffix)
    stem = KB_PART.sub("", stem).replace("gene_bc_matrices", "gene_bc_matrix")
    words = re.split(r"[\s._-]+", stem)  # other signs tell samples apart: CD34+ and CD34-
    return "_".join(word for word in words if word.lower() not in _SAME_CELLS)
