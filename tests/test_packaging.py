"""What is shipped: the wheel's content, its metadata, and the pinned versions of a development install."""

from __future__ import annotations

import configparser
import email
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
#: Files that modules read.
READ = (".html", ".css", ".json")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RECIPE = yaml.safe_load((ROOT / "recipe" / "recipe.yaml").read_text())
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
#: What the Dockerfile copies from the checkout.
COPIED = [name for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy so that no build folder is left behind."""
    source = tmp_path_factory.mktemp("source")
    # What the Dockerfile builds the wheel of, and what lies beside it in a checkout.
    for name in (*COPIED, "tests", "tools"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(ROOT / name, source)
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


def pythons() -> list[str]:
    """The versions of Python that the metadata promise."""
    found = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", text)
        for text in PYPROJECT["project"]["classifiers"]
    ]
    return [match[1] for match in found if match]


def test_python_is_promised_where_it_is_tested():
    jobs = WORKFLOW["jobs"]
    assert jobs["everything"]["strategy"]["matrix"]["python"] == pythons()
    assert jobs["base"]["strategy"]["matrix"]["python"] == [pythons()[0], pythons()[-1]]
    assert PYPROJECT["project"]["requires-python"] == f">={pythons()[0]}"
    assert RECIPE["context"]["python_min"] == pythons()[0]
    assert re.findall(r"^ARG PYTHON=(.*)$", DOCKERFILE, re.MULTILINE)[0] in pythons()


def test_the_workflow_runs_what_ci_runs():
    ran = [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    assert "bash .ci/run" in ran
    for path in re.findall(r"(?:tools|\.ci)/[\w.]+", "\n".join(ran)):
        assert (ROOT / path).exists(), path


def test_the_conda_recipe_asks_for_what_the_wheel_asks_for():
    required = {}
    for text in PYPROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        required[{"torch": "pytorch"}.get(requirement.name, requirement.name)] = str(requirement.specifier)
    triton = required.pop("triton")
    requirements = RECIPE["requirements"]
    assert requirements["run_constraints"] == [f"triton {triton}"]
    python, virtual, *others = requirements["run"]
    assert (python, virtual) == ("python >=${{ python_min }}", "__linux")
    assert dict(text.split(" ", 1) for text in others) == required
    (backend,) = PYPROJECT["build-system"]["requires"]
    assert backend.replace(">=", " >=") in requirements["host"]
    scripts = [f"{name} = {where}" for name, where in PYPROJECT["project"]["scripts"].items()]
    assert RECIPE["build"]["python"]["entry_points"] == scripts
    for test in RECIPE["tests"]:
        for name in test.get("files", {}).get("source", ()):
            assert (ROOT / name).exists(), name


def test_recipe_and_citation_say_what_the_wheel_says(metadata):
    assert metadata["Version"] == CITATION["version"] == RECIPE["context"]["version"]
    assert metadata["Name"] == CITATION["title"] == RECIPE["context"]["name"]
    assert metadata["License-Expression"] == CITATION["license"] == RECIPE["about"]["license"]
    assert metadata["Summary"] == CITATION["abstract"] == RECIPE["about"]["summary"]
    assert metadata["Keywords"].split(",") == CITATION["keywords"]


def test_the_dockerfile_copies_what_is_there_and_what_its_builder_is_sent():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    sent = [line[1:] for line in lines if line.startswith("!")]
    left_out = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    for name in COPIED:
        assert (ROOT / name).exists(), name
        assert name in sent
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in left_out), name
    assert sorted(sent) == sorted(set(COPIED))


def test_the_dockerfile_installs_extras_that_exist_and_starts_a_command_that_does():
    (extras,) = re.findall(r'"\$1\[(.*?)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"]) - {"dev", "docs", "packaging"}
    assert re.findall(r'^ENTRYPOINT \["(.*)"\]$', DOCKERFILE, re.MULTILINE) == list(PYPROJECT["project"]["scripts"])
