"""What tools/aot_matrix.py writes: its rows, the capability table that choices are made from, a table for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from geneformer_kernels.dispatch import INSIDE, OPERATIONS
from geneformer_kernels.target import SMEM_BYTES, Target

ROOT = Path(__file__).resolve().parent.parent
ROWS_FILE = ROOT / "tools" / "aot_matrix.json"
CAPABILITY_FILE = ROOT / "kernels" / "geneformer_kernels" / "capability.py"
README_FILE = ROOT / "kernels" / "README.md"
BEGIN, END = "<!-- begin: python tools/aot_matrix.py -->", "<!-- end: python tools/aot_matrix.py -->"

NO_CODE = "does not compile"
ARCHITECTURES = {70: "Volta", 75: "Turing", 80: "Ampere", 86: "Ampere", 89: "Ada", 90: "Hopper"}
assert ARCHITECTURES.keys() <= SMEM_BYTES.keys()


@dataclass(frozen=True, order=True)
class Row:
    """One kernel under one plan on one architecture, and what the compiler made of it.

    Attributes
    ----------
    op, kernel, problem, dtype, sm
        Which; no two rows share all five.
    is_default
        Whether ``choose`` would launch it there by itself.
    warps, stages
        Of the launch.
    registers, spill_bytes, smem_bytes
        Per thread, per thread, and per block; None where it does not compile.
    matrix
        Matrix instructions in the machine code, ``"FMA"`` among them for a product that became scalar arithmetic; empty
        where there is no product; ``"does not compile"``.
    case
        Eight digits that change with everything the plan says of the row.
    """

    op: str
    kernel: str
    problem: str
    dtype: str
    sm: int
    is_default: bool
    warps: int
    stages: int
    registers: int | None
    spill_bytes: int | None
    smem_bytes: int | None
    matrix: str
    case: str

    @property
    def operation(self) -> str:
        """What ``choose`` is asked for: the kernel's own operation if it has one inside the folder's."""
        own = self.kernel.removesuffix("_kernel")
        return own if own in INSIDE else self.op

    @property
    def name(self) -> str:
        """The row in words."""
        problem = f", {self.problem}" if self.problem else ""
        return f"{self.op}: {self.kernel}, {self.dtype}{problem}, sm_{self.sm}"


COLUMNS = tuple(column.name for column in fields(Row) if column.name not in ("op", "kernel"))


@dataclass
class Table:
    """All rows, the version of Triton that compiled them, and the source each kernel had: op -> kernel -> hash."""

    triton: str
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def of(self, is_kept: Callable[[Row], bool]) -> Table:
        """The rows for which something holds, with the sources of their operations."""
        rows = [row for row in self.rows if is_kept(row)]
        return Table(self.triton, {row.op: self.sources[row.op] for row in rows}, rows)

    def with_ops(self, other: Table, ops: Iterable[str]) -> Table:
        """This table with some operations taken from another one."""
        replaced = set(ops)
        kept = self.of(lambda row: row.op not in replaced)
        taken = other.of(lambda row: row.op in replaced)
        return Table(other.triton, kept.sources | taken.sources, kept.rows + taken.rows)


def read_table(text: str) -> Table:
    """A table from the text that :func:`table_text` made."""
    stored = json.loads(text)
    table = Table(stored["triton"])
    for op, kernels in stored["operations"].items():
        table.sources[op] = {kernel: part["source"] for kernel, part in kernels.items()}
        for kernel, part in kernels.items():
            table.rows += [Row(op, kernel, **dict(zip(stored["columns"], row, strict=True))) for row in part["rows"]]
    return table


def table_text(table: Table) -> str:
    """The table as JSON that reads well in a diff: sorted, one line per row."""
    lines = ["{", f'"triton": {json.dumps(table.triton)},', f'"columns": {json.dumps(COLUMNS)},', '"operations": {']
    for op in sorted(table.sources, key=operation_order):
        lines.append(f"  {json.dumps(op)}: {{")
        for kernel, source in sorted(table.sources[op].items()):
            lines.append(f'    {json.dumps(kernel)}: {{"source": {json.dumps(source)}, "rows": [')
            rows = sorted(row for row in table.rows if (row.op, row.kernel) == (op, kernel))
            lines += [f"      {json.dumps([getattr(row, name) for name in COLUMNS])}," for row in rows]
            lines[-1] = lines[-1].removesuffix(",")
            lines.append("    ]},")
        lines[-1] = lines[-1].removesuffix(",")
        lines.append("  },")
    lines[-1] = lines[-1].removesuffix(",")
    return "\n".join([*lines, "}", "}"]) + "\n"


def operation_order(op: str) -> tuple[int, str]:
    """Sort key: the order of ``dispatch.OPERATIONS``, then others by name."""
    return (OPERATIONS.index(op) if op in OPERATIONS else len(OPERATIONS), op)


def capability(rows: Iterable[Row]) -> dict[tuple[str, int, str], str]:
    """(op, sm, dtype) -> ``"tensor cores"``, ``"plain"``, ``"fma"`` or ``"none"``: the worst of what may be launched.

    Cases that no choice launches by itself count for a kernel that has no other, as evidence of why it is not launched;
    beside matrix products that do run they say nothing.
    """
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (operation_order(row.operation), row.sm, row.dtype)):
        groups.setdefault((row.operation, row.sm, row.dtype), []).append(row)
    return {key: _capability_of(group) for key, group in groups.items()}


def _capability_of(rows: list[Row]) -> str:
    counted = [row for row in rows if row.is_default]
    if not any(row.matrix for row in counted):
        covered = {row.kernel for row in counted}
        counted += [row for row in rows if row.kernel not in covered]
    found = {row.matrix for row in counted}
    if NO_CODE in found:
        return "none"
    if any("FMA" in matrix for matrix in found):
        return "fma"
    return "tensor cores" if any(found) else "plain"


CAPABILITY_HEAD = '''\
"""GENERATED by tools/aot_matrix.py; do not edit. What each operation's matrix products become on each architecture.

