"""``python -m bench.cpu.favor_case WAY LENGTH ROUNDS FILE``: one way to attend, or to encode, timed in its own process.

Sizes are scBERT's: 10 heads of 64, 266 features, one cell. FILE gets seconds of every round, and the resident memory
before the first one.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

N_HEADS, HEAD_DIM, N_FEATURES = 10, 64, 266
WAYS = ("ours", "plain", "softmax", "encoder")


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """The published formula for [B, H, L, D], as Performers compute it: features of all tokens are in memory."""
    ratio, scale = len(projection) ** -0.5, HEAD_DIM**-0.25

    def features(x: torch.Tensor, is_query: bool) -> torch.Tensor:
        dash = torch.einsum("bhid,jd->bhij", scale * x, projection)
        half = (x**2).sum(-1, keepdim=True) / 2 * scale**2
        largest = dash.amax(-1, keepdim=True) if is_query else dash.amax()
        return ratio * (torch.exp(dash - half - largest) + 1e-4)

    of_q, of_k = features(q, True), features(k, False)
    inverse = 1 / torch.einsum("bhnd,bhd->bhn", of_q, of_k.sum(-2))
    context = torch.einsum("bhnd,bhne->bhde", of_k, v)
    return torch.einsum("bhde,bhnd,bhn->bhne", context, of_q, inverse)


def way_of(name: str, length: int) -> Callable[[], Any]:
    """What is timed."""
    generator = torch.Generator().manual_seed(0)
    if name == "encoder":
        from geneformer_fast import Encoder, EncoderConfig
        from geneformer_fast.ragged import Ragged

        encoder = Encoder(EncoderConfig.preset("scbert")).eval()
        tokens = Ragged.from_cells([torch.randint(0, 6, (length,), generator=generator)])
        return lambda: encoder(tokens)
    qkv = torch.randn(length, 3, N_HEADS, HEAD_DIM, generator=generator)
    projection = torch.randn(N_FEATURES, HEAD_DIM, generator=generator)
    if name == "ours":
        from geneformer_kernels import favor_attention

        bounds = torch.tensor([0, length], dtype=torch.int32)
        return lambda: favor_attention(*qkv.unbind(1), projection, cu_seqlens=bounds)
    q, k, v = (x.transpose(0, 1)[None] for x in qkv.unbind(1))
    if name == "plain":
        return lambda: plain(q, k, v, projection)
    return lambda: F.scaled_dot_product_attention(q, k, v)


def main() -> None:
    """Time one way; see the module."""
    name, length, rounds, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    with torch.inference_mode():
        way_of(name, 16)()  # what is loaded with the first call is no part of it
        way = way_of(name, length)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    path.write_text(json.dumps({"seconds": seconds, "bytes_before": before}))


if __name__ == "__main__":
    main()
