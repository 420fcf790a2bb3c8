"""What lies in a folder of perturbations, and what its JSON files say.

``part-00000.parquet`` and on
    Rows of some whole cells each, longest cells first; a file is whole or absent.
``_cells.parquet``
    The cells that are perturbed, in the order of processing: their place in it (``rank``), row of the token folder
    (``cell``), number of tokens (``length``), and what is carried of obs. Also those that have no rows.
``_UNFINISHED.json``
    There as long as the folder is being written: what is being made.
``_blocks/00000.json`` and on
    Meanwhile: what each whole file holds, and its checksum.
``_manifest.json``
    Written last: what was made, of what, and the checksums of all files.

Names begin with an underscore where a reader of Parquet folders is to pass over them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from geneformer_fast import __version__
from geneformer_fast.errors import OutputError
from geneformer_fast.files import schema
from geneformer_fast.files.checksums import check_digest, fingerprint_of, with_digest
from geneformer_fast.files.writing import is_leftover, system_errors, write_json

MANIFEST = "_manifest.json"
UNFINISHED = "_UNFINISHED.json"
CELLS = "_cells.parquet"
BLOCKS = "_blocks"
FORMAT = "geneformer-fast perturbations"
FORMAT_VERSION = 1
PART = "part-*.parquet"
#: How the official perturber's files end.
OFFICIAL_SUFFIX = "_raw.pickle"
#: What to do about a folder that cannot be gone on with.
AGAIN = "pass --overwrite (overwrite=True) to start again"
#: What to do about one that is damaged.
DAMAGED = "restore it from a good copy, or perturb again"


def part_name(number: int) -> str:
    """File name of a block of cells."""
    return f"part-{number:05d}.parquet"


def block_name(number: int) -> str:
    """File name of what is written down of a whole block."""
    return f"{number:05d}.json"


@dataclass
class BlockEntry:
    """A whole file of rows: those of the cells from place ``start`` to ``stop`` of the folder's cells."""

    file: str
    start: schema.whole(0)  # type: ignore[valid-type]
    stop: schema.whole(0)  # type: ignore[valid-type]
    n_rows: schema.whole(0)  # type: ignore[valid-type]
    n_bytes: schema.whole(0)  # type: ignore[valid-type]
    sha256: str


@dataclass
class Block:
    """What is written down of a whole file before the manifest is."""

    run: str
    block: BlockEntry


@dataclass
class ShardEntry:
    """Which part of a run's cells a folder holds."""

    index: schema.whole(1)  # type: ignore[valid-type]
    n_shards: schema.whole(1)  # type: ignore[valid-type]


@dataclass
class Unfinished:
    """What is read of ``_UNFINISHED.json``."""

    format: str
    format_version: schema.whole(1)  # type: ignore[valid-type]
    plan: dict[str, Any]
    states: list[str]
    shard: ShardEntry
    cells_sha256: str
    blocks: list[tuple[schema.whole(0), schema.whole(0)]]  # type: ignore[valid-type, misc]


