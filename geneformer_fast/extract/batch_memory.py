"""What a batch of tokens takes in a forward pass without gradients, as the implementations that run say it."""

from __future__ import annotations

import torch
from geneformer_kernels.dispatch import Impl
from geneformer_kernels.on_device import choose_for
from geneformer_kernels.ops.favor_attention.op import favor_workspace
from geneformer_kernels.ops.feed_forward.op import feed_forward_workspace
from geneformer_kernels.ops.linear.op import linear_workspace
from geneformer_kernels.ops.residual_layernorm.op import residual_layernorm_workspace
from geneformer_kernels.ops.varlen_attention.op import attention_workspace
from geneformer_kernels.workspace import Workspace, one_by_one, together
from torch import nn

from geneformer_fast import pieces
from geneformer_fast.block import Block
from geneformer_fast.encoder import Encoder
from geneformer_fast.layers import EightBits, QuantizedLinear, wants_rows

# What everything but a block's steps keeps for a batch.
_KEPT_BYTES = 4 << 20
# Hidden units that torch has at one time where integers are multiplied, in units of the feed-forward width.
_HIDDEN = {"relu": 1, "gelu": 2, "gelu_tanh": 2, "swiglu": 4}
# Token ids in 64 bits in the batch that is computed, and in those that wait before and behind it.
_ID_BYTES = 3 * 8
# Of a number that torch multiplies as an integer: rounded, its sum in int32, and that twice in float32.
_ROUNDED_BYTES = 1 + 3 * 4
# How a layer is multiplied: integers by compiled loops, integers or float8 by torch, or floats.
_LOOPS, _ROWS, _FLOATS = "loops", "rows", "floats"


def batch_memory(encoder: Encoder, longest: int, device: torch.device | None = None) -> Workspace:
    """What an encoder takes beside its weights: for a token of a batch, for a batch, and for each thread of them all.

    Parameters
    ----------
    encoder
        In the dtype it is to run in.
    longest
        Tokens of the longest cell.
    device
        Where it is to run, if it is not there.

    Notes
    -----
    With C the width, F the feed-forward width, w bytes of a number of the stream (float32) and d of one that is
    computed on, a block holds the stream and x that it began with, (w + d) C (one tensor in post-norm and float32), and
    one after the other

    - queries, keys, values and the context, 4 d C;
    - what the projection gives, and the stream and x after the LayerNorm behind it, (w + 2 d) C;
    - the latter two, hidden units and the result of the feed-forward half;
    - the latter three, and the stream and x after the second LayerNorm.

    To each comes what the implementation that runs takes for itself (:class:`geneformer_kernels.workspace.Workspace`).
    Where one compiled loop computes all that follows attention, there are only the context and its two results; so it
    is, beside what a piece takes, where cells are so long that they are computed in pieces (:mod:`..pieces`).
    """
    device = encoder.device if device is None else device
    with torch.inference_mode():
        blocks = [_of_block(encoder, i, longest, device) for i in range(len(encoder.blocks))]
    row, call, thread = one_by_one(*blocks) if blocks else Workspace()
    return Workspace(row + _ID_BYTES, _KEPT_BYTES + call, thread)


def _of_block(encoder: Encoder, index: int, longest: int, device: torch.device) -> Workspace:
    """The most that is in use at any of a block's steps."""
    block, config = encoder.blocks[index], encoder.config
    assert isinstance(block, Block)
    following = encoder.blocks[index + 1] if index + 1 < len(encoder.blocks) else None
    reader = following.qkv if isinstance(following, Block) else None
    next_norm = None
    if config.norm == "pre":
        next_norm = following.attention_norm if isinstance(following, Block) else encoder.final_norm
    x = torch.empty(1, config.width, dtype=encoder.dtype, device=device)
    stream = x.to(torch.promote_types(x.dtype, torch.float32))
    size, wide, is_post = x.element_size(), stream.element_size(), config.norm == "post"
    loop = block.loop_after_attention(
        x.new_empty(1, config.n_heads * config.head_dim), stream, x.dtype, next_norm, reader
    )
    kinds = _kinds_of_products(block, ("qkv", "out", "up", "down"))
    x_size = 1 if kinds == {_LOOPS} else 0 if is_post and size == wide and kinds == {_FLOATS} else size
    context, both = size * config.n_heads * config.head_dim, (wide + x_size) * config.width
    qkv = x.new_empty(1, 3, config.n_heads, config.head_dim)
    if block.projection is None:
        attention = attention_workspace(qkv, longest)
    else:
        attention = favor_workspace(qkv[:, 0], len(block.projection))
    steps = [
        together(Workspace(3 * context), _of_product(block.qkv, x)),
        together(Workspace(4 * context), attention),
    ]
    if loop is not None:
        second, after = block.norms(next_norm)[1], context + both
        if second is None or wants_rows(reader) != (loop == "int8"):
            # The loop's second result is what is to be added, which is done by itself.
            after = 2 * (size + wide) * config.width
            if second is not None:
                kind = config.norm if following is not None else "post"
                after += (0 if kind == "post" and size == wide else size) * config.width
                after += _of_norm(second, x, kind, {_FLOATS}).row
            elif size < wide:
                after += wide * config.width  # torch adds no halves to floats without a copy of them
        steps.append(together(Workspace(after), _of_loop(loop, block, x.dtype)))
    else:
        norms = [_of_norm(norm, x, config.norm, kinds) for norm in block.norms(next_norm) if norm is not None]
        norm = one_by_one(*norms)
        after_attention = [
            together(Workspace(context + both), norm, _of_product(block.out, x)._replace(row=0)),
            together(Workspace(both + context), _of_feed_forward(block, x, kinds)),
            together(Workspace(2 * both + context), norm),
        ]
        if device.type == "cpu" and pieces.is_long_batch(longest):
            row, call, thread = one_by_one(*after_attention)
            after_attention = [Workspace(context + both, call + pieces.PIECE_ROWS * row, thread)]
        steps += after_attention
    return together(Workspace(both), one_by_one(*steps))


