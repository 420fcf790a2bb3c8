"""Which card a number was measured on, in which state, and what the card can do at most. Only reads; sets nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.gpu.sources import tree_digest
from bench.gpu.timer import Clock, Run
from bench.machine import provenance, slug

#: Name of the commit, said by who starts it: a copy of a checkout may lie inside another one.
COMMIT = "GENEFORMER_FAST_COMMIT"
# What a result depends on; a number can be traced to a commit by this even where git was not there.
_SOURCES = ("kernels", "geneformer_fast", "bench")


def gpu_provenance(device: torch.device) -> dict[str, Any]:
    """As :func:`bench.machine.provenance`, with the card and a digest of the sources."""
    found = provenance()
    found["commit"] = os.environ.get(COMMIT, "") or found["commit"]
    return {**found, "source": source_digest(), "gpu": card(device)}


def source_digest(folders: Sequence[str] = _SOURCES) -> str:
    """12 hexadecimal digits over all Python files of the folders."""
    return tree_digest(folders)


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
        "driver": _query(device, ["driver_version"]).get("driver_version"),
    }


def state(device: torch.device) -> dict[str, Any]:
    """Clocks, power, temperature and what holds the clocks down, as the driver says; {} where nobody can tell."""
    if device.type != "cuda":
        return {}
    try:
        return _nvml_state(device)
    except Exception:
        names = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
        return _query(device, names)


def _nvml_state(device: torch.device) -> dict[str, Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        clock, most = pynvml.nvmlDeviceGetClockInfo, pynvml.nvmlDeviceGetMaxClockInfo
        reads = {
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


def _query(device: torch.device, names: Sequence[str]) -> dict[str, Any]:
    """What nvidia-smi says of a card, where it is there."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (value.strip() for value in said.strip().split(",")), strict=False))


def card_slug(found: dict[str, Any]) -> str:
    """A folder name for a card."""
    return slug(found["name"])


def half_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit dtype that the device multiplies fast; float32 on a CPU, where nothing is measured."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def ceilings(
    device: torch.device, clock: Clock, *, is_tiny: bool = False, is_thorough: bool = False
) -> dict[str, float]:
    """What the card reaches now: T operations/s of large matrix products, GB/s (read and written) of a large copy.

    Random numbers, because products of zeros run faster. Every case measures them in its own process, so that a card
    that was slow that minute is not taken for a slow kernel.
    """
    n, n_bytes = (64, 1 << 16) if is_tiny else (8192, 1 << 31)
    repeats = 30 if is_thorough else 10
    product_ms = _median(clock, _product(device, n), repeats)
    copy_ms = _median(clock, _copy(device, n_bytes), repeats)
    found = {
        "product_tflops": _digits(2 * n**3 / product_ms / 1e9),
        "copy_gbps": _digits(2 * n_bytes / copy_ms / 1e6),
    }
    try:
        int8_ms = _median(clock, _int8_product(device, n), repeats)
    except RuntimeError:
        return found  # torch has no int8 product on this card
    return {**found, "int8_product_tflops": _digits(2 * n**3 / int8_ms / 1e9)}


def _digits(number: float) -> float:
    """Five digits that count: rounded to decimals, a slow machine's small product would come out as 0."""
    return float(f"{number:.5g}")


def _product(device: torch.device, n: int) -> Run:
    a, b = (torch.randn(n, n, device=device).to(half_dtype(device)) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b.T, out=out)


def _copy(device: torch.device, n_bytes: int) -> Run:
    source = torch.randint(0, 255, (n_bytes // 8,), dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _int8_product(device: torch.device, n: int) -> Run:
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(a, b.T)


def _median(clock: Clock, run: Run, n: int) -> float:
    for _ in range(3):
        run()
    return float(np.median(clock.samples(run, n)))
