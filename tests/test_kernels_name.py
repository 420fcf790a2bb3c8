"""The import name ``kernels`` belongs to Hugging Face's package: ours must never stand in its way.

The danger is the folder ``kernels/`` of this repository. Python takes a folder without ``__init__.py`` for a namespace
package, but only when nothing else on the path is called so; hence that folder never gets an ``__init__.py``.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def neighbour(tmp_path: Path) -> Path:
    """A site folder holding another distribution's package ``kernels``."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(name):\n    return 'kernel ' + name\n")
    (package / "layer.py").write_text("MODE = 'inference'\n")
    return package.parent


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


USE_BOTH = (
    "{first}; {second}\n"
    "from kernels import get_kernel\n"
    "from kernels.layer import MODE\n"
    "print(get_kernel('x'), MODE, geneformer_kernels.__name__)"
)


@pytest.mark.parametrize("place", ["in the checkout", "elsewhere"])
@pytest.mark.parametrize("order", [("import kernels", "import geneformer_kernels"), ("import geneformer_kernels", "")])
def test_another_package_named_kernels_works_beside_us(neighbour, tmp_path, place, order):
    cwd = ROOT if place == "in the checkout" else tmp_path
    code = USE_BOTH.format(first=order[0], second=order[1])
    assert run_python(code, cwd=cwd, path=neighbour) == "kernel x inference geneformer_kernels"


def test_installing_us_makes_no_package_named_kernels(tmp_path):
    code = "import importlib.util, geneformer_kernels; print(importlib.util.find_spec('kernels'))"
    found = run_python(code, cwd=tmp_path)
    if "kernels" in importlib.metadata.packages_distributions():
        pytest.skip("Hugging Face's kernels is installed here")
    assert found == "None"


def test_our_distribution_claims_two_names_only():
    claimed = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if "geneformer-fast" in distributions and not name.startswith("__editable__")
    }
    assert {name for name in claimed if not name.endswith("_finder")} == {"geneformer_fast", "geneformer_kernels"}


def test_the_source_root_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "geneformer_kernels" / "__init__.py").is_file()


def test_transformers_does_not_take_our_folder_for_the_kernels_package():
    pytest.importorskip("transformers")
    if "kernels" in importlib.metadata.packages_distributions():
        pytest.skip("Hugging Face's kernels is installed here")
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, cwd=ROOT) == "False"
