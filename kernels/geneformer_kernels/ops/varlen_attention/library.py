"""torch's own kernels for packed sequences on a card, with gradients that are the same every time.

Left to themselves, both kernels add up parts of the queries' gradients in whatever order their blocks finish. In
torch's deterministic mode they do not; the backward operator switches it on for as long as it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch

from geneformer_kernels.operators import operator

# torch has no public function for these; torch 2.11 and 2.13 agree on their signatures.
_ATEN: Any = torch.ops.aten
#: Rows of the memory-efficient kernel's sums are padded to a multiple of this.
_LSE_STEP = 32


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic mode within the block, whatever it was before.

    The public function would reach for the compiler's settings as well.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])


def attend(
    route: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    dropout_p: float,
    needs_grad: bool,
) -> torch.Tensor:
    """Attention of [T, H, D], D a multiple of 8, within cells of at most ``longest`` tokens; int32 cu_seqlens [B + 1].

    ``route`` is ``"varlen"`` (flash attention, no dropout) or ``"efficient"``.
    """
    if needs_grad:
        return attend_fwd(route, q, k, v, cu_seqlens, longest, scale, dropout_p)[0]
    if route == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        return cast(torch.Tensor, varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale))
    return _efficient(q, k, v, cu_seqlens, longest, scale, dropout_p, keeps_sums=False)[0]


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """cuDNN's attention over [B, H, L, D], which torch's dispatcher takes for cells without a mask."""
    return cast(
        torch.Tensor,
        _ATEN._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, False, False, scale=scale)[0],
    )


def _efficient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    dropout_p: float,
    *,
    keeps_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, sums, and the seed and offset of dropout, by what nested tensors call."""
    out, *rest = _ATEN._efficient_attention_forward(
        *(x.unsqueeze(0) for x in (q, k, v)), None, cu_seqlens, cu_seqlens, longest, longest, dropout_p, 0, keeps_sums,
        scale=scale,
    )  # fmt: skip
    return out.squeeze(0), rest[0], rest[1], rest[2]


@operator("varlen_attention_library_fwd")
def attend_fwd(
    route: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [T, H, D], each row's logarithm of the sum, and the seed and offset of dropout (empty without)."""
    if route == "varlen":
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        out, lse = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, return_aux=AuxRequest(lse=True), scale=scale
        )
        return out, lse, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    return _efficient(q, k, v, cu_seqlens, longest, scale, dropout_p, keeps_sums=True)


@attend_fwd.register_fake
def _(route, q, k, v, cu_seqlens, longest, scale, dropout_p):
    n_tokens, n_heads, _ = q.shape
    sums: tuple[int, ...] = (n_heads, n_tokens)
    state: tuple[int, ...] = (0,)
    if route != "varlen":
        padded = (longest + _LSE_STEP - 1) // _LSE_STEP * _LSE_STEP
        sums, state = (cu_seqlens.shape[0] - 1, n_heads, padded), ()
    seed, offset = (torch.empty(state, dtype=torch.int64) for _ in range(2))
    return q.new_empty(q.shape), q.new_empty(sums, dtype=torch.float32), seed, offset


@operator("varlen_attention_library_bwd")
def attend_bwd(
    d_out: torch.Tensor,
    route: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    longest: int,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    bounds = cu_seqlens, cu_seqlens, longest, longest
    with deterministic():
        if route == "varlen":
            # The state of a generator that no dropout asks, as torch.nn.attention.varlen makes it itself.
            state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
            dq, dk, dv = _ATEN._flash_attention_backward(
                d_out.contiguous(), q, k, v, out, lse, *bounds, 0.0, False, state, unused, scale=scale
            )
            return dq, dk, dv
        d_out, q, k, v, out = (x.unsqueeze(0) for x in (d_out.contiguous(), q, k, v, out))
        gradients = _ATEN._efficient_attention_backward(
            d_out, q, k, v, None, out, *bounds, lse, dropout_p, seed, offset, 0, False, scale=scale
        )
        dq, dk, dv = (x.squeeze(0).contiguous() for x in gradients[:3])
        return dq, dk, dv


@attend_bwd.register_fake
def _(d_out, route, q, k, v, cu_seqlens, out, lse, seed, offset, longest, scale, dropout_p):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.route, q, k, v, cu_seqlens, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 8
    return None, *attend_bwd(d_out, ctx.route, *ctx.saved_tensors, *ctx.numbers), None, None, None, None


attend_fwd.register_autograd(_backward, setup_context=_save)
