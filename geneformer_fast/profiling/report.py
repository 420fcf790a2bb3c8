"""The report of a profiled run: one record, in JSON, in a table for the terminal, and as a page."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import pandas

#: Of ``report.json``. It grows when a field changes its meaning; new fields do not change it.
SCHEMA_VERSION = 1
# Beyond all that is counted here.
_MOST = 2**63 - 1


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
            A field is missing or holds something else; or another version wrote it, or nobody said which.
        """
        _check_versions(value, where)
        found: Report = build(cls, value, where, InputError)
        if (name := _too_large(value)) is not None:
            raise InputError(f"{where}: {name} is larger than any count; correct it, or restore it from a good copy")
        return found

    def to_frame(self) -> pandas.DataFrame:
        """Every figure in a row of its own, this report's and those of the engines it is compared with.

        Returns
        -------
        pandas.DataFrame
            ``engine``; ``section`` and ``name`` of the figure, as in ``report.json`` (``"flops.mfu"``,
            ``"cells.lengths.p90"``, ``"operations.varlen_attention.time_ms"``); ``value``, NaN where there is none;
            ``unit``; ``text``, of figures that are words; ``reason``, why a value is missing.

        Raises
        ------
        UnsupportedError
            pandas is not installed.
        """
        from geneformer_fast.profiling.frame import frame_of

        return frame_of(self)

    def to_html(self) -> str:
        """The report as one page that asks for nothing from anywhere.

        Raises
        ------
        UnsupportedError
            What draws it is not installed.
        """
        from geneformer_fast.profiling.page.html import page

        return page(self)

    def __repr__(self) -> str:
        what = self.subject
        return f"Report({what.mode} of {what.model} by {what.engine} on {what.device}: {self.cells.n:,} cells)"

    def __str__(self) -> str:
        from geneformer_fast.profiling.text import table

        return table(self)

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


def _check_versions(value: Any, where: str) -> None:
    """Refuse what another version wrote, of the report itself and of those it is compared with."""
    if not isinstance(value, dict):
        return  # which the schema says
    if "schema_version" not in value:
        raise InputError(f"{where}: schema_version is missing, so this is no report of geneformer-fast")
    version = value["schema_version"]
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{where} was written by a later version of geneformer-fast (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); read it with that version"
        )
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise InputError(
            f"{where}: there is no schema {version} of reports; correct it, or restore it from a good copy"
        )
    compared = value.get("compared")
    for place, other in enumerate(compared if isinstance(compared, list) else ()):
        _check_versions(other, f"{where}: compared.{place}")


def _too_large(value: Any, name: str = "") -> str | None:
    """The first whole number that no counter reaches, and no float holds."""
    if isinstance(value, dict | list):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        found = (_too_large(part, f"{name}.{key}" if name else str(key)) for key, part in parts)
        return next((each for each in found if each is not None), None)
    return name if isinstance(value, int) and abs(value) > _MOST else None
