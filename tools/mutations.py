"""Breaks the kernels on purpose, one deliberate fault at a time, and expects a test to turn red for each.

Faults stand in ``tools/mutations/<op>.toml``::

    [[fault]]
    file = "kernels/geneformer_kernels/ops/varlen_attention/kernel.py"
    find = "tl.where(m_keys, b_scores, -float('inf'))"     # occurs exactly once in the file
    replace = "b_scores"
    tests = "tests/kernels/test_varlen_attention_triton.py -k forward"
    why = "keys of the next cell take part"

Masks of loads and stores are not written down one by one: each file of kernels that a file of faults names has a fault
for every condition of every mask, made from its syntax tree::

    [[masks]]
    file = "kernels/geneformer_kernels/ops/varlen_attention/kernel.py"
    tests = "tests/kernels/test_varlen_attention_triton.py"
    [masks.without_effect]
    "without m_rows[:, None]: m = " = "why no test can see it; such faults are left out"

Each fault is applied to a copy of the working tree, in which the tests run with Triton's interpreter. The exit code is
1, with a line per fault, if a fault survives its tests, cannot be applied, or if the tests are red without it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("tools") / "mutations"
KEYS = ("file", "find", "replace", "tests", "why")
#: What a copy of the working tree holds.
COPIED = ("kernels", "geneformer_fast", "bench", "tests", "pyproject.toml")

# pytest's exit codes.
PASSED, FAILED, NO_TESTS = 0, 1, 5
#: How a process ends that reads where nothing is: as red as a test can be.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class FaultError(Exception):
    """A fault that cannot be applied as it is written."""


@dataclass(frozen=True)
class Fault:
    """One deliberate fault, as a row of a file says it."""

    origin: str
    file: str
    find: str
    replace: str
    tests: str
    why: str

    def __str__(self) -> str:
        return f"{self.origin} ({self.why})"


def read_faults(root: Path = ROOT, ops: Iterable[str] | None = None) -> list[Fault]:
    """All faults below a repository root, or those of some operations (names of the files).

    Raises
    ------
    FaultError
        A file is not of the form above, or one that was asked for is absent.
    """
    paths = sorted((root / FOLDER).glob("*.toml"))
    if ops is not None:
        wanted = set(ops)
        absent = wanted - {path.stem for path in paths}
        if absent:
            raise FaultError(f"there is no {FOLDER.as_posix()}/{min(absent)}.toml")
        paths = [path for path in paths if path.stem in wanted]
    faults = []
    for path in paths:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise FaultError(f"{path.name}: {error}") from None
        for number, row in enumerate(tables.get("fault", []), 1):
            origin = f"{path.name} fault {number}"
            if sorted(row) != sorted(KEYS) or not all(isinstance(value, str) for value in row.values()):
                raise FaultError(f"{origin}: must hold exactly the texts {', '.join(KEYS)}, has {', '.join(row)}")
            faults.append(Fault(origin, **row))
        for row in tables.get("masks", []):
            if not {"file", "tests"} <= set(row) <= {"file", "tests", "without_effect"}:
                raise FaultError(f"{path.name} masks: must hold file, tests and without_effect, has {', '.join(row)}")
            faults += mask_faults(path.name, root=root, **row)
    return faults


def masked_calls(tree: ast.AST) -> list[ast.Call]:
    """Every call with a mask: loads, stores, atomic operations."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and any(keyword.arg == "mask" for keyword in node.keywords)
    ]


def mask_faults(
    origin: str, file: str, tests: str, without_effect: dict[str, str] | None = None, *, root: Path = ROOT
) -> list[Fault]:
    """A fault per condition of every mask of a file of kernels: loads and stores that do without it.

    The conditions ``a & b`` of a mask are left out one at a time, where the call says them and where the function gives
    them a name. Keys of without_effect are beginnings of what such a fault says of itself (its why).

    Raises
    ------
    FaultError
        There is no such file, or a key of without_effect is the beginning of none.
    """
    path = root / file
    if not path.is_file():
        raise FaultError(f"{origin}: there is no {file}")
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    faults = []
    for node, changed, condition in sorted(_without_conditions(ast.parse(text)), key=lambda found: found[0].lineno):
        find, replace = _in_text(text, node, ast.unparse(changed))
        why = f"without {ast.unparse(condition)}: {lines[node.lineno - 1].strip()}"
        faults.append(Fault(f"{origin} masks, {path.name} line {node.lineno}", file, find, replace, tests, why))
    spared = tuple(without_effect or ())
    for key in spared:
        if not any(fault.why.startswith(key) for fault in faults):
            raise FaultError(f"{origin}: no mask of {file} is {key}")
    return [fault for fault in faults if not fault.why.startswith(spared)]


