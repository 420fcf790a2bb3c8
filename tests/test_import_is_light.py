"""Importing the packages loads nothing but themselves and the standard library, and asks the machine nothing."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

# Runs in a fresh interpreter: records what each statement in turn loads, opens, starts and changes.
PROBE = """
import json, os, sys, traceback
ours = ("geneformer_fast", "geneformer_kernels")
touched, effects = [], []
def watch(event, args):
    if event == "open" and str(args[0]).startswith(("/proc/", "/sys/", "/dev/")):
        touched.append(f"opened {args[0]}")
    elif event in ("ctypes.dlopen", "subprocess.Popen", "os.system", "socket.connect"):
        touched.append(event)
sys.addaudithook(watch)
for statement in json.loads(sys.argv[1]):
    before, environment, failed = set(sys.modules), dict(os.environ), ""
    touched.clear()
    try:
        exec(statement, {})
    except Exception:
        failed = traceback.format_exc()
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    foreign = sorted(name for name in loaded - set(sys.stdlib_module_names) if name not in ours)
    changed = sorted(k for k in environment.keys() | os.environ.keys() if environment.get(k) != os.environ.get(k))
    effects.append({"foreign": foreign, "touched": [*touched], "environment": changed, "failed": failed})
print(json.dumps(effects))
"""
NOTHING: dict[str, object] = {"foreign": [], "touched": [], "environment": [], "failed": ""}

LIGHT = (
    "import geneformer_fast",
    "import geneformer_kernels",
    "import geneformer_fast, geneformer_kernels; dir(geneformer_fast); dir(geneformer_kernels)",
    "import geneformer_fast.errors, geneformer_fast.cli",
    "import geneformer_kernels.dispatch, geneformer_kernels.target",
)
TOKENIZING = "from geneformer_fast import tokenize, medians, Vocabulary, open_tokens"
#: What the probe must see -> where, and as what.
SEEN = {
    "import iniconfig": ("foreign", "iniconfig"),
    "open('/proc/cpuinfo').close()": ("touched", "opened /proc/cpuinfo"),
    "import subprocess; subprocess.run(['true'])": ("touched", "subprocess.Popen"),
    "import ctypes; ctypes.CDLL(None)": ("touched", "ctypes.dlopen"),
    "import os; os.environ['OMP_NUM_THREADS'] = '17'": ("environment", "OMP_NUM_THREADS"),
}
ENCODING = (
    "from geneformer_fast import Encoder, EncoderConfig, Ragged\n"
    "encoder = Encoder(EncoderConfig(2, 32, 2, 48, 97, 32), 'mlm')\n"
    "encoder.logits(encoder(Ragged.from_cells([[3, 4, 5], [6]]))).sum().backward()\n"
    "import geneformer_fast.checkpoints.mapping\n"
)
NAMES = {
    package: (
        f"import {package} as package\n"
        "for name in package.__all__: assert getattr(package, name) is not None, name\n"
        "assert set(package.__all__) <= set(dir(package))\n"
    )
    for package in ("geneformer_kernels", "geneformer_fast")
}
# Whoever accelerates a BERT has imported it, and transformers loads torch's compiler, which sets a variable.
BERT = "import transformers.models.bert.modeling_bert"
#: Statements of one process each, whose imports take seconds: those that must load nothing come first.
PROCESSES = ((*LIGHT, TOKENIZING, *SEEN), (ENCODING, NAMES["geneformer_kernels"], BERT, NAMES["geneformer_fast"]))


@functools.cache
def effects_in(statements: tuple[str, ...]) -> list[dict[str, object]]:
    given = json.dumps(statements)
    done = subprocess.run([sys.executable, "-c", PROBE, given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def effects_of(statement: str) -> dict[str, object]:
    """What a statement does in a fresh process, after those before it."""
    (statements,) = (each for each in PROCESSES if statement in each)
    return effects_in(statements)[statements.index(statement)]


@pytest.mark.parametrize("statement", LIGHT)
def test_import_loads_nothing_foreign_and_touches_nothing(statement):
    assert effects_of(statement) == NOTHING


@pytest.mark.parametrize("statement", SEEN)
def test_the_probe_sees_what_it_must(statement):
    kind, what = SEEN[statement]
    assert what in effects_of(statement)[kind]


def test_tokenization_runs_without_torch():
    effects = effects_of(TOKENIZING)
    assert not effects["failed"]
    assert not {"torch", "triton", "transformers", "datasets"} & set(effects["foreign"])
    assert effects["environment"] == []


def test_the_encoder_runs_without_what_reads_cells():
    """A machine with a card may have torch, triton and numpy only."""
    effects = effects_of(ENCODING)
    assert not effects["failed"]
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


@pytest.mark.parametrize("package", NAMES)
def test_every_public_name_is_found_where_the_package_says(package):
    effects = effects_of(NAMES[package])
    assert not effects["failed"]
    assert effects["environment"] == []


@pytest.mark.parametrize("package", NAMES)
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="no_such_name"):
        __import__(package).no_such_name  # noqa: B018
