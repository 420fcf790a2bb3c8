"""Compiles every kernel under every plan for every architecture, without a card, and keeps what came out.

``python tools/aot_matrix.py`` compiles what changed since the last run and writes ``tools/aot_matrix.json`` (registers,
spills, shared memory and matrix instruction of every row), ``geneformer_kernels/capability.py`` (what choices are made
from) and a table in ``kernels/README.md``. It writes nothing and exits with 1, a line per breach, when something that
would be launched by default spills, needs more shared memory than a card has, became scalar arithmetic or does not
compile. ``--check`` compares and writes nothing; ``--sm`` looks at some architectures only.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
for _folder in (HERE, HERE.parent / "kernels"):  # this checkout's code, wherever the tool is started
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from aot_compile import MEASURE_VERSION, Compilers  # noqa: E402
from aot_tables import (  # noqa: E402
    ARCHITECTURES,
    COLUMNS,
    NO_CODE,
    ROOT,
    ROWS_FILE,
    Row,
    Table,
    files_of,
    read_table,
)
from geneformer_kernels.dispatch import OPERATIONS  # noqa: E402
from geneformer_kernels.launch import KernelCase  # noqa: E402
from geneformer_kernels.target import Target  # noqa: E402
from kernel_source import kernel_module, source_hash  # noqa: E402

MAX_SPILL_BYTES = 64
MAX_LINES = 80
PACKAGE = "geneformer_kernels.ops"


class CaseError(Exception):
    """The cases that a plan gives contradict each other or the kernel."""


@dataclass(frozen=True)
class Task:
    """One case on one architecture."""

    case: KernelCase
    sm: int
    module: str
    source: str

    @property
    def label(self) -> tuple[str, str, str, str, int]:
        """What a row is found by."""
        case = self.case
        return case.op, case.kernel, case.problem, case.dtype, self.sm

    @property
    def job(self) -> dict[str, Any]:
        """The case as a worker of aot_compile reads it."""
        case = self.case
        return {
            "module": self.module,
            "kernel": case.kernel,
            "sm": self.sm,
            "signature": case.signature,
            "constexprs": case.constexprs,
            "divisible": sorted(case.divisible),
            "options": case.launch.options,
        }

    @property
    def digits(self) -> str:
        """Eight digits of everything the plan says."""
        content = asdict(self.case) | {"divisible": sorted(self.case.divisible)}
        return _digest(content)[:8]

    def key(self, triton: str) -> str:
        """What a compiled result is remembered by: equal for cases that must compile to the same code."""
        return _digest([MEASURE_VERSION, triton, self.source, self.job])

    def row(self, result: dict[str, Any]) -> Row:
        """The row of the table that a compiled result makes."""
        launch = self.case.launch
        numbers = [result.get(name) for name in ("registers", "spill_bytes", "smem_bytes")]
        matrix = result.get("matrix", NO_CODE)
        return Row(
            *self.label, self.case.is_default, launch.num_warps, launch.num_stages, *numbers, matrix, self.digits
        )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_of(op: str, package: str = PACKAGE) -> Any:
    """An operation's plan if it has kernels to compile, else None."""
    names = (f"{package}.{op}", f"{package}.{op}.plan")
    if any(importlib.util.find_spec(name) is None for name in names):
        return None
    plan = importlib.import_module(f"{package}.{op}.plan")
    return plan if hasattr(plan, "kernel_cases") else None


def collect(ops: Iterable[str], sms: Iterable[int], *, package: str = PACKAGE) -> list[Task]:
    """Every case of some operations on some architectures.

    Raises
    ------
    CaseError
        Two cases have one name, a case names another operation, or a kernel that does not exist.
    """
    tasks: dict[tuple[str, str, str, str, int], Task] = {}
    hash_once = functools.cache(source_hash)
    for op in ops:
        plan = plan_of(op, package)
        for sm in sms if plan is not None else ():
            for case in plan.kernel_cases(Target.cuda(sm)):
                module = kernel_module(f"{package}.{op}", case.kernel)
                try:
                    task = Task(case, sm, module, hash_once(module, case.kernel))
                except LookupError as error:
                    raise CaseError(f"{op}: {error}, which kernel_cases names") from None
                if case.op != op:
                    raise CaseError(f"{op}: kernel_cases gives a case of {case.op}")
                if task.label in tasks:
                    raise CaseError(f"two cases are called {task.label}: their problems must tell them apart")
                tasks[task.label] = task
    return list(tasks.values())


def sources_of(tasks: Iterable[Task]) -> dict[str, dict[str, str]]:
    """op -> kernel -> the hash of its source."""
    sources: dict[str, dict[str, str]] = {}
    for task in tasks:
        sources.setdefault(task.case.op, {})[task.case.kernel] = task.source
    return sources


def compile_tasks(
    tasks: Sequence[Task], triton: str, *, n_workers: int, cache: Path | None, limit_s: float = 900.0
) -> list[tuple[Task, dict[str, Any]]]:
    """Each task with its result, as :func:`aot_compile.measure` gives it, or ``{"error": why}``.

    Results go into the cache (a folder; None: no cache) as they come, so an interrupted run loses nothing.
    """
    keys = {task.label: task.key(triton) for task in tasks}
    results: dict[str, dict[str, Any]] = {}
    for key in set(keys.values()) if cache is not None else ():
        with contextlib.suppress(OSError, ValueError):
            results[key] = json.loads((cache / key[:2] / f"{key}.json").read_text())
    jobs = {keys[task.label]: task.job for task in tasks if keys[task.label] not in results}
    if jobs:
        from tqdm import tqdm

        with (
            tqdm(total=len(jobs), desc="compile", unit="kernel", disable=None, smoothing=0) as bar,
            Compilers(min(n_workers, len(jobs)), limit_s=limit_s) as compilers,
        ):
            for key, result in compilers.run(jobs):
                results[key] = result
                if cache is not None and result.get("is_final", True):
                    _store(cache / key[:2] / f"{key}.json", result)
                bar.update()
    return [(task, results[keys[task.label]]) for task in tasks]


