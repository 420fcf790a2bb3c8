"""Labels of cells from the columns that tokens carry, and classes of genes from a file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from geneformer_fast.errors import InputError
from geneformer_fast.files.schema import read_json
from geneformer_fast.finetuning.carried import why_not_carried
from geneformer_fast.finetuning.losses import IGNORED
from geneformer_fast.tokenization.arrow import TokenFolder

# More classes than this are hardly meant: a column of cell names, say.
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Task:
    """One thing to tell: a column of labels.

    Attributes
    ----------
    name
        The column.
    classes
        [K] names, sorted; class c is ``classes[c]``.
    codes
        [n_cells of the token folder] int64, the class of each cell; -100 where it has none.
    weight
        Of its loss beside those of other tasks.
    """

    name: str
    classes: list[str]
    codes: np.ndarray
    weight: float = 1.0


def column_values(tokens: TokenFolder, column: str, *, role: str) -> np.ndarray:
    """[n_cells] a carried column as text; None where it is empty.

    Raises
    ------
    InputError
        There is no such column, or it holds fractions or infinite numbers.
    """
    if why_not := why_not_carried(tokens.path, column, tokens.columns, role=role):
        raise InputError(why_not)
    array = tokens.column(column)
    if pa.types.is_floating(array.type):
        numbers = array.to_numpy().astype(np.float64)
        known = numbers[~np.isnan(numbers)]
        if not np.isfinite(known).all():
            first = int((~np.isfinite(numbers) & ~np.isnan(numbers)).argmax())
            raise InputError(
                f"{tokens.path}: the {role} {column!r} of cell {first} is infinite, which is no class; label it, or "
                "leave it empty"
            )
        if not (known == np.round(known)).all():
            raise InputError(f"{tokens.path}: the {role} {column!r} holds fractions, which are no classes")
        return np.array([None if np.isnan(value) else str(int(value)) for value in numbers], dtype=object)
    values = [None if value is None or not str(value).strip() else str(value) for value in array.to_pylist()]
    return np.array(values, dtype=object)


def read_task(
    tokens: TokenFolder,
    column: str,
    *,
    drop_unlabelled: bool = False,
    ignore: Sequence[str] = (),
    min_cells: int = 0,
    weight: float = 1.0,
    among: np.ndarray | None = None,
) -> Task:
    """The classes of cells from one column.

    Parameters
    ----------
    tokens
        Tokens that carry the column.
    column
        Its name.
    drop_unlabelled
        Whether cells may lack a label; they are then left out.
    ignore
        Labels that stand for none, such as ``"unassigned"``.
    min_cells
        Classes of fewer cells are left out.
    weight
        Of the task.
    among
        Numbers of the cells that are looked at; the others have no label, whatever the column says. None: all.

    Raises
    ------
    InputError
        No such column; cells lack a label; fewer than two classes are left; far too many.
    """
    values = column_values(tokens, column, role="label")
    cells = np.arange(len(values)) if among is None else among
    is_empty = values[cells] == None  # noqa: E711 - elementwise
    if is_empty.any() and not drop_unlabelled:
        raise InputError(
            f"{tokens.path}: {is_empty.sum():,} of {len(cells):,} cells have no {column!r} (the first is cell "
            f"{int(cells[is_empty.argmax()])}); leave them out with --drop-unlabelled (drop_unlabelled=True), or label "
            "them"
        )
    if among is not None:
        values = _only(values, among)
    values[np.isin(values, list(ignore))] = None
    known = values[values != None].astype(str)  # noqa: E711
    names, counts = np.unique(known, return_counts=True) if len(known) else (np.array([]), np.array([], dtype=int))
    classes = [str(name) for name, count in zip(names, counts, strict=True) if count >= min_cells]
    if len(classes) > _MOST_CLASSES:
        raise InputError(
            f"{tokens.path}: {column!r} has {len(classes):,} different values, too many for classes of cells"
        )
    code_of = {name: code for code, name in enumerate(classes)}
    codes = np.array([code_of.get(value, IGNORED) for value in values], dtype=np.int64)
    if len(classes) < 2:
        found = f"one class only ({classes[0]!r})" if classes else "no class at all"
        few = f" of at least {min_cells} cells" if min_cells > 1 else ""
        raise InputError(f"{tokens.path}: {column!r} has {found}{few}: there is nothing to tell apart")
    return Task(column, classes, codes, weight)


def _only(values: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Values of some cells, and none of the others."""
    kept = np.full(len(values), None, dtype=object)
    kept[cells] = values[cells]
    return kept


def check_ignored(tokens: TokenFolder, columns: Sequence[str], ignore: Sequence[str]) -> None:
    """Refuse to ignore labels that no cell has: most likely they are misspelt, and the right ones would be learned.

    Raises
    ------
    InputError
        Names the label, and those there are.
    """
    there = {value for column in columns if ignore for value in column_values(tokens, column, role="label")} - {None}
    absent = sorted(set(ignore) - there)
    if absent:
        named = " or ".join(map(repr, columns))
        raise InputError(
            f"{tokens.path}: no cell's {named} is {absent[0]!r}, which was to be ignored; there are "
            f"{', '.join(sorted(there)[:20])}"
        )


def read_gene_classes(classes: str | os.PathLike[str] | Mapping[str, str]) -> dict[str, str]:
    """Gene id -> class, from a file or a mapping.

    Parameters
    ----------
    classes
        ``.json``: ``{"ENSG...": "class", ...}`` or ``{"class": ["ENSG...", ...], ...}``. ``.csv`` or ``.tsv``: two
        columns, gene and class, with a header or without. Or a mapping of either form.

    Raises
    ------
    InputError
        The file cannot be read as that; a gene is in two classes; fewer than two classes.
    """
    if isinstance(classes, Mapping):
        source, pairs = "classes", _pairs_of(classes, "classes")
    else:
        path = Path(classes)
        source = str(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file of gene classes")
        pairs = _pairs_of(read_json(path, InputError), source) if path.suffix == ".json" else _read_table(path)
    found: dict[str, str] = {}
    for gene, name in pairs:
        if found.get(gene, name) != name:
            raise InputError(f"{source}: gene {gene} is in the classes {found[gene]!r} and {name!r}; give it one")
        found[gene] = name
    if len(set(found.values())) < 2:
        raise InputError(f"{source}: {len(set(found.values()))} classes of genes, but at least 2 are needed")
    return found


def _pairs_of(content: Mapping[str, object], source: str) -> list[tuple[str, str]]:
    pairs = []
    for key, value in content.items():
        if isinstance(value, str):
            pairs.append((str(key), value))
        elif isinstance(value, list | tuple | set) and all(isinstance(gene, str) for gene in value):
            pairs += [(gene, str(key)) for gene in value]
        else:
            raise InputError(f"{source}: {key!r} is neither a gene with a class nor a class with a list of genes")
    return pairs


def _read_table(path: Path) -> list[tuple[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",") if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no table of text: {error}") from None
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) < 2 or not row[1].strip()), None)
    if wrong is not None:
        raise InputError(f"{path}: line {wrong} does not hold a gene and a class")
    has_header = bool(rows) and rows[0][0].strip().lower() in ("gene", "genes", "gene_id", "ensembl_id", "id", "")
    return [(row[0].strip(), row[1].strip()) for row in rows[has_header:]]
