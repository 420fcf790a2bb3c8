"""What a family is stands in its file alone: no other module names one, or imports its module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from geneformer_fast import families

ROOT = Path(__file__).resolve().parent.parent.parent
#: Where a name may stand, and why.
ALLOWED = {
    # The import law lists modules by name.
    "tools/layers.py": {"geneformer", "bionemo", "aido_cell", "scgpt", "scbert"},
    # A study of three families, each pretrained by its own objective.
    "bench/imbalance/models.py": {"geneformer", "scgpt", "scbert"},
    "bench/imbalance/objectives.py": {"geneformer", "scgpt", "scbert"},
}
#: Benchmarks are of models that they name; none may do otherwise for one of them.
NAMING = ("bench/",)


def names_of_families() -> set[str]:
    """Every name by which a family, one of its models, or its cells are chosen."""
    found: set[str] = set()
    for name in families.FAMILIES:
        found |= {name, name.replace("-", "_")}
    for each in families.all_families():
        found |= {*each.layouts, *each.presets, *each.other_names, *each.vocabularies}
    return found


def named_in(path: Path, names: set[str], *, is_naming: bool) -> Iterator[tuple[int, str]]:
    """Line and name of every constant in a file that is one; where naming is free, of comparisons alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    looked_at = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)] if is_naming else [tree]
    for top in looked_at:
        for node in ast.walk(top):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in names:
                yield node.lineno, node.value
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            for module in modules:
                part = module.removeprefix("geneformer_fast.families.").partition(".")[0]
                if part != module and part in names:
                    yield node.lineno, f"import of families.{part}"


def test_no_other_module_names_a_family() -> None:
    names = names_of_families()
    assert {"v1", "v2", "bionemo", "geneformer-v2", "aido-cell-3m", "gf-12l-95m-i4096"} <= names
    found = []
    for folder in ("geneformer_fast", "kernels/geneformer_kernels", "bench", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith("geneformer_fast/families/"):
                continue
            named = named_in(path, names - ALLOWED.get(place, set()), is_naming=place.startswith(NAMING))
            found += [f"{place}:{line}: {name}" for line, name in named]
    assert found == [], "ask geneformer_fast.families instead"


def test_the_scan_sees_what_it_is_to_see(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        'TABLE = {"v2": 1}\nif family == "v1":\n    pass\nfrom geneformer_fast.families.bionemo import FAMILY\n'
        'import geneformer_fast.families.family\n"""Text about v2 and bionemo."""\n'
    )
    names = names_of_families()
    assert [*named_in(path, names, is_naming=False)] == [(1, "v2"), (2, "v1"), (4, "import of families.bionemo")]
    assert [*named_in(path, names, is_naming=True)] == [(2, "v1"), (4, "import of families.bionemo")]


def test_every_family_has_its_file() -> None:
    folder = ROOT / "geneformer_fast" / "families"
    for each in families.all_families():
        module = each.name.replace("-", "_")
        assert (folder / f"{module}.py").exists() or (folder / module / "__init__.py").exists()
        assert (ROOT / "docs" / "families" / f"{module}.md").exists()
        assert f"| {each.title} |" in (ROOT / "docs" / "families" / "index.md").read_text(encoding="utf-8")
