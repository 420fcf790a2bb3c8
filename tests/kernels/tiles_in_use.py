"""Whether the calling thread has tiles in use, as the processor says."""

from __future__ import annotations

from typing import Any

import numba
from geneformer_kernels.cpu import amx
from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.llvm import INT32, INT64, call
from numba import types
from numba.extending import intrinsic


def _tiles_in_use(typing_context: Any) -> Any:
    """Of the states of the processor's registers that are in use, those of tiles."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        in_use = call(builder, "llvm.x86.xgetbv", INT64, INT32(1))
        return builder.and_(in_use, INT64(0b11 << 17))

    return types.int64(), generate


tiles_in_use: Any = intrinsic(_tiles_in_use)


@numba.njit(**{**LOOP, "cache": False})
def in_use():
    return tiles_in_use()


@numba.njit(**{**LOOP, "cache": False})
def in_use_after_configuring():
    amx.configure_tiles()
    found = tiles_in_use()
    amx.release_tiles()
    return found
