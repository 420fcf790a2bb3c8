"""What a kernel may know of the hardware it runs on. The only place in the project that asks.

A :class:`Target` is plain data, so that every plan and every choice can be tested for a card that is not there: build
one by hand, or start from a row of :data:`CARDS`. Nothing here runs at import.
"""

from __future__ import annotations

import functools
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Shared memory one block may use (bytes), by compute capability: CUDA C++ programming guide, table "technical
# specifications per compute capability", opt-in maximum.
SMEM_BYTES = {70: 98_304, 75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

#: Instruction sets of CPUs that multiply int8 in compiled loops, slowest first; avx2 has to widen them.
INT8_INSTRUCTIONS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8")
#: What LLVM, the compiler of those loops, calls them.
LLVM_FEATURES = {"avx2": "avx2", "avx_vnni": "avxvnni", "avx512_vnni": "avx512vnni", "amx_int8": "amx-int8"}
# x86 CPUs with AVX2 that somebody may name to numba in place of their own.
_WITH_AVX2 = ("haswell", "broadwell", "skylake", "alderlake", "znver1", "znver2", "znver3", "x86-64-v3", "x86-64-v4")


@dataclass(frozen=True)
class Target:
    """One device, as far as a plan or a choice depends on it.

    Attributes
    ----------
    kind
        ``"cpu"``, ``"cuda"``, ``"hip"`` or ``"mps"``.
    sm
        Compute capability as major * 10 + minor (90 for Hopper); 0 where there is none.
    smem_bytes
        Shared memory one block may use, in bytes; 0 where there is none.
    n_sms
        Streaming multiprocessors, or CPU cores.
    triton
        Version of the installed Triton as (major, minor), or None.
    features
        CPU instruction sets that matter here: ``avx2``, ``fma``, ``avx512``, ``avx512_bf16``, ``amx_bf16``,
        ``arm_bf16``, those of :data:`INT8_INSTRUCTIONS` and ``int8_dot``; and
        ``triton_interpreter`` in a process that started with ``TRITON_INTERPRET=1``.
    name
        What people call it.
    """

    kind: str
    sm: int = 0
    smem_bytes: int = 0
    n_sms: int = 1
    triton: tuple[int, int] | None = None
    features: frozenset[str] = frozenset()
    name: str = ""

    @staticmethod
    def cpu(features: Iterable[str] = (), *, n_cores: int = 1, name: str = "CPU") -> Target:
        """A CPU with the given instruction sets."""
        return Target(kind="cpu", n_sms=n_cores, features=frozenset(features), name=name)

    @staticmethod
    def cuda(sm: int, *, n_sms: int = 1, triton: tuple[int, int] | None = (3, 6), name: str = "") -> Target:
        """A CUDA card of compute capability ``sm`` with that architecture's shared memory limit."""
        smem_bytes = SMEM_BYTES.get(sm, max(size for known, size in SMEM_BYTES.items() if known <= max(sm, 70)))
        return Target("cuda", sm, smem_bytes, n_sms, triton, name=name or f"sm_{sm}")

    @property
    def has_fast_bf16(self) -> bool:
        """Whether bfloat16 matrix products are faster here than float32 ones."""
        if self.kind == "cpu":
            return bool(self.features & {"avx512_bf16", "amx_bf16", "arm_bf16"})
        return self.kind == "hip" or (self.kind == "cuda" and self.sm >= 80)

    @property
    def has_int8_product(self) -> bool:
        """Whether torch multiplies int8 here, exactly.

        Volta has no such instruction. On a CPU without one (VNNI, or Arm's dot product) oneDNN adds products in 16
        bits, two at a time, and where their sum does not fit, takes the largest number that does.
        """
        if self.kind == "cpu":
            return "int8_dot" in self.features
        return self.kind == "cuda" and self.sm >= 75

    @property
    def has_fp8_product(self) -> bool:
        """Whether torch multiplies float8 (e4m3) here with a scale per row: Ada, Hopper and newer."""
        return self.kind == "cuda" and self.sm >= 89

    @property
    def int8_instructions(self) -> str | None:
        """The fastest set of :data:`INT8_INSTRUCTIONS` here; None: products of int8 are torch's."""
        return next((name for name in reversed(INT8_INSTRUCTIONS) if name in self.features), None)

    @property
    def has_float32_loops(self) -> bool:
        """Whether compiled loops can multiply float32 here: on a CPU with AVX2."""
        return self.kind == "cpu" and {"avx2", "fma"} <= self.features

    @property
    def prefers_float32_loops(self) -> bool:
        """Whether they are the fastest way: with AVX-512 libraries take twice as many numbers at a time."""
        return self.has_float32_loops and "avx512" not in self.features

    @property
    def fastest_dtype(self) -> str:
        """The dtype name matrix products should use when nobody asks for another one."""
        if self.has_fast_bf16:
            return "bfloat16"
        return "float16" if self.kind in ("cuda", "mps") else "float32"


CARDS = {
    "V100": Target.cuda(70, n_sms=80, name="V100"),
    "T4": Target.cuda(75, n_sms=40, name="T4"),
    "A100": Target.cuda(80, n_sms=108, name="A100"),
    "A10": Target.cuda(86, n_sms=72, name="A10"),
    "L4": Target.cuda(89, n_sms=58, name="L4"),
    "H100": Target.cuda(90, n_sms=132, name="H100"),
}


def target_of(device: str | torch.device) -> Target:
    """The target behind a torch device; the hardware is asked once per device and process, the threads every time."""
    import torch

    device = torch.device(device)
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _probe(device.type, index, torch.get_num_threads() if device.type == "cpu" else 1)


# Of the arguments, what may change while a process runs; what is asked besides stays what it is.
@functools.cache
def _probe(device_type: str, index: int | None, n_threads: int) -> Target:
    import torch

    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip is not None:
            return Target("hip", n_sms=properties.multi_processor_count, name=properties.name)
        sm = properties.major * 10 + properties.minor
        smem_bytes = getattr(properties, "shared_memory_per_block_optin", None) or Target.cuda(sm).smem_bytes
        return Target("cuda", sm, smem_bytes, properties.multi_processor_count, triton_version(), name=properties.name)
    if device_type == "cpu":
        features = cpu_features() | ({"triton_interpreter"} if is_interpreted() else set())
        return Target.cpu(features, n_cores=n_threads, name=cpu_name())
    return Target(device_type, name=device_type)


def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the installed Triton, read from its metadata without importing it; None if absent."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def is_interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, line by line, in this process: for tests."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes") and triton_version() is not None


@functools.cache
def cpu_features() -> frozenset[str]:
    """Instruction sets of this CPU among those a choice depends on, as the operating system reports them.

    Without those for narrow products that oneDNN, which multiplies for torch, is told to leave alone
    (``ONEDNN_MAX_CPU_ISA``), and without AVX-512 where MKL, which multiplies float32, is (``MKL_ENABLE_INSTRUCTIONS``).
    """
    flags = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL").upper()
    if limit not in ("ALL", "DEFAULT"):
        flags -= set() if "AMX" in limit else {"amx_bf16", "amx_int8"}
        flags -= set() if re.search("BF16|FP16|AMX|AVX10", limit) else {"avx512_bf16"}
        flags -= set() if re.search("VNNI|BF16|FP16|AMX|AVX10", limit) else {"avx512_vnni", "avx_vnni"}
    names = {
        "avx2": "avx2",
        "fma": "fma",
        "avx512f": "avx512",
        "avx512_bf16": "avx512_bf16",
        "amx_bf16": "amx_bf16",
        "bf16": "arm_bf16",
        "avx512_vnni": "int8_dot",
        "avx_vnni": "int8_dot",
        "asimddp": "int8_dot",
    }
    if os.environ.get("MKL_ENABLE_INSTRUCTIONS", "").upper() in ("SSE4_2", "AVX", "AVX2"):
        flags.discard("avx512f")  # of which products of float32, MKL's, then make nothing
    found = {name for flag, name in names.items() if flag in flags}
    if limit.startswith("AVX2"):
        flags.discard("avx512_vnni")
    if not is_left_to_numba("fma"):
        found -= {"fma"}
    return frozenset(
        found - {"avx2"} | {name for name in INT8_INSTRUCTIONS if name in flags and is_left_to_numba(name)}
    )


def is_left_to_numba(name: str) -> bool:
    """Whether numba's environment lets it compile for ``"fma"``, or a set of :data:`INT8_INSTRUCTIONS`, of this CPU."""
    if os.environ.get("NUMBA_ENABLE_AVX", "1") == "0":
        return False
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        return True
    if name in ("avx2", "fma") and os.environ.get("NUMBA_CPU_NAME", "").lower() in _WITH_AVX2:
        return f"-{name}" not in features.split(",")
    return f"+{LLVM_FEATURES.get(name, name)}" in features.split(",")


def cpu_name() -> str:
    """The CPU's model name, as the operating system reports it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