def _of_loop(loop: str, block: Block, dtype: torch.dtype) -> Workspace:
    """Of one loop over all that follows attention."""
    shapes = [(layer.out_features, layer.in_features) for layer in (block.out, block.up, block.down)]
    # Imported late: numba is needed on these branches only.
    if loop == "float32":
        from geneformer_kernels.cpu import float32_block

        return float32_block.workspace(shapes)
    from geneformer_kernels.cpu import int8_block

    return int8_block.workspace(shapes, block.config.activation, dtype)


def _of_product(layer: nn.Module, x: torch.Tensor) -> Workspace:
    """Of a linear layer that multiplies rows such as ``x``; one that an adapter wraps is among its modules."""
    parts = [_of_linear(each, x) for each in layer.modules() if isinstance(each, nn.Linear)]
    return one_by_one(*parts) if parts else Workspace()


def _of_linear(layer: nn.Linear, x: torch.Tensor) -> Workspace:
    shape, rows = (layer.out_features, layer.in_features), x.new_empty(1, layer.in_features)
    kind = _kind_of(layer)
    if kind == _LOOPS:
        from geneformer_kernels.cpu import int8_products

        return int8_products.workspace(shape, x.dtype)
    if not isinstance(layer, EightBits):
        return linear_workspace(rows, layer.weight, layer.bias)
    # A weight of eight bits, without its numbers: widened, or multiplied as it is in pieces no larger than that.
    weight = torch.empty(shape, dtype=x.dtype, device="meta")
    widened = Workspace(call=weight.nbytes) if kind == _FLOATS else Workspace(_ROUNDED_BYTES * max(shape))
    return together(widened, linear_workspace(rows, weight, None))


def _of_norm(norm: nn.LayerNorm, x: torch.Tensor, kind: str, kinds: set[str]) -> Workspace:
    if kinds == {_LOOPS}:  # which read float32 and bfloat16
        return Workspace(4 * x.shape[1] if x.dtype == torch.float16 else 0)
    return residual_layernorm_workspace(x, norm.weight, norm.bias, norm=kind, out_dtype=x.dtype)


def _of_feed_forward(block: Block, x: torch.Tensor, kinds: set[str]) -> Workspace:
    """Of both layers and what is between them, beside their result."""
    config, size, layers = block.config, x.element_size(), (block.up, block.down)
    inside, hidden = _kinds_of_products(block, ("up", "down")), _HIDDEN[config.activation] * config.ff_width
    products = one_by_one(*(_of_product(layer, x)._replace(row=0) for layer in layers))
    if inside == {_FLOATS}:
        up, down = (_weight_of(layer, x.dtype) for layer in layers)
        own = feed_forward_workspace(x, up, None, down, None, activation=config.activation)
        # Both are widened, where they have eight bits, before the first one is multiplied.
        return together(own, Workspace(call=sum(each.nbytes for each in (up, down) if each.is_meta)))
    if inside == {_LOOPS}:
        from geneformer_kernels.cpu import int8_products

        shapes = [(layer.out_features, layer.in_features) for layer in layers]
        return int8_products.feed_forward_workspace(shapes, config.activation, x.dtype)
    if _ROWS in inside:
        return together(Workspace(size * hidden + _ROUNDED_BYTES * hidden), products)
    # One of the two by loops: hidden units in float32, and what is rounded of them.
    wide = max(size, 4) * max(hidden, 2 * config.ff_width)
    return together(Workspace(wide + 2 * max(config.width, config.ff_width)), products)


def _weight_of(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight that is multiplied, without its numbers where it has eight bits."""
    linear = next(each for each in layer.modules() if isinstance(each, nn.Linear))
    if not isinstance(linear, EightBits):
        return linear.weight
    return torch.empty(linear.out_features, linear.in_features, dtype=dtype, device="meta")


def _kinds_of_products(block: Block, names: tuple[str, ...]) -> set[str]:
    """How layers of those names are multiplied here; one that an adapter wraps is among its modules."""
    kinds = set()
    for name in names:
        for layer in getattr(block, name).modules():
            if isinstance(layer, nn.Linear):
                # Hidden units that are smoothed are there as a whole.
                is_whole = name == "down" and isinstance(layer, QuantizedLinear) and layer.smooth is not None
                kind = _kind_of(layer)
                kinds.add(_ROWS if kind == _LOOPS and is_whole else kind)
    return kinds


def _kind_of(layer: nn.Linear) -> str:
    if wants_rows(layer):
        return _LOOPS if _is_by_loops(layer) else _ROWS
    return _ROWS if getattr(layer, "scheme", None) == "fp8" else _FLOATS


def _is_by_loops(layer: QuantizedLinear) -> bool:
    """Whether compiled loops multiply a layer's rows."""
    shape = {"width": layer.in_features, "n_columns": layer.out_features, "is_dynamic": True}
    return all(
        choose_for(op, layer.weight_scale, dtype=layer.work_dtype, shape=shape) == Impl.NUMBA
        for op in ("int8_linear", "int8_feed_forward")
    )
