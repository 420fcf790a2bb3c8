"""One block for every family: attention and feed-forward with their residual additions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from geneformer_kernels import (
    feed_forward,
    feed_forward_layernorm,
    int8_feed_forward,
    linear,
    residual_layernorm,
    residual_layernorm_int8,
    varlen_attention_qkv,
)
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.int8_rows import activate
from geneformer_kernels.on_device import (
    choose_for,
    is_plain,
    needs_gradient,
    why_float32_loops_are_slow,
    why_not_float32_loops,
)
from geneformer_kernels.ops.feed_forward.op import has_layernorm_inside
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from geneformer_fast import random_features
from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import Linear, QuantizedLinear, Rows, wants_rows
from geneformer_fast.pieces import in_pieces, is_long


@dataclass(frozen=True)
class FirstTokens:
    """First tokens of packed cells, for a last block that computes nothing for the others.

    Attributes
    ----------
    starts
        [B] int64, where each cell begins.
    cell
        [T] int64, the cell of every token.
    lengths
        [B] int64.
    """

    starts: torch.Tensor
    cell: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Projected:
    """What a block's queries, keys and values are already, in place of what they are projected from.

    Attributes
    ----------
    qkv
        [T, 3, H, D].
    dtype
        Of products.
    """

    qkv: torch.Tensor
    dtype: torch.dtype


def first_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, readers: FirstTokens) -> torch.Tensor:
    """Attention of one query per cell [B, H, D] over the keys and values of its cell [T, H, D]: [B, H * D].

    Sums over a cell are in float32 at least. Every pass reads [T, H * D] once, which is little beside a product.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q[readers.cell] * k).sum(-1, dtype=wide).mul_(q.shape[-1] ** -0.5)  # [T, H]
    highest = torch.segment_reduce(scores, "max", lengths=readers.lengths, unsafe=True)
    weights = (scores - highest[readers.cell]).exp_()
    totals = torch.segment_reduce(weights, "sum", lengths=readers.lengths, unsafe=True)
    weighted = weights[..., None] * v  # [T, H, D]
    context = torch.segment_reduce(weighted.flatten(1), "sum", lengths=readers.lengths, unsafe=True)
    return (context.view_as(q) / totals[..., None]).flatten(1).to(q.dtype)