def _without_conditions(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr, ast.expr]]:
    """For every condition of every mask, what to replace by what, and the condition."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = set()
        for call in masked_calls(function):
            (mask,) = (keyword.value for keyword in call.keywords if keyword.arg == "mask")
            names |= {node.id for node in ast.walk(mask) if isinstance(node, ast.Name)}
            for condition, rest in _one_left_out(mask):
                keywords = [keyword for keyword in call.keywords if keyword.arg not in ("mask", "other")]
                if rest is not None:
                    others = [keyword for keyword in call.keywords if keyword.arg == "other"]
                    keywords += [ast.keyword("mask", rest), *others]
                yield call, ast.Call(call.func, call.args, keywords), condition
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
                for condition, rest in _one_left_out(node.value):
                    if rest is not None:
                        yield node.value, rest, condition


def _one_left_out(mask: ast.expr) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Each condition of ``a & b & c``, and the others."""
    conditions = _conditions(mask)
    for i, condition in enumerate(conditions):
        rest = conditions[:i] + conditions[i + 1 :]
        yield condition, functools.reduce(lambda a, b: ast.BinOp(a, ast.BitAnd(), b), rest) if rest else None


def _conditions(mask: ast.expr) -> list[ast.expr]:
    if isinstance(mask, ast.BinOp) and isinstance(mask.op, ast.BitAnd):
        return _conditions(mask.left) + _conditions(mask.right)
    return [mask]


def _in_text(text: str, node: ast.expr, replacement: str) -> tuple[str, str]:
    """The text of a node and what to replace it with, with as many lines before it as make it the only one."""
    lines = text.splitlines(keepends=True)
    inside = ast.get_source_segment(text, node) or ""
    before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
    for i_line in reversed(range(node.lineno - 1)):
        if text.count(before + inside) == 1:
            break
        before = lines[i_line] + before
    return before + inside, before + replacement


def place_of(fault: Fault, root: Path) -> int:
    """Line number of the text that a fault replaces.

    Raises
    ------
    FaultError
        See :func:`mutated`.
    """
    text = _text_of(fault, root)
    return text[: text.index(fault.find)].count("\n") + 1


def mutated(fault: Fault, root: Path) -> str:
    """The text of the fault's file with the fault in it.

    Raises
    ------
    FaultError
        The file or the tests are absent, the text to find does not occur exactly once, or the result is no Python.
    """
    text = _text_of(fault, root)
    changed = text.replace(fault.find, fault.replace)
    # What stands around the statement with the fault is Python as it was, and takes most of the time.
    begin = text.index(fault.find)
    first, last = (text.count("\n", 0, place) + 1 for place in (begin, begin + len(fault.find)))
    touched = [lines for lines in _statements(text) if lines[0] <= last and first <= lines[1]]
    first, last = min([first, *(lines[0] for lines in touched)]), max([last, *(lines[1] for lines in touched)])
    grown = changed.count("\n") - text.count("\n")
    try:
        ast.parse("\n".join(changed.split("\n")[first - 1 : last + grown]))
    except SyntaxError as error:
        raise FaultError(f"{fault}: leaves no Python behind, line {first - 1 + (error.lineno or 1)}") from None
    return changed


@functools.cache
def _statements(text: str) -> list[tuple[int, int]]:
    """First and last line of every statement that is not within another, decorators with them."""
    return [
        (min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]), node.end_lineno or 0)
        for node in ast.parse(text).body
    ]


def _text_of(fault: Fault, root: Path) -> str:
    """The text of the fault's file, in which the text to find occurs once."""
    path = root / fault.file
    if not path.is_file():
        raise FaultError(f"{fault}: there is no {fault.file}")
    for name in shlex.split(fault.tests)[:1] or [""]:
        if not name or not (root / name.partition("::")[0]).exists():
            raise FaultError(f"{fault}: its tests must begin with a file, and {name or 'nothing'} is none")
    text = path.read_text(encoding="utf-8")
    n_found = text.count(fault.find) if fault.find else 0
    if n_found != 1:
        raise FaultError(f"{fault}: the text to find occurs {n_found} times in {fault.file}, not once")
    if fault.find == fault.replace:
        raise FaultError(f"{fault}: replaces a text by itself")
    return text


