"""The loss of masked gene prediction without its logits: custom operators and the public function."""

from __future__ import annotations

import torch

from geneformer_kernels.arguments import (
    FLOATS,
    INTEGERS,
    check_choice,
    check_optional,
    check_tensor,
    check_whole,
    is_looked_into,
)
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.on_device import DTYPE_NAMES, choose_for, launching_on, needs_gradient, plainly_on, target_for
from geneformer_kernels.operators import operator
from geneformer_kernels.ops.mlm_cross_entropy import plan, reference, row_chunks
from geneformer_kernels.ranges import ranged

REDUCTIONS = ("mean", "sum", "none")


@operator("mlm_cross_entropy_fwd")
def mlm_cross_entropy_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of every row, 0 where the target is ignore_index, and row_max and row_sum: [R] each, float32.

    (float64 for float64 hidden.) row_max is the row's largest logit, in units of the implementation (triton: times
    log2(e)), and row_sum the sum of the exponentials of the differences from it: together they lose less than the
    logarithm of the sum. weight is brought to the dtype of hidden here rather than outside, so that its gradient is not
    rounded to half on the way back to a float32 parameter.
    """
    with plainly_on(hidden):
        hidden, weight, bias = hidden.contiguous(), weight.to(hidden.dtype).contiguous(), _wide(bias, hidden)
        targets = targets.contiguous()
        if len(hidden) == 0:
            return _empty((0,), bias), _empty((0,), bias), _empty((0,), bias)
        if impl == Impl.TRITON:
            return _launch_fwd(hidden, weight, bias, targets, ignore_index)
        if _is_compiled(hidden):
            # Numba is needed on this branch only.
            from geneformer_kernels.ops.mlm_cross_entropy import host

            return host.forward(hidden, weight, bias, targets, ignore_index)
        rows = plan.rows_per_chunk(len(weight), target_for(hidden))
        return row_chunks.forward(hidden, weight, bias, targets, ignore_index, rows)


@mlm_cross_entropy_fwd.register_fake
def _(hidden, weight, bias, targets, ignore_index, impl):  # type: ignore[no-untyped-def]
    rows = hidden.new_empty(hidden.shape[0], dtype=row_chunks.wide_dtype(hidden.dtype))
    return rows, torch.empty_like(rows), torch.empty_like(rows)


@operator("mlm_cross_entropy_bwd")
def mlm_cross_entropy_bwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    d_loss: torch.Tensor,
    ignore_index: int,
    impl: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias in their dtypes, from d_loss [R]; an empty tensor where none is needed.

    Rows are weighted by ``d_loss / max |d_loss|``: half precision holds the logits' gradients in [-1, 1], whether the
    loss is a mean over 50,000 rows or scaled by 2**16. The maximum is multiplied in at the end, in float32. The weight
    of a row whose target is outside the vocabulary is NaN, as its loss is.
    """
    needs = (needs_hidden, needs_weight, needs_bias)
    if len(hidden) == 0:
        d_hidden, d_weight, d_bias = (
            x.new_zeros(x.shape if n else 0) for x, n in zip((hidden, weight, bias), needs, strict=True)
        )
        return d_hidden, d_weight, d_bias
    with plainly_on(hidden):
        is_counted, is_valid = row_chunks.counted_and_valid(targets, ignore_index, len(weight))
        scale = torch.where(is_valid, d_loss, 0)
        largest = scale.abs().amax()
        scale = torch.where(is_counted & ~is_valid, torch.nan, scale / torch.where(largest > 0, largest, 1))
        rows = hidden.contiguous(), weight.to(hidden.dtype).contiguous(), _wide(bias, hidden), targets.contiguous()
        if impl == Impl.TRITON:
            gradients = _launch_bwd(*rows, row_max, row_sum, scale, needs)
        elif _is_compiled(hidden):
            from geneformer_kernels.ops.mlm_cross_entropy import host

            gradients = host.backward(*rows, row_max, row_sum, scale, needs)
        else:
            n_rows = plan.rows_per_chunk(len(weight), target_for(hidden))
            gradients = row_chunks.backward(*rows, row_max, row_sum, scale, needs, n_rows)
        d_hidden, d_weight, d_bias = (
            x.new_empty(0) if gradient is None else gradient.mul_(largest).to(x.dtype).contiguous()
            for x, gradient in zip((hidden, weight, bias), gradients, strict=True)
        )
        return d_hidden, d_weight, d_bias


