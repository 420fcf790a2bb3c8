"""Compiled loops are kept beside their sources, and compiled again when a piece of theirs changed in another file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import geneformer_kernels
import pytest
from geneformer_kernels.cpu import kept

PIECE = """
import numba
from geneformer_kernels.cpu.compiled import LOOP
@numba.njit(**LOOP)
def piece(x):
    return x + {added}
"""
WHOLE = """
import numba
from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.piece import piece
@numba.njit(**LOOP)
def whole(x):
    return 10 * piece(x)
"""
RUN = """
from geneformer_kernels.cpu.whole import whole
print(whole(1), sum(whole.stats.cache_hits.values()))
"""


def test_a_loop_is_compiled_again_when_its_pieces_changed(tmp_path: Path) -> None:
    """By numba alone the second run would say 20 again: the file of ``whole`` is what it was."""
    package = tmp_path / "geneformer_kernels"
    source = Path(geneformer_kernels.__file__).parent
    (package / "cpu").mkdir(parents=True)
    for name in ("__init__.py", "cpu/__init__.py"):
        (package / name).write_text("")
    for name in ("compiled.py", "kept.py"):
        shutil.copy(source / "cpu" / name, package / "cpu" / name)
    (package / "cpu" / "whole.py").write_text(WHOLE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": ""}

    def said(added: int) -> str:
        (package / "cpu" / "piece.py").write_text(PIECE.format(added=added))
        command = [sys.executable, "-c", RUN]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert said(1) == "20 0"
    assert said(1) == "20 1"
    assert said(5) == "60 0"
    assert said(1) == "20 0"


def test_a_numba_that_cannot_be_told_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "caching", object())
    assert kept.keep_for_all_sources() is False
