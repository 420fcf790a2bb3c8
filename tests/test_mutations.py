"""Deliberate faults in the kernels: they apply, every kernel has one, and tools/mutations.py judges right."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import mutations
import pytest
from geneformer_kernels.target import cpu_features
from kernel_source import kernel_files, kernel_functions

ROOT = Path(__file__).resolve().parent.parent
OPS = ROOT / "kernels" / "geneformer_kernels" / "ops"
TILES = ROOT / "kernels" / "geneformer_kernels" / "tiles.py"
KERNELS = [path for folder in sorted(OPS.iterdir()) for path in kernel_files(folder)]
every_fault = functools.cache(mutations.read_faults)  # which parses every file of kernels again and again


def test_every_fault_applies_as_written():
    wrong = []
    for fault in every_fault():
        try:
            mutations.mutated(fault, ROOT)
        except mutations.FaultError as error:
            wrong.append(str(error))
    assert wrong == []


def test_every_kernel_has_a_fault():
    places: dict[Path, list[int]] = {}
    for fault in every_fault():
        places.setdefault(ROOT / fault.file, []).append(mutations.place_of(fault, ROOT))
    bare = [
        f"{path.parent.name}: {name}"
        for path in KERNELS
        for name, lines in kernel_functions(path).items()
        if not any(place in lines for place in places.get(path, []))
    ]
    assert bare == []


def accesses(path: Path) -> list[ast.Call]:
    """Calls of ``tl.load``, ``tl.store`` and the atomic operations."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and re.match(r"tl\.(load|store|atomic_)", ast.unparse(node.func))
    ]


