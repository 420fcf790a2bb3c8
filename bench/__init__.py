"""Speed and memory beside rivals. Runs from a checkout, installed or not: its second source root is put first here."""

from __future__ import annotations

import sys
from pathlib import Path

_KERNELS = str(Path(__file__).resolve().parent.parent / "kernels")
if _KERNELS not in sys.path:
    sys.path.insert(0, _KERNELS)
