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

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_fast.errors import OutputError

UNFINISHED = "UNFINISHED.json"
MANIFEST = "manifest.json"
STATE = "state.json"
DATASET_INFO = "dataset_info.json"
PARTIAL_SHARDS = ".data-*.arrow.part"
FORMAT = "geneformer-fast tokens"
FORMAT_VERSION = 1

#: Columns a token folder always has; carried columns take other names.
OWN_COLUMNS = ("input_ids", "length", "source_file", "source_row")


def shard_name(index: int, n_shards: int | None = None) -> str:
    """File name of a shard: the one ``datasets`` uses, or, before their number is known, a provisional one."""
    return f"data-{index:05d}.arrow" if n_shards is None else f"data-{index:05d}-of-{n_shards:05d}.arrow"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an unreadable one is an OutputError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise OutputError(f"{path}: holds no JSON object")
    return content


def unfinished_message(folder: Path) -> str:
    """What to say about a folder that is not finished."""
    progress = read_json(folder / UNFINISHED).get("progress", {})
    done = f"{progress.get('n_cells', 0):,} cells in {len(progress.get('shards', []))} complete shards"
    return (
        f"{folder} is unfinished: {done} so far. Run the same command with --resume (resume=True) to go on, or with "
        "--overwrite (overwrite=True) to start again."
    )


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """SHA-256 over a JSON object's canonical form, as hex."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


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
    # A run killed at its very beginning leaves no more than the temporary name of its first file.
    return "foreign" if any(path.name != f".{UNFINISHED}.tmp" for path in folder.iterdir()) else "empty"


def own_files(folder: Path) -> list[Path]:
    """The files of a token folder, those that mark it as finished first and the mark of an unfinished one last."""
    names = [STATE, MANIFEST, DATASET_INFO, *(f".{name}.tmp" for name in (STATE, MANIFEST, DATASET_INFO, UNFINISHED))]
    shards = sorted(path for pattern in ("data-*.arrow", PARTIAL_SHARDS) for path in folder.glob(pattern))
    return [path for path in (*(folder / name for name in names), *shards, folder / UNFINISHED) if path.exists()]
