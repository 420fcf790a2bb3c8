"""The torch path: logits of a chunk of rows at a time, computed again for the gradients; and sums of products.

Runs on any device and in any dtype. Memory beside inputs and gradients is a few times the chunk's float32 logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# torch.mm with half operands and a float32 result: torch 2.8 and newer, CUDA only.
_HAS_WIDE_PRODUCT = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits are exponentiated and sums of products are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``total + a @ b`` in the wide dtype, in place where there is a total.

    Products of half matrices stay float32 on CUDA; elsewhere each one is rounded to half before it is added.
    """
    wide = wide_dtype(a.dtype)
    if a.dtype == wide:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    product = torch.mm(a, b, out_dtype=wide) if a.is_cuda and _HAS_WIDE_PRODUCT else torch.mm(a, b)
    return product.to(wide) if total is None else total.add_(product)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if hidden.is_cuda:
        return add_product(None, hidden, weight.t()).add_(bias)
    # The library adds the bias while the tile is in registers: a pass over the logits less.
    return F.linear(hidden, weight, bias.to(hidden.dtype)).to(wide_dtype(hidden.dtype))


def counted_and_valid(targets: torch.Tensor, ignore_index: int, n_vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets count, and which of those are in the vocabulary."""
    is_counted = targets != ignore_index
    return is_counted, is_counted & (targets >= 0) & (targets < n_vocab)


def refuse_outside(targets: torch.Tensor, ignore_index: int, n_vocab: int) -> None:
    """Looks at targets on the CPU.

    Raises
    ------
    ValueError
        A target is outside the vocabulary.
    """
    is_counted, is_valid = counted_and_valid(targets, ignore_index, n_vocab)
    if not torch.equal(is_valid, is_counted):
        wrong = targets[is_counted & ~is_valid][0].item()
        raise ValueError(f"target {wrong} is outside the vocabulary of {n_vocab} and is not ignore_index")


def columns(targets: torch.Tensor, ignore_index: int, n_vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets made safe to index with, which of them count, and which of those are in the vocabulary.

    Raises
    ------
    ValueError
        On the CPU: a target is outside the vocabulary.
    """
    if targets.device.type == "cpu":
        refuse_outside(targets, ignore_index, n_vocab)
    is_counted, is_valid = counted_and_valid(targets, ignore_index, n_vocab)
    return torch.where(is_valid, targets, 0), is_counted, is_valid


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, largest logit and sum of ``exp(logit - largest)``: [R] each, ``rows`` rows at a time.

    Raises
    ------
    ValueError
        On the CPU: a target is outside the vocabulary. Other devices are not waited for; there the loss is NaN.
    """
    column, is_counted, is_valid = columns(targets, ignore_index, weight.shape[0])
    column = column[:, None]
    loss, row_max, row_sum = (torch.empty(targets.shape, dtype=bias.dtype, device=bias.device) for _ in range(3))
    for first in range(0, len(targets), rows):
        chunk = slice(first, first + rows)
        logits = _logits(hidden[chunk], weight, bias)
        row_max[chunk], picked = logits.amax(-1), logits.gather(1, column[chunk])[:, 0]
        row_sum[chunk] = logits.sub_(row_max[chunk, None]).exp_().sum(-1)
        # The difference from the largest logit first: exact where logits are huge.
        loss[chunk] = row_sum[chunk].log() - (picked - row_max[chunk])
        del logits  # before the next ones are made
    loss = torch.where(is_valid, loss, torch.nan)
    return torch.where(is_counted, loss, 0), row_max, row_sum


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    targets: torch.Tensor,
    row_max: torch.Tensor,
    row_sum: torch.Tensor,
    row_scale: torch.Tensor,
    needs: tuple[bool, bool, bool],
    rows: int,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias for rows weighted by row_scale [R], in the wide dtype; None where unneeded.

    ``dlogits = (softmax - onehot) * row_scale`` is rounded to the dtype of hidden for the products, as torch does.
    """
    needs_hidden, needs_weight, needs_bias = needs
    wide = wide_dtype(hidden.dtype)
    d_hidden = torch.empty_like(hidden, dtype=wide) if needs_hidden else None
    d_weight = None
    d_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
    column = targets.clamp(0, weight.shape[0] - 1)[:, None]  # a row whose target that changes is weighted by NaN
    for first in range(0, len(targets), rows):
        chunk = slice(first, first + rows)
        scale = row_scale[chunk, None]
        dlogits = _logits(hidden[chunk], weight, bias).sub_(row_max[chunk, None]).exp_()
        dlogits.mul_(scale / row_sum[chunk, None])
        dlogits.scatter_add_(1, column[chunk], -scale)
        if d_bias is not None:
            d_bias += dlogits.sum(0)
        dlogits = dlogits.to(hidden.dtype)
        if d_hidden is not None:
            d_hidden[chunk] = add_product(None, dlogits, weight)
        if needs_weight:
            d_weight = add_product(d_weight, dlogits.t(), hidden[chunk])
        del dlogits
    return d_hidden, d_weight, d_bias
