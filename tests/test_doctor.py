"""The doctor: what it reports about this machine, about machines that are not here, and about what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from geneformer_kernels.dispatch import ENVIRONMENT_VARIABLE, OPERATIONS
from geneformer_kernels.target import CARDS, Target

from geneformer_fast import __version__, cli, doctor


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


def test_text_names_versions_the_cpu_and_a_reason_for_every_operation(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"geneformer-fast {__version__}" in text
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in text.splitlines())
    for name in OPERATIONS:
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3, f"no reason given: {line}"
    assert text.rstrip().endswith("No problems found.")


def test_json_holds_the_same(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["geneformer_fast"] == __version__
    cpu = report["devices"][0]
    assert cpu["name"] == "cpu"
    assert cpu["facts"]["n_cores"] == os.cpu_count()
    assert [operation["name"] for operation in cpu["operations"]] == list(OPERATIONS)
    assert {package["name"]: package["version"] for package in report["packages"]}["torch"] == torch.__version__
    assert report["problems"] == []


@pytest.mark.parametrize("target", [*CARDS.values(), Target.cpu(["avx512_bf16"]), Target.cpu()], ids=lambda t: t.name)
def test_every_operation_can_run_on_every_card_and_says_why(target):
    operations = doctor.operations_on(target)
    assert [operation.name for operation in operations] == list(OPERATIONS)
    assert all(operation.impl and operation.reason for operation in operations)


@pytest.mark.parametrize("card", ["V100", "T4"])
def test_rows_are_quantised_by_triton_where_int8_products_are_torchs(card):
    by_name = {operation.name: operation for operation in doctor.operations_on(CARDS[card])}
    assert by_name["int8_linear"].impl == "torch"
    assert (by_name["quantize_rows"].impl, by_name["quantize_rows"].reason) == ("triton", "one Triton kernel")


def test_a_wish_from_the_environment_is_shown_and_an_impossible_one_is_a_problem(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "feed_forward=reference")
    by_name = {operation.name: operation for operation in doctor.operations_on(Target.cpu())}
    assert by_name["feed_forward"].impl == "reference"
    assert ENVIRONMENT_VARIABLE in by_name["feed_forward"].reason

    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fp8_linear=numba")  # no CPU has such loops
    report = doctor.examine()
    assert report.environment[ENVIRONMENT_VARIABLE] == "fp8_linear=numba"
    assert any("fp8_linear cannot run on cpu" in problem for problem in report.problems)
    assert "PROBLEM: fp8_linear" in doctor.as_text(report)


def test_missing_packages_a_needed_one_is_a_problem_an_optional_one_says_how_to_get_it(monkeypatch, capsys):
    present = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("h5py", "zarr") else present(name))
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "PROBLEM: h5py is not installed (reading .h5ad, 10x .h5 and .loom): pip install h5py" in text
    assert "pip install 'geneformer-fast[zarr]'" in text
    assert "PROBLEM: zarr" not in text


def test_without_torch_the_doctor_still_speaks():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"  # an import of it now raises ImportError
        "from geneformer_fast.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM: torch cannot be imported" in done.stdout


def test_extras_named_by_the_doctor_exist():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for name, (extra, _) in doctor.OPTIONAL.items():
        requirements = project["optional-dependencies"][extra]
        assert any(requirement.startswith(name) for requirement in requirements), (name, extra)
    required = {requirement.split(">")[0].split(";")[0].strip() for requirement in project["dependencies"]}
    assert set(doctor.REQUIRED) == required
