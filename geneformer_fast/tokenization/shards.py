"""Writing token folders: their schema, batches of cells, and shards that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from geneformer_fast.counts.arrays import number_array
from geneformer_fast.files.writing import settle, system_errors
from geneformer_fast.tokenization import manifest

_DIGESTED_BYTES = 1 << 20
#: Names of Arrow types in the ``features`` of ``datasets``.
_FEATURE_NAMES = {"double": "float64", "float": "float32", "halffloat": "float16"}


def token_schema(
    tokens: np.dtype,
    carried: Mapping[str, pa.DataType],
    sources: Sequence[str],
    extra: Mapping[str, pa.DataType] | None = None,
) -> pa.Schema:
    """The schema of a token folder.

    Parameters
    ----------
    tokens
        Integer dtype of ``input_ids``.
    carried
        Name and type of the carried columns.
    sources
        Names of the inputs; ``source_file`` is an index into them (a ClassLabel of ``datasets``, which is how that
        library writes a dictionary-encoded column).
    extra
        Name and type of further columns after ``input_ids``: lists as long as these, or a number per cell.
    """
    fields = [
        pa.field("input_ids", pa.list_(pa.from_numpy_dtype(tokens))),
        *(pa.field(name, kind) for name, kind in (extra or {}).items()),
        *(pa.field(name, kind) for name, kind in carried.items()),
        pa.field("length", pa.int64()),
        pa.field("source_file", pa.int64()),
        pa.field("source_row", pa.int64()),
    ]
    schema = pa.schema(fields)
    content = json.dumps({"info": {"features": features(schema, sources)}}, ensure_ascii=False)
    return schema.with_metadata({"huggingface": content})


def features(schema: pa.Schema, sources: Sequence[str]) -> dict[str, Any]:
    """The ``features`` of ``datasets`` for a schema, in the spelling that its versions 2 to 5 all read."""

    def value(kind: pa.DataType) -> dict[str, Any]:
        return {"dtype": _FEATURE_NAMES.get(str(kind), str(kind)), "_type": "Value"}

    described = {}
    for field in schema:
        if pa.types.is_list(field.type):
            described[field.name] = {"feature": value(field.type.value_type), "_type": "Sequence"}
        elif field.name == "source_file":
            described[field.name] = {"names": list(sources), "_type": "ClassLabel"}
        else:
            described[field.name] = value(field.type)
    return described


def record_batch(schema: pa.Schema, values: np.ndarray, columns: Mapping[str, Any]) -> pa.RecordBatch:
    """A batch of cells: packed tokens, and the other columns by name; ``columns["length"]`` cuts the lists."""
    offsets = np.zeros(len(columns["length"]) + 1, dtype=np.int64)
    np.cumsum(columns["length"], out=offsets[1:])
    if offsets[-1] >= 2**31:
        raise ValueError(f"{offsets[-1]} tokens in one batch do not fit 32-bit offsets")
    cuts = number_array(offsets.astype(np.int32))

    def column(field: pa.Field) -> pa.Array:
        content = values if field.name == "input_ids" else columns[field.name]
        if pa.types.is_list(field.type):
            return pa.ListArray.from_arrays(cuts, number_array(content))
        return _as_arrow(content)

    return pa.RecordBatch.from_arrays([column(field) for field in schema], schema=schema)


def _as_arrow(values: np.ndarray | pa.Array) -> pa.Array:
    return values if isinstance(values, pa.Array) else number_array(values)


class ShardWriter:
    """One shard, under a hidden name until it is complete and on the disk.

    Parameters
    ----------
    folder, index
        Where, and which.
    schema
        Of every batch.
    """

    def __init__(self, folder: Path, index: int, schema: pa.Schema) -> None:
        self.path = folder / manifest.shard_name(index)
        self._partial = folder / f".{self.path.name}.part"
        with system_errors(self.path):
            self._file = pa.OSFile(str(self._partial), "wb")
            self._writer = pa.ipc.new_stream(self._file, schema)
        self.n_cells = 0
        self.n_tokens = 0
        self._digest, self._n_digested = hashlib.sha256(), 0

    @property
    def n_bytes(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def write(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        with system_errors(self.path):
            self._writer.write_batch(batch)
        self.n_cells += batch.num_rows
        self.n_tokens += len(batch.column("input_ids").values)

    def finish(self) -> dict[str, Any]:
        """Write the end of the shard. Returns its entry in the manifest."""
        with system_errors(self.path):
            self._writer.close()
            n_bytes = self.n_bytes
            self._file.close()
        return {"file": self.path.name, "n_cells": self.n_cells, "n_tokens": self.n_tokens, "n_bytes": n_bytes}

    def digest_written(self) -> None:
        """Bring the checksum up to what is written so far, so that little is left when the shard is sealed.

        For the thread that seals: a stream is only ever appended to, so what lies in the file stays as it is.
        """
        with open(self._partial, "rb", buffering=0) as file:
            file.seek(self._n_digested)
            while block := file.read(_DIGESTED_BYTES):
                self._digest.update(block)
                self._n_digested += len(block)

    def seal(self) -> str:
        """After ``finish``: bring the shard onto the disk, then under its name. May run in another thread.

        Returns
        -------
        str
            The SHA-256 of what was written.
        """
        with system_errors(self.path):
            self.digest_written()
            settle(self._partial)
            os.replace(self._partial, self.path)
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close and remove what is there of an incomplete shard."""
        if not self._file.closed:
            self._file.close()
        self._partial.unlink(missing_ok=True)
