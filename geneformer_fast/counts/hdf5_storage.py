"""What must hold of an HDF5 data set before its values are read, and whose file its bytes lie in."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from geneformer_fast.errors import InputError

# Filters by their registered numbers that h5py does not bring; the hdf5plugin package brings these and more.
_FILTERS = {
    307: "bzip2",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32026: "blosc2",
}
# Virtual data sets may lead to others; more than this is a circle.
_MAX_DEPTH = 8


class OwnBytes:
    """The bytes of one opened HDF5 file, for reading without the library.

    Parameters
    ----------
    file
        The h5py file. What links lead to in other files is not among its bytes.

    Attributes
    ----------
    fd
        A descriptor of the very file that h5py has open, whatever lies under its name by now; -1 where it has none.
    """

    def __init__(self, file: Any) -> None:
        import h5py

        self._number = h5py.h5o.get_info(file.id).fileno
        self.fd = -1
        # other drivers (the environment's HDF5_DRIVER) keep files in memory, or in parts
        if file.driver == "sec2":
            self.fd = os.dup(file.id.get_vfd_handle())

    def close(self) -> None:
        """Close the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def hold(self, dataset: Any) -> bool:
        """Whether a data set lies in this file, as a range or in chunks, in the type that numpy calls it."""
        import h5py

        if self.fd < 0 or h5py.h5o.get_info(dataset.id).fileno != self._number or dataset.file.userblock_size:
            return False
        if dataset.is_virtual or dataset.external:
            return False
        return bool(dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype)))


def linked_files(file: Any) -> list[Path]:
    """The other files that external links of an HDF5 file lead to, as far as they are there."""
    import h5py

    folder = Path(file.filename).parent
    found: set[Path] = set()

    def note(_name: str, link: Any) -> None:
        if isinstance(link, h5py.ExternalLink):
            found.update(path for path in (folder / link.filename, Path(link.filename)) if path.is_file())

    # damage is met where something is read; h5py raises a SystemError here where HDF5 says what is wrong
    with suppress(OSError, RuntimeError, KeyError, ValueError, SystemError):
        file.visititems_links(note)
    return sorted(found)


def check_filters(dataset: Any) -> None:
    """Load hdf5plugin where a data set's compression needs it.

    Raises
    ------
    InputError
        The compression is not known here; names it and what to install.
    """
    import h5py

    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
    unknown = [entry for entry in filters if not h5py.h5z.filter_avail(entry[0])]
    if not unknown:
        return
    try:
        import hdf5plugin  # noqa: F401  (registers its filters)
    except ImportError:
        advice = "pip install hdf5plugin, or save the file with gzip compression"
    else:
        advice = "hdf5plugin is installed, but does not bring it; save the file with gzip compression"
    for code, _, _, label in unknown:
        if not h5py.h5z.filter_avail(code):
            name = _FILTERS.get(code) or label.decode(errors="replace").split(";")[0].strip() or "unknown"
            raise InputError(
                f"{dataset.file.filename}: {dataset.name} is compressed with the HDF5 filter {name!r} (number {code}), "
                f"which is not available here: {advice}"
            )


def absent_chunks(dataset: Any) -> tuple[int, int]:
    """How many pieces of a data set were never written, which HDF5 reads as its fill value, and how many there are.

    Raises
    ------
    ValueError
        A virtual data set whose sources are not all there, or values kept in HDF5's external files.
    """
    import h5py

    if dataset.size is None or dataset.size == 0:
        return 0, 0
    if dataset.is_virtual:
        check_virtual(dataset)
        return 0, 1
    if dataset.external:
        raise ValueError(
            f"{dataset.name} keeps its values in another file, {dataset.external[0][0]!r}, by HDF5's external storage, "
            "which is not supported; rewrite it with h5repack"
        )
    if dataset.chunks is None:
        return int(dataset.id.get_space_status() == h5py.h5d.SPACE_STATUS_NOT_ALLOCATED), 1
    n_chunks = 1
    for extent, chunk in zip(dataset.shape, dataset.chunks, strict=True):
        n_chunks *= -(-extent // chunk)
    return n_chunks - dataset.id.get_num_chunks(), n_chunks


def check_virtual(dataset: Any, depth: int = 0) -> None:
    """Raise ValueError unless every value of a virtual data set comes from a source that is there: others read as 0."""
    import h5py

    if depth >= _MAX_DEPTH:
        raise ValueError(f"{dataset.name} is a virtual data set that leads to itself")
    n_mapped = 0
    for source in dataset.virtual_sources():
        place = f"{dataset.name} is a virtual data set, and its source {source.dset_name!r} in {source.file_name!r}"
        if source.file_name == ".":
            _check_source(dataset.file, source, place, depth)
        else:
            # HDF5 looks beside the file first, then in the working directory
            beside = Path(dataset.file.filename).parent / source.file_name
            path = next((path for path in (beside, Path(source.file_name)) if path.is_file()), None)
            if path is None:
                raise ValueError(f"{place} is not there, so its values would read as zeros")
            with h5py.File(path, "r") as file:
                _check_source(file, source, place, depth)
        n_mapped += source.vspace.get_select_npoints()
    if n_mapped < dataset.size:
        raise ValueError(
            f"{dataset.name} is a virtual data set with sources for {n_mapped} of {dataset.size} values; the others "
            "would read as zeros"
        )


def _check_source(file: Any, source: Any, place: str, depth: int) -> None:
    import h5py

    if source.dset_name not in file:
        raise ValueError(f"{place} is not there, so its values would read as zeros")
    target = file[source.dset_name]
    if source.src_space.get_select_type() == h5py.h5s.SEL_ALL:  # a whole source is named without its shape
        is_there = target.size == source.vspace.get_select_npoints()
    else:
        _, last = source.src_space.get_select_bounds()
        is_there = len(last) == len(target.shape) and all(i < n for i, n in zip(last, target.shape, strict=True))
    if not is_there:
        raise ValueError(f"{place} has shape {target.shape}, not what is taken from it")
    check_filters(target)
    if target.is_virtual:
        check_virtual(target, depth + 1)
    elif absent_chunks(target)[0]:
        raise ValueError(f"{place} was not written completely")