class Block(nn.Module):
    """Attention and feed-forward with their residual additions, post- or pre-norm.

    The stream [T, C] is float32 and carries the residual; ``x`` [T, C] is what the next matrix product reads: numbers
    in the dtype of products, or rows rounded to int8 for a product of integers. In post-norm both are the last
    LayerNorm's output; in pre-norm ``x`` is the normalised stream, made by the LayerNorm that belongs to the sublayer
    about to run. Each of the four linear layers may be a :class:`QuantizedLinear`.
    """

    projection: torch.Tensor | None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.attention == "favor" and config.attention_dropout:
            raise UnsupportedError("linear attention has no weights to drop: attention_dropout must be 0 with 'favor'")
        self.config, inner = config, config.n_heads * config.head_dim
        self.qkv: Linear | QuantizedLinear = Linear(config.width, 3 * inner, bias=config.qkv_bias)
        self.out: Linear | QuantizedLinear = Linear(inner, config.width)
        has_features = config.attention == "favor"
        self.register_buffer("projection", torch.empty(config.n_features, config.head_dim) if has_features else None)
        #: Of linear attention: ``"cell"``, or ``"batch"`` for what a published model computes of a batch of cells.
        self.stabiliser = "cell"
        self.attention_norm = nn.LayerNorm(config.width, eps=config.eps)
        up_width = config.ff_width * (2 if config.activation == "swiglu" else 1)
        self.up: Linear | QuantizedLinear = Linear(config.width, up_width)
        self.down: Linear | QuantizedLinear = Linear(config.ff_width, config.width)
        self.ff_norm = nn.LayerNorm(config.width, eps=config.eps)

    def projected(self, x: torch.Tensor | Rows | Projected) -> torch.Tensor:
        """[T, C] -> queries, keys and values [T, 3, H, D]."""
        if isinstance(x, Projected):
            return x.qkv
        return self.qkv(x).view(-1, 3, self.config.n_heads, self.config.head_dim)

    def attend(self, x: torch.Tensor | Rows | Projected, cells: AttentionCells) -> torch.Tensor:
        """Self-attention of [T, C] within each cell, [T, C], which :attr:`out` is to project."""
        qkv = self.projected(x)
        if self.projection is not None:
            return random_features.attend(qkv, self.projection, cells, self.stabiliser).flatten(1)
        dropout_p = self.config.attention_dropout if self.training else 0.0
        return varlen_attention_qkv(qkv, cu_seqlens=cells, dropout_p=dropout_p).flatten(1)

    def attend_from(self, x: torch.Tensor | Rows | Projected, readers: FirstTokens) -> torch.Tensor:
        """:meth:`attend` of the first token of each cell alone, [B, C]: one query per cell, all keys and values."""
        config, starts = self.config, readers.starts
        if self.projection is not None:  # all keys are what costs
            cells = random_features.cells_of_lengths(readers.lengths, len(readers.cell))
            return self.attend(x, cells)[starts]
        if type(self.qkv) is Linear and is_untouched(self.qkv) and not isinstance(x, Projected):
            inner = config.n_heads * config.head_dim
            bias = self.qkv.bias
            of_q, of_kv = (None, None) if bias is None else (bias[:inner], bias[inner:])
            assert isinstance(x, torch.Tensor)
            q = linear(x[starts], self.qkv.weight[:inner], of_q)
            k, v = linear(x, self.qkv.weight[inner:], of_kv).view(-1, 2, config.n_heads, config.head_dim).unbind(1)
        else:
            q, k, v = self.projected(x).unbind(1)
            q = q[starts]
        return first_attention(q.view(-1, config.n_heads, config.head_dim), k, v, readers)

    def forward(
        self,
        stream: torch.Tensor,
        x: torch.Tensor | Rows | Projected,
        cells: AttentionCells | FirstTokens,
        next_norm: nn.LayerNorm | None,
        is_final: bool = False,
        reader: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """(stream, x) -> (stream, x).

        ``cells`` are those of this forward pass, the same for every block; :class:`FirstTokens` of them where the
        stream has their first tokens only, and nothing else is to come out. ``next_norm`` is the pre-norm LayerNorm of
        whatever comes after this block; ``is_final``: it is the encoder's last one, whose result is the stream.
        ``reader`` is the layer that multiplies what comes out, if that is known.
        """
        dropout_p = self.config.dropout if self.training else 0.0
        first_norm, second_norm = self.norms(next_norm)
        second_kind = "post" if is_final else self.config.norm
        dtype = products_dtype(self.qkv, x)
        context = self.attend_from(x, cells) if isinstance(cells, FirstTokens) else self.attend(x, cells)
        loop = None if dropout_p else self.loop_after_attention(context, stream, dtype, next_norm, reader)
        if loop == "int8":
            return self._by_rows(context, stream, dtype, first_norm, second_norm, second_kind, reader)
        if loop == "float32":
            return self._by_float32(context, stream, first_norm, second_norm, second_kind, reader)
        rest: dict[str, Any] = {
            "dtype": dtype,
            "norms": (first_norm, second_norm),
            "second_kind": second_kind,
            "reader": reader,
        }
        if not dropout_p and is_long(context) and all(map(is_untouched, (self.out, self.up, self.down))):
            return in_pieces(lambda rows, stream: self._after_attention([rows], stream, **rest), context, stream)
        handed = [context]
        del context
        return self._after_attention(handed, stream, **rest)

    def _after_attention(
        self,
        handed: list[torch.Tensor],
        stream: torch.Tensor,
        *,
        dtype: torch.dtype,
        norms: tuple[nn.LayerNorm, nn.LayerNorm | None],
        second_kind: str,
        reader: nn.Module | None,
    ) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """(stream, x) after what follows attention, one operation after the other.

        What attention gives is taken out of its list, so that nobody holds it while hidden units are there.
        """
        first_norm, second_norm = norms
        dropout_p = self.config.dropout if self.training else 0.0
        attended = self.out(handed.pop())
        stream, x = add_norm(attended, stream, first_norm, self.config.norm, dtype, dropout_p, reader=self.up)
        del attended  # its memory is needed by the feed-forward
        weights, activation = float_weights(self.up, self.down, x, dtype), self.config.activation
        if weights is None:
            out = feed_forward_of_rows(self.up, self.down, x, activation, dtype)
        else:
            assert isinstance(x, torch.Tensor)
            if (
                second_norm is not None
                and not wants_rows(reader)
                and has_layernorm_inside(x, self.config.ff_width, activation=activation)
            ):
                return feed_forward_layernorm(
                    x, stream, *weights, second_norm.weight, second_norm.bias, activation=activation,
                    eps=second_norm.eps, norm=second_kind, out_dtype=dtype, dropout_p=dropout_p,
                )  # fmt: skip
            out = feed_forward(x, *weights, activation=activation)
        if second_norm is None:
            out = F.dropout(out, dropout_p)
            return stream + out, out
        return add_norm(out, stream, second_norm, second_kind, dtype, dropout_p, reader=reader)

    def norms(self, next_norm: nn.LayerNorm | None) -> tuple[nn.LayerNorm, nn.LayerNorm | None]:
        """The LayerNorms after attention and after the feed-forward half; ``next_norm`` as in :meth:`forward`."""
        return (self.attention_norm, self.ff_norm) if self.config.norm == "post" else (self.ff_norm, next_norm)

    def loop_after_attention(
        self,
        context: torch.Tensor,
        stream: torch.Tensor,
        dtype: torch.dtype,
        next_norm: nn.LayerNorm | None,
        reader: nn.Module | None,
    ) -> str | None:
        """``"int8"`` or ``"float32"`` where one compiled loop computes all that follows attention, without dropout."""
        first_norm, second_norm = self.norms(next_norm)
        if context.shape[-1] != stream.shape[-1]:  # which the loops take as one
            return None
        if self._is_near(context, stream, dtype, (first_norm, second_norm, reader)):
            return "int8"
        return "float32" if self._is_near_in_float32(context, stream, first_norm, second_norm) else None

    def _is_near(
        self, context: torch.Tensor, stream: torch.Tensor, dtype: torch.dtype, others: tuple[nn.Module | None, ...]
    ) -> bool:
        """Whether one loop computes all that follows attention, each row while it is near: integers, on a CPU.

        ``others`` are modules besides the layers whose parameters count in it. What looks at a layer by hooks sees it.
        """
        layers = self.out, self.up, self.down
        if context.device.type != "cpu" or torch.compiler.is_compiling() or not len(context):
            return False
        if not all(wants_rows(layer) for layer in layers) or self.down.smooth is not None:
            return False
        return (
            is_plain(context, stream)
            and not (
                torch.is_grad_enabled()
                and needs_gradient(context, stream, *(p for m in (*layers, *others) if m for p in m.parameters()))
            )
            and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
            and is_by_loops(context, dtype)
        )

    def _by_rows(
        self,
        context: torch.Tensor,
        stream: torch.Tensor,
        dtype: torch.dtype,
        first_norm: nn.LayerNorm,
        second_norm: nn.LayerNorm | None,
        second_kind: str,
        reader: nn.Module | None,
    ) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """(stream, x) after what follows attention, by the loop."""
        from geneformer_kernels.cpu.int8_block import Layer, Norm, after_attention

        layers = []
        for layer in (self.out, self.up, self.down):
            assert isinstance(layer, QuantizedLinear)
            layers.append(Layer(layer.weight_q, layer.row_scale, layer.bias, layer.smooth))
        out, up, down = layers
        is_post = self.config.norm == "post"
        first, second = Norm(first_norm.weight, first_norm.bias, first_norm.eps, is_post, up.smooth), None
        if second_norm is not None and wants_rows(reader):
            is_post = second_kind == "post"
            second = Norm(second_norm.weight, second_norm.bias, second_norm.eps, is_post, reader.smooth)
        stream, x, scale = after_attention(
            context, stream, (out, up, down), (first, second), self.config.activation, dtype
        )
        if scale is not None:
            return stream, Rows(x, scale)
        if second_norm is None:
            return stream + x, x
        return add_norm(x, stream, second_norm, second_kind, dtype, reader=reader)

    def _is_near_in_float32(
        self, context: torch.Tensor, stream: torch.Tensor, first_norm: nn.LayerNorm, second_norm: nn.LayerNorm | None
    ) -> bool:
        """Whether one loop computes all that follows attention, each row while it is near: float32, on a CPU with AVX2.

        What looks at a layer, or stands in for it, finds it called.
        """
        layers = self.out, self.up, self.down
        if context.device.type != "cpu" or context.dtype != torch.float32 or torch.compiler.is_compiling():
            return False
        if not all(type(layer) is Linear and is_untouched(layer) for layer in layers) or _has_any_global_hook():
            return False
        modules = [module for module in (*layers, first_norm, second_norm) if module is not None]
        if why_not_float32_loops(context, stream, *(each for module in modules for each in module.parameters())):
            return False
        steps, sizes = ("linear", "residual_layernorm", "feed_forward"), (self.config.width, self.config.ff_width)
        if any(size % 16 for size in sizes) or why_float32_loops_are_slow("linear", None, max(sizes)):
            return False
        return all(choose_for(step, context) == Impl.NUMBA for step in steps)

    def _by_float32(
        self,
        context: torch.Tensor,
        stream: torch.Tensor,
        first_norm: nn.LayerNorm,
        second_norm: nn.LayerNorm | None,
        second_kind: str,
        reader: nn.Module | None,
    ) -> tuple[torch.Tensor, torch.Tensor | Rows]:
        """(stream, x) after what follows attention, by the loop."""
        from geneformer_kernels.cpu.float32_block import Layer, Norm, after_attention

        out, up, down = (Layer(layer.weight, layer.bias) for layer in (self.out, self.up, self.down))
        first, second = Norm(first_norm.weight, first_norm.bias, first_norm.eps, self.config.norm == "post"), None
        if second_norm is not None and not wants_rows(reader):
            second = Norm(second_norm.weight, second_norm.bias, second_norm.eps, second_kind == "post")
        stream, x = after_attention(context, stream, (out, up, down), (first, second), self.config.activation)
        if second is not None:
            return stream, x
        if second_norm is None:
            return stream + x, x
        return add_norm(x, stream, second_norm, second_kind, torch.float32, reader=reader)


def is_untouched(layer: nn.Module) -> bool:
    """Whether calling a module computes what its class says and nothing else: no hook, no method of its own."""
    return not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def float_weights(
    up: nn.Linear, down: nn.Linear, x: torch.Tensor | Rows, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None] | None:
    """Weights and biases of two feed-forward layers if both are to be multiplied as they would be unquantized.

    A gradient would keep widened weights until it is needed: then each layer sees to itself. So does one that somebody
    put something around (adapters of low rank), which weights alone do not tell.
    """
    layers = up, down
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return None
    quantized = [layer for layer in layers if isinstance(layer, QuantizedLinear)]
    if isinstance(x, Rows) or any(layer.is_dynamic or layer.scheme == "fp8" for layer in quantized):
        return None
    if quantized and needs_gradient(x, *(layer.bias for layer in layers)):
        return None
    (up_weight, up_bias), (down_weight, down_bias) = (
        layer.as_float(dtype) if isinstance(layer, QuantizedLinear) else (layer.weight, layer.bias) for layer in layers
    )
    return up_weight, up_bias, down_weight, down_bias


def feed_forward_of_rows(
    up: nn.Linear, down: nn.Linear, x: torch.Tensor | Rows, activation: str, dtype: torch.dtype
) -> torch.Tensor:
    """The feed-forward half where a layer of it multiplies integers, or is float8."""
    if wants_rows(up) and wants_rows(down) and down.smooth is None:
        weights = up.weight_q, up.row_scale, up.bias, down.weight_q, down.row_scale, down.bias
        q, scale = x if isinstance(x, Rows) else (x if up.smooth is None else x * up.smooth, None)
        return int8_feed_forward(q, *weights, x_scale=scale, activation=activation, out_dtype=dtype)
    # What is rounded for the second layer comes from float32, as it does within int8_feed_forward.
    hidden_dtype = torch.float32 if wants_rows(down) else dtype
    if isinstance(up, QuantizedLinear):
        inside = None if activation == "swiglu" else activation
        hidden = up(x, activation=inside, out_dtype=hidden_dtype)
        hidden = activate(hidden, activation) if inside is None else hidden
    else:
        hidden = activate(up(x).to(hidden_dtype), activation)
    return down(hidden)


def products_dtype(layer: nn.Linear, x: torch.Tensor | Rows | Projected) -> torch.dtype:
    """Dtype of what a layer makes of ``x``; one in floating point takes what it is given."""
    if isinstance(x, Projected):
        return x.dtype
    if isinstance(layer, QuantizedLinear):
        return layer.work_dtype
    assert isinstance(x, torch.Tensor)
    return x.dtype


def is_by_loops(context: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether every step after attention would be a compiled loop of a CPU, which take whole registers of numbers."""
    floats = (torch.float32, torch.bfloat16)
    steps = "quantize_rows", "int8_linear", "residual_layernorm_int8", "int8_feed_forward"
    return (
        context.shape[1] % 64 == 0
        and context.dtype in floats
        and dtype in floats
        and all(choose_for(step, context, dtype=dtype) == Impl.NUMBA for step in steps)
    )


def add_norm(
    x: torch.Tensor,
    stream: torch.Tensor | None,
    norm: nn.LayerNorm,
    kind: str,
    out_dtype: torch.dtype,
    dropout_p: float = 0.0,
    *,
    reader: nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Rows]:
    """Add to the stream and normalise with a module's parameters; see ``geneformer_kernels.residual_layernorm``.

    Where ``reader``, the layer that multiplies what comes out, multiplies integers, rows come out. With a gradient or
    dropout these are for the reader to make, of float32, so that it finds the same numbers.
    """
    if wants_rows(reader):
        if not dropout_p and not needs_gradient(x, stream, norm.weight, norm.bias, reader.bias):
            stream, q, scale = residual_layernorm_int8(
                x, stream, norm.weight, norm.bias, eps=norm.eps, norm=kind, smooth=reader.smooth
            )
            return stream, Rows(q, scale)
        out_dtype = torch.float32
    return residual_layernorm(
        x, stream, norm.weight, norm.bias, eps=norm.eps, norm=kind, out_dtype=out_dtype, dropout_p=dropout_p
    )
