"""Every command and every block of Python in the README and the documentation runs, page by page.

The blocks of a page run in the order in which they stand, in one folder that holds a small quickstart, as a reader
would run them: Python in one session, commands in this process. The lines that begin with ``pip install`` need a fresh
machine: ``.ci/run`` takes two of them from the README and runs them; here it is only checked that it will find them.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from pages import INSTALL, ROOT, Block, blocks, code, commands, pages, words_of
from toys import draw_without_umap

import geneformer_fast as gf

PAGES = [page for page in pages() if code(page)]
EVERY_BLOCK = [block for page in PAGES for block in code(page)]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_block(block: Block, session: dict[str, Any]) -> None:
    """Run a block as a reader would."""
    if block.language == "python":
        exec(compile(block.text, block.place, "exec"), session)
        return
    from geneformer_fast.cli import main

    for line in commands(block):
        words = words_of(line)
        assert words[0] == "geneformer-fast", f"{block.place}: {line}"
        if words[1] == "quickstart":  # this is the folder it leaves
            continue
        assert main(words[1:]) == 0, f"{block.place}: {line}"
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).exists(), f"{block.place}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_run(folder: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_without_umap(monkeypatch)
    session: dict[str, Any] = {"__name__": "__main__"}
    for block in code(page):
        if not block.remark:
            run_block(block, session)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.remark == "slow" for b in code(p))], ids=name_of)
def test_the_slow_blocks_of_a_page_run(folder: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    session: dict[str, Any] = {"__name__": "__main__"}
    for block in code(page):
        if block.remark != "not run":
            run_block(block, session)


@pytest.mark.parametrize("block", [b for b in EVERY_BLOCK if b.language == "bash"], ids=lambda b: b.place)
def test_commands_are_known_with_their_options(block: Block) -> None:
    from geneformer_fast.cli import build_parser

    for line in commands(block):
        words = words_of(line)
        if words[:2] == ["pip", "install"]:
            for word in words[2:]:
                if word.startswith("geneformer-fast"):
                    assert Requirement(word).extras <= EXTRAS, f"{block.place}: {line}"
            continue
        if words[0] in ("git", "hf"):  # what fetches models
            assert block.remark == "not run", f"{block.place}: {line}"
            continue
        if words[0] == "docker":  # what the image runs is the program
            if words[1] != "run":
                continue
            words = words[words.index("geneformer-fast") :]
        assert words[0] == "geneformer-fast", f"{block.place}: {line}"
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # the old name of an option
            build_parser([words[1]]).parse_args(words[1:])


@pytest.mark.parametrize("block", [b for b in EVERY_BLOCK if b.language == "python"], ids=lambda b: b.place)
def test_public_names_and_their_arguments_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gf":
            assert node.attr in gf.__all__, f"{block.place}: gf.{node.attr}"
        # What a call gives has methods of its own, which are no names of the package.
        if isinstance(node, ast.Call) and re.fullmatch(r"gf(\.\w+)+", ast.unparse(node.func)):
            called: Any = gf
            for name in ast.unparse(node.func).split(".")[1:]:
                called = getattr(called, name)
            parameters = inspect.signature(called).parameters
            if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                continue
            for keyword in node.keywords:
                assert keyword.arg in parameters, f"{block.place}: {ast.unparse(node.func)}({keyword.arg}=)"


def test_every_command_of_the_program_is_shown() -> None:
    from geneformer_fast.cli import COMMANDS

    shown = {words_of(line)[1] for block in EVERY_BLOCK if block.language == "bash" for line in commands(block)}
    assert set(COMMANDS) <= shown


def test_what_is_not_run_says_why() -> None:
    for block in EVERY_BLOCK:
        assert not block.remark or len(block.reason) > 10, block.place
    # Few enough to look at: installations, and what needs several cards or weights that cannot be had here.
    left_out = [block for block in EVERY_BLOCK if block.remark == "not run"]
    assert sum("published weights" not in block.reason for block in left_out) <= 5


def test_the_two_commands_are_there_as_ci_expects_them() -> None:
    readme = ROOT / "README.md"
    lines = "".join(block.text for block in code(readme) if block.language == "bash").splitlines()
    installs = [line for line in lines if line.startswith("pip ")]
    assert installs == [INSTALL + "geneformer-fast quickstart", INSTALL + "pytest"]
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r'grep -E "(.*)" README\.md', script)
    found = [line for line in readme.read_text().splitlines() if re.search(pattern.replace("\\\\", "\\"), line)]
    assert found == installs


def test_the_program_is_found_and_starts(folder: Path) -> None:
    scripts = sysconfig.get_path("scripts")
    environment = os.environ | {"PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
    command = ["geneformer-fast", "tokenize", "quickstart/cells.h5ad", "--out", "elsewhere"]
    command += ["--dictionary", "quickstart/vocabulary"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (folder / "elsewhere").exists()


def test_blocks_are_read_as_they_are_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n<!-- not run: needs a card -->\n```bash\n# why\ngeneformer-fast a \\\n  b\n```\n\n"
        "```python\nx = 1\n```\n<!-- slow: long -->\n\nText in between.\n```python\ny = '''\n``\n'''\n```\n"
        "````md\n```python\n```\n````\n```{directive} with words\n```\n"
    )
    found = blocks(page)
    assert [(b.language, b.line, b.remark) for b in found] == [
        ("bash", 5, "not run"), ("python", 11, ""), ("python", 17, ""), ("md", 22, ""), ("{directive}", 26, ""),
    ]  # fmt: skip
    assert commands(found[0]) == ["geneformer-fast a    b"]
    assert found[2].text == "y = '''\n``\n'''\n"
    assert words_of("torchrun --nproc-per-node 8 -m geneformer_fast pretrain t") == ["geneformer-fast", "pretrain", "t"]
    page.write_text("```python\n")
    with pytest.raises(ValueError, match="line 2 is not closed"):
        blocks(page)


def test_a_block_that_fails_is_a_failure(folder: Path) -> None:
    page = ROOT / "README.md"
    with pytest.raises(ZeroDivisionError):
        run_block(Block(page, 1, "python", "1 / 0"), {})
    with pytest.raises(AssertionError):
        run_block(Block(page, 1, "bash", "geneformer-fast tokenize nothing.h5ad --out x --dictionary y\n"), {})
    with pytest.raises(AssertionError):
        run_block(Block(page, 1, "bash", f"{sys.executable} -c pass\n"), {})
