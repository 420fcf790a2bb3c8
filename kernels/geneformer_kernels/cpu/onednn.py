"""Linear layers of bfloat16 on the CPU by oneDNN's own operator, which takes the activation into the product."""

from __future__ import annotations

import functools
import os

import torch

from geneformer_kernels.target import target_of
from geneformer_kernels.workspace import Workspace

# oneDNN's cache of compiled products, and the one that torch has for each thread. A batch needs a handful of them.
_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}


@functools.cache
def keep_few_products() -> None:
    """Bound how many products of bfloat16 are kept compiled in this process, unless the environment says how many.

    One is compiled for every number of rows, and packed batches hardly ever repeat theirs: without a bound of ours
    memory grows by 3 MB with every batch of six layers until two times 1,024 are kept (torch 2.13, amx_bf16,
    2026-11-30). The libraries read these variables when they multiply for the first time, and never again.
    """
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:  # the name it had
        for name, capacity in _CACHES.items():
            os.environ.setdefault(name, capacity)


# What it keeps compiled then.
_COMPILED_BYTES = 24 << 20


def workspace(weight: torch.Tensor) -> Workspace:
    """Of torch's product with a weight [N, K] on the CPU: it laid out anew, by MKL or oneDNN, and buffers of it.

    Up to three times a weight in float32 were seen (MKL, V2-104M: 25 MB, a weight has 9).
    """
    is_by_onednn = weight.dtype in (torch.bfloat16, torch.float16)
    return Workspace(call=3 * 4 * weight.numel() + (_COMPILED_BYTES if is_by_onednn else 0))


def is_for_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether :func:`onednn_linear` may compute this: bfloat16 on a CPU that has it, rows to compute, no gradient."""
    return (
        x.device.type == "cpu"
        and all(t is None or t.dtype == torch.bfloat16 for t in (x, weight, bias))
        and len(x) > 0
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and target_of(x.device).has_fast_bf16
    )


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None = None
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)`` for x [T, C] and weight [N, C]; activation is None or ``"relu"``.

    1.1 to 2.3 times as fast as `F.linear` followed by ReLU (256 to 4,096 rows, widths 256 to 768, one core of a Xeon
    with amx_bf16, 2026-11-30). The operator is the one torch.compile uses on the CPU. It lays the weights out anew at
    every call. Copies kept from call to call would save 0 to 8 % at 4,096 rows (28 % at 256), and miss weights that are
    changed where torch counts no versions: through ``.data``, a numpy view, another library.
    """
    keep_few_products()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation or "none", [], "")
