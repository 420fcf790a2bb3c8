"""The JSON files beside the shards: what a token folder is made of, and whether it is finished.

``UNFINISHED.json``
    There as long as the folder is being written: what is being made, and how far it is. It becomes ``state.json``.
``dataset_info.json``, ``manifest.json``
    Written when all shards are complete.
``state.json``
    What ``datasets.load_from_disk`` needs last. One rename turns UNFINISHED.json into it, so there is no moment at
    which a folder is neither unfinished nor finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geneformer_fast.errors import OutputError
from geneformer_fast.files import schema
from geneformer_fast.files.checksums import VERIFY, check_digest, fingerprint_of, is_verifying
from geneformer_fast.files.writing import is_leftover, is_plain_name
from geneformer_fast.tokenization.tally import Tally

UNFINISHED = "UNFINISHED.json"
MANIFEST = "manifest.json"
STATE = "state.json"
DATASET_INFO = "dataset_info.json"
#: What ``datasets`` writes beside the folders of several splits.
DATASET_DICT = "dataset_dict.json"
#: Where state.json lists the shards.
DATA_FILES = "_data_files"
PARTIAL_SHARDS = ".data-*.arrow.part"
FORMAT = "geneformer-fast tokens"
FORMAT_VERSION = 1
#: Hexadecimal digits of the manifest's fingerprint that state.json holds, as ``datasets`` writes its own.
N_FINGERPRINT = 16

#: What a manifest says of the rule of a family that reads values; of an input, which genes of its list it has.
PREPARATION, GENES_THERE = "preparation", "genes_there"

#: Columns a token folder always has; carried columns take other names.
OWN_COLUMNS = ("input_ids", "length", "source_file", "source_row")


def shard_name(index: int, n_shards: int | None = None) -> str:
    """File name of a shard: the one ``datasets`` uses, or, before their number is known, a provisional one."""
    return f"data-{index:05d}.arrow" if n_shards is None else f"data-{index:05d}-of-{n_shards:05d}.arrow"


@dataclass
class ShardEntry:
    """A shard in a manifest. ``sha256`` is not known of those that versions before it wrote."""

    file: str
    n_cells: schema.whole(0)  # type: ignore[valid-type]
    n_tokens: schema.whole(0)  # type: ignore[valid-type]
    n_bytes: schema.whole(0)  # type: ignore[valid-type]
    sha256: str | None = None


@dataclass
class Identity:
    """The vocabulary in a manifest."""

    name: str | None = None
    family: str | None = None
    special: dict[str, schema.whole(0, 2**31 - 1)] | None = None  # type: ignore[valid-type]
    n_tokens: schema.whole(1, 2**31) | None = None  # type: ignore[valid-type]
    fingerprint: str | None = None


@dataclass
class InputEntry:
    """An input in a manifest."""

    n_cells: schema.whole(0)  # type: ignore[valid-type]


@dataclass
class Manifest:
    """What is read of a manifest."""

    vocabulary: Identity
    inputs: list[InputEntry]
    n_cells: schema.whole(0)  # type: ignore[valid-type]
    shards: list[ShardEntry]


@dataclass
class Progress:
    """What is read of ``UNFINISHED.json`` to go on."""

    source: schema.whole(0)  # type: ignore[valid-type]
    row: schema.whole(0)  # type: ignore[valid-type]
    n_cells: schema.whole(0)  # type: ignore[valid-type]
    n_tokens: schema.whole(0)  # type: ignore[valid-type]
    shards: list[ShardEntry]
    cells: list[Tally]


@dataclass
class Unfinished:
    """``UNFINISHED.json``, as long as it is not a ``state.json`` that only lacks its name."""

    progress: Progress


@dataclass
class DataFile:
    """A shard in ``state.json``."""

    filename: str


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an unreadable one is an OutputError that names the file."""
    return schema.read_json(path, OutputError)


def read_unfinished(folder: Path) -> dict[str, Any]:
    """What is being made in a folder, and how far it is; or the ``state.json`` that a killed run had ready."""
    path = folder / UNFINISHED
    try:
        content = read_json(path)
        if DATA_FILES not in content:
            check_digest(content, path, OutputError, "nothing in it can be relied on")
            schema.check(Unfinished, content, path, OutputError)
    except OutputError as error:
        raise OutputError(f"{error}; pass --overwrite to start again") from None
    return content


def read_state(folder: Path) -> dict[str, Any]:
    """What ``datasets`` keeps of a folder: the names of its shards, and a fingerprint."""
    path = folder / STATE
    content = read_json(path)
    schema.check(list[DataFile], content.get(DATA_FILES), f"{path}: {DATA_FILES}", OutputError)
    names = [entry["filename"] for entry in content[DATA_FILES]]
    if not names or not all(is_plain_name(name) for name in names):
        raise OutputError(f"{path}: names no data files, or some that are not in this folder")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OutputError(f"{path}: names {twice} twice")
    return content


def sums_of(folder: Path, content: Mapping[str, Any] | None, names: Sequence[str]) -> list[str | None]:
    """SHA-256 of every shard as its folder's manifest has it; None where nobody wrote it down.

    Raises
    ------
    OutputError
        The manifest lists other shards than ``state.json`` does.
    """
    if content is None:
        return [None] * len(names)
    listed = [entry["file"] for entry in content["shards"]]
    if listed != list(names):
        raise OutputError(f"{folder / MANIFEST}: lists {_short(listed)}, but {STATE} lists {_short(list(names))}")
    return [entry.get("sha256") for entry in content["shards"]]


