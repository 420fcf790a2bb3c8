"""Attention and its gradients on the CPU: oneDNN's bfloat16 products, whole cells handed to threads.

Torch's fused CPU attention multiplies bfloat16 no faster than float32 (``plan.torch_plan``), and has no dropout: with
it, torch falls back to float32 weights of all pairs, each kept for the backward pass. Here a block of scores lives in
the cache, and what the backward pass needs of them is one number per token and head.
"""

from __future__ import annotations

import itertools

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOG2_E, LOOP, from_bfloat16, power_of_two, to_bfloat16
from geneformer_kernels.cpu.dropout_loops import WEYL, hashed, keep_scale_of, key_of, threshold_of
from geneformer_kernels.cpu.shares import in_shares
from geneformer_kernels.ops.varlen_attention import host


class Attention:
    """One batch's attention: the constants of a call, and what it does to a cell.

    Parameters
    ----------
    shape
        [T, H, D] of q, k and v.
    bounds
        The cells' ends, B + 1 of them.
    scale
        Factor on the scores.
    block_rows
        Rows of scores that are in work at a time, rounded up to whole steps.
    dropout_p, seed
        A weight is dropped where the hash of (seed, token, head, key's place in the cell) is small.
    """

    def __init__(
        self, shape: torch.Size, bounds: list[int], scale: float, block_rows: int, dropout_p: float, seed: int
    ) -> None:
        self.n_tokens, self.n_heads, self.head_dim = shape
        self.cells = [(start, stop) for start, stop in itertools.pairwise(bounds) if start < stop]
        self.scale, self.block_rows = scale, host.whole_steps(block_rows)
        self.threshold, self.keep_scale = threshold_of(dropout_p), keep_scale_of(dropout_p)
        self.seed = np.uint64(seed % 2**64)  # of any int64

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H, D] bfloat16 each -> the output, and log2 of the sum of 2**(score * log2(e)), [H, T] float32."""
        out, lse = q.new_empty(q.shape), q.new_empty(self.n_heads, self.n_tokens, dtype=torch.float32)

        def attend(cells: list[tuple[int, int]]) -> None:
            buffers = _Buffers(self.n_heads)
            for start, stop in cells:
                cell = slice(start, stop)
                self._forward_cell(buffers, start, q[cell], k[cell], v[cell], out[cell], lse[:, cell].numpy())

        in_shares(attend, self.cells, _cost)
        return out, lse

    def backward(
        self,
        d_out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> torch.Tensor:
        """[T, 3, H, D], the gradients of q, k and v."""
        d_qkv = q.new_empty(self.n_tokens, 3, self.n_heads, self.head_dim)

        def differentiate(cells: list[tuple[int, int]]) -> None:
            buffers = _Buffers(self.n_heads)
            for start, stop in cells:
                cell = slice(start, stop)
                cell_lse = lse[:, cell].contiguous().numpy()
                self._backward_cell(
                    buffers, start, d_out[cell], q[cell], k[cell], v[cell], out[cell], cell_lse, d_qkv[cell]
                )

        in_shares(differentiate, self.cells, _cost)
        return d_qkv

    def _forward_cell(self, buffers, start, q, k, v, out, lse):
        length = len(q)
        padded = host.whole_steps(length)
        keys, values = buffers.heads_first("keys", k, padded), buffers.heads_first("values", v, padded)
        host.centre(keys.view(torch.uint16).numpy(), length, self.scale)
        row_keys = self._row_keys(start, length)
        rows = min(self.block_rows, padded)
        for low in range(0, length, rows):
            end = min(low + rows, length)
            height = host.whole_steps(end - low)
            queries = buffers.heads_first("queries", q[low:end], height)
            weights = torch.bmm(queries, keys.transpose(1, 2), out=buffers.heads("scores", height, padded))
            _soften(
                weights.view(torch.uint16).numpy(), length, lse[:, low:end], row_keys[:, low:end], self.threshold,
                self.keep_scale,
            )  # fmt: skip
            mixed = torch.bmm(weights, values, out=buffers.heads("context", height, self.head_dim))
            out[low:end] = mixed[:, : end - low].transpose(0, 1)

    def _backward_cell(self, buffers, start, d_out, q, k, v, out, lse, d_qkv):
        # Rows are keys here and columns queries: sums over queries end within a product, in float32, and what one row
        # of the softmax shares is a vector along the columns. Only the queries' gradient is a sum over blocks.
        length = len(q)
        padded = host.whole_steps(length)
        queries, d_outs = buffers.heads_first("queries", q, padded), buffers.heads_first("d_outs", d_out, padded)
        keys, values = buffers.heads_first("keys", k, padded), buffers.heads_first("values", v, padded)
        host.centre(keys.view(torch.uint16).numpy(), length, self.scale)
        outs = buffers.heads_first("outs", out, padded)
        delta = _dots(*(x.view(torch.uint16).numpy()[:, :length] for x in (d_outs, outs)))
        row_keys = self._row_keys(start, length)
        dq = buffers.heads("dq", padded, self.head_dim, torch.float32).zero_()
        rows = min(self.block_rows, padded)
        for low in range(0, length, rows):
            end = min(low + rows, length)
            height = host.whole_steps(end - low)
            key_rows, value_rows = keys[:, low : low + height], values[:, low : low + height]
            weights = torch.bmm(key_rows, queries.transpose(1, 2), out=buffers.heads("scores", height, padded))
            d_weights = torch.bmm(value_rows, d_outs.transpose(1, 2), out=buffers.heads("d_scores", height, padded))
            _differentiate(
                weights.view(torch.uint16).numpy(), d_weights.view(torch.uint16).numpy(), end - low, low, lse, delta,
                row_keys, self.threshold, self.keep_scale,
            )  # fmt: skip
            product = torch.bmm(weights, d_outs, out=buffers.heads("context", height, self.head_dim))
            d_qkv[low:end, 2] = product[:, : end - low].transpose(0, 1)
            product = torch.bmm(d_weights, queries, out=product)
            # The keys carried the scale into the queries' gradient, but their own lacks it.
            d_qkv[low:end, 1] = product[:, : end - low].transpose(0, 1).float().mul_(self.scale)
            product = torch.bmm(
                d_weights.transpose(1, 2), key_rows, out=buffers.heads("dq_part", padded, self.head_dim)
            )
            dq += product
        d_qkv[:, 0] = dq[:, :length].transpose(0, 1)

    def _row_keys(self, start: int, length: int) -> np.ndarray:
        """[H, L] uint32 for the rows of a cell's scores; without dropout nobody reads them."""
        keys = np.zeros((self.n_heads, length), np.uint32)
        if self.threshold:
            _fill_row_keys(self.seed, np.uint64(start), keys)
        return keys


