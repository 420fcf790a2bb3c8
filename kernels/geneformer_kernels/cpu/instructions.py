"""Which instructions loops may name one by one."""

from __future__ import annotations

from llvmlite.binding import get_host_cpu_features

from geneformer_kernels.target import LLVM_FEATURES, is_left_to_numba


def is_compiled_for(name: str) -> bool:
    """Whether LLVM compiles for a set of ``target.INT8_INSTRUCTIONS`` here; one it does not know ends the process.

    numba can be told, by its environment, to compile for another CPU than this one.
    """
    return is_left_to_numba(name) and bool(get_host_cpu_features().get(LLVM_FEATURES[name]))
