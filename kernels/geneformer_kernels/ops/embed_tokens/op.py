"""The embedding front: the public function, and the Triton kernels as operators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from geneformer_kernels.arguments import (
    FLOATS,
    check_bounds,
    check_ids,
    check_optional,
    check_out_dtype,
    check_positive,
    check_probability,
    check_seed,
    check_tensor,
)
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.dropout import keep_scale
from geneformer_kernels.launch import too_wide
from geneformer_kernels.on_device import choose_for, draw_seed, launching_on, needs_gradient, target_for
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.embed_tokens import reference
from geneformer_kernels.ops.embed_tokens.plan import EmbedTokensPlan, plan
from geneformer_kernels.ranges import ranged


@operator("embed_tokens_fwd")
def embed_tokens_fwd(
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    type_row: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(stream, out, positions, mean, rstd) by the Triton kernel; ``seed`` None: no dropout.

    Empty are out where it would equal the stream, positions and statistics without ``needs_grad``, and the statistics
    without a normalisation.
    """
    from geneformer_kernels.ops.embed_tokens.kernel import embed_tokens_fwd_kernel

    outputs = _empty_outputs(token_ids, token_table, weight, out_dtype, needs_grad)
    n_rows, width, n_cells = len(token_ids), token_table.shape[1], len(cu_seqlens) - 1
    if n_rows:
        stream, out, positions, mean, rstd = (each if each.numel() else None for each in outputs)
        chosen = plan(n_rows, width, target_for(token_ids))
        with launching_on(token_ids):
            embed_tokens_fwd_kernel[(-(-n_rows // chosen.fwd_block_rows),)](
                token_ids_ptr=token_ids.contiguous(),
                cu_seqlens_ptr=cu_seqlens.contiguous(),
                token_ptr=token_table.contiguous(),
                position_ptr=position_table.contiguous(),
                type_ptr=None if type_row is None else type_row.contiguous(),
                weight_ptr=None if weight is None else weight.contiguous(),
                bias_ptr=None if bias is None else bias.contiguous(),
                seed_ptr=seed,
                stream_ptr=stream,
                out_ptr=out,
                positions_ptr=positions,
                mean_ptr=mean,
                rstd_ptr=rstd,
                n_rows=n_rows,
                n_cells=n_cells,
                n_steps=(n_cells - 1).bit_length(),
                n_vocabulary=len(token_table),
                n_positions=len(position_table),
                width=width,
                eps=eps,
                threshold=round(dropout_p * 65536),
                keep_scale=keep_scale(dropout_p),
                BLOCK_ROWS=chosen.fwd_block_rows,
                BLOCK_C=chosen.block_c,
                **chosen.fwd_launch.options,
            )
    return outputs


@embed_tokens_fwd.register_fake
def _(
    token_ids,
    cu_seqlens,
    token_table,
    position_table,
    type_row,
    weight,
    bias,
    seed,
    eps,
    dropout_p,
    out_dtype,
    needs_grad,
):
    return _empty_outputs(token_ids, token_table, weight, out_dtype, needs_grad)


def _empty_outputs(
    token_ids: torch.Tensor,
    token_table: torch.Tensor,
    weight: torch.Tensor | None,
    out_dtype: torch.dtype,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def empty(shape: tuple[int, ...], is_there: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape if is_there else (0,), dtype=dtype, device=token_table.device)

    n_rows, width = token_ids.shape[0], token_table.shape[1]
    return (
        empty((n_rows, width), True),
        empty((n_rows, width), out_dtype != torch.float32, out_dtype),
        empty((n_rows,), needs_grad, torch.int32),
        empty((n_rows,), needs_grad and weight is not None),
        empty((n_rows,), needs_grad and weight is not None),
    )


@operator("embed_tokens_bwd")
def embed_tokens_bwd(
    d_stream: torch.Tensor | None,
    d_out: torch.Tensor | None,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    type_row: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    needs_token: bool,
    needs_position: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the token table, of the position table (empty where not needed), and of weight, bias and type row.

    The last one is [n, C] with the rows that are there, in this order.
    """
    from geneformer_kernels.ops.embed_tokens.kernel import embed_tokens_bwd_rows_kernel

    n_partials = _n_partials(type_row, weight)
    n_rows, width, device = len(token_ids), token_table.shape[1], token_table.device
    chosen = plan(n_rows, width, target_for(token_table))
    d_total = torch.empty(n_rows, width, dtype=torch.float32, device=device)
    n_programs = chosen.n_programs if n_rows else 0
    partial = None
    if n_partials:
        partial = torch.empty(n_programs, n_partials, width, dtype=torch.float32, device=device)
    with launching_on(token_table):
        if n_rows:
            embed_tokens_bwd_rows_kernel[(n_programs,)](
                d_stream_ptr=None if d_stream is None else d_stream.contiguous(),
                d_out_ptr=None if d_out is None else d_out.contiguous(),
                token_ids_ptr=token_ids.contiguous(),
                positions_ptr=positions,
                token_ptr=token_table.contiguous(),
                position_ptr=position_table.contiguous(),
                type_ptr=None if type_row is None else type_row.contiguous(),
                weight_ptr=None if weight is None else weight.contiguous(),
                mean_ptr=None if weight is None else mean,
                rstd_ptr=None if weight is None else rstd,
                seed_ptr=seed,
                d_total_ptr=d_total,
                partial_ptr=partial,
                n_rows=n_rows,
                n_vocabulary=len(token_table),
                width=width,
                threshold=round(dropout_p * 65536),
                keep_scale=keep_scale(dropout_p),
                N_PARTIALS=n_partials,
                BLOCK_ROWS=chosen.bwd_block_rows,
                BLOCK_C=chosen.block_c,
                **chosen.bwd_launch.options,
            )
        ids = token_ids.clamp(0, len(token_table) - 1).to(torch.int32)
        d_token = _table_gradient(d_total, ids, len(token_table), chosen) if needs_token else d_total.new_empty(0)
        d_position = (
            _table_gradient(d_total, positions, len(position_table), chosen) if needs_position else d_total.new_empty(0)
        )
    return d_token, d_position, d_total.new_empty(0, width) if partial is None else partial.sum(0)


@embed_tokens_bwd.register_fake
def _(
    d_stream,
    d_out,
    token_ids,
    positions,
    token_table,
    position_table,
    type_row,
    weight,
    mean,
    rstd,
    seed,
    dropout_p,
    needs_token,
    needs_position,
):
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=token_table.device)

    return (
        empty(*token_table.shape) if needs_token else empty(0),
        empty(*position_table.shape) if needs_position else empty(0),
        empty(_n_partials(type_row, weight), token_table.shape[1]),
    )


def _n_partials(type_row: torch.Tensor | None, weight: torch.Tensor | None) -> int:
    return (2 if weight is not None else 0) + (1 if type_row is not None else 0)


def _table_gradient(d_total: torch.Tensor, keys: torch.Tensor, n_keys: int, chosen: EmbedTokensPlan) -> torch.Tensor:
    """[n_keys, C], for each key the sum of the rows of ``d_total`` that carry it; no atomics, one order of addition."""
    from geneformer_kernels.ops.embed_tokens.kernel import embed_tokens_bwd_chunks_kernel, embed_tokens_bwd_table_kernel

    n_rows, width = d_total.shape
    if not n_rows:
        return d_total.new_zeros(n_keys, width)
    sorted_keys, order = torch.sort(keys, stable=True)
    every_key = torch.arange(n_keys + 1, dtype=sorted_keys.dtype, device=keys.device)
    bounds = torch.searchsorted(sorted_keys, every_key, out_int32=True)
    n_chunks, n_columns = -(-n_rows // chosen.chunk), -(-width // chosen.table_block_c)
    partial = torch.empty(n_chunks, 2, width, dtype=torch.float32, device=d_total.device)
    d_table = torch.empty(n_keys, width, dtype=torch.float32, device=d_total.device)
    shared = {
        "d_total_ptr": d_total,
        "order_ptr": order,
        "bounds_ptr": bounds,
        "partial_ptr": partial,
        "chunk": chosen.chunk,
        "width": width,
        "BLOCK_ROWS": chosen.table_block_rows,
        "BLOCK_C": chosen.table_block_c,
        **chosen.table_launch.options,
    }
    embed_tokens_bwd_chunks_kernel[(n_chunks, n_columns)](keys_ptr=sorted_keys, n_rows=n_rows, **shared)
    embed_tokens_bwd_table_kernel[(n_keys, n_columns)](d_table_ptr=d_table, **shared)
    return d_table


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    token_ids, _, token_table, position_table, type_row, weight, bias, seed, _, ctx.dropout_p, _, _ = inputs
    _, out, positions, mean, rstd = output
    # The looked-up rows are looked up again: the tables are there anyway, [T, C] of them would not be.
    ctx.save_for_backward(token_ids, positions, token_table, position_table, type_row, weight, mean, rstd, seed)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((out,) if out.ndim == 1 else ()), positions, mean, rstd)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, d_stream: torch.Tensor | None, d_out: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_stream is None and d_out is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    _, _, token_table, position_table, type_row, weight = saved[:6]
    _, _, needs_token, needs_position, needs_type, needs_weight, needs_bias = ctx.needs_input_grad[:7]
    d_token, d_position, d_small = embed_tokens_bwd(d_stream, d_out, *saved, ctx.dropout_p, needs_token, needs_position)
    return (
        None,
        None,
        d_token.to(token_table.dtype) if needs_token else None,
        d_position.to(position_table.dtype) if needs_position else None,
        d_small[-1].to(type_row.dtype) if needs_type else None,
        d_small[0].to(weight.dtype) if needs_weight else None,
        d_small[1].to(ctx.bias_dtype) if needs_bias else None,
        *(None,) * 5,
    )


embed_tokens_fwd.register_autograd(_backward, setup_context=_setup_context)


@ranged("embed_tokens")
def embed_tokens(
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    type_row: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``dropout(layer_norm(token_table[token_ids] + type_row + position_table[positions]))`` for packed cells.

    Parameters
    ----------
    token_ids
        [T] int32 or int64, the tokens of all cells. On the CPU a wrong id raises; on a card it gives undefined numbers.
    cu_seqlens
        [B + 1] integers, cumulative cell lengths from 0 to T; positions count from each cell's start. Empty cells are
        allowed. A last one that is not T raises on the CPU. On a card nobody waits to see it: the Triton kernel never
        reads it, so that the last cell goes on to the last token; other implementations give undefined numbers.
    token_table, position_table
        [V, C] and [L, C] float32 (or float64), L at least the length of the longest cell.
    type_row
        [C], the row of the one token type (BERT's segment 0), or None.
    weight, bias
        [C] each, scale and shift of the LayerNorm; None for both: no normalisation.
    eps
        Added to the variance.
    dropout_p
        Probability of dropping an element of the result (training only); the rest is scaled by ``1 / (1 - dropout_p)``.
        The Triton kernel rounds the probability, not the scale, to a multiple of 2**-16.
    seed
        [1] int64 on the device: determines the mask of the Triton kernel; None draws one from torch's generator. The
        other implementations draw their masks from that generator themselves.
    out_dtype
        Dtype of ``out``; None is that of the stream.
    impl
        ``"triton"`` (C up to 4,096), ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    stream, out
        [T, C] each: float32 (float64 for float64 tables), and the same values in ``out_dtype``; one tensor where the
        dtypes are equal.

    Raises
    ------
    TypeError
        Something is no tensor, or no number.
    ValueError
        Shapes, dtypes or devices do not fit, a table is empty and tokens are there, ``eps`` is not positive, or
        ``dropout_p`` is no probability. On the CPU: a token or a position is outside its table, or ``cu_seqlens`` do
        not run from 0 to T.
    ImplUnavailableError
        An implementation asked for by name cannot run here.

    References
    ----------
    Devlin et al., "BERT", arXiv:1810.04805.
    """
    _check(token_ids, cu_seqlens, token_table, position_table, type_row, weight, bias)
    check_positive("eps", eps)
    check_probability("dropout_p", dropout_p)
    check_out_dtype("out_dtype", out_dtype)
    check_seed("seed", seed, token_table.device)
    wide = torch.float64 if token_table.dtype == torch.float64 else torch.float32
    out_dtype = out_dtype or wide
    inputs = (token_ids, cu_seqlens, token_table, position_table, type_row, weight, bias)
    shape = {"width": token_table.shape[1], "needs_grad": needs_gradient(*inputs[2:])}
    narrow = wide if wide == torch.float64 else out_dtype
    cannot = too_wide(token_table.shape[1])
    chosen = choose_for("embed_tokens", token_table, impl, dtype=narrow, shape=shape, triton_cannot=cannot)
    if chosen == "triton":
        if not dropout_p:
            seed = None
        elif seed is None:
            seed = draw_seed(token_table.device)
        stream, out, *_ = embed_tokens_fwd(*inputs, seed, eps, dropout_p, out_dtype, needs_gradient(*inputs[2:]))
        return stream, out if out.ndim == 2 else stream
    if chosen == "reference":
        stream, _ = reference.embed_tokens(*inputs, eps, wide)
    else:
        stream = _embed_tokens_torch(*inputs, eps)
    stream = F.dropout(stream, dropout_p) if dropout_p else stream
    return stream, stream.to(out_dtype)


def _check(
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    type_row: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    check_tensor("token_table", token_table, FLOATS, n_axes=2)
    device = token_table.device
    check_tensor("position_table", position_table, FLOATS, n_axes=2, device=device)
    for name, index in (("token_ids", token_ids), ("cu_seqlens", cu_seqlens)):
        check_tensor(name, index, (torch.int32, torch.int64), n_axes=1, device=device)
    n_tokens, n_positions = token_table.shape[0], position_table.shape[0]
    if token_table.shape[1] != position_table.shape[1] or not token_table.shape[1]:
        raise ValueError(
            f"token_table {[*token_table.shape]} and position_table {[*position_table.shape]} must be [V, C] and [L, C]"
        )
    longest = check_bounds("cu_seqlens", cu_seqlens, token_ids.shape[0])
    if token_ids.shape[0] and not (n_tokens and n_positions):
        raise ValueError(
            f"token_table {[*token_table.shape]} and position_table {[*position_table.shape]} must have rows for "
            f"{token_ids.shape[0]} tokens"
        )
    check_ids("token_ids", token_ids, n_tokens, "rows of token_table")
    if longest > n_positions:
        raise ValueError(f"position_table has {n_positions} rows, and the longest cell {longest} tokens")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must both be there or both be None")
    for name, row in (("type_row", type_row), ("weight", weight), ("bias", bias)):
        check_optional(name, row, FLOATS, device=device)
        if row is not None and row.shape != token_table.shape[1:]:
            raise ValueError(f"{name} {[*row.shape]} must be [{token_table.shape[1]}]")


def _embed_tokens_torch(
    token_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_table: torch.Tensor,
    position_table: torch.Tensor,
    type_row: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    wide = torch.float64 if token_table.dtype == torch.float64 else torch.float32
    total = F.embedding(token_ids.long(), token_table).to(wide)
    # Order of addition as in BertEmbeddings: token + type, then + position.
    if type_row is not None:
        total = total + type_row
    n_rows = token_ids.shape[0]
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=n_rows)
    positions = torch.arange(n_rows, device=token_ids.device) - starts
    total = total + F.embedding(positions, position_table)
    if weight is None or bias is None:
        return total
    return F.layer_norm(total, total.shape[-1:], weight.to(wide), bias.to(wide), eps)