@dataclass
class Manifest:
    """What is read of ``_manifest.json``."""

    format: str
    format_version: schema.whole(1)  # type: ignore[valid-type]
    plan: dict[str, Any]
    states: list[str]
    columns: list[str]
    shard: ShardEntry
    cells_sha256: str
    cells_file_sha256: str
    n_cells: schema.whole(0)  # type: ignore[valid-type]
    n_cells_of_run: schema.whole(0)  # type: ignore[valid-type]
    n_rows: schema.whole(0)  # type: ignore[valid-type]
    files: list[BlockEntry]
    report: dict[str, Any] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of what decides numbers and bytes."""
    found = {"geneformer_fast": __version__, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in ("torch", "numpy", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a build without metadata
            found[name] = "unknown"
    return found


def cells_fingerprint(cells: pa.Table) -> str:
    """SHA-256 over which cells a folder holds, and what is carried of them."""
    return fingerprint_of([[name, *map(str, cells[name].to_pylist())] for name in cells.column_names])


def state_of(folder: Path) -> str:
    """``"absent"``, ``"empty"``, ``"finished"``, ``"unfinished"`` or ``"foreign"``."""
    if not folder.exists():
        return "absent"
    if not folder.is_dir():
        return "foreign"
    if (folder / MANIFEST).exists():
        return "finished"
    if (folder / UNFINISHED).exists():
        return "unfinished"
    return "empty" if all(is_leftover(path) for path in folder.iterdir()) else "foreign"


def is_official(folder: Path) -> bool:
    """Whether a folder holds pickles of the official perturber, and nothing of ours."""
    return state_of(folder) == "foreign" and folder.is_dir() and any(folder.glob(f"*{OFFICIAL_SUFFIX}"))


def check_state(folder: Path, *, resume: bool, overwrite: bool) -> str:
    """What state a folder is in, which may be written.

    Raises
    ------
    OutputError
        It may not be: something else is in it, or what neither option speaks for.
    """
    if resume and overwrite:
        raise OutputError("resume and overwrite exclude each other: one keeps what is there, the other removes it")
    state = state_of(folder)
    if state == "foreign":
        raise OutputError(f"{folder} exists and holds no perturbations; nothing in it is touched. Name another one")
    if state in ("finished", "unfinished") and overwrite:
        _check_own(folder / (MANIFEST if state == "finished" else UNFINISHED))
    if state == "finished" and not (resume or overwrite):
        raise OutputError(f"{folder} holds finished perturbations; name another folder or pass --overwrite")
    if state == "unfinished" and not (resume or overwrite):
        raise OutputError(unfinished_message(folder))
    return state


def _check_own(path: Path) -> None:
    """Nothing is removed beside a file that only has the name of one of ours, damaged ones excepted."""
    with system_errors(path):
        is_own = FORMAT.encode() in path.read_bytes()
    if not is_own:
        raise OutputError(
            f"{path} is no file of perturbations, so nothing beside it is removed; name another folder, or move it"
        )


def unfinished_message(folder: Path) -> str:
    """What to say about a folder that is not finished."""
    content = read_unfinished(folder)
    n_done = len(list((folder / BLOCKS).glob("*.json")))
    return (
        f"{folder} is unfinished: {n_done:,} of {len(content['blocks']):,} files are complete. Run the same command "
        "with --resume (resume=True) to go on, or with --overwrite (overwrite=True) to start again."
    )


def read_unfinished(folder: Path) -> dict[str, Any]:
    """What is being made in a folder."""
    return _read(folder / UNFINISHED, Unfinished, AGAIN)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished folder holds.

    Raises
    ------
    OutputError
        It is damaged, or not what its name says.
    """
    return _read(folder / MANIFEST, Manifest, DAMAGED)


def read_block(folder: Path, number: int, run: str) -> dict[str, Any] | None:
    """What is written down of a whole block of a run; None where it is not whole yet, or another run's."""
    path = folder / BLOCKS / block_name(number)
    if not path.exists():
        return None
    content = schema.read_json(path, OutputError, Block)
    check_digest(content, path, OutputError, AGAIN)
    return content["block"] if content["run"] == run else None


def write_block(folder: Path, number: int, run: str, entry: Mapping[str, Any]) -> None:
    """Write down that a block of a run, which has this fingerprint, is whole."""
    write_json(folder / BLOCKS / block_name(number), with_digest({"run": run, "block": dict(entry)}), indent=None)


def _read(path: Path, kind: Any, advice: str) -> dict[str, Any]:
    content = schema.read_json(path, OutputError)
    if content.get("format") != FORMAT:
        raise OutputError(f"{path} is no file of perturbations: its format is {content.get('format')!r}; {advice}")
    if content.get("format_version", 0) != FORMAT_VERSION:
        raise OutputError(
            f"{path} is of version {content.get('format_version')!r} of its format, and this package reads version "
            f"{FORMAT_VERSION}; use the version of geneformer_fast that wrote it"
        )
    check_digest(content, path, OutputError, advice)
    schema.check(kind, content, path, OutputError)
    return content


def differences(begun: Any, asked: Any, where: str = "") -> list[str]:
    """One line per place in which two JSON values differ, the first ones of a list only."""
    if isinstance(begun, Mapping) and isinstance(asked, Mapping):
        lines = []
        for key in [*begun, *(key for key in asked if key not in begun)]:
            lines += differences(begun.get(key), asked.get(key), f"{where}.{key}" if where else str(key))
        return lines
    return [] if begun == asked else [f"{where}: begun with {_short(begun)}, now {_short(asked)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def own_files(folder: Path) -> list[Path]:
    """Files of a folder of perturbations but for the mark of an unfinished one, in an order to remove them in.

    What says that a file is whole comes before the file.
    """
    blocks = sorted((folder / BLOCKS).glob("*.json"))
    parts = sorted(folder.glob(PART))
    return [path for path in (folder / MANIFEST, *blocks, *parts, folder / CELLS) if path.exists()]