def read_manifest(
    folder: Path, *, state: Mapping[str, Any] | None = None, verify: bool | None = None
) -> dict[str, Any]:
    """What a finished folder is made of.

    Parameters
    ----------
    folder
        The folder.
    state
        Contents of its ``state.json``, whose fingerprint is that of the manifest; None reads it.
    verify
        Whether the fingerprint is compared; None: as the environment says.

    Raises
    ------
    OutputError
        A file is damaged, or the two do not belong together.
    """
    path = folder / MANIFEST
    content = schema.read_json(path, OutputError, Manifest)
    state = read_state(folder) if state is None else state
    if is_verifying(verify) and state.get("_fingerprint") != fingerprint_of(content)[:N_FINGERPRINT]:
        raise OutputError(
            f"{path} is damaged or was changed: its content does not fit the fingerprint in {STATE}; restore both, or "
            f"read it with {VERIFY}=0 where the change was meant"
        )
    return content


def unfinished_message(folder: Path) -> str:
    """What to say about a folder that is not finished."""
    content = read_unfinished(folder)
    progress = content.get("progress", {"n_cells": 0, "shards": content.get(DATA_FILES, [])})
    done = f"{progress['n_cells']:,} cells in {len(progress['shards'])} complete shards so far"
    if DATA_FILES in content:
        done = "all shards are complete, only the last step is missing"
    return (
        f"{folder} is unfinished: {done}. Run the same command with --resume (resume=True) to go on, or with "
        "--overwrite (overwrite=True) to start again."
    )


def differences(begun: Any, asked: Any, where: str = "") -> list[str]:
    """One line per place in which two JSON values differ."""
    if isinstance(begun, dict) and isinstance(asked, dict):
        lines = []
        for key in [*begun, *(key for key in asked if key not in begun)]:
            lines += differences(begun.get(key), asked.get(key), f"{where}.{key}" if where else key)
        return lines
    if isinstance(begun, list) and isinstance(asked, list) and len(begun) == len(asked):
        pairs = zip(begun, asked, strict=True)
        return [line for i, pair in enumerate(pairs) for line in differences(*pair, f"{where}[{i}]")]
    if isinstance(begun, list) and isinstance(asked, list):
        return [f"{where}: begun with {_named(begun, asked)}, now {_named(asked, begun)}"]
    return [] if begun == asked else [f"{where}: begun with {_short(begun)}, now {_short(asked)}"]


def _named(entries: list[Any], others: list[Any]) -> str:
    """How many entries, and which of them the other list lacks."""
    names = [entry.get("path") if isinstance(entry, dict) else entry for entry in entries]
    known = [entry.get("path") if isinstance(entry, dict) else entry for entry in others]
    only = [name for name in names if name not in known]
    return f"{len(entries)} entries" + (f" (among them {_short(only[:3])})" if only else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def state_of(folder: Path) -> str:
    """``"absent"``, ``"empty"``, ``"finished"``, ``"unfinished"`` or ``"foreign"``."""
    if not folder.exists():
        return "absent"
    if not folder.is_dir():
        return "foreign"
    if (folder / UNFINISHED).exists():
        return "unfinished"
    if (folder / STATE).exists() and (folder / MANIFEST).exists():
        return "finished"
    # A run killed at its very beginning leaves no more than a hidden folder with its first file.
    return "empty" if all(is_leftover(path) for path in folder.iterdir()) else "foreign"


def refuse_both(resume: bool, overwrite: bool) -> None:
    """Raise OutputError where a folder is to be gone on with and replaced."""
    if resume and overwrite:
        raise OutputError("resume and overwrite exclude each other: one keeps what is there, the other removes it")


def check_state(folder: Path, state: str, *, resume: bool, overwrite: bool) -> None:
    """Raise OutputError where a folder in this state (:func:`state_of`) may not be written."""
    if state == "foreign":
        raise OutputError(f"{folder} exists and is no token folder; nothing in it is touched. Name another one")
    if state == "finished" and not (resume or overwrite):
        raise OutputError(f"{folder} holds finished tokens; name another folder or pass --overwrite")
    if state == "unfinished" and not (resume or overwrite):
        raise OutputError(unfinished_message(folder))


def check_finished(folder: Path) -> None:
    """Raise OutputError where there is no finished token folder."""
    state = state_of(folder)
    if state == "absent":
        raise OutputError(f"{folder}: no such token folder")
    if state == "unfinished":
        raise OutputError(unfinished_message(folder))
    if not folder.is_dir() or not (folder / STATE).exists():
        raise OutputError(no_tokens_message(folder))


def no_tokens_message(folder: Path) -> str:
    """What to say about a folder that holds no tokens itself; of several splits it names the folders that do."""
    inside = sorted(path.name for path in folder.iterdir() if (path / STATE).is_file()) if folder.is_dir() else []
    is_dict = (folder / DATASET_DICT).exists()
    if inside or is_dict:
        what = "is a DatasetDict of the splits" if is_dict else "holds no tokens itself, but the token folders"
        advice = f"give one of them, such as {folder / inside[0]}" if inside else "copy them again"
        return f"{folder}: {what} {', '.join(inside) or 'that are missing'}; {advice}"
    return f"{folder}: not a token folder ({STATE} is missing); make one with tokenize"


def own_files(folder: Path) -> list[Path]:
    """The files of a token folder, those that mark it as finished first and the mark of an unfinished one last."""
    names = (STATE, MANIFEST, DATASET_INFO)
    shards = sorted(path for pattern in ("data-*.arrow", PARTIAL_SHARDS) for path in folder.glob(pattern))
    return [path for path in (*(folder / name for name in names), *shards, folder / UNFINISHED) if path.exists()]