def copy_tree(root: Path, folder: Path) -> None:
    """A copy of what the tests need of a working tree."""
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif (root / name).is_file():
            shutil.copy(root / name, folder / name)


def run_tests(folder: Path, tests: str, limit_s: float) -> tuple[int | None, str]:
    """Exit code of pytest in a copy (None: not done in time) and the end of what it printed."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a second per run, and kernel tests need none
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"not done after {limit_s:.0f} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])


def unselected(tests: str) -> str:
    """The files that a selection is taken from, without ``-k`` and names of tests: run once for many faults."""
    words = shlex.split(tests)
    kept = [
        word.partition("::")[0] for i, word in enumerate(words) if word != "-k" and (i == 0 or words[i - 1] != "-k")
    ]
    return shlex.join(dict.fromkeys(kept))


def check_unbroken(root: Path, tests: str, limit_s: float) -> str | None:
    """Why tests prove nothing: they are red without any fault, or do not run. None if they are green."""
    with tempfile.TemporaryDirectory(prefix="unbroken_") as name:
        copy_tree(root, Path(name))
        code, end = run_tests(Path(name), tests, limit_s)
    if code == PASSED and " passed" not in end:
        return f"every test is skipped on this machine: {tests}\n{end}"
    return None if code == PASSED else f"without any fault, red or broken: {tests}\n{end}"


def check_fault(fault: Fault, root: Path, limit_s: float) -> str | None:
    """Why a fault is not proven to be caught; None if a test turned red or crashed."""
    with tempfile.TemporaryDirectory(prefix="mutated_") as name:
        folder = Path(name)
        copy_tree(root, folder)
        (folder / fault.file).write_text(mutated(fault, root), encoding="utf-8")
        code, end = run_tests(folder, fault.tests, limit_s)
    if code == FAILED or code in [-crash for crash in CRASHES]:
        return None
    if code == PASSED:
        return f"{fault}: SURVIVED {fault.tests}"
    if code == NO_TESTS:
        return f"{fault}: no test is selected by {fault.tests}"
    return f"{fault}: the tests neither passed nor failed: {fault.tests}\n{end}"


def run(root: Path, faults: Sequence[Fault], *, n_workers: int, limit_s: float) -> list[str]:
    """What is wrong with faults and tests, a text each; empty if every fault is caught.

    Tests that are red without any fault prove nothing, so their faults are not tried.
    """
    wrong = []
    for fault in faults:
        try:
            mutated(fault, root)
        except FaultError as error:
            wrong.append(str(error))
    if wrong:
        return wrong
    files = list(dict.fromkeys(unselected(fault.tests) for fault in faults))
    reasons = _in_parallel(lambda tests: check_unbroken(root, tests, limit_s), files, n_workers, "unbroken")
    green = {name for name, reason in zip(files, reasons, strict=True) if reason is None}
    tried = [fault for fault in faults if unselected(fault.tests) in green]
    reasons += _in_parallel(lambda fault: check_fault(fault, root, limit_s), tried, n_workers, "faults")
    return [reason for reason in reasons if reason is not None]


def _in_parallel(check: Callable, items: Sequence, n_workers: int, what: str) -> list[str | None]:
    from tqdm import tqdm

    with ThreadPoolExecutor(n_workers) as threads, tqdm(total=len(items), desc=what, unit="run", disable=None) as bar:
        futures = [threads.submit(check, item) for item in items]
        for future in futures:
            future.add_done_callback(lambda _: bar.update())
        try:
            return [future.result() for future in futures]
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Try every fault and name those that no test catches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="this file of faults only (may be repeated)")
    parser.add_argument("--match", default="", help="faults only whose line in the output matches this expression")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="test runs at a time (%(default)s)")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds one test run may take (%(default)s)")
    wanted = parser.parse_args(arguments)
    try:
        faults = [fault for fault in read_faults(root, wanted.op) if re.search(wanted.match, str(fault))]
    except FaultError as error:
        print(error)
        return 1
    wrong = run(root, faults, n_workers=wanted.jobs, limit_s=wanted.limit_s)
    for reason in wrong:
        print(reason)
    print(f"{len(faults)} faults, {len(wrong)} not proven to be caught")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
