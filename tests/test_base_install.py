"""``pip install geneformer-fast`` without extras tokenizes and embeds: in an environment that has nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from base_install import ROOT, base_requirements, brought_by, make_environment

#: What only extras bring: torch needs jinja2 itself, and anndata zarr.
EXTRAS = ("accelerate", "datasets", "matplotlib", "optuna", "peft", "sklearn", "tensorboard", "transformers", "umap")
#: Commands on what tools/first_run.py leaves, and the extra that each of them needs.
NEEDY = {
    "embed cells.h5ad --model model --out plotted.npy --plot umap.png": "plot",
    "finetune cells tokens --model model --label kind --out classes": "train",
    "profile --model model --tokens tokens --compare stock": "hf",
    "profile --model model --tokens tokens --out report": "profile",
}
# Runs commands in one process: what each of them returned and said.
COMMANDS = """
import contextlib, io, json, shlex, sys
from geneformer_fast.cli import main
said = []
for line in json.loads(sys.argv[1]):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(shlex.split(line))
        except SystemExit as end:  # arguments that cannot be
            code = end.code
    said.append([code, errors.getvalue()])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a base install, without Triton besides, as where conda brings a torch for CPUs."""
    return make_environment(tmp_path_factory.mktemp("base") / "environment", without=["triton"])


@pytest.fixture(scope="module")
def first_run(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which the commands ran, and what they said."""
    folder = tmp_path_factory.mktemp("first")
    return folder, run(python, str(ROOT / "tools" / "first_run.py"), str(folder))


def run(python: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def test_nothing_of_the_extras_is_there(python: Path) -> None:
    code = f"import importlib.util as u; print([name for name in {(*EXTRAS, 'triton', 'torch')} if u.find_spec(name)])"
    assert run(python, "-c", code).stdout.strip() == "['torch']"
    assert {"torch", "anndata", "triton", "pandas"} <= set(brought_by(base_requirements()))


def test_counts_become_tokens_and_embeddings(first_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = first_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"({ROOT / 'geneformer_fast'})" in done.stdout.splitlines()[-1]
    assert {"cells.h5ad", "tokens", "embeddings.npy", "genes.parquet", "embedded.h5ad"} <= set(os.listdir(folder))


def test_what_needs_an_extra_names_it(python: Path, first_run: tuple[Path, object]) -> None:
    folder, _ = first_run
    done = run(python, "-c", COMMANDS, json.dumps(list(NEEDY)), cwd=folder)
    assert done.returncode == 0, done.stderr
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for (line, extra), (code, said) in zip(NEEDY.items(), json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert code == 2, (line, said)
        assert re.findall(r"pip install 'geneformer-fast\[(\w+)\]'", said) == [extra], (line, said)
        assert extra in extras
