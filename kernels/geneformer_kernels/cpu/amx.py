"""Tiles of a CPU with AMX, for loops that numba compiles: whether a process may have them, their layout, their release.

A tile holds 16 rows of 64 bytes; there are eight.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic

from geneformer_kernels.cpu.llvm import INT8, VOID, call

#: Rows of a tile, bytes of each of them, and of all.
TILE_ROWS, TILE_WIDTH, TILE_BYTES = 16, 64, 1024
#: What LLVM calls the instruction sets that loops with tiles need, and what people do.
_NAMES = {
    "amx-tile": "amx_tile", "amx-int8": "amx_int8", "amx-bf16": "amx_bf16",
    "avx512bf16": "avx512_bf16", "avx512bw": "avx512bw", "avx512dq": "avx512dq",
}  # fmt: skip

# Linux on x86-64: the call by which a process asks for more registers, and for which.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def why_not(*features: str) -> str | None:
    """Why loops that need these of LLVM's instruction sets, and tiles, cannot run in this process; None if they can."""
    return why_not_compilable(*features) or _why_refused(os.getpid())


def why_not_compilable(*features: str) -> str | None:
    """Why numba cannot compile these instructions here: its LLVM would end the process."""
    config: Any = numba.config
    if config.CPU_NAME is not None or config.CPU_FEATURES is not None or not config.ENABLE_AVX:
        return "numba is told to compile for another CPU"
    here = get_host_cpu_features()
    missing = [_NAMES[name] for name in features if not here.get(name)]
    return f"the CPU lacks {', '.join(missing)}" if missing else None


@functools.cache
def _why_refused(process: int) -> str | None:
    """Why the operating system keeps tiles from this process; None once it has been asked and agreed.

    Linux agrees for all threads at once, those that run already too, and for processes forked from this one.
    """
    if sys.platform != "linux":
        return f"how to ask {sys.platform} for AMX is not known here"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0:
        return None
    code = ctypes.get_errno()
    why = "a thread's stack for signals is too small" if code == errno.ENOSPC else os.strerror(code)
    return f"the operating system refuses AMX: {why}"


def _configure(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if why_not_compilable("amx-tile") is None:
            # Palette 1; from byte 16 on, each tile's bytes per row (two bytes), from byte 48 on, its rows.
            layout = np.zeros(64, np.uint8)
            layout[0] = 1
            layout[16:32].view(np.uint16)[:] = TILE_WIDTH
            layout[48:56] = TILE_ROWS
            at = alloca_once(builder, ir.ArrayType(INT8, len(layout)))
            builder.store(ir.Constant(ir.ArrayType(INT8, len(layout)), bytearray(layout)), at)
            call(builder, "llvm.x86.ldtilecfg", VOID, builder.bitcast(at, ir.PointerType(INT8)))
        return context.get_dummy_value()

    return types.void(), generate


def _release(typing_context: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if why_not_compilable("amx-tile") is None:
            call(builder, "llvm.x86.tilerelease", VOID)
        return context.get_dummy_value()

    return types.void(), generate


#: All eight tiles have 16 rows of 64 bytes.
configure_tiles: Any = intrinsic(_configure)
#: Tiles as if never used: who comes next in this thread configures his own; switches of threads save none.
release_tiles: Any = intrinsic(_release)
