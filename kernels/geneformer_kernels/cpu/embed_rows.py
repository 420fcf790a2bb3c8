"""Embedding tables of int8 looked up on the CPU: widened, added and normalised in one pass, for inference."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import torch

from geneformer_kernels.cpu.compiled import LOOP
from geneformer_kernels.cpu.lanes import LANES, add_widened, normalise, sum_of_squares, write_halves
from geneformer_kernels.cpu.row_arithmetic import address_of
from geneformer_kernels.cpu.shares import in_pieces
from geneformer_kernels.ranges import ranged


class Table(NamedTuple):
    """Rows of int8 [N, C], and float32 [N], what each is multiplied by."""

    q: torch.Tensor
    scale: torch.Tensor


def is_for_loops(
    token_q: torch.Tensor,
    token_scale: torch.Tensor,
    position_q: torch.Tensor,
    position_scale: torch.Tensor,
    *floats: torch.Tensor,
) -> bool:
    """Whether :func:`embed_rows` serves: tables of one width, whole LANES, and the rest float32, all on the CPU."""
    tables, rest = (token_q, position_q), (token_scale, position_scale, *floats)
    return (
        all(each.device.type == "cpu" for each in (*tables, *rest))
        and all(each.dtype == torch.int8 and each.is_contiguous() for each in tables)
        and all(each.dtype == torch.float32 for each in rest)
        and token_q.shape[1] == position_q.shape[1] > 0
        and token_q.shape[1] % LANES == 0
    )


@ranged("embed_tokens")
def embed_rows(
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token: Table,
    position: Table,
    type_row: torch.Tensor | None,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 stream, the same in ``out_dtype``) [T, C] of packed cells, as ``geneformer_kernels.embed_tokens``.

    Sums are ``token + type_row + position``, in this order. The bits of a row depend neither on the rows around it nor
    on the CPU or its threads.

    Parameters
    ----------
    token_ids, cu_seqlens
        [T] and [B + 1] int32 or int64. Not checked: ids are rows of ``token``, and no cell is longer than ``position``.
    token, position
        As :func:`is_for_loops` has them.
    type_row
        [C] float32 or None.
    affine
        Weight and bias of the LayerNorm, [C] float32 each; None: no normalisation.
    eps
        Added to the variance.
    out_dtype
        A floating-point dtype.
    """
    n_rows, width = len(token_ids), token.q.shape[1]
    stream, is_half = torch.empty(n_rows, width, dtype=torch.float32), out_dtype == torch.bfloat16
    out = torch.empty(n_rows, width, dtype=torch.bfloat16) if is_half else stream
    # -0.0 adds nothing, not even to the sign of a zero.
    between = torch.full((width,), -0.0, dtype=torch.float32) if type_row is None else type_row.detach().contiguous()
    ids, bounds = (each.long().contiguous().numpy() for each in (token_ids, cu_seqlens))
    tables = (token.q.data_ptr(), position.q.data_ptr())
    scales = tuple(table.scale.contiguous().numpy() for table in (token, position))
    weight, bias = (between, between) if affine is None else (each.detach().contiguous() for each in affine)
    floats = (between.data_ptr(), weight.data_ptr(), bias.data_ptr())
    at = (stream.data_ptr(), out.data_ptr(), is_half)

    def embed(start: int, stop: int) -> None:
        total = np.empty(width, np.float32)
        _embed_rows(
            ids, bounds, *tables, *scales, *floats, affine is not None, np.float32(eps), width, total, at, start, stop
        )

    in_pieces(embed, n_rows)
    return stream, out if is_half else stream.to(out_dtype)


@numba.njit(**LOOP)
def _embed_rows(
    ids, bounds, token, position, token_scale, position_scale, between, weight, bias, has_norm, eps, width, total, at,
    start, stop,
):  # fmt: skip
    """Rows ``start`` to ``stop``; ``at``: addresses of the stream and of bfloat16, and whether there are any."""
    stream, out, is_half = at
    total_row, row_bytes, n_blocks, size = address_of(total), 4 * width, width // LANES, np.float32(width)
    i_cell = np.searchsorted(bounds, start, side="right") - 1
    for i in range(start, stop):
        while i >= bounds[i_cell + 1]:  # cells may be empty
            i_cell += 1
        i_token, i_position = ids[i], i - bounds[i_cell]
        stream_row = stream + row_bytes * i
        sums = total_row if has_norm else stream_row
        found = add_widened(
            token + width * i_token, token_scale[i_token], between, position + width * i_position,
            position_scale[i_position], n_blocks, sums,
        )  # fmt: skip
        if has_norm:
            mean = found / size
            variance = sum_of_squares(sums, mean, n_blocks) / size
            rstd = np.float32(1) / np.sqrt(variance + eps)
            normalise(sums, mean, rstd, weight, bias, n_blocks, stream_row)
        if is_half:
            write_halves(stream_row, 1, width, out + 2 * width * i, 2 * width)
