"""What is shipped: the wheel's content, its metadata, and the pinned versions of a development install."""

from __future__ import annotations

import configparser
import email
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
#: Files that modules read.
READ = (".html", ".css", ".json")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy so that no build folder is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("geneformer_fast", "kernels", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    # Without isolation: the build backend is already here (torch needs it), and a test must not need the network.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_every_module_of_both_packages_and_nothing_else(wheel):
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "geneformer_fast"), (ROOT / "kernels", "geneformer_kernels"))
        for path in (root / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {name for name in shipped if name.endswith((".py", "py.typed"))} == expected
    assert {name.partition("/")[0] for name in shipped} == {"geneformer_fast", "geneformer_kernels"}
    assert {"geneformer_fast/py.typed", "geneformer_kernels/py.typed"} <= shipped
    read = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "geneformer_fast").rglob("*.*") if path.suffix in READ
    }
    assert "geneformer_fast/profiling/page/page.html" in read
    assert read <= shipped


def test_the_wheel_says_who_it_is(wheel, metadata):
    assert metadata["Name"] == "geneformer-fast"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == set(PYPROJECT["project"]["optional-dependencies"])
    licences = [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert len(licences) == 1
    assert wheel.read(licences[0]) == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_brings_the_console_script(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["console_scripts"]) == {"geneformer-fast": "geneformer_fast.cli:main"}


def test_the_wheel_works_outside_the_checkout(wheel, metadata, tmp_path):
    wheel.extractall(tmp_path)
    code = (
        "import sys, geneformer_fast, geneformer_kernels.dispatch\n"
        "from geneformer_fast.cli import main\n"
        "assert all(p.__file__.startswith(sys.argv[1]) for p in (geneformer_fast, geneformer_kernels))\n"
        "main(['--version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"geneformer-fast {metadata['Version']}"), done.stderr


def pins() -> dict[str, Requirement]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len({canonicalize_name(requirement.name) for requirement in requirements}) == len(requirements)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_constraints_are_exact_and_leave_the_cuda_libraries_to_torch():
    for name, pin in pins().items():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], name
        assert "+" not in str(pin.specifier), f"{name}: a local build exists on one machine only"
        assert name == "nvidia-ml-py" or not name.startswith(("nvidia-", "cuda-")), name


def test_every_dependency_of_the_development_install_is_pinned_within_its_bounds():
    project = PYPROJECT["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    pinned = pins()
    for requirement in map(Requirement, texts):
        if requirement.name == project["name"]:
            continue
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        (exact,) = pin.specifier
        assert requirement.specifier.contains(exact.version), f"{pin} against {requirement}"
