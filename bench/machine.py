"""Where and with what a number was measured. Every result carries this."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from geneformer_kernels.target import cpu_features, cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
#: Environment variable that names another folder for the results of this machine.
OUT = "GENEFORMER_FAST_BENCH_OUT"
_PACKAGES = (
    *("geneformer-fast", "numpy", "numba", "scipy", "pyarrow", "h5py", "anndata", "pandas", "datasets"),
    *("torch", "triton", "transformers"),
)


def provenance() -> dict[str, Any]:
    """Machine, versions and commit of a measurement, as JSON values."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": cpu_name(),
        "n_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "instructions": sorted(cpu_features()),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        # Neighbours on the machine slow things down; a number taken under load says so.
        "load_1min": round(os.getloadavg()[0], 2),
    }


def machine_slug(found: dict[str, Any]) -> str:
    """A folder name for a machine: its processor and number of cores."""
    return f"{slug(found['machine'])}-{found['n_cores']}-cores"


def slug(name: str) -> str:
    """A name as part of a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def provenance_on(device: str) -> dict[str, Any]:
    """:func:`provenance`, with the card where the device is one."""
    if not device.startswith("cuda"):
        return provenance()
    import torch

    from bench.gpu.card import gpu_provenance

    return gpu_provenance(torch.device(device))


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
    found = provenance_on(device)
    name = slug(found["gpu"]["name"]) if "gpu" in found else machine_slug(found)
    path = (folder or Path(os.environ.get(OUT) or RESULTS / name)) / f"{case}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"case": case, "provenance": found, **content}, indent=1) + "\n")
    return path


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
