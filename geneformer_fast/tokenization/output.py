"""A token folder in the making: shards, progress, resuming, and the one rename that finishes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from geneformer_fast.errors import OutputError
from geneformer_fast.files.checksums import check_file, fingerprint_of, is_verifying, with_digest
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.writing import sync_folder, system_errors, write_json
from geneformer_fast.tokenization import manifest
from geneformer_fast.tokenization.shards import ShardWriter, features

_AGAIN = "pass --overwrite to start again"
#: A shard is closed by the first batch that makes it this large. Small enough that little is lost when a run is killed.
SHARD_BYTES = 128 * 2**20


class TokenOutput:
    """Writes one token folder.

    Parameters
    ----------
    folder
        Where.
    schema, sources
        Of the shards; names of the inputs.
    plan
        What is being made, as JSON values: options, vocabulary, inputs. Resuming needs the same plan.
    resume, overwrite
        What to do with what is there: go on with it, or remove it.
    shard_bytes
        Size at which a shard is closed.

    Attributes
    ----------
    progress
        The state after the last complete shard on the disk: ``source`` and ``row`` to go on from, the ``shards`` and
        the ``cells`` tallied so far.
    is_finished
        True where resuming found nothing left to do.

    Raises
    ------
    OutputError
        The folder holds something else, or something finished or unfinished that neither option speaks for; another
        process is writing it; the plan differs from the one it was begun with.
    """

    def __init__(
        self,
        folder: Path,
        *,
        schema: pa.Schema,
        sources: Sequence[str],
        plan: Mapping[str, Any],
        resume: bool = False,
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        manifest.refuse_both(resume, overwrite)
        self.folder = folder
        self._schema = schema
        self._sources = list(sources)
        self._plan = dict(plan)
        self._shard_bytes = shard_bytes
        self._shard: ShardWriter | None = None
        # Bringing a shard onto the disk takes as long as making it: the next one is made meanwhile.
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._seals: list[Future[None]] = []
        self._is_new = not folder.exists()
        self.is_finished = False
        self.progress: dict[str, Any] = {"source": 0, "row": 0, "n_cells": 0, "n_tokens": 0, "shards": [], "cells": []}
        self._made = self.progress
        if (state := manifest.state_of(folder)) != "unfinished":  # which it also is while another process writes it
            manifest.check_state(folder, state, resume=resume, overwrite=overwrite)
        with contextlib.ExitStack() as lock:
            lock.enter_context(folder_lock(folder))
            state = manifest.state_of(folder)  # again, since another process may have finished it meanwhile
            manifest.check_state(folder, state, resume=resume, overwrite=overwrite)
            self._lock = lock.pop_all()
        try:
            if state in ("finished", "unfinished") and resume:
                self._resume(state)
            elif state in ("finished", "unfinished"):
                self._clear()
            if not self.is_finished:
                self._save_progress()
        except BaseException:
            self.close()
            raise

    def _clear(self) -> None:
        """Remove a token folder's files; from the first step on it says it is unfinished."""
        write_json(self.folder / manifest.UNFINISHED, {"format": manifest.FORMAT, "progress": self.progress})
        for path in manifest.own_files(self.folder):
            if path.name != manifest.UNFINISHED:
                path.unlink()

    def _resume(self, state: str) -> None:
        begun = manifest.read_unfinished(self.folder) if state == "unfinished" else manifest.read_manifest(self.folder)
        is_sealed = manifest.DATA_FILES in begun  # killed just before the last rename
        plan = manifest.read_manifest(self.folder, state=begun) if is_sealed else begun
        lines = [line for key in self._plan for line in manifest.differences(plan.get(key), self._plan[key], key)]
        if lines:
            asked, there = (place.get("options") for place in (self._plan, plan))
            is_old = isinstance(asked, dict) and isinstance(there, dict) and not asked.keys() <= there.keys()
            same = "Go on with the earlier version that began it" if is_old else "Repeat what it was begun with"
            raise OutputError(
                f"{self.folder} cannot be resumed, it was begun differently:\n  " + "\n  ".join(lines[:10]) +
                f"\n{same}, or pass --overwrite to start again."
            )  # fmt: skip
        if state == "finished" or is_sealed:
            if is_sealed:
                self._publish()
            self.is_finished = True
            return
        progress = begun["progress"]
        if progress["source"] > len(self._sources) or len(progress["cells"]) not in (0, len(self._sources)):
            raise OutputError(f"{self.folder / manifest.UNFINISHED}: progress is beyond the inputs; {_AGAIN}")
        self.progress = self._made = progress
        self._check_shards()

    def _check_shards(self) -> None:
        """Bring complete shards back under their provisional names and remove everything else."""
        shards = self.progress["shards"]
        kept = set()
        for index, entry in enumerate(shards):
            path = self.folder / manifest.shard_name(index)
            final = self.folder / manifest.shard_name(index, len(shards))
            if not path.exists() and final.exists():
                final.rename(path)
            if not path.exists() or path.stat().st_size != entry["n_bytes"]:
                raise OutputError(f"{path}: missing or not of {entry['n_bytes']} bytes any more; {_AGAIN}")
            if entry.get("sha256") is not None and is_verifying():
                check_file(path, entry["sha256"], OutputError, _AGAIN)
            kept.add(path.name)
        for path in manifest.own_files(self.folder):
            if path.name not in kept and path.name != manifest.UNFINISHED:
                path.unlink()

    @property
    def n_cells(self) -> int:
        """Cells written so far, those of the shard in work included."""
        return self._made["n_cells"] + (self._shard.n_cells if self._shard is not None else 0)

    def _save_progress(self) -> None:
        content = {
            "format": manifest.FORMAT,
            "message": "This token folder is unfinished. Run the same command with --resume to go on.",
            **self._plan,
            "progress": self.progress,
        }
        write_json(self.folder / manifest.UNFINISHED, with_digest(content))

    def write(self, batch: pa.RecordBatch | None, *, source: int, row: int, cells: list[dict[str, Any]]) -> None:
        """Append a batch (None: there is nothing of these cells to write).

        Parameters
        ----------
        source, row
            Where reading goes on after this batch.
        cells
            Tally of the cells so far, to be kept with the progress.
        """
        if batch is None or batch.num_rows == 0:
            return
        if self._shard is None:
            self._shard = ShardWriter(self.folder, len(self._made["shards"]), self._schema)
        self._shard.write(batch)
        self._sealer.submit(self._shard.digest_written)  # what fails here fails again when the shard is sealed
        if self._shard.n_bytes >= self._shard_bytes:
            self._close_shard(source, row, cells)

    def _close_shard(self, source: int, row: int, cells: list[dict[str, Any]]) -> None:
        assert self._shard is not None
        self._wait_for_seals()  # one at a time, or unwritten shards would pile up in memory
        shard, self._shard = self._shard, None
        entry = shard.finish()
        self._made = {
            "source": source,
            "row": row,
            "n_cells": self._made["n_cells"] + entry["n_cells"],
            "n_tokens": self._made["n_tokens"] + entry["n_tokens"],
            "shards": [*self._made["shards"], entry],
            "cells": [dict(tally) for tally in cells],
        }
        self._seals.append(self._sealer.submit(self._seal, shard, self._made))

    def _seal(self, shard: ShardWriter, made: dict[str, Any]) -> None:
        made["shards"][-1]["sha256"] = shard.seal()
        self.progress = made
        self._save_progress()

    def _wait_for_seals(self) -> None:
        while self._seals:
            self._seals.pop().result()

    def finish(self, *, source: int, cells: list[dict[str, Any]]) -> None:
        """Complete the folder."""
        if self._shard is not None:
            self._close_shard(source, 0, cells)
        self._wait_for_seals()
        shards = self.progress["shards"]
        for index in range(len(shards)):
            final = manifest.shard_name(index, len(shards))
            with system_errors(self.folder):
                os.rename(self.folder / manifest.shard_name(index), self.folder / final)
        files = [{**entry, "file": manifest.shard_name(i, len(shards))} for i, entry in enumerate(shards)]
        content = {
            "format": manifest.FORMAT,
            **self._plan,
            "n_cells": self.progress["n_cells"],
            "n_tokens": self.progress["n_tokens"],
            "cells": cells,
            "shards": files,
        }
        info = {"citation": "", "description": "", "homepage": "", "license": ""}
        described = features(self._schema, self._sources)
        write_json(self.folder / manifest.DATASET_INFO, {**info, "features": described})
        write_json(self.folder / manifest.MANIFEST, content)
        state: dict[str, Any] = {
            manifest.DATA_FILES: [{"filename": entry["file"]} for entry in files],
            "_fingerprint": fingerprint_of(content)[: manifest.N_FINGERPRINT],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(self.folder / manifest.UNFINISHED, state)
        self._publish()
        self.is_finished = True

    def _publish(self) -> None:
        with system_errors(self.folder):
            os.rename(self.folder / manifest.UNFINISHED, self.folder / manifest.STATE)
            sync_folder(self.folder)

    def discard_if_empty(self) -> None:
        """After a failure: where no shard is complete, nothing is worth resuming, so leave nothing behind."""
        self._give_up_shard()
        if self.progress["shards"] or self.is_finished:
            return
        for path in manifest.own_files(self.folder):
            path.unlink()
        if self._is_new:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def close(self) -> None:
        """Give up an incomplete shard and the lock."""
        self._give_up_shard()
        self._lock.close()

    def _give_up_shard(self) -> None:
        self._sealer.shutdown(wait=True)
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        for partial in self.folder.glob(manifest.PARTIAL_SHARDS):
            partial.unlink()  # of a shard whose sealing failed or was interrupted
