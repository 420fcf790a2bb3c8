"""The report of a profiled run: one record, in JSON, in a table for the terminal, and as a page."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geneformer_fast.errors import InputError
from geneformer_fast.files.schema import build, read_json
from geneformer_fast.files.writing import write_json
from geneformer_fast.profiling.figures import (
    Ceilings,
    Cells,
    Energy,
    Finding,
    Flops,
    Memory,
    Operation,
    Series,
    Setting,
    Subject,
    Timing,
    Tokens,
)

#: Of ``report.json``. It grows when a field changes its meaning; new fields do not change it.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What a profiled run came to; see :mod:`geneformer_fast.profiling.figures` for each figure's definition.

    Attributes
    ----------
    schema_version
        :data:`SCHEMA_VERSION`.
    subject
        What was profiled.
    machine
        Processor, card, versions, commit, date (:func:`geneformer_fast.profiling.machine.provenance`).
    ceilings, time, cells, tokens, flops, memory, energy, operations
        The figures.
    blocks
        Milliseconds per block of the encoder, forward and backward together, over the steps that torch's profiler
        watched.
    series
        Power, memory and utilisation over time.
    findings
        What to change, most useful first.
    compared
        The same cells through another engine.
    sweep
        Settings that were tried.
    """

    subject: Subject
    machine: dict[str, Any]
    ceilings: Ceilings
    time: Timing
    cells: Cells
    tokens: Tokens
    flops: Flops
    memory: Memory
    energy: Energy
    operations: list[Operation] = field(default_factory=list)
    blocks: list[float] = field(default_factory=list)
    series: Series = field(default_factory=Series)
    findings: list[Finding] = field(default_factory=list)
    compared: list[Report] = field(default_factory=list)
    sweep: list[Setting] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any], where: str = "the report") -> Report:
        """The report that :meth:`to_dict` gave.

        Raises
        ------
        InputError
            A field is missing or holds something else; or a later version wrote it.
        """
        version = value.get("schema_version") if isinstance(value, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise InputError(
                f"{where} was written by a later version of geneformer-fast (schema {version}, this one knows "
                f"{SCHEMA_VERSION}); read it with that version"
            )
        return build(cls, value, where, InputError)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``report.json``.

        Raises
        ------
        OutputError
            It cannot be written; nothing half-written is left.
        """
        path = Path(path)
        write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read ``report.json``.

        Raises
        ------
        InputError
            It is no report.
        """
        return cls.from_dict(read_json(Path(path), InputError), str(path))
