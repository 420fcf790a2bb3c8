"""Every command and every Python example in the README runs, and those of the kernels' README.

They run in one temporary folder that holds a small quickstart, in the order in which they stand, as a reader would run
them, but in one process. The two lines that begin with ``pip install`` need a fresh machine: ``.ci/run`` takes them
from the README and runs them literally; here it is only checked that it will find them.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pytest
from small_tour import small_tour

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = "pip install -c constraints.txt -e '.[dev]' && "


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    """The lines of all shell blocks, continued lines joined, without comments."""
    text = "".join(blocks("bash")).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


EXAMPLES = blocks("python") + blocks("python", (ROOT / "kernels" / "README.md").read_text(encoding="utf-8"))
COMMANDS = [line for line in command_lines() if not line.startswith(INSTALL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart has run, small."""
    where = tmp_path_factory.mktemp("reader")
    small_tour(where / "quickstart")
    return where


def test_the_two_commands_are_there_as_ci_expects_them():
    installs = [line for line in command_lines() if line.startswith("pip ")]
    assert installs == [INSTALL + "geneformer-fast quickstart", INSTALL + "pytest"]
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r'grep -E "(.*)" README\.md', script)
    assert [line for line in README.splitlines() if re.search(pattern.replace("\\\\", "\\"), line)] == installs


def test_only_known_programs_are_shown():
    assert {shlex.split(line)[0] for line in COMMANDS} == {"geneformer-fast"}


def test_the_commands_the_program_has_are_shown():
    from geneformer_fast.cli import COMMANDS as known

    assert {shlex.split(line)[1] for line in COMMANDS} == set(known) - {"quickstart"}


@pytest.mark.parametrize("line", COMMANDS)
def test_command(folder, line, monkeypatch):
    from geneformer_fast.cli import main

    words = shlex.split(line)
    monkeypatch.chdir(folder)
    assert main(words[1:]) == 0
    if "--out" in words:
        assert (folder / words[words.index("--out") + 1]).exists()


def test_the_program_is_found_and_starts(folder):
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | {"PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    command = ["geneformer-fast", "tokenize", "quickstart/cells.h5ad", "--out", "elsewhere"]
    command += ["--dictionary", "quickstart/vocabulary"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (folder / "elsewhere").exists()


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_example(folder, number, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(compile(EXAMPLES[number], f"example {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_links_and_paths_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    # Without blocks of a language, whose last fence looks like the first one of a block without.
    rest = re.sub(r"^```\w+\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    (tree,) = (text for text in re.findall(r"^```\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL) if "tests/" in text)
    parent = ROOT
    for line in tree.splitlines():
        names = re.match(r"(\s*)((?:[\w./]+ )+) ", line)
        assert names is not None, line
        for name in names[2].split():
            base = parent if names[1] else ROOT
            assert (base / name).exists(), name
        if not names[1]:
            parent = ROOT / names[2].split()[0]


def test_results_are_marked_for_the_report():
    assert README.count("<!-- results:begin -->") == 1
    assert README.index("<!-- results:begin -->") < README.index("<!-- results:end -->")
