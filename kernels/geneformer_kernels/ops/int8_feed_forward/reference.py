"""What the feed-forward half of a block with int8 weights means."""

from __future__ import annotations

import torch

from geneformer_kernels.int8_rows import finish, quantize_groups, quantize_rows, rounded, scaled_product


def int8_feed_forward(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    up_q: torch.Tensor,
    up_scale: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_q: torch.Tensor,
    down_scale: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    *,
    has_groups: bool = False,
) -> torch.Tensor:
    """``down(rows(activation(up(rows(x)))))`` where ``rows`` rounds to int8, and integers are multiplied.

    Hidden units have one scale per row, with ``has_groups`` one per row and 128 columns.
    """
    q, scale = rounded(x, x_scale)
    hidden = finish(scaled_product(q, scale, up_q), up_scale, up_bias, activation, torch.float32)
    q, scale = quantize_groups(hidden) if has_groups else quantize_rows(hidden)
    return finish(scaled_product(q, scale, down_q), down_scale, down_bias, None, out_dtype)
