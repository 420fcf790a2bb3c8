"""What the pages say is what the code has: names, options, messages, links; and the site is built without warnings."""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks, code, pages

import geneformer_fast as gf

README = ROOT / "README.md"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", [*pages(), ROOT / "CONTRIBUTING.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)", page.read_text()):
        linked = page.parent / target
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in slugs, f"{target}{anchor}"


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = set()
    for block in blocks(DOCS / "index.md"):
        if block.language == "{toctree}":
            lines = [line for line in block.text.splitlines() if line and not line.startswith(":")]
            listed |= {line for line in lines if "*" not in line}
            for pattern in (line for line in lines if "*" in line):
                listed |= {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.glob(f"{pattern}.md")}
    there = {str(path.relative_to(DOCS).with_suffix("")) for path in [*pages(), *NOTEBOOKS] if DOCS in path.parents}
    assert listed == there - {"index"}


def test_the_api_page_has_every_public_name_and_every_error() -> None:
    from geneformer_fast import errors

    text = (DOCS / "api.md").read_text()
    listed = set(re.findall(r"^   (\w+)$", text, re.MULTILINE))
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert listed == (set(gf.__all__) - {"__version__"}) | raised


def test_the_command_line_page_has_every_command() -> None:
    from geneformer_fast.cli import COMMANDS

    shown = re.findall(r"^```\{command-options\} (.+)$", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted([*(set(COMMANDS) - {"finetune"}), "finetune cells", "finetune genes"])


def test_options_in_the_text_exist() -> None:
    from bench.imbalance.__main__ import build_parser as bench_parser
    from geneformer_fast.cli import build_parser

    def options(parser: argparse.ArgumentParser) -> set[str]:
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]  # old names are not
        found = {option for action in shown for option in action.option_strings}
        inner = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
        return found.union(*(options(one) for choices in inner for one in choices.values()))

    # Beside our own those of pip, of torchrun, and of the benchmark that a page names.
    known = options(build_parser()) | options(bench_parser()) | {"--index-url", "--nproc-per-node"}
    for page in pages():
        for option in re.findall(r"`(--[a-z][a-z-]*)", page.read_text()):
            assert option in known or page.parent.name == "kernels", f"{page.name}: {option}"


def test_arguments_of_the_migration_table_exist() -> None:
    """Of the right column: keywords are parameters, and names are public."""
    import inspect

    from geneformer_fast.perturbation.official_files import open_official

    takers = (
        *(gf.tokenize, gf.embed, gf.finetune_cells, gf.finetune_genes, gf.accelerate, gf.quantize, gf.Recipe),
        *(gf.perturb, gf.perturbation_stats, gf.state_embeddings, open_official),
    )
    known = {name for taker in takers for name in inspect.signature(taker).parameters}
    for row in re.findall(r"^\| .+ \| (.+) \|$", (DOCS / "migration.md").read_text(), re.MULTILINE):
        for keyword in re.findall(r"\b(\w+)=", " ".join(re.findall(r"`([^`]+)`", row))):
            assert keyword in known, keyword
        for name in re.findall(r"gf\.(\w+)", row):
            assert name in gf.__all__, name


def templates() -> list[list[str]]:
    """Every text of the package as the pieces between its holes."""
    found = []

    def pieces(node: ast.expr) -> list[str] | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            parts = [""]
            for value in node.values:
                if isinstance(value, ast.Constant):
                    parts[-1] += value.value
                else:
                    parts.append("")
            return parts
        return None

    for path in (ROOT / "geneformer_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.expr) and (parts := pieces(node)):
                found.append(parts)
    return found


def test_messages_of_the_page_of_errors_are_those_of_the_code() -> None:
    every = templates()
    shown = [block.text.strip() for block in blocks(DOCS / "errors.md") if block.language == "text"]
    assert len(shown) >= 20
    for message in shown:
        wanted = re.split(r"\{[^}]*\}", message)
        assert any(parts == wanted for parts in every), message


def test_extras_of_the_install_page_are_those_of_the_package() -> None:
    text = (DOCS / "install.md").read_text()
    table = text.split("<!-- extras:begin -->")[1].split("<!-- extras:end -->")[0]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(project["optional-dependencies"])


def test_the_tree_of_folders_is_there() -> None:
    (tree,) = (b for b in blocks(ROOT / "CONTRIBUTING.md") if not b.language and "tests/" in b.text)
    parent = ROOT
    for line in tree.text.splitlines():
        names = re.match(r"(\s*)((?:[\w./]+ )+) ", line)
        assert names is not None, line
        for name in names[2].split():
            assert ((parent if names[1] else ROOT) / name).exists(), name
        if not names[1]:
            parent = ROOT / names[2].split()[0]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(notebook: Path) -> None:
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_the_lines_of_the_readme_are_in_a_notebook() -> None:
    """They are slow, so that the build of the documentation runs them."""
    (slow,) = [block for block in code(README) if block.remark == "slow"]
    cells = [
        "".join(cell["source"])
        for notebook in NOTEBOOKS
        for cell in json.loads(notebook.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    executed = [line for cell in cells for line in cell.splitlines()]
    for line in slow.text.splitlines():
        if line and "read_h5ad" not in line:
            assert line in executed, line


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx") is None, reason="sphinx is not installed: pip install 'geneformer-fast[docs]'")
def test_the_site_is_built_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(DOCS), str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert (tmp_path / "html" / "index.html").exists()
    assert "obsm" in (tmp_path / "html" / "generated" / "geneformer_fast.embed.html").read_text()
