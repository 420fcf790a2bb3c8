"""Importing the packages loads nothing but themselves and the standard library, and asks the machine nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Runs in a fresh interpreter: records what a statement loads, opens, starts and changes.
PROBE = """
import json, os, sys
ours = ("geneformer_fast", "geneformer_kernels")
exec(sys.argv[2])
before, environment, touched = set(sys.modules), dict(os.environ), []
def watch(event, args):
    if event == "open" and str(args[0]).startswith(("/proc/", "/sys/", "/dev/")):
        touched.append(f"opened {args[0]}")
    elif event in ("ctypes.dlopen", "subprocess.Popen", "os.system", "socket.connect"):
        touched.append(event)
sys.addaudithook(watch)
exec(sys.argv[1])
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
foreign = sorted(name for name in loaded - set(sys.stdlib_module_names) if name not in ours)
changed = sorted(key for key in environment.keys() | os.environ.keys() if environment.get(key) != os.environ.get(key))
print(json.dumps({"foreign": foreign, "touched": touched, "environment": changed}))
"""
NOTHING: dict[str, list[str]] = {"foreign": [], "touched": [], "environment": []}


def effects_of(statement: str, *, after: str = "") -> dict[str, list[str]]:
    """What a statement does in a fresh process, in which ``after`` has run unobserved."""
    done = subprocess.run([sys.executable, "-c", PROBE, statement, after], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "statement",
    [
        "import geneformer_fast",
        "import geneformer_kernels",
        "import geneformer_fast, geneformer_kernels; dir(geneformer_fast); dir(geneformer_kernels)",
        "import geneformer_fast.errors, geneformer_fast.cli",
        "import geneformer_kernels.dispatch, geneformer_kernels.target",
    ],
)
def test_import_loads_nothing_foreign_and_touches_nothing(statement):
    assert effects_of(statement) == NOTHING


@pytest.mark.parametrize(
    ("statement", "kind", "what"),
    [
        ("import packaging.version", "foreign", "packaging"),
        ("open('/proc/cpuinfo').close()", "touched", "opened /proc/cpuinfo"),
        ("import subprocess; subprocess.run(['true'])", "touched", "subprocess.Popen"),
        ("import ctypes; ctypes.CDLL(None)", "touched", "ctypes.dlopen"),
        ("os.environ['OMP_NUM_THREADS'] = '17'", "environment", "OMP_NUM_THREADS"),
    ],
)
def test_the_probe_sees_what_it_must(statement, kind, what):
    assert what in effects_of(statement)[kind]


def test_tokenization_runs_without_torch():
    effects = effects_of("from geneformer_fast import tokenize, medians, Vocabulary, open_tokens")
    assert not {"torch", "triton", "transformers", "datasets"} & set(effects["foreign"])
    assert effects["environment"] == []


def test_the_encoder_runs_without_what_reads_cells():
    """A machine with a card may have torch, triton and numpy only."""
    effects = effects_of(
        "from geneformer_fast import Encoder, EncoderConfig, Ragged\n"
        "encoder = Encoder(EncoderConfig(2, 32, 2, 48, 97, 32), 'mlm')\n"
        "encoder.logits(encoder(Ragged.from_cells([[3, 4, 5], [6]]))).sum().backward()\n"
        "import geneformer_fast.checkpoints.mapping\n"
    )
    absent = {
        "anndata",
        "numba",
        "h5py",
        "pyarrow",
        "pandas",
        "scipy",
        "zarr",
        "transformers",
        "datasets",
        "safetensors",
    }
    assert not absent & set(effects["foreign"])
    assert effects["environment"] == []


@pytest.mark.parametrize("package", ["geneformer_fast", "geneformer_kernels"])
def test_every_public_name_is_found_where_the_package_says(package):
    statement = (
        f"import {package} as package\n"
        "for name in package.__all__: assert getattr(package, name) is not None, name\n"
        "assert set(package.__all__) <= set(dir(package))\n"
    )
    # Whoever accelerates a BERT has imported it, and transformers loads torch's compiler, which sets a variable.
    after = "import transformers.models.bert.modeling_bert" if package == "geneformer_fast" else ""
    assert effects_of(statement, after=after)["environment"] == []


@pytest.mark.parametrize("package", ["geneformer_fast", "geneformer_kernels"])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="no_such_name"):
        __import__(package).no_such_name  # noqa: B018
