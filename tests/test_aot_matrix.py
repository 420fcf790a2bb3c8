"""The committed table of compiled kernels is true and complete."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import aot_matrix
import kernel_source
import pytest
from aot_tables import ARCHITECTURES, NO_CODE, Row, Table
from geneformer_kernels.capability import CAPABILITY
from geneformer_kernels.dispatch import INSIDE, OPERATIONS, Impl, ImplUnavailableError, candidates, choose
from geneformer_kernels.target import CARDS, Target

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

N_WORKERS = min(os.cpu_count() or 1, 4)

DTYPES = ("float16", "bfloat16", "float32", "float64")

COMPILED_OPS = [op for op in OPERATIONS if aot_matrix.plan_of(op) is not None]

CHOSEN_OPS = [op for op in OPERATIONS if op in COMPILED_OPS or op in INSIDE]


@pytest.fixture(scope="module")
def committed() -> Table:
    table = aot_matrix.committed_table()
    if not table.rows:
        pytest.skip(
            "nothing is compiled yet: python tools/aot_matrix.py makes the table, choices refuse Triton until then"
        )
    return table


@pytest.fixture(scope="module")
def tasks() -> list[aot_matrix.Task]:
    return aot_matrix.collect(OPERATIONS, ARCHITECTURES)


def triton_of(table: Table) -> str:
    """The installed Triton, if it is the one that compiled a table."""
    installed = importlib.metadata.version("triton")
    if installed != table.triton:
        pytest.skip(f"the table was compiled by Triton {table.triton}; another version, {installed}, is another code")
    return installed


def test_the_table_holds_the_cases_that_the_plans_give_now(committed, tasks):
    now = {(*task.label, task.digits) for task in tasks}
    then = {(row.op, row.kernel, row.problem, row.dtype, row.sm, row.case) for row in committed.rows}
    assert sorted(now - then) == [], "run python tools/aot_matrix.py"
    assert sorted(then - now) == [], "run python tools/aot_matrix.py"


def test_the_table_is_of_the_kernels_as_they_are_now(committed, tasks):
    assert committed.sources == aot_matrix.sources_of(tasks), "run python tools/aot_matrix.py"


def test_every_generated_file_is_what_the_table_gives(committed):
    assert aot_matrix.differences(committed) == []


def test_every_kernel_is_in_the_table(committed):
    folder = aot_matrix.ROOT / "kernels" / "geneformer_kernels" / "ops"
    for op in COMPILED_OPS:
        found = [
            name for path in kernel_source.kernel_files(folder / op) for name in kernel_source.kernel_functions(path)
        ]
        assert sorted(found) == sorted(committed.sources[op]), op


def test_no_row_of_a_default_plan_breaks_a_limit(committed, tasks):
    rows = {(row.op, row.kernel, row.problem, row.dtype, row.sm): row for row in committed.rows}
    results = [(task, result_of(rows[task.label])) for task in tasks if task.label in rows]
    assert aot_matrix.breaches(results) == []


def result_of(row: Row) -> dict:
    if row.matrix == NO_CODE:
        return {"error": NO_CODE}
    return {name: getattr(row, name) for name in ("registers", "spill_bytes", "smem_bytes", "matrix")}


@pytest.mark.parametrize("op", COMPILED_OPS)
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_cases_depend_on_the_architecture_only(op, card):
    plan = aot_matrix.plan_of(op)
    assert plan.kernel_cases(card) == plan.kernel_cases(Target.cuda(card.sm))


@pytest.mark.parametrize("op", CHOSEN_OPS)
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_choices_and_compiled_rows_agree(committed, op, card):
    """What would be launched has been compiled, and what is compiled as a default can be launched."""
    compiled = {row.dtype for row in committed.rows if (row.operation, row.sm) == (op, card.sm) and row.is_default}
    if op != "rank_genes":  # which is float64 arithmetic everywhere
        assert (op, card.sm, card.fastest_dtype) in CAPABILITY
    for dtype in DTYPES:
        can_run = any(option.impl == Impl.TRITON and option.can_run for option in candidates(op, dtype, card))
        try:
            chosen = choose(op, dtype, card).impl
        except ImplUnavailableError:
            chosen = None
        assert chosen != Impl.TRITON or dtype in compiled, f"{dtype} would be launched without having been compiled"
        assert can_run or dtype not in compiled, f"{dtype} is compiled as a default but cannot run"


def representative(table: Table) -> list[Row]:
    """The lightest row of each operation, and of every other one with a matrix product, on architectures in turn."""
    chosen = []
    for i, op in enumerate(table.sources):
        for has_dot, sms in ((False, list(ARCHITECTURES)), (True, [80, 86, 89, 90])):
            sm = sms[i % len(sms)]
            rows = [row for row in table.rows if (row.op, row.sm, bool(row.matrix)) == (op, sm, has_dot)]
            rows = [row for row in rows if row.matrix != NO_CODE and not (has_dot and i % 2)]
            chosen += sorted(rows, key=lambda row: (row.registers * row.warps, row))[:1]
    return chosen


@has_triton
def test_a_fresh_table_equals_the_committed_one_in_a_sample(committed, tasks):
    triton = triton_of(committed)
    rows = representative(committed)
    labels = {(row.op, row.kernel, row.problem, row.dtype, row.sm) for row in rows}
    chosen = [task for task in tasks if task.label in labels]
    results = aot_matrix.compile_tasks(chosen, triton, n_workers=N_WORKERS, cache=None)
    assert sorted(task.row(result) for task, result in results) == sorted(rows)


@pytest.mark.slow
@has_triton
def test_a_fresh_table_equals_the_committed_one(committed, tasks):
    triton = triton_of(committed)
    results = aot_matrix.compile_tasks(tasks, triton, n_workers=N_WORKERS, cache=None)
    assert aot_matrix.breaches(results) == []
    assert aot_matrix.differences(aot_matrix.table_of(results, triton)) == []