@mlm_cross_entropy_bwd.register_fake
def _(hidden, weight, bias, targets, row_max, row_sum, d_loss, ignore_index, impl, *needs):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape if n else 0) for x, n in zip((hidden, weight, bias), needs, strict=True))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.ignore_index, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, d_loss, *_):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad[:3]
    gradients = mlm_cross_entropy_bwd(*ctx.saved_tensors, d_loss, ctx.ignore_index, ctx.impl, *needs)
    found = (gradient if n else None for gradient, n in zip(gradients, needs, strict=True))
    return (*found, None, None, None)


mlm_cross_entropy_fwd.register_autograd(_backward, setup_context=_save)


def _is_compiled(hidden: torch.Tensor) -> bool:
    """Whether the compiled loops of the CPU serve, rather than torch's operators."""
    return hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16


def _wide(bias: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return bias.to(row_chunks.wide_dtype(hidden.dtype)).contiguous()


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with zeros up to a width that the kernels take; they change no logit."""
    missing = -matrix.shape[1] % plan.WIDTH_STEP
    return torch.nn.functional.pad(matrix, (0, missing)) if missing else matrix


def _launch_fwd(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, targets: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from geneformer_kernels.ops.mlm_cross_entropy import kernel

    hidden, weight = _padded(hidden), _padded(weight)
    (n_rows, width), n_vocab = hidden.shape, len(weight)
    forward = plan.forward_plan(n_rows, n_vocab, width, DTYPE_NAMES[hidden.dtype], target_for(hidden))
    combine = plan.combine_plan()
    partial_max, partial_sum = (_empty((forward.n_splits, n_rows), bias) for _ in range(2))
    loss, row_max, row_sum = (_empty((n_rows,), bias) for _ in range(3))
    with launching_on(hidden):
        kernel.mlm_cross_entropy_fwd_kernel[_ceil(n_rows, forward.tiles.block_r) * forward.n_splits,](
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=bias,
            partial_max_ptr=partial_max,
            partial_sum_ptr=partial_sum,
            n_rows=n_rows,
            n_vocab=n_vocab,
            width=width,
            n_splits=forward.n_splits,
            blocks_per_split=forward.blocks_per_split,
            **forward.tiles.constexprs,
            **forward.tiles.launch.options,
        )
        kernel.mlm_cross_entropy_fwd_combine_kernel[_ceil(n_rows, combine.block_r),](
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=bias,
            targets_ptr=targets,
            partial_max_ptr=partial_max,
            partial_sum_ptr=partial_sum,
            row_max_ptr=row_max,
            row_sum_ptr=row_sum,
            loss_ptr=loss,
            n_rows=n_rows,
            n_vocab=n_vocab,
            width=width,
            n_splits=forward.n_splits,
            ignore_index=ignore_index,
            **combine.constexprs,
            **combine.launch.options,
        )
    return loss, row_max, row_sum


def _launch_bwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    row_scale: torch.Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients in float32 for rows weighted by row_scale, one chunk of the vocabulary after the other.

    dlogits of a chunk is the only large thing that exists beside inputs and gradients.
    """
    from geneformer_kernels.ops.mlm_cross_entropy import kernel

    needs_hidden, needs_weight, needs_bias = needs
    true_width = hidden.shape[1]
    hidden, weight = _padded(hidden), _padded(weight)
    (n_rows, width), n_vocab = hidden.shape, len(weight)
    backward = plan.backward_plan(n_rows, n_vocab, width, DTYPE_NAMES[hidden.dtype], target_for(hidden))
    tiles, n_row_blocks = backward.tiles, _ceil(n_rows, backward.tiles.block_r)
    workspace = _empty((n_rows, backward.chunk_v), hidden)
    d_hidden: torch.Tensor | None = None
    d_weight = _empty(weight.shape, bias) if needs_weight else None
    d_bias = torch.empty_like(bias) if needs_bias else None
    for first in range(0, n_vocab, backward.chunk_v):
        stop = min(first + backward.chunk_v, n_vocab)
        # cuBLAS takes twice as long over columns that are no multiple of 8: the last chunk begins a few columns
        # earlier, which are computed again to the same gradients of weight and bias.
        n_again = min(first, (first - stop) % 8)
        chunk = slice(first - n_again, stop)
        n_columns = chunk.stop - chunk.start
        partial_dbias = _empty((n_row_blocks, n_columns), bias)
        with launching_on(hidden):
            kernel.mlm_cross_entropy_bwd_dlogits_kernel[n_row_blocks * _ceil(n_columns, tiles.block_v),](
                hidden_ptr=hidden,
                weight_ptr=weight[chunk],
                bias_ptr=bias[chunk],
                targets_ptr=targets,
                row_max_ptr=row_max,
                row_sum_ptr=row_sum,
                row_scale_ptr=row_scale,
                dlogits_ptr=workspace,
                partial_dbias_ptr=partial_dbias,
                n_rows=n_rows,
                n_columns=n_columns,
                width=width,
                first_vocab=chunk.start,
                stride_dlogits_r=backward.chunk_v,
                **tiles.constexprs,
                **tiles.launch.options,
            )
        dlogits = workspace[:, :n_columns]
        if d_weight is not None:
            d_weight[chunk] = row_chunks.add_product(None, dlogits.t(), hidden)
        if needs_hidden:
            dlogits[:, :n_again] = 0.0
            d_hidden = row_chunks.add_product(d_hidden, dlogits, weight[chunk])
        if d_bias is not None:
            torch.sum(partial_dbias, 0, out=d_bias[chunk])
    d_hidden, d_weight = (d if d is None else d[:, :true_width] for d in (d_hidden, d_weight))
    return d_hidden, d_weight, d_bias


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _ceil(n: int, size: int) -> int:
    return -(-n // size)


@ranged("mlm_cross_entropy")
def mlm_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    impl: Impl | str | None = None,
) -> torch.Tensor:
    """``F.cross_entropy(F.linear(hidden, weight, bias), targets)`` without ever holding the logits [R, V].

    Parameters
    ----------
    hidden
        [R, C], rows of the masked positions in the compute dtype.
    weight
        [V, C], the decoder, usually the token table itself: float32 parameters or any floating dtype. Computed in the
        dtype of ``hidden``; the gradient comes back in its own.
    bias
        [V] or None; added in float32, but in the dtype of ``hidden`` by the reference, and on a CPU in float16.
    targets
        [R] int64, the vocabulary entry that was masked.
    ignore_index
        Rows with this target count for nothing: loss 0, gradient exactly 0 where ``hidden`` is finite. (NaN times 0 is
        NaN, in torch's cross entropy too.)
    reduction
        ``"mean"`` over the rows that count, ``"sum"``, or ``"none"``.
    impl
        ``"triton"``, ``"torch"`` or ``"reference"``; None chooses.

    Returns
    -------
    torch.Tensor
        float32 (float64 for float64 ``hidden``), a scalar, or [R] for ``"none"``. Unlike torch's NaN, the mean over no
        rows is 0 with gradients of 0: a batch without masked tokens does not end a training run.

    Raises
    ------
    TypeError
        Something is no tensor, or no integer.
    ValueError
        Shapes, dtypes, devices or the reduction do not fit; on the CPU: a target is outside the vocabulary and not
        ``ignore_index``. On a card nobody waits to see that: the row's loss becomes NaN, and so do its row of the
        gradient of ``hidden`` and all of the gradients of ``weight`` and ``bias``. (The reference ends in torch's
        device-side assertion there.)

    Notes
    -----
    The backward pass computes the logits again and holds their gradient for a chunk of the vocabulary at a time: a
    quarter of the logits or 256 MiB, whichever is smaller (at least 16 MiB or one block of columns); on the torch path,
    for a chunk of rows. In bfloat16 on a CPU it is 4 MiB per thread, and what is added up to the gradient of ``hidden``
    takes about as much as the gradient of ``weight`` in float32, at most. Sums run in a fixed order, so results are the
    same every time.

    References
    ----------
    Wijmans et al., "Cut your losses in large-vocabulary language models", arXiv:2411.09009; Milakov and Gimelshein,
    "Online normalizer calculation for softmax", arXiv:1805.02867.
    """
    _validate(hidden, weight, bias, targets, ignore_index, reduction)
    shape = {"width": hidden.shape[1], "n_vocab": weight.shape[0], "needs_grad": needs_gradient(hidden, weight, bias)}
    chosen = choose_for(plan.OP, hidden, impl, shape=shape)
    if chosen == Impl.REFERENCE:
        return reference.mlm_cross_entropy(hidden, weight, bias, targets, ignore_index, reduction)
    if bias is None:
        bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
    loss, *_ = mlm_cross_entropy_fwd(hidden, weight, bias, targets, ignore_index, chosen)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (targets != ignore_index).sum().clamp(min=1)


def _validate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
) -> None:
    check_tensor("hidden", hidden, FLOATS)
    check_tensor("weight", weight, FLOATS, device=hidden.device)
    check_optional("bias", bias, FLOATS, device=hidden.device)
    check_tensor("targets", targets, INTEGERS, device=hidden.device)
    check_choice("reduction", reduction, REDUCTIONS)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"hidden {[*hidden.shape]} and weight {[*weight.shape]} must be [R, C] and [V, C]")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{hidden.shape[0]}], not {targets.dtype} {[*targets.shape]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {[*bias.shape]} must be [{weight.shape[0]}]")
    check_whole("ignore_index", ignore_index, -(2**31), 2**31 - 1)
    if is_looked_into(targets):
        row_chunks.refuse_outside(targets, ignore_index, len(weight))