``"tensor cores"``: matrix instructions. ``"plain"``: the operation has no matrix product. ``"fma"``: it compiles, but
to scalar arithmetic, tens of times slower than the card. ``"none"``: it does not compile.
"""

from __future__ import annotations

'''


def capability_text(rows: Iterable[Row]) -> str:
    """The module ``geneformer_kernels.capability``."""
    lines = [f'    ("{op}", {sm}, "{dtype}"): "{kind}",\n' for (op, sm, dtype), kind in capability(rows).items()]
    body = "{\n" + "".join(lines) + "}" if lines else "{}"
    return f"{CAPABILITY_HEAD}CAPABILITY: dict[tuple[str, int, str], str] = {body}\n"


def readme_text(table: Table) -> str:
    """The operation × architecture table for people, in markdown."""
    if not table.rows:
        return "No kernel has been compiled yet.\n"
    head = ["operation", *(f"sm_{sm} {name}" for sm, name in ARCHITECTURES.items()), "rows", "registers", "spill bytes"]
    lines = [f"| {' | '.join(head)} |", "|---" * (1 + len(ARCHITECTURES)) + "|---:" * 3 + "|"]
    kinds = capability(table.rows)
    for op in sorted({row.operation for row in table.rows}, key=operation_order):
        rows = [row for row in table.rows if row.operation == op]
        launched = [row for row in rows if row.is_default and row.matrix != NO_CODE]
        most = [max((getattr(row, name) or 0 for row in launched), default=0) for name in ("registers", "spill_bytes")]
        cells = [_cell([row for row in rows if row.sm == sm], kinds, op, sm) for sm in ARCHITECTURES]
        lines.append(f"| {' | '.join([f'`{op}`', *cells, str(len(rows)), *map(str, most)])} |")
    return "\n".join(lines) + f"\n\nCompiled by Triton {table.triton}.\n"


def _cell(rows: list[Row], kinds: dict[tuple[str, int, str], str], op: str, sm: int) -> str:
    dtypes = sorted({row.dtype for row in rows})
    if not dtypes:
        return ""
    fastest = Target.cuda(sm).fastest_dtype
    dtype = fastest if fastest in dtypes else dtypes[0]
    kind = kinds[op, sm, dtype]
    if kind == "tensor cores":
        names = {name for row in rows if row.dtype == dtype and row.is_default for name in row.matrix.split("+")}
        return ", ".join(sorted(names - {""}))
    return {"plain": "Triton", "fma": "library (scalar)", "none": "library (no code)"}[kind]


def with_section(text: str, section: str) -> str:
    """A document with what lies between the two markers replaced.

    Raises
    ------
    ValueError
        The markers are not there, once each and in order.
    """
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise ValueError(f"the document must hold {BEGIN} and then {END}, once each")
    return f"{head}{BEGIN}\n\n{section}\n{END}{tail}"


def files_of(table: Table) -> dict[Path, str]:
    """File -> its whole text, for everything that is generated from a table."""
    return {
        ROWS_FILE: table_text(table),
        CAPABILITY_FILE: capability_text(table.rows),
        README_FILE: with_section(README_FILE.read_text(encoding="utf-8"), readme_text(table)),
    }