def _cost(cell: tuple[int, int]) -> int:
    return (cell[1] - cell[0]) ** 2


class _Buffers:
    """Scratch memory of one thread, taken at its first cell, which is its largest.

    Lengths within are rounded up (``host.whole_steps``), with zeros behind each cell's end.
    """

    def __init__(self, n_heads: int) -> None:
        self.n_heads = n_heads
        self.flat: dict[str, torch.Tensor] = {}

    def heads(self, name: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """[H, rows, columns], not filled."""
        size = self.n_heads * rows * columns
        if name not in self.flat or len(self.flat[name]) < size:
            self.flat[name] = torch.empty(size, dtype=dtype)
        return self.flat[name][:size].view(self.n_heads, rows, columns)

    def heads_first(self, name: str, x: torch.Tensor, padded: int) -> torch.Tensor:
        """[L, H, D] -> [H, padded, D]."""
        heads = self.heads(name, padded, x.shape[2], x.dtype)
        heads[:, : len(x)] = x.transpose(0, 1)
        heads[:, len(x) :] = 0
        return heads


@numba.njit(**LOOP)
def _fill_row_keys(seed, start, keys):
    n_heads, length = keys.shape
    for head in range(n_heads):
        for i in range(length):
            keys[head, i] = key_of(seed, (start + np.uint64(i)) * np.uint64(n_heads) + np.uint64(head))


@numba.njit(**LOOP)
def _soften(scores, length, lse, row_keys, threshold, keep_scale):
    """Scores [H, rows, padded] become weights in place, dropped and rescaled."""
    weights = np.empty(length, np.float32)
    for head in range(scores.shape[0]):
        for i in range(lse.shape[1]):
            row = scores[head, i]
            shift, total = host.weigh(row[:length], weights)
            lse[head, i] = shift + np.log2(total)
            if threshold:
                _drop(weights, row_keys[head, i], threshold)
                total = total / keep_scale
            host.narrow(weights, np.float32(1) / total, row[:length])
            row[length:] = 0


@numba.njit(**LOOP)
def _drop(weights, key, threshold):
    for j in range(len(weights)):
        is_kept = hashed(key + np.uint32(j) * WEYL) >= threshold
        weights[j] = weights[j] if is_kept else np.float32(0)


@numba.njit(**LOOP)
def _differentiate(scores, d_weights, n_rows, low, lse, delta, row_keys, threshold, keep_scale):
    """Scores of keys by queries become weights, and gradients of weights become those of scores, in place."""
    length = lse.shape[1]
    for head in range(scores.shape[0]):
        for i in range(n_rows):
            row, d_row = scores[head, i], d_weights[head, i]
            if threshold:
                _differentiate_dropped(
                    row[:length], d_row[:length], lse[head], delta[head], row_keys[head],
                    np.uint32(low + i) * WEYL, threshold, keep_scale,
                )  # fmt: skip
            else:
                _differentiate_row(row[:length], d_row[:length], lse[head], delta[head])
            row[length:] = 0
            d_row[length:] = 0
        scores[head, n_rows:] = 0
        d_weights[head, n_rows:] = 0


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _differentiate_row(row, d_row, lse, delta):
    for j in range(len(row)):
        weight = power_of_two(from_bfloat16(row[j]) * LOG2_E - lse[j])
        row[j] = to_bfloat16(weight)
        d_row[j] = to_bfloat16(weight * (from_bfloat16(d_row[j]) - delta[j]))


@numba.njit(fastmath={"contract", "nsz"}, **LOOP)
def _differentiate_dropped(row, d_row, lse, delta, row_keys, column, threshold, keep_scale):
    for j in range(len(row)):
        weight = power_of_two(from_bfloat16(row[j]) * LOG2_E - lse[j])
        kept = keep_scale if hashed(row_keys[j] + column) >= threshold else np.float32(0)
        row[j] = to_bfloat16(weight * kept)
        d_row[j] = to_bfloat16(weight * (from_bfloat16(d_row[j]) * kept - delta[j]))


@numba.njit(fastmath={"reassoc", "contract", "nsz"}, forceinline=True, **LOOP)
def _dots(a, b):
    """[H, L, D] bfloat16 twice -> [H, L] float32, the products' sums over D."""
    sums = np.zeros(a.shape[:2], np.float32)
    for head in range(a.shape[0]):
        for i in range(a.shape[1]):
            for j in range(a.shape[2]):
                sums[head, i] += from_bfloat16(a[head, i, j]) * from_bfloat16(b[head, i, j])
    return sums
