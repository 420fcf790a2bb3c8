"""Where results lie, and what every one of them says: where and with what it was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
#: Environment variable that names another folder for the results of this machine.
OUT = "GENEFORMER_FAST_BENCH_OUT"

# torch is loaded when something was measured; whoever compares or tabulates results does without.


def provenance() -> dict[str, Any]:
    """Machine, versions and commit of a measurement, as the profiler says them; no commit where git knows none."""
    from geneformer_fast.profiling import machine

    return {"commit": "", "is_dirty": False, **machine.provenance()}


def machine_folder(found: dict[str, Any]) -> Path:
    """Where results of the machine, or of its card, lie."""
    from geneformer_fast.profiling import machine

    return RESULTS / (machine.slug(found["gpu"]["name"]) if "gpu" in found else machine.machine_slug(found))


def save_result(case: str, content: dict[str, Any], *, folder: Path | None = None, device: str = "cpu") -> Path:
    """Write ``bench/results/<machine or card>/<case>.json``: what was measured, and where.

    Parameters
    ----------
    case, content
        Name and figures.
    folder
        Another one for this machine's results; before the environment variable :data:`OUT`.
    device
        What was measured on.
    """
    found = _provenance_on(device)
    path = (folder or Path(os.environ.get(OUT) or machine_folder(found))) / f"{case}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"case": case, "provenance": found, **content}, indent=1) + "\n")
    return path


def _provenance_on(device: str) -> dict[str, Any]:
    """:func:`provenance`, with the card where the device is one."""
    if not device.startswith("cuda"):
        return provenance()
    import torch

    from bench.gpu.card import gpu_provenance

    return gpu_provenance(torch.device(device))
