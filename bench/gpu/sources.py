"""Which sources a measurement and a test on a card rest on, so that it can be told what changed since."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_OPS = "kernels/geneformer_kernels/ops"
_SHARED = "kernels/geneformer_kernels/*.py"
# Written from results: a result would make itself old.
_GENERATED = ("measured.py", "measured_int8.py")
# What runs on a CPU only.
_HOST = re.compile(r"host.*|avx512|blocked|reference|__init__")
_CALLED = {("rank_genes", "kernels"): "the fused pass and its other kernels"}
#: Name for people -> patterns, of what the operations' folders do not hold.
_OTHER_PARTS = {
    "what all kernels share": (_SHARED,),
    "the encoder": tuple(f"geneformer_fast/{name}.py" for name in ("encoder", "block", "layers", "config", "ragged")),
    "training": ("geneformer_fast/training/*.py",),
    "accelerate()": ("geneformer_fast/drop_in/*.py",),
    "the random encoders that are compared": ("bench/gpu/models.py", "bench/weights.py"),
    "tests for cards": ("tests/kernels/*.py", "tests/gpu/*.py"),
}
# Makes, compares and times candidates.
_PROCEDURE = (
    *("bench/gpu/card.py", "bench/gpu/impls.py", "bench/gpu/measure.py", "bench/gpu/models.py", "bench/gpu/timer.py"),
    *("bench/gpu/workload.py", "bench/gpu/providers/*.py", "geneformer_fast/profiling/lengths.py"),
    *("geneformer_fast/profiling/clock.py", "geneformer_fast/profiling/ceilings.py", "bench/weights.py"),
)
#: What tests on a card import, by folder; a change anywhere in them repeats all.
TESTED = (
    *("kernels", "geneformer_fast", "tests", "bench/weights.py"),
    *("bench/gpu/models.py", "bench/gpu/measure.py", "bench/gpu/workload.py"),
)


def digest_of(paths: Iterable[Path], *, root: Path = ROOT, also: str = "") -> str:
    """12 hexadecimal digits over names and contents of files in that order, and a text."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    digest.update(also.encode())
    return digest.hexdigest()[:12]


def tree_digest(places: Iterable[str], *, root: Path = ROOT) -> str:
    """:func:`digest_of` all Python files in folders, one folder after another, and of files named by themselves."""
    found = [root / place for place in places]
    return digest_of((p for at in found for p in ([at] if at.is_file() else sorted(at.rglob("*.py")))), root=root)


def _files(patterns: Iterable[str], root: Path) -> list[Path]:
    return [path for pattern in patterns for path in sorted(root.glob(pattern)) if path.name not in _GENERATED]


def parts(root: Path = ROOT) -> dict[str, str]:
    """Name for people -> digest, of everything that tests on a card run there."""
    found = {}
    for folder in sorted(path for path in (root / _OPS).iterdir() if (path / "op.py").exists()):
        files = [path for path in sorted(folder.glob("*.py")) if not _HOST.fullmatch(path.stem)]
        kernels = [path for path in files if path.stem.startswith("kernel")]
        for name, some in (("kernels", kernels), ("launches", [path for path in files if path not in kernels])):
            if some:
                called = _CALLED.get((folder.name, name), name)
                found[f"{folder.name}: {called}"] = digest_of(some, root=root)
    return found | {name: digest_of(_files(patterns, root), root=root) for name, patterns in _OTHER_PARTS.items()}


def source_of(case: Any, root: Path = ROOT) -> str:
    """Digest of what a case (:class:`bench.gpu.cases.Case`) runs: its operations, the procedure, and its problems."""
    ops = [f"{_OPS}/{op}/*.py" for op in (*case.tests, "linear")]
    models = ["geneformer_fast/*.py", "geneformer_fast/checkpoints/*.py"] if "encoder" in case.tests else []
    problems = re.sub(r" at 0x[0-9a-f]+", "", repr(case.problems))  # of functions
    return digest_of(_files([_SHARED, *ops, *models, *_PROCEDURE], root), root=root, also=problems)


def basis_of(gpu: str, source: str) -> dict[str, str | None]:
    """What two numbers must share to stand for each other: the card, torch, triton, and the source."""
    return {"gpu": gpu, "torch": _version("torch"), "triton": _version("triton"), "source": source}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