def _store(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(result, file)
    os.replace(file.name, path)


def breaches(results: Iterable[tuple[Task, dict[str, Any]]]) -> list[str]:
    """What may not be: a line each."""
    found = []
    for task, result in results:
        row, case = task.row(result), task.case
        limit = Target.cuda(task.sm).smem_bytes
        if "error" in result:
            if case.is_default:
                found.append(f"{row.name}: does not compile: {result['error']}")
            continue
        if row.smem_bytes > limit:
            found.append(f"{row.name}: {row.smem_bytes} bytes of shared memory, the card has {limit}")
        if case.has_dot != bool(row.matrix):
            found.append(f"{row.name}: has_dot is {case.has_dot} but the code has {row.matrix or 'no matrix product'}")
        if case.is_default and row.spill_bytes > MAX_SPILL_BYTES:
            found.append(f"{row.name}: spills {row.spill_bytes} bytes, allowed are {MAX_SPILL_BYTES}")
        if case.is_default and "FMA" in row.matrix:
            found.append(f"{row.name}: a matrix product became scalar arithmetic")
    return found


def table_of(results: Sequence[tuple[Task, dict[str, Any]]], triton: str) -> Table:
    """The table that results make."""
    return Table(triton, sources_of(task for task, _ in results), [task.row(result) for task, result in results])


def committed_table() -> Table:
    """The table as it stands in the repository."""
    return read_table(ROWS_FILE.read_text(encoding="utf-8")) if ROWS_FILE.exists() else Table("")


def differences(table: Table) -> list[str]:
    """Lines by which the committed files differ from what a table makes; empty where they agree."""
    lines: list[str] = []
    for path, text in files_of(table).items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        name = path.relative_to(ROOT).as_posix()
        lines += difflib.unified_diff(
            old.splitlines(), text.splitlines(), f"{name} (committed)", f"{name} (fresh)", "", "", 0, ""
        )
    return lines


def cache_folder() -> Path:
    """Where compiled results are remembered by default: outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "geneformer_fast" / "aot_matrix"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=OPERATIONS, help="this operation only (may be repeated)")
    parser.add_argument(
        "--sm", action="append", type=int, choices=ARCHITECTURES, help="this architecture only: prints, writes nothing"
    )
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (%(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of results (%(default)s)")
    parser.add_argument("--no-cache", action="store_true", help="compile everything again")
    parser.add_argument("--limit-s", type=float, default=900.0, help="seconds one kernel may take (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, judge, and write or compare."""
    wanted = _parse(arguments)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        print("Triton is not installed (its wheels are for Linux): pip install triton")
        return 2
    old = committed_table()
    ops, sms = wanted.op or OPERATIONS, wanted.sm or tuple(ARCHITECTURES)
    if wanted.op and not wanted.sm and old.rows and old.triton != triton:
        print(f"the committed table is of Triton {old.triton}, this is {triton}: compile every operation, without --op")
        return 2
    began = time.monotonic()
    try:
        tasks = collect(ops, sms)
    except CaseError as error:
        print(error)
        return 1
    cache = None if wanted.no_cache else wanted.cache
    try:
        results = compile_tasks(tasks, triton, n_workers=wanted.jobs, cache=cache, limit_s=wanted.limit_s)
    except KeyboardInterrupt:
        print("interrupted; nothing was written" + (", what was compiled is remembered" if cache else ""))
        return 130
    fresh, found = table_of(results, triton), breaches(results)
    for line in found:
        print(line)
    table = old.with_ops(fresh, ops) if wanted.op else fresh
    changes = _look(fresh, old, ops, sms) if wanted.sm else differences(table)
    if wanted.check:
        for line in changes[:MAX_LINES]:
            print(line)
        if len(changes) > MAX_LINES:
            print(f"... and {len(changes) - MAX_LINES} lines more")
    elif not wanted.sm and not found:
        for path, text in files_of(table).items():
            path.write_text(text, encoding="utf-8")
    n_changed = len(changes) if wanted.check else 0
    end = "nothing was written" if found or wanted.check or wanted.sm else f"written to {ROWS_FILE.name} and two more"
    print(f"{len(results)} rows, {len(found)} breaches, {time.monotonic() - began:.0f} s; {end}")
    return 1 if found or n_changed else 0


def _look(fresh: Table, old: Table, ops: Sequence[str], sms: Sequence[int]) -> list[str]:
    """Prints rows as aligned text, and returns those that are not the committed ones."""
    names = ("op", "kernel", *COLUMNS)
    lines = [list(names), *([str(getattr(row, name)) for name in names] for row in sorted(fresh.rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    committed = old.of(lambda row: row.op in ops and row.sm in sms).rows
    return [
        *(f"- {row}" for row in sorted(set(committed) - set(fresh.rows))),
        *(f"+ {row}" for row in sorted(set(fresh.rows) - set(committed))),
    ]


if __name__ == "__main__":
    sys.exit(main())
