"""The case of linear attention by random features at scBERT's size, beside the published formula."""

from __future__ import annotations

import torch

from bench.gpu.measure import Work
from bench.gpu.providers.operations import Function, Problem, Tensors, draw, operation

N_HEADS, HEAD_DIM, N_FEATURES = 10, 64, 266
EPS = 1e-4


def favor_problems(is_tiny: bool) -> list[Problem]:
    """Cells of scBERT's length, and of a quarter of it; forward, and forward and backward."""
    chosen = [("37", 2, 37)] if is_tiny else [("16907", 4, 16_907), ("4227", 16, 4_227)]
    return [_problem(*sizes, has_gradients) for sizes in chosen for has_gradients in (False, True)]


def plain(t: Tensors) -> torch.Tensor:
    """The published formula, with a stabiliser per cell."""
    n_cells = len(t["bounds"]) - 1
    scale = HEAD_DIM**-0.25
    q, k, v = (t[name].view(n_cells, -1, N_HEADS, HEAD_DIM).transpose(1, 2) for name in "qkv")
    features = []
    for x, axes in ((q, -1), (k, (1, 2, 3))):
        projected = x * scale @ t["projection"].to(x.dtype).T
        half = (x * scale).square().sum(-1, keepdim=True) / 2
        features.append(torch.exp(projected - half - projected.amax(axes, keepdim=True)) + EPS)
    of_q, of_k = features
    out = of_q @ (of_k.transpose(2, 3) @ v) / (of_q @ of_k.sum(2)[..., None])
    return out.transpose(1, 2).flatten(0, 1)


def _problem(name: str, n_cells: int, length: int, has_gradients: bool) -> Problem:
    total, shape = n_cells * length, (n_cells * length, N_HEADS, HEAD_DIM)

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        tensors = {name: draw(device, *shape, mean=0.2, seed=seed).to(dtype) for seed, name in enumerate("qkv")}
        bounds = torch.arange(0, total + 1, length, dtype=torch.int32, device=device)
        return {**tensors, "projection": draw(device, N_FEATURES, HEAD_DIM, mean=0.0, seed=3), "bounds": bounds}

    def ours(inputs: Tensors) -> Function:
        function = operation("favor_attention")
        return lambda t: function(
            t["q"], t["k"], t["v"], t["projection"], cu_seqlens=t["bounds"], longest=length, eps=EPS
        )

    # Keys and queries by the projection, keys by values, queries by their sums; twice as much again for gradients.
    flops = 8.0 * total * N_HEADS * N_FEATURES * HEAD_DIM * (3 if has_gradients else 1)
    n_bytes = total * N_HEADS * HEAD_DIM * 2 * (4 if not has_gradients else 11)
    return Problem(
        name=name + ("_backward" if has_gradients else ""),
        what=f"{n_cells} cells of {length:,} tokens, {N_HEADS} heads of {HEAD_DIM}, {N_FEATURES} features"
        + (", forward and backward" if has_gradients else ""),
        op="favor_attention", shape={"head_dim": HEAD_DIM, "n_features": N_FEATURES},
        make=make, plain=plain, ours=ours, work=Work(flops=flops, n_bytes=n_bytes, counts={"cells": n_cells}),
        gradients=("q", "k", "v") if has_gradients else (),
        tolerance=0.05,
    )  # fmt: skip
