"""The import law holds in this repository, and tools/layers.py notices every way of breaking it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "tools" / "layers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layers"] = module
    spec.loader.exec_module(module)
    return module


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {
        "geneformer_fast/__init__.py": '_HOME = {"Encoder": "geneformer_fast.encoder"}\n',
        "kernels/geneformer_kernels/__init__.py": "",
        **files,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_this_repository_keeps_the_law(layers):
    assert [str(breach) for breach in layers.breaches(ROOT)] == []


def test_every_module_was_looked_at(layers):
    known = layers.module_files(ROOT)
    assert {"geneformer_fast.cli", "geneformer_fast.errors", "geneformer_kernels.dispatch"} <= set(known)
    on_disk = [*(ROOT / "geneformer_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(known) == len(on_disk)


GOOD = {
    "geneformer_fast/cli/__init__.py": "from geneformer_fast import __version__, errors\n",
    "geneformer_fast/errors.py": "class E(Exception): ...\n",
    "geneformer_fast/encoder.py": "import torch\nfrom geneformer_kernels import varlen_attention\n",
    "geneformer_fast/data.py": "from geneformer_fast import Encoder\nfrom .encoder import block\n",
    "geneformer_fast/heads.py": "import torch\n",
    "kernels/geneformer_kernels/dispatch.py": "from geneformer_kernels.target import Target\n",
    "kernels/geneformer_kernels/target.py": "def probe():\n    import torch\n",
    "kernels/geneformer_kernels/ops/__init__.py": "",
    "kernels/geneformer_kernels/ops/sum/__init__.py": "",
    "kernels/geneformer_kernels/ops/sum/op.py": (
        "import torch\nfrom geneformer_kernels.dispatch import choose\nfrom . import reference\n"
        "def run():\n    from geneformer_kernels.ops.sum import kernel\n"
    ),
    "kernels/geneformer_kernels/ops/sum/reference.py": "import torch\n",
    "kernels/geneformer_kernels/ops/sum/plan.py": "import math\nfrom geneformer_kernels.target import Target\n",
    "kernels/geneformer_kernels/ops/sum/kernel.py": "import triton\nimport triton.language as tl\n",
    "kernels/geneformer_kernels/ops/sum/kernel_wide.py": (
        "import triton\nfrom geneformer_kernels.ops.sum.kernel import each\nfrom geneformer_kernels.tiles import tile\n"
    ),
}


def test_a_lawful_tree_has_no_breach(layers, tmp_path):
    assert layers.breaches(write_tree(tmp_path, GOOD)) == []


OPS = "kernels/geneformer_kernels/ops"
BROKEN = {
    "upward": ("geneformer_fast/encoder.py", "import geneformer_fast.cli\n", "layer above"),
    "upward, lazily": ("geneformer_fast/encoder.py", "def f():\n    import geneformer_fast.data\n", "layer above"),
    "upward, relative": ("geneformer_fast/encoder.py", "from . import data\n", "layer above"),
    "upward, for types": (
        "geneformer_fast/errors.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import geneformer_fast.data\n",
        "layer above",
    ),
    "a lazy name of the package": ("geneformer_fast/ragged.py", "from geneformer_fast import Encoder\n", "layer above"),
    "kernels know genes": (f"{OPS}/sum/op.py", "import geneformer_fast.errors\n", "know nothing of genes"),
    "tokenization uses a model": (
        "geneformer_fast/tokenization/run.py",
        "import geneformer_fast.encoder\n",
        "needs no model",
    ),
    "tokenization loads torch": ("geneformer_fast/tokenization/run.py", "def f():\n    import torch\n", "import torch"),
    "an unknown place": ("geneformer_fast/misc.py", "", "stands on no layer"),
    "transformers elsewhere": ("geneformer_fast/encoder.py", "import transformers\n", "transformers, which belongs in"),
    "anndata in kernels": (f"{OPS}/sum/reference.py", "import anndata.io\n", "anndata, which belongs in"),
    "pickle elsewhere": ("geneformer_fast/encoder.py", "def f():\n    import pickle\n", "pickle, which belongs in"),
    "heavy command line": ("geneformer_fast/cli/x.py", "import numpy as np\n", "numpy when loaded"),
    "heavy package": ("geneformer_fast/__init__.py", "import torch.nn\n", "torch.nn when loaded"),
    "heavy under if": ("geneformer_fast/errors.py", "try:\n    import scipy\nexcept ImportError: ...\n", "scipy when"),
    "operations meet": (f"{OPS}/sum/op.py", "from geneformer_kernels.ops.max import op\n", "never import each other"),
    "eager kernel": (f"{OPS}/sum/op.py", "from geneformer_kernels.ops.sum.kernel import k\n", "inside a function"),
    "eager second kernel": (f"{OPS}/sum/op.py", "from geneformer_kernels.ops.sum import kernel_wide\n", "inside a"),
    "torch in a second kernel": (f"{OPS}/sum/kernel_wide.py", "import torch\n", "device code needs triton only"),
    "a plan in a kernel": (f"{OPS}/sum/kernel_wide.py", "from geneformer_kernels.ops.sum import plan\n", "plan.py"),
    "torch in a kernel": (f"{OPS}/sum/kernel.py", "import torch\n", "device code needs triton only"),
    "torch in a plan": (f"{OPS}/sum/plan.py", "import torch\n", "pure standard library"),
    "triton in a reference": (f"{OPS}/sum/reference.py", "import triton\n", "triton, which belongs in kernel.py"),
    "a kernel that dispatches": (f"{OPS}/sum/kernel.py", "import geneformer_kernels.dispatch\n", "must not import"),
    "a reference that plans": (
        f"{OPS}/sum/reference.py",
        "from geneformer_kernels.ops.sum import plan\n",
        "plan.py of",
    ),
    "a target that dispatches": (
        "kernels/geneformer_kernels/target.py",
        "import geneformer_kernels.dispatch\n",
        "must",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_breach_is_reported_with_file_and_line(layers, tmp_path, case):
    name, text, reason = BROKEN[case]
    extra = {f"{OPS}/max/__init__.py": "", f"{OPS}/max/op.py": ""}
    root = write_tree(tmp_path, GOOD | extra | {name: "# first line\n" + text})
    found = [breach for breach in layers.breaches(root) if reason in breach.reason]
    assert len(found) == 1, [str(breach) for breach in layers.breaches(root)]
    assert found[0].path == root / name
    expected = 1 if not text else 1 + next(i for i, line in enumerate(text.splitlines(), 1) if "import " in line)
    if "TYPE_CHECKING" in text:
        expected = 4
    assert found[0].line == expected


def test_cycles_are_reported(layers, tmp_path):
    root = write_tree(
        tmp_path,
        {
            "geneformer_fast/extract.py": "import geneformer_fast.training\n",
            "geneformer_fast/training.py": "import geneformer_fast.drop_in\n",
            "geneformer_fast/drop_in.py": "import geneformer_fast.extract\n",
        },
    )
    found = [str(breach) for breach in layers.breaches(root)]
    assert len(found) == 1
    assert "cycle: geneformer_fast.drop_in -> geneformer_fast.extract -> geneformer_fast.training" in found[0]


def test_modules_of_one_package_may_not_need_each_other(layers, tmp_path):
    package = "geneformer_fast/quickstart"
    cycle = {f"{package}/a.py": f"import {package.replace('/', '.')}.b\n", f"{package}/b.py": "from . import a\n"}
    root = write_tree(tmp_path, {f"{package}/__init__.py": "", **cycle})
    assert ["cycle" in breach.reason for breach in layers.breaches(root)] == [True]
    # Loading one of them inside a function ends the deadlock, and not the circle; naming its types is free.
    (root / package / "b.py").write_text("def f():\n    from . import a\n")
    assert ["cycle" in breach.reason for breach in layers.breaches(root)] == [True]
    (root / package / "b.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a\n")
    assert layers.breaches(root) == []


def test_the_registry_lies_low_and_the_families_high(layers, tmp_path):
    root = write_tree(
        tmp_path,
        {
            "geneformer_fast/families/__init__.py": "if TYPE_CHECKING:\n    import geneformer_fast.encoder\n",
            "geneformer_fast/families/mine.py": "from geneformer_fast import families, checkpoints\n",
            "geneformer_fast/checkpoints.py": "from geneformer_fast import families\n",
            "geneformer_fast/encoder.py": "import geneformer_fast.families\n",
        },
    )
    assert layers.breaches(root) == []
    (root / "geneformer_fast/checkpoints.py").write_text("import geneformer_fast.families.mine\n")
    (root / "geneformer_fast/families/__init__.py").write_text("import geneformer_fast.encoder\n")
    found = {breach.module: breach.reason for breach in layers.breaches(root) if "cycle" not in breach.reason}
    assert found == {
        "geneformer_fast.checkpoints": "must not import geneformer_fast.families.mine, which is on a layer above",
        "geneformer_fast.families": "must not import geneformer_fast.encoder, which is on a layer above",
    }


def test_the_tool_runs_from_the_command_line():
    done = subprocess.run([sys.executable, ROOT / "tools" / "layers.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("0 breaches of the import law in ")
