"""What predictions are called, so that no name is taken from anything else, whatever labels and classes are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from geneformer_fast.errors import CheckpointError, InputError, OutputError

#: Columns that say which cell or gene a row is of, and where it came from: nothing else is ever called so.
RESERVED = ("cell", "row", "fold", "source_file", "source_row", "obs_names", "gene", "token", "n_cells")
#: What an annotated object holds of a task, by the place it is in.
PLACES = {"obs": ("{}_predicted", "{}_probability"), "obsm": ("{}_probabilities",), "uns": ("{}_predicted",)}


def check_names(tasks: Mapping[str, Sequence[str]]) -> None:
    """Refuse tasks and classes whose columns in a table of predictions would be another column's.

    Parameters
    ----------
    tasks
        Name to classes.

    Raises
    ------
    InputError
        Names the two, and what to do.
    """
    owners = dict.fromkeys(RESERVED, "says which row is which")
    for task, classes in tasks.items():
        for column, what in (
            (task, f"the truth of {task!r}"),
            (f"{task}_predicted", f"the prediction of {task!r}"),
            (f"{task}_probability", f"the probability of that prediction of {task!r}"),
            *((f"{task}: {label}", f"the probability of {label!r} in {task!r}") for label in classes),
        ):
            if column in owners:
                raise InputError(
                    f"the column {column!r} of the predictions would hold {what}, but it {_holds(owners[column])}; "
                    "carry the label under another name (tokenize --obs NEW=OLD)"
                )
            owners[column] = what


def check_card(card: Mapping[str, Any], model: Path) -> None:
    """Refuse a model of which two tasks would be written under one name.

    Raises
    ------
    CheckpointError
        Names it.
    """
    columns = Counter(
        column
        for task in card["tasks"]
        for name in [task["name"]]
        for column in (f"{name}_predicted", f"{name}_probability", *(f"{name}: {label}" for label in task["classes"]))
    )
    column, count = next(iter(columns.most_common(1)), ("", 0))
    if count > 1:
        raise CheckpointError(f"{model}: two of its tasks would be written as {column!r}; give one another name")


def check_free(source: str, names: Sequence[str], taken: Mapping[str, Collection[str]], ours: Collection[str]) -> None:
    """Refuse to put predictions over columns of the user's; those of an earlier ``predict`` are replaced.

    Parameters
    ----------
    source
        The object or file, for the message.
    names
        Of the tasks, or what they are to be called.
    taken
        Names that are there, by place; see :data:`PLACES`.
    ours
        Those of ``uns`` that an earlier prediction made.

    Raises
    ------
    OutputError
        Names the column, and what to do.
    """
    for name in names:
        if f"{name}_predicted" in ours:
            continue
        for place, patterns in PLACES.items():
            for found in (pattern.format(name) for pattern in patterns):
                if found in taken.get(place, ()):
                    raise OutputError(
                        f"{source}: its {place} holds {found!r} already, which predict did not make; call the "
                        "predictions otherwise (key_added=, --key-added), or rename it"
                    )


def check_anndata(adata: Any, names: Sequence[str]) -> None:
    """:func:`check_free` for an AnnData in memory."""
    ours = [name for name, entry in adata.uns.items() if isinstance(entry, Mapping) and "geneformer_fast" in entry]
    taken = {"obs": [*adata.obs.columns, adata.obs.index.name], "obsm": list(adata.obsm), "uns": list(adata.uns)}
    check_free("the AnnData", names, taken, ours)


def check_h5ad(path: Path, names: Sequence[str]) -> None:
    """:func:`check_free` for a file; and a name that HDF5 would take for a path is refused."""
    import h5py

    slashed = next((name for name in names if "/" in name), None)
    if slashed is not None:
        raise OutputError(
            f"a name with a slash, {slashed!r}, cannot be written into an .h5ad file; call the predictions otherwise "
            "(key_added=, --key-added), or choose .parquet"
        )
    try:
        with h5py.File(path, "r") as file:
            places = {place: file[place] for place in PLACES if isinstance(file.get(place), h5py.Group)}
            taken = {place: set(group) for place, group in places.items()}
            uns = places.get("uns", {})
            ours = [name for name in uns if isinstance(uns[name], h5py.Group) and "geneformer_fast" in uns[name]]
            check_free(str(path), names, taken, ours)
            index = places["obs"].attrs.get("_index") if "obs" in places else None
            if index in {pattern.format(name) for name in names for pattern in PLACES["obs"]}:
                raise OutputError(
                    f"{path}: the names of its cells are called {index!r}; call the predictions otherwise"
                )
    except (OSError, KeyError):
        return  # what is wrong with the file is said by whoever reads its cells


def _holds(what: str) -> str:
    return what if what.startswith("says") else f"holds {what}"
