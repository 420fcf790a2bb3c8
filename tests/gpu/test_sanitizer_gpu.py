"""Every kernel under compute-sanitizer: none may touch memory that is not its own, or shared memory out of turn."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import every_kernel
import pytest
import torch
from geneformer_kernels.dispatch import choose
from geneformer_kernels.target import CARDS, target_of

ROOT = Path(__file__).resolve().parent.parent.parent
OPERATIONS = list(every_kernel.RUNS)
MOST_S = 240
#: Exit status where the sanitizer found something.
FOUND = 99
# What it says, in lines of its own, where it cannot look at this card or this kind of machine.
UNABLE = re.compile(
    r"^=========.*(Device not supported|not supported on this|Unable to|Failed to initialize|Internal Sanitizer Error)",
    re.MULTILINE,
)
CLEAN = {
    "memcheck": re.compile(r"^========= ERROR SUMMARY: 0 errors$", re.MULTILINE),
    "racecheck": re.compile(r"^========= RACECHECK SUMMARY: 0 hazards displayed", re.MULTILINE),
}


def kernels_of(op: str) -> set[str]:
    """Names of the functions in an operation's kernel files that are launched."""
    folder = ROOT / "kernels" / "geneformer_kernels" / "ops" / op
    modules = [
        importlib.import_module(f"geneformer_kernels.ops.{op}.{path.stem}") for path in folder.glob("kernel*.py")
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def verdict(tool: str, status: int, said: str) -> str:
    """Either "clean", "unable" where the sanitizer could not look, or else "failed".

    A program that began and did not end well has failed, whatever the sanitizer says besides.
    """
    has_begun = re.search(r"^begun$", said, re.MULTILINE) is not None
    if status == 0 and CLEAN[tool].search(said) and not UNABLE.search(said):
        return "clean"
    if UNABLE.search(said) and (status == 0 or not has_begun) and status != FOUND:
        return "unable"
    return "failed"


def check(tool: str, op: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    choose(op, "float64" if op == "rank_genes" else "float16", target_of("cuda"), "triton")
    # Every tensor is an allocation of its own, so that reading past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    options = ["--tool", tool, "--error-exitcode", str(FOUND)]
    command = [_sanitizer(), *options, sys.executable, every_kernel.__file__, op]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MOST_S, cwd=ROOT)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer took longer than {MOST_S} s")
    said = done.stdout + done.stderr
    found = verdict(tool, done.returncode, said)
    if found == "unable":
        pytest.skip(f"compute-sanitizer cannot look at this machine: {UNABLE.search(said)[0]}")
    assert found == "clean", said[-4000:]
    launched = re.search(r"^launched (.*)$", said, re.MULTILINE)
    assert launched is not None
    assert set(launched[1].split()) == kernels_of(op)


def _sanitizer() -> str:
    found = shutil.which("compute-sanitizer")
    for folder in ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"):
        found = found or shutil.which("compute-sanitizer", path=folder)
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATIONS)
def test_memcheck_finds_nothing(op: str) -> None:
    check("memcheck", op)


@pytest.mark.slow  # and not gpu: no measurement waits for it
@pytest.mark.parametrize("op", OPERATIONS)
def test_racecheck_finds_nothing(op: str) -> None:
    check("racecheck", op)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_kernel_is_launched(op: str) -> None:
    """In the interpreter, and no kernel that a plan names is missing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled for the card in this process")
    plan = importlib.import_module(f"geneformer_kernels.ops.{op}.plan")
    planned = {case.kernel for card in CARDS.values() for case in plan.kernel_cases(card)}
    assert every_kernel.launched_by(op, "cpu") == kernels_of(op) >= planned


def test_every_operation_with_kernels_has_a_run() -> None:
    folders = {path.parent.name for path in (ROOT / "kernels/geneformer_kernels/ops").glob("*/kernel*.py")}
    assert folders == set(OPERATIONS)


CLEAN_RUN = "begun\nlaunched a b\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (0, CLEAN_RUN, "clean"),
        (0, "========= COMPUTE-SANITIZER\n" + CLEAN_RUN, "clean"),
        (0, "UserWarning: Unable to find something\n" + CLEAN_RUN, "clean"),
        (
            FOUND,
            "begun\n========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error\n",
            "failed",
        ),
        (FOUND, "begun\n========= Misaligned address\n========= Unable to unwind\n", "failed"),
        (1, "begun\nRuntimeError: CUDA error: misaligned address\nUnable to go on\n", "failed"),
        (1, "begun\n========= Unable to go on\nRuntimeError: CUDA error\n", "failed"),
        (-11, "begun\n", "failed"),
        (1, "ModuleNotFoundError: Unable to import it\n", "failed"),
        (0, "begun\nlaunched a b\n", "failed"),
        (1, "========= Error: Device not supported. Please refer to the documentation\n", "unable"),
        (0, "========= Unable to find injection library\n" + CLEAN_RUN, "unable"),
    ],
)
def test_only_the_sanitizer_says_that_it_is_unable(status: int, said: str, expected: str) -> None:
    assert verdict("memcheck", status, said) == expected
