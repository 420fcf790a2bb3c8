"""What must hold of a stored array, in HDF5 or zarr, before its values are read."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from geneformer_fast.errors import InputError

#: What to do where pieces of an array are not stored, which both libraries read as zeros without a word.
Absent = Literal["refuse", "warn", "usual", "accept"]


def readable(node: Any, *, absent: Absent = "refuse") -> Any:
    """A stored array, fit to be read: complete, and compressed by what is known and bounded.

    Parameters
    ----------
    node
        An h5py data set or zarr array; anything else is handed back as it is.
    absent
        ``"refuse"`` where a lost piece would change results unnoticed; ``"warn"`` where leaving pieces out is also how
        writers store zeros; ``"usual"`` where nearly every writer's array is zeros throughout: if nothing at all is
        stored that is accepted, else warned of; ``"accept"`` where the absent values are known by other means.

    Returns
    -------
    The array to read from.

    Raises
    ------
    InputError
        Its compression is not available, or not allowed, or pieces are absent.
    """
    library = type(node).__module__.partition(".")[0]
    if library == "h5py":
        from geneformer_fast.counts.hdf5_storage import absent_chunks, check_filters

        check_filters(node)
        _judge(node.file.filename, node.name.lstrip("/"), absent_chunks(node), absent, "file", node)
        return node
    if library == "zarr":
        from geneformer_fast.counts.zarr_storage import checked_array, n_absent, store_name

        array = checked_array(node)
        _judge(store_name(array), array.path, n_absent(array), absent, "store", array)
        return array
    return node


def _judge(place: str, path: str, counted: tuple[int, int], absent: Absent, kind: str, node: Any) -> None:
    missing, total = counted
    if missing <= 0 or absent == "accept" or (absent == "usual" and missing == total):
        return
    if absent == "refuse":
        raise InputError(
            f"{place}: {path} lacks {missing} of {total} chunks; the {kind} was not copied or written completely, copy "
            "it again. Writers may leave chunks of zeros out, and lost ones look the same: if zeros are meant, store "
            f"them, in Python: {_storing_zeros(place, path, kind)}"
        )
    warnings.warn(
        f"{place}: {path} of shape {tuple(node.shape)} lacks {missing} of {total} chunks, whose values are read as "
        f"zeros. Writers leave out chunks that hold zeros only; if this {kind} may have lost files, copy it again or "
        "compare the number of chunks with the original",
        stacklevel=3,
    )


def _storing_zeros(place: str, path: str, kind: str) -> str:
    """Statements that write the chunks that are not there, into a file or store as it stands."""
    if kind == "file":
        return f"import h5py; a = h5py.File({place!r}, 'r+')[{path!r}]; a[...] = a[...]"
    setting = "zarr.config.set({'array.write_empty_chunks': True})"
    return f"import zarr; {setting}; a = zarr.open({place!r})[{path!r}]; a[...] = a[...]"
