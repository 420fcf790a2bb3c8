"""tools/aot_matrix.py notices all it should, on kernels that are wrong on purpose."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import aot_compile
import aot_matrix
import aot_tables
import kernel_source
import pytest
from aot_tables import NO_CODE, Row

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
N_WORKERS = min(os.cpu_count() or 1, 4)

TOY_KERNELS = {
    "good": '''
        @triton.jit
        def good_kernel(x_ptr, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
            """One program = BLOCK numbers."""
            o = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + o, mask=o < n, other=0.0)
            if SCALE is not None:
                x = x * SCALE
            tl.store(x_ptr + o, x, mask=o < n)
        ''',
    "spilling": '''
        @triton.jit
        def spilling_kernel(x_ptr, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
            """All numbers are needed twice: 512 of them per thread in 255 registers."""
            o = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + o)
            tl.store(x_ptr + o, x - tl.sum(x, 0) * SCALE)
        ''',
    "product": '''
        @triton.jit
        def product_kernel(x_ptr, n, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
            """Sum of n products of [M, K] by its transpose."""
            o_m, o_k = tl.arange(0, M), tl.arange(0, K)
            b_sum = tl.zeros((M, M), tl.float32)
            for i in range(n):
                b_x = tl.load(x_ptr + i * M * K + o_m[:, None] * K + o_k[None, :])
                b_y = tl.load(x_ptr + i * M * K + o_m[None, :] * K + o_k[:, None])
                b_sum += tl.dot(b_x, b_y, input_precision=PRECISION)
            tl.store(x_ptr + o_m[:, None] * M + o_m[None, :], b_sum.to(x_ptr.dtype.element_ty))
        ''',
    "refused": """
        @triton.jit
        def refused_kernel(x_ptr, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
            tl.static_assert(BLOCK == 1, "no such block")
        """,
    "endless": """
        import time

        time.sleep(60)


        @triton.jit
        def endless_kernel(x_ptr, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
            pass
        """,
    "deadly": """
        import os

        os.abort()


        @triton.jit
        def deadly_kernel(x_ptr, n, SCALE: tl.constexpr, BLOCK: tl.constexpr):
            pass
        """,
}

TOY_PLAN = """
from dataclasses import replace

from geneformer_kernels.launch import KernelCase, Launch, pointer


def kernel_cases(target):
    plain = KernelCase(
        "{op}", "{op}_kernel", "", "float32", {{"x_ptr": pointer("float32"), "n": "i32"}},
        {{"SCALE": 2.0, "BLOCK": 128}}, Launch(num_warps=1), frozenset({{"x_ptr"}}),
    )
    product = replace(
        plain, constexprs={{"M": 32, "K": 32, "PRECISION": "tf32x3"}}, launch=Launch(num_warps=4), has_dot=True
    )
    half = replace(product, dtype="float16", signature={{"x_ptr": pointer("float16"), "n": "i32"}})
    return {cases}
"""

TOY_CASES = {
    "good": '(plain, replace(plain, problem="no scale", constexprs={"SCALE": None, "BLOCK": 128}))',
    "spilling": '(replace(plain, constexprs={"SCALE": 2.0, "BLOCK": 16384}),)',
    "product": """(
        product, half, replace(product, problem="scalar", constexprs={"M": 16, "K": 16, "PRECISION": "ieee"}),
        replace(product, problem="scalar, never launched", is_default=False,
                constexprs={"M": 16, "K": 16, "PRECISION": "ieee"}),
        replace(half, problem="large", constexprs={"M": 128, "K": 64, "PRECISION": "tf32"},
                launch=Launch(num_warps=8, num_stages=5)),
        replace(half, problem="not announced", has_dot=False),
    )""",
    "refused": '(plain, replace(plain, problem="never launched", is_default=False))',
    "deadly": "(plain,)",
    "endless": "(plain,)",
    "absent": "(plain,)",
    "twice": "(plain, replace(plain, constexprs={}))",
    "stray": '(replace(plain, op="good"),)',
    "misnamed": '(replace(plain, signature={"y_ptr": "*fp32", "n": "i32"}),)',
}


@pytest.fixture(scope="module")
def toy_package(tmp_path_factory: pytest.TempPathFactory):
    """A package ``toyops`` of operations as kernels/geneformer_kernels/ops is one."""
    root = tmp_path_factory.mktemp("toys")
    (root / "toyops").mkdir()
    (root / "toyops" / "__init__.py").write_text("")
    for op, cases in TOY_CASES.items():
        folder = root / "toyops" / op
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "plan.py").write_text(TOY_PLAN.format(op=op, cases=cases))
        kernel = TOY_KERNELS.get(op, TOY_KERNELS["good"].replace("good", op if op != "absent" else "good"))
        head = "import triton\nimport triton.language as tl\n\n\n"
        (folder / "kernel.py").write_text(head + textwrap.dedent(kernel))
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] == "toyops"]:
        del sys.modules[name]


def toy_tasks(*ops: str, sms: tuple[int, ...] = (86,)) -> list[aot_matrix.Task]:
    return aot_matrix.collect(ops, sms, package="toyops")


@pytest.fixture(scope="module")
def toy_results(toy_package, tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    cache = tmp_path_factory.mktemp("cache")
    tasks = [
        *toy_tasks("good", "spilling", "product", "refused", "deadly", "misnamed"),
        *(task for task in toy_tasks("product", sms=(70,)) if task.case.problem == ""),
        *(task for task in toy_tasks("product", sms=(90,)) if task.case.problem == "large"),
    ]
    results = aot_matrix.compile_tasks(tasks, "3", n_workers=N_WORKERS, cache=cache)
    return SimpleNamespace(tasks=tasks, results=results, cache=cache)


def row_of(toy_results, op: str, problem: str = "", dtype: str = "float32", sm: int = 86) -> Row:
    (row,) = (
        task.row(result)
        for task, result in toy_results.results
        if task.label == (op, f"{op}_kernel", problem, dtype, sm)
    )
    return row


def test_what_is_wrong_is_named_and_nothing_else(toy_results):
    found = aot_matrix.breaches(toy_results.results)
    spilled = row_of(toy_results, "spilling").spill_bytes
    needed = row_of(toy_results, "product", "large", "float16").smem_bytes
    expected = [
        f"spilling: spilling_kernel, float32, sm_86: spills {spilled} bytes, allowed are 64",
        "product: product_kernel, float32, scalar, sm_86: a matrix product became scalar arithmetic",
        f"product: product_kernel, float16, large, sm_86: {needed} bytes of shared memory, the card has 101376",
        "product: product_kernel, float16, not announced, sm_86: has_dot is False but the code has HMMA",
        "refused: refused_kernel, float32, sm_86: does not compile: ",
        "deadly: deadly_kernel, float32, sm_86: does not compile: the compiler died (SIGABRT)",
        "misnamed: misnamed_kernel, float32, sm_86: does not compile: ValueError: the case names ['y_ptr'] that",
        "product: product_kernel, float32, sm_70: a matrix product became scalar arithmetic",
        "product: product_kernel, float16, sm_70: a matrix product became scalar arithmetic",
    ]
    assert len(found) == len(expected), found
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(start)
    assert "no such block" in found[4]


def test_what_is_read_of_the_code(toy_results):
    good = row_of(toy_results, "good")
    assert (good.spill_bytes, good.matrix) == (0, "")
    assert 0 < good.registers <= 64
    # 512 numbers per thread do not fit into 255 registers: at least the difference is stored.
    assert 4 * (512 - 255) <= row_of(toy_results, "spilling").spill_bytes < 4 * 2 * 512
    assert row_of(toy_results, "product").matrix == "HMMA"
    assert row_of(toy_results, "product", dtype="float16").matrix == "HMMA"
    assert row_of(toy_results, "product", "scalar").matrix == "FMA"
    assert row_of(toy_results, "product", "large", "float16", 90).matrix == "HGMMA"
    assert row_of(toy_results, "product", dtype="float16", sm=70).matrix == "FMA"
    assert row_of(toy_results, "product", "large", "float16").smem_bytes > 101_376
    refused = row_of(toy_results, "refused")
    assert (refused.matrix, refused.registers, refused.smem_bytes) == (NO_CODE, None, None)


def test_results_are_remembered_until_the_kernel_or_the_case_changes(toy_results, toy_package, monkeypatch):
    compiled = []

    class Recording:
        def __init__(self, n_workers, limit_s):
            pass

        __enter__ = __exit__ = lambda self, *exc: self

        def run(self, jobs):
            compiled.extend(job["kernel"] for job in jobs.values())
            return ((key, {"registers": 1, "spill_bytes": 0, "smem_bytes": 0, "matrix": ""}) for key in jobs)

    monkeypatch.setattr(aot_matrix, "Compilers", Recording)

    def compile_again(tasks, triton="3"):
        compiled.clear()
        return aot_matrix.compile_tasks(tasks, triton, n_workers=1, cache=toy_results.cache)

    again = compile_again(toy_results.tasks)
    assert compiled == ["deadly_kernel"]  # that a compiler died says nothing of the next time
    for (task, new), (_, old) in zip(again, toy_results.results, strict=True):
        assert new == old or task.case.op == "deadly"

    good = toy_tasks("good")
    compile_again([replace(task, case=replace(task.case, problem="another name")) for task in good])
    assert compiled == []
    compile_again([replace(good[0], case=replace(good[0].case, constexprs={"SCALE": 3.0, "BLOCK": 128}))])
    assert len(compiled) == 1
    compile_again(good, triton="4")
    assert len(compiled) == 2
    path = toy_package / "toyops" / "good" / "kernel.py"
    path.write_text(path.read_text().replace("x * SCALE", "x * SCALE + 1"))
    kernel_source.read_module.cache_clear()
    compile_again(toy_tasks("good"))
    assert len(compiled) == 2


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("absent", r"toyops\.absent\.kernel defines no absent_kernel"),
        ("twice", "two cases are called"),
        ("stray", "gives a case of good"),
    ],
)
def test_contradictory_cases_are_refused(toy_package, op, message):
    with pytest.raises(aot_matrix.CaseError, match=message):
        toy_tasks(op)


@has_triton
def test_a_compiler_that_never_ends_is_given_up(toy_package):
    (task,) = toy_tasks("endless")
    with aot_compile.Compilers(1, limit_s=0.3) as compilers:
        ((key, result),) = compilers.run({"key": task.job})
    assert (key, result) == ("key", {"error": "took longer than 0.3 s", "is_final": False})


def test_what_became_of_products_is_read_from_text():
    ttgir = "%0 = tt.dot %a, %b, %c : tensor<16x16xf16, #A> * tensor<16x16xf16, #B> -> tensor<16x16xf32, #{}> loc(#loc)"
    product, scalar = "HMMA.16816.F32 R4, R8, R12, R4 ;", "FFMA R4, R8, R12, R4 ;"
    ptx = "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}"
    read = aot_compile.matrix_instructions
    assert read("", scalar) == ""
    assert read(ttgir.format("mma"), product) == read(ttgir.format("ttg.nvidia_mma<{x}"), product) == "HMMA"
    assert read(ttgir.format("mma1"), ptx) == "HMMA"
    assert read(ttgir.format("mma"), "HGMMA.64x64x16.F32 R24, gdesc[UR8], !UPT ;") == "HGMMA"
    assert read(ttgir.format("blocked"), scalar) == "FMA"
    assert read(ttgir.format("mma"), scalar) == "FMA"  # whatever Triton intended
    assert read("ttng.warp_group_dot %a, %b, %c", scalar) == "FMA"
    # One product of two that became scalar shows, although the other runs on tensor cores.
    assert read(ttgir.format("mma") + "\n" + ttgir.format("blocked1"), product) == "HMMA+FMA"
    with pytest.raises(ValueError, match="ptxas says nothing"):
        aot_compile.resources("")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The generated files of a repository without rows, and a tool that works on them."""
    (tmp_path / "README.md").write_text(f"# Kernels\n{aot_tables.BEGIN}\n{aot_tables.END}\n")
    for name in ("ROWS_FILE", "CAPABILITY_FILE", "README_FILE"):
        path = tmp_path / {"ROWS_FILE": "rows.json", "CAPABILITY_FILE": "capability.py"}.get(name, "README.md")
        monkeypatch.setattr(aot_tables, name, path)
    monkeypatch.setattr(aot_matrix, "ROWS_FILE", tmp_path / "rows.json")
    monkeypatch.setattr(aot_matrix, "ROOT", tmp_path)
    return tmp_path


def test_the_command_writes_checks_and_refuses(files, toy_results, monkeypatch, capsys):
    good = [(task, result) for task, result in toy_results.results if task.case.op == "good"]
    bad = [(task, result) for task, result in toy_results.results if task.case.op == "spilling"]
    given = list(good)
    monkeypatch.setattr(aot_matrix, "collect", lambda ops, sms: [task for task, _ in given])
    monkeypatch.setattr(aot_matrix, "compile_tasks", lambda *args, **kwargs: given)

    def run(*arguments: str) -> tuple[int, str]:
        return aot_matrix.main(arguments), capsys.readouterr().out

    assert run("--check")[0] == 1
    assert not (files / "rows.json").exists()
    assert run()[0] == 0
    assert "2 rows, 0 breaches" in run("--check")[1]
    assert run("--check")[0] == 0
    written = {path: path.read_text() for path in files.iterdir()}
    assert len(written) == 3
    assert '("good", 86, "float32"): "plain"' in written[files / "capability.py"]
    assert "| `good` |" in written[files / "README.md"]

    code, text = run("--sm", "86")
    assert code == 0
    assert "good_kernel" in text
    (files / "rows.json").write_text(written[files / "rows.json"].replace("no scale", "no scales"))
    code, text = run("--check")
    assert code == 1
    assert '-      ["no scales"' in text
    assert "no scales" in text
    (files / "rows.json").write_text(written[files / "rows.json"])

    given += bad
    code, text = run()
    assert code == 1
    assert "allowed are 64" in text
    assert {path: path.read_text() for path in files.iterdir()} == written  # nothing is written beside a breach


def test_without_triton_the_command_says_so(files, monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(aot_matrix, "version", absent)
    assert aot_matrix.main([]) == 2
    assert "Triton is not installed" in capsys.readouterr().out
