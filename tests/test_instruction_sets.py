"""Numerical tests with the instruction sets and numbers of threads of lesser machines, which this one can play."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tolerance import VARIABLE

ROOT = Path(__file__).resolve().parent.parent
#: What tells torch, oneDNN, MKL, OpenBLAS and numba to leave newer instructions alone; and numpy, by the ends of names.
LEVELS = {
    "AVX2": (
        {
            "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "OPENBLAS_CORETYPE": "Haswell", "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "",
        },
        ("AVX512", "X86_V4"),
    ),
    "SSE": (
        {
            "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "OPENBLAS_CORETYPE": "Nehalem", "NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "",
        },
        ("AVX", "FMA", "F16C", "X86_V3", "X86_V4"),
    ),
}  # fmt: skip
#: Beside every file with a witness: those with numbers of their own.
OTHERS = (
    "tests/kernels/test_default_dtype.py",
    "tests/kernels/test_dropout.py",
    "tests/kernels/test_dropout_gradients.py",
    "tests/kernels/test_rank_genes.py",
    "tests/kernels/test_strides.py",
    "tests/drop_in/test_drop_in_geneformer.py",
    "tests/drop_in/test_drop_in_logits.py",
    "tests/drop_in/test_drop_in_padding.py",
    "tests/extract/test_extract_numbers.py",
    "tests/gpu/test_training_gpu.py",
    "tests/test_encoder_kernels.py",
    "tests/test_encoder_training.py",
    "tests/training/test_step_parity.py",
)

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86")


def environment(level: str, n_threads: int) -> dict[str, str]:
    settings, names = LEVELS[level]
    umath = np._core._multiarray_umath
    present = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
    return os.environ | settings | {
        "NPY_DISABLE_CPU_FEATURES": " ".join(name for name in present if name.startswith(names)),
        "OMP_NUM_THREADS": str(n_threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
    }  # fmt: skip


def with_witness() -> list[str]:
    """Test files that ask a witness, by themselves or through a file of inputs that they share."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))}
    asking = {path for path, text in texts.items() if "Witness(" in text}
    shared = "|".join(path.stem for path in asking if not path.name.startswith("test_"))
    through = re.compile(rf"^from ({shared}) import", re.MULTILINE)
    found = asking | {path for path, text in texts.items() if through.search(text)}
    return [str(path.relative_to(ROOT)) for path in sorted(found) if path.name.startswith("test_")]


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_a_process_is_held_to_a_level(level: str) -> None:
    """Otherwise the tests below would show nothing."""
    program = """if True:
        import numpy as np, torch
        from geneformer_kernels.target import target_of
        umath = np._core._multiarray_umath
        names = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
        print(torch.backends.cpu.get_cpu_capability(), target_of("cpu").fastest_dtype, torch.get_num_threads(), *names)
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment(level, 1) | {"PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert found[:3] == [{"AVX2": "AVX2", "SSE": "DEFAULT"}[level], "float32", "1"]
    assert not [name for name in found[3:] if name.startswith(LEVELS[level][1])]


def test_files_with_a_witness_are_found() -> None:
    files = with_witness()
    assert "tests/kernels/test_varlen_attention_triton.py" in files
    assert "tests/kernels/test_varlen_attention_dropout.py" in files
    assert "tests/drop_in/test_drop_in_step.py" in files
    assert all((ROOT / name).exists() for name in OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("witness", ["here", "drawn"])
@pytest.mark.parametrize(("level", "n_threads"), [("AVX2", 1), ("AVX2", 2), ("SSE", 1)])
def test_numbers_are_right(level: str, n_threads: int, witness: str) -> None:
    """With this machine's torch as a witness, and by the arithmetic alone."""
    files = with_witness() if witness == "drawn" else sorted({*with_witness(), *OTHERS})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *files], cwd=ROOT,
        env=environment(level, n_threads) | {VARIABLE: witness}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
