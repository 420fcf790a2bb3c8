"""Linear attention by random features through torch, by chunks of tokens whose features stay near.

A cell's keys are read once: sums are kept for the largest projection so far, and rescaled where a larger one comes
(Milakov and Gimelshein, arXiv:1805.02867, do the same for a softmax). ``eps`` never meets a feature: what it adds to a
sum of features times something is ``eps`` times the sum of that something. ``1 / sqrt(m)`` cancels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from geneformer_kernels.cpu.shares import in_shares
from geneformer_kernels.workspace import Workspace

Cell = tuple[int, int, int]  # its number, its first token, and the token behind its last


@dataclass(frozen=True)
class Features:
    """Attributes
    ----------
    weight
        [m, D] in the dtype that is computed in.
    eps
        Added to every feature.
    chunk_rows
        Tokens at a time.
    """

    weight: torch.Tensor
    eps: float
    chunk_rows: int

    @property
    def scale(self) -> float:
        """Of queries and keys."""
        return self.weight.shape[1] ** -0.25

    def chunks(self, start: int, stop: int) -> Iterator[slice]:
        """Of about one size."""
        n_chunks = -(-(stop - start) // self.chunk_rows)
        step = -(-(stop - start) // max(n_chunks, 1))
        return (slice(low, min(low + step, stop)) for low in range(start, stop, max(step, 1)))

    def projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scaled rows [H, n, D] of x [n, H, D], projections [H, n, m], and half of the squared lengths [H, n, 1]."""
        rows = self.wide(x) * self.scale
        of_rows = (rows.flatten(0, 1) @ self.weight.T).view(*rows.shape[:2], -1)
        return rows, of_rows, rows.square().sum(-1, keepdim=True) / 2

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """[n, H, D] -> [H, n, D] contiguous."""
        return x.transpose(0, 1).contiguous().to(self.weight.dtype)

    def with_ones(self, x: torch.Tensor) -> torch.Tensor:
        """[n, H, D] -> [H, n, D + 1] with a last column of ones: one product then sums features, too."""
        return F.pad(self.wide(x), (0, 1), value=1.0)

    def context(
        self, k: torch.Tensor, v: torch.Tensor, cell: Cell, largest: torch.Tensor, top: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``phi(k).T [v, 1]`` [H, m, D + 1] of a cell, and the largest projection, which is at least ``largest``.

        Writes the largest projection of every key into ``top`` [H, T].
        """
        _, start, stop = cell
        n_heads, n_columns = k.shape[1], v.shape[2] + 1
        found = self.weight.new_zeros(n_heads, len(self.weight), n_columns)
        plain = self.weight.new_zeros(n_heads, 1, n_columns)
        for chunk in self.chunks(start, stop):
            _, powers, half_norm = self.projected(k[chunk])
            tops = powers.amax(-1)
            top[:, chunk] = tops
            larger = torch.maximum(largest, tops.amax())
            found.mul_(torch.exp(largest - larger))
            powers.sub_(half_norm + larger).exp_()
            values = self.with_ones(v[chunk])
            found.baddbmm_(powers.transpose(1, 2), values)
            plain += values.sum(1, keepdim=True)
            largest = larger
        return found.add_(plain, alpha=self.eps), largest

    def attend(self, q: torch.Tensor, context: torch.Tensor, cell: Cell, out: torch.Tensor) -> None:
        """Writes the rows of a cell into ``out`` [T, H, D]."""
        _, start, stop = cell
        by_eps = self.eps * context.sum(1, keepdim=True)
        for chunk in self.chunks(start, stop):
            _, powers, half_norm = self.projected(q[chunk])
            powers.sub_(half_norm + powers.amax(-1, keepdim=True)).exp_()
            both = torch.baddbmm(by_eps, powers, context)
            out[chunk] = (both[..., :-1] / both[..., -1:]).transpose(0, 1)

    def query_gradients(
        self, q: torch.Tensor, out: torch.Tensor, d_out: torch.Tensor, context: torch.Tensor, cell: Cell,
        dq: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Writes a cell's rows of ``dq``; the gradient of its context, [H, m, D + 1]."""
        _, start, stop = cell
        by_eps = self.eps * context.sum(1, keepdim=True)
        found, plain = torch.zeros_like(context), torch.zeros_like(by_eps)
        for chunk in self.chunks(start, stop):
            rows, powers, half_norm = self.projected(q[chunk])
            largest, best = powers.max(-1, keepdim=True)
            powers.sub_(half_norm + largest).exp_()
            total = torch.baddbmm(by_eps[..., -1:], powers, context[..., -1:])
            d_rows = self.wide(d_out[chunk])
            delta = (d_rows * self.wide(out[chunk])).sum(-1, keepdim=True)
            d_both = torch.cat([d_rows, -delta], -1) / total
            found.baddbmm_(powers.transpose(1, 2), d_both)
            plain += d_both.sum(1, keepdim=True)
            d_projected = torch.bmm(d_both, context.transpose(1, 2)).mul_(powers)
            flow = d_projected.sum(-1, keepdim=True)
            d_projected.scatter_add_(-1, best, -flow)
            dq[chunk] = self.row_gradient(d_projected, flow, rows)
        return found.add_(plain, alpha=self.eps)

    def key_gradients(
        self, k: torch.Tensor, v: torch.Tensor, d_context: torch.Tensor, largest: torch.Tensor, cell: Cell,
        dk: torch.Tensor, dv: torch.Tensor, flow: torch.Tensor,
    ) -> None:  # fmt: skip
        """Writes a cell's rows of ``dv``, of ``flow``, and of ``dk`` without what flows through the largest one."""
        _, start, stop = cell
        by_eps = self.eps * d_context.sum(1, keepdim=True)
        for chunk in self.chunks(start, stop):
            rows, powers, half_norm = self.projected(k[chunk])
            powers.sub_(half_norm + largest).exp_()
            dv[chunk] = torch.baddbmm(by_eps, powers, d_context)[..., :-1].transpose(0, 1)
            d_projected = torch.bmm(self.with_ones(v[chunk]), d_context.transpose(1, 2)).mul_(powers)
            flows = d_projected.sum(-1, keepdim=True)
            flow[:, chunk] = flows[..., 0]
            dk[chunk] = self.row_gradient(d_projected, flows, rows)

    def row_gradient(self, d_projected: torch.Tensor, flow: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[n, H, D] from the gradient of projections [H, n, m], and what flows through half the squared length."""
        plain = (d_projected.flatten(0, 1) @ self.weight).view_as(rows)
        return plain.sub_(flow * rows).mul_(self.scale).transpose(0, 1)


def cells_of(cu_seqlens: torch.Tensor) -> list[Cell]:
    """Those that have tokens."""
    bounds = cu_seqlens.tolist()
    return [(i, start, stop) for i, (start, stop) in enumerate(itertools.pairwise(bounds)) if start < stop]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, features: Features, cells: list[Cell], n_cells: int,
    is_batch: bool, keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [T, H, D]; contexts [B, H, m, D + 1], of no elements unless ``keeps``; largest [B]; top [H, T]."""
    n_tokens, n_heads, head_dim = q.shape
    weight = features.weight
    out = torch.empty((n_tokens, n_heads, head_dim), dtype=q.dtype, device=q.device)
    top = torch.empty((n_heads, n_tokens), dtype=weight.dtype, device=q.device)
    largest = torch.full((n_cells,), float("-inf"), dtype=weight.dtype, device=q.device)
    contexts = weight.new_zeros((n_cells if keeps else 0, n_heads, len(weight), head_dim + 1))
    if is_batch and n_tokens:
        largest.fill_(torch.stack([features.projected(k[c])[1].amax() for c in features.chunks(0, n_tokens)]).amax())

    def attend(share: list[Cell]) -> None:
        for cell in share:
            context, largest[cell[0]] = features.context(k, v, cell, largest[cell[0]].clone(), top)
            features.attend(q, context, cell, out)
            if keeps:
                contexts[cell[0]] = context

    _in_shares(attend, cells, q.device)
    return out, contexts, largest, top


def backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
    contexts: torch.Tensor, largest: torch.Tensor, features: Features, cells: list[Cell],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k (without what flows through the largest projection) and v, and flow [H, T]."""
    n_tokens, n_heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    flow = torch.empty((n_heads, n_tokens), dtype=features.weight.dtype, device=q.device)

    def differentiate(share: list[Cell]) -> None:
        for cell in share:
            d_context = features.query_gradients(q, out, d_out, contexts[cell[0]], cell, dq)
            features.key_gradients(k, v, d_context, largest[cell[0]], cell, dk, dv, flow)

    _in_shares(differentiate, cells, q.device)
    return dq, dk, dv, flow


def _in_shares(task: Callable[[list[Cell]], None], cells: list[Cell], device: torch.device) -> None:
    """On a CPU a share of the cells for each thread, where there are several."""
    if device.type == "cpu" and len(cells) > 1:
        in_shares(task, cells, lambda cell: cell[2] - cell[1])
    else:
        task(cells)


def workspace(n_heads: int, head_dim: int, n_features: int, itemsize: int, chunk_rows: int) -> Workspace:
    """Of inference: the largest projection of every key, and each thread's context, projections and rows of a chunk."""
    context = n_heads * n_features * (head_dim + 1)
    chunk = n_heads * chunk_rows * (n_features + 4 * (head_dim + 1))
    return Workspace(row=n_heads * itemsize, thread=(2 * context + chunk) * itemsize)
