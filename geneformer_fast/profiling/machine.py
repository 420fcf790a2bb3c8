"""Where and with what a number was measured, and in which state the device was. Only reads; sets nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from geneformer_kernels.target import cpu_features, cpu_name

#: The package's folder's folder: a checkout's root, or a folder of installed packages.
ROOT = Path(__file__).resolve().parents[2]
#: Environment variable with the name of the commit, said by who starts a copy of a checkout.
COMMIT = "GENEFORMER_FAST_COMMIT"
PACKAGES = (
    *("geneformer-fast", "numpy", "numba", "scipy", "pyarrow", "h5py", "anndata", "pandas", "datasets"),
    *("torch", "triton", "transformers"),
)


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """Machine, versions and commit of a measurement, as JSON values.

    Parameters
    ----------
    device
        A card, which is described as well, under ``gpu``.

    Returns
    -------
    dict
        ``commit`` and ``is_dirty`` only where the package lies in a checkout, or where :data:`COMMIT` says so.
    """
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "machine": cpu_name(),
        "n_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "instructions": sorted(cpu_features()),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        **_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        # Neighbours on the machine slow things down; a number taken under load says so.
        "load_1min": round(os.getloadavg()[0], 2),
    }
    if device is not None and device.type == "cuda":
        found["gpu"] = card(device)
    return found


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_slug(found: dict[str, Any]) -> str:
    """A folder name for a machine: its processor and number of cores."""
    return f"{slug(found['machine'])}-{found['n_cores']}-cores"


def card(device: torch.device) -> dict[str, Any]:
    """Name, size and versions of a card; of a device that is none, only its type."""
    if device.type != "cuda":
        return {"name": device.type}
    at = torch.cuda.get_device_properties(device)
    return {
        "name": at.name,
        "sm": at.major * 10 + at.minor,
        "n_sms": at.multi_processor_count,
        "memory_gib": round(at.total_memory / 2**30, 1),
        "l2_mib": round((getattr(at, "L2_cache_size", 0) or 0) / 2**20, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": query(device, ["driver_version"]).get("driver_version"),
    }


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power, temperature and what holds the clocks down, as the driver says; {} where nobody can tell."""
    if device.type != "cuda":
        return {}
    try:
        return _nvml_state(device)
    except Exception:  # no library, no driver, no right to ask: whatever it is, the program may know
        names = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
        return query(device, names)


def _nvml_state(device: torch.device) -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid_of(device))
        clock, most = pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetMaxClockInfo
        reads: dict[str, Callable[[], Any]] = {
            "sm_mhz": lambda: clock(handle, pynvml.NVML_CLOCK_SM),
            "sm_mhz_at_most": lambda: most(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": lambda: clock(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": lambda: round(pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3, 1),
            "power_limit_w": lambda: round(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3, 1),
            "celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": lambda: hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
            "processes": lambda: len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        }
        found = {}
        for name, read in reads.items():
            try:
                found[name] = read()
            except (pynvml.NVMLError, AttributeError) as error:
                found[name] = str(error)
        return found
    finally:
        pynvml.nvmlShutdown()


def uuid_of(device: torch.device) -> str:
    """What the driver calls a card, whatever torch's index of it is."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def query(device: torch.device, names: Sequence[str]) -> dict[str, Any]:
    """What nvidia-smi says of a card, where it is there."""
    command = ["nvidia-smi", f"--id={uuid_of(device)}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (value.strip() for value in said.strip().split(",")), strict=False))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The commit of the checkout the package lies in; an installed package may lie within somebody else's."""
    told = os.environ.get(COMMIT, "")
    if not (ROOT / ".git").exists():
        return {"commit": told} if told else {}
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return {"commit": told or _git("rev-parse", "--short=12", "HEAD"), "is_dirty": bool(changes)}


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