@pytest.mark.parametrize("path", [*KERNELS, TILES], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_mask_has_a_fault(path):
    """One per condition, or a reason why no test can see that it is gone."""
    file = path.relative_to(ROOT).as_posix()
    by_place = [call for call in accesses(path) if len(call.args) > (1 if "load" in ast.unparse(call.func) else 2)]
    assert [ast.unparse(call) for call in by_place] == []  # a mask has its name, or it is not seen here
    masked = [call for call in accesses(path) if any(keyword.arg == "mask" for keyword in call.keywords)]
    possible = mutations.mask_faults("", file, "tests", root=ROOT)
    bare = {call.lineno for call in masked} - {int(fault.origin.rpartition(" ")[2]) for fault in possible}
    assert bare == set()

    tables = [tomllib.loads(path.read_text()) for path in (ROOT / mutations.FOLDER).glob("*.toml")]
    rows = [row for table in tables for row in table.get("masks", []) if row["file"] == file]
    reasons = {key: why for row in rows for key, why in row.get("without_effect", {}).items()}
    tried = {(fault.find, fault.replace) for fault in every_fault() if fault.file == file}
    left_out = [fault.why for fault in possible if (fault.find, fault.replace) not in tried]
    assert [why for why in left_out if not why.startswith(tuple(reasons))] == []
    assert all(reasons.values())


@pytest.mark.slow
def test_every_fault_is_caught():
    faults = every_fault()
    if "avx512_bf16" not in cpu_features():
        faults = [fault for fault in faults if "avx512" not in fault.origin]
    assert mutations.run(ROOT, faults, n_workers=2, limit_s=900) == []


ROWS = """
[[fault]]
file = "kernels/toy.py"
find = "x + 1"
replace = "x + 2"
tests = "tests/test_toy.py -k adds"
why = "adds too much"
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A repository with one function, two tests of it and one fault; gives a function that writes other faults."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # most of the time of a run that tests nothing else
    for name, text in {
        "kernels/toy.py": "def add(x):\n    return x + 1\n\n\ndef unseen(x):\n    return x * 2\n",
        "tests/test_toy.py": (
            "import os\nimport toy\n\n\ndef test_adds():\n    assert toy.add(1) == 2\n\n\n"
            "def test_is_interpreted():\n    assert os.environ['TRITON_INTERPRET'] == '1'\n"
        ),
        "tests/test_red.py": "def test_red():\n    assert False\n",
        "tests/test_skipped.py": "import pytest\n\n\n@pytest.mark.skip\ndef test_skipped():\n    pass\n",
        "tools/mutations/toy.toml": ROWS,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def write(*rows: dict[str, str]) -> Path:
        texts = []
        for changes in rows:
            text = ROWS
            for key, value in changes.items():
                (line,) = (line for line in ROWS.splitlines() if line.startswith(f"{key} ="))
                text = text.replace(line, f"{key} = '''{value}'''")
            texts.append(text)
        (tmp_path / "tools/mutations/toy.toml").write_text("".join(texts))
        return tmp_path

    return write


def test_caught_and_surviving_faults_are_told_apart(toy, capsys):
    root = toy(
        {},
        {"find": "x * 2", "replace": "x * 3", "why": "nobody looks"},
        {"tests": "tests/test_toy.py -k interpreted", "why": "the wrong test"},
        {"tests": "tests/test_red.py::test_red", "why": "red before"},
        {"tests": "tests/test_toy.py -k nothing", "why": "no test"},
        {"replace": "__import__('os').abort()", "why": "a crash is red"},
        {"tests": "tests/test_skipped.py", "why": "nothing runs here"},
    )
    before = {path: path.read_bytes() for path in root.rglob("*.py")}
    assert mutations.main(["--jobs", "2"], root) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "SURVIVED" in line] == [
        "toy.toml fault 2 (nobody looks): SURVIVED tests/test_toy.py -k adds",
        "toy.toml fault 3 (the wrong test): SURVIVED tests/test_toy.py -k interpreted",
    ]
    assert "without any fault, red or broken: tests/test_red.py" in lines
    assert "toy.toml fault 5 (no test): no test is selected by tests/test_toy.py -k nothing" in lines
    assert "every test is skipped on this machine: tests/test_skipped.py" in lines
    assert lines[-1] == "7 faults, 5 not proven to be caught"
    assert {path: path.read_bytes() for path in root.rglob("*.py")} == before  # nothing was left behind

    assert mutations.main(["--op", "toy", "--jobs", "1"], toy({})) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 faults, 0 not proven to be caught"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"find": "return"}, "occurs 2 times"),
        ({"find": "x - 1"}, "occurs 0 times"),
        ({"find": ""}, "occurs 0 times"),
        ({"replace": "x + 1"}, "by itself"),
        ({"replace": "x +"}, "leaves no Python behind, line 2"),
        ({"file": "kernels/absent.py"}, "there is no kernels/absent.py"),
        ({"tests": "tests/absent.py"}, "tests/absent.py is none"),
        ({"tests": ""}, "nothing is none"),
    ],
)
def test_a_fault_that_does_not_apply_is_an_error(toy, capsys, changes, message):
    assert mutations.main([], toy({}, changes)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("toy.toml fault 2 (")
    assert message in lines[0]


def test_files_of_another_form_are_refused(toy, capsys):
    root = toy({})
    path = root / "tools/mutations/toy.toml"
    for text, message in {
        "[[fault": "toy.toml: ",
        ROWS.replace("why =", "because ="): "must hold exactly the texts file, find, replace, tests, why",
        ROWS.replace('"x + 1"', "1"): "must hold exactly the texts",
    }.items():
        path.write_text(text)
        assert mutations.main([], root) == 1
        assert message in capsys.readouterr().out
    path.write_text(ROWS)
    assert mutations.main(["--op", "other"], root) == 1
    assert "there is no tools/mutations/other.toml" in capsys.readouterr().out


MASKED = """
def kernel(p, q, n):
    m = (o < n) & (o >= 0) & ~hidden
    x = tl.load(p + o, mask=m, other=0.0)
    y = tl.load(q + o, mask=m[:, None] & (x > 0)[None, :], other=0.0)
    y = tl.load(q + o, mask=m[:, None] & (x > 0)[None, :], other=0.0)
    tl.store(q + o, x + tl.load(p), mask=o < n)
"""
MASKS = """
[[masks]]
file = "kernels/masked.py"
tests = "tests/test_toy.py"
"""


def test_masks_lose_one_condition_at_a_time(toy):
    root = toy({})
    (root / "kernels/masked.py").write_text(MASKED)
    path = root / "tools/mutations/toy.toml"
    path.write_text(ROWS + MASKS)
    _, *faults = mutations.read_faults(root)
    changes = []
    for fault in faults:
        lines = zip(MASKED.splitlines(), mutations.mutated(fault, root).splitlines(), strict=True)
        changes.append([(i, line.strip()) for i, (before, line) in enumerate(lines, 1) if line != before])
    assert changes == [
        [(3, "m = (o >= 0) & ~hidden")],
        [(3, "m = (o < n) & ~hidden")],
        [(3, "m = (o < n) & (o >= 0)")],
        [(4, "x = tl.load(p + o)")],
        [(5, "y = tl.load(q + o, mask=(x > 0)[None, :], other=0.0)")],
        [(5, "y = tl.load(q + o, mask=m[:, None], other=0.0)")],
        [(6, "y = tl.load(q + o, mask=(x > 0)[None, :], other=0.0)")],
        [(6, "y = tl.load(q + o, mask=m[:, None], other=0.0)")],
        [(7, "tl.store(q + o, x + tl.load(p))")],
    ]
    assert str(faults[3]) == ("toy.toml masks, masked.py line 4 (without m: x = tl.load(p + o, mask=m, other=0.0))")

    path.write_text(ROWS + MASKS + 'without_effect = { "without o >= 0: m =" = "o is positive" }')
    assert [fault.why for fault in mutations.read_faults(root)[1:]] == [
        fault.why for fault in faults if "without o >= 0" not in fault.why
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('without_effect = { "without o < 1" = "" }', "no mask of kernels/masked.py is without o < 1"),
        ('why = ""', "must hold file, tests and without_effect, has file, tests, why"),
    ],
)
def test_masks_of_another_form_are_refused(toy, capsys, line, message):
    root = toy({})
    (root / "tools/mutations/toy.toml").write_text(MASKS + line)
    assert mutations.main([], root) == 1
    assert "toy.toml: there is no kernels/masked.py" in capsys.readouterr().out or "why" in line
    (root / "kernels/masked.py").write_text(MASKED)
    assert mutations.main([], root) == 1
    assert message in capsys.readouterr().out


def test_faults_are_chosen_by_what_they_say(toy, capsys):
    root = toy({}, {"find": "x * 2", "replace": "x * 3", "why": "nobody looks"})
    assert mutations.main(["--match", "fault 1 |too much"], root) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 faults, 0 not proven to be caught"


def test_a_run_that_does_not_end_proves_nothing(toy):
    root = toy({"replace": "add(x)"}, {})
    (root / "tests/test_toy.py").write_text("import time\n\n\ndef test_adds():\n    time.sleep(60)\n")
    (reason,) = mutations.run(root, mutations.read_faults(root), n_workers=1, limit_s=0.2)
    assert "red or broken" in reason
    assert "not done after" in reason
    (fault, _) = mutations.read_faults(root)
    assert "neither passed nor failed" in (mutations.check_fault(fault, root, 0.2) or "")


@pytest.mark.parametrize(
    ("tests", "files"),
    [
        ("tests/test_a.py", "tests/test_a.py"),
        ("tests/test_a.py -k 'one and not two'", "tests/test_a.py"),
        ("tests/test_a.py::test_b tests/test_a.py::test_c -m slow", "tests/test_a.py -m slow"),
    ],
)
def test_a_selection_is_taken_from_files_that_run_once(tests, files):
    assert mutations.unselected(tests) == files


def test_the_tool_explains_itself():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "mutations.py", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "tools/mutations/<op>.toml" in done.stdout
