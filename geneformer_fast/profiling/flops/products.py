"""The products of a pass through an encoder, first to last, and which of their gradients training needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from geneformer_fast.profiling.flops.anatomy import Anatomy, Layer


@dataclass(frozen=True)
class Rows:
    """How much goes through an encoder.

    Attributes
    ----------
    n_tokens
        Rows of the blocks.
    squares
        Sum of the cells' squared lengths.
    head
        Rows of the head.
    """

    n_tokens: float = 0.0
    squares: float = 0.0
    head: float = 0.0

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.n_tokens + other.n_tokens, self.squares + other.squares, self.head + other.head)


@dataclass(frozen=True)
class Product:
    """A product of a pass through an encoder.

    Attributes
    ----------
    part
        ``"inputs"``, ``"blocks"`` or ``"head"``.
    operation
        ``"qkv"``, ``"attention"``, ``"out"``, ``"up"``, ``"down"``; ``"decoder"`` for the head's last layer of
        ``"mlm"``; ``"layer"`` for others.
    layer
        None for attention.
    needs_input
        In training, whether the gradient of what it multiplies is needed; of attention, of queries, keys or values.
    is_recomputed
        Whether recomputation repeats it: blocks do where a gradient passes through them.
    n_gradients
        Of attention: products its backward pass needs, each half as much as the forward pass. Four, less where
        queries, keys or values are projected by layers of their own of which some are frozen; a fused kernel may
        compute all the same.
    """

    part: str
    operation: str
    layer: Layer | None
    needs_input: bool
    is_recomputed: bool = False
    n_gradients: int = 4

    def forward(self, rows: Rows, width: int) -> float:
        """Operations of the forward pass."""
        if self.layer is None:
            return 4.0 * width * rows.squares
        return self.layer.forward(rows.head if self.part == "head" else rows.n_tokens)

    def backward(self, rows: Rows, width: int) -> float:
        """Operations of the backward pass."""
        if self.layer is None:
            return self.forward(rows, width) / 2 * self.n_gradients * self.needs_input
        return self.layer.backward(rows.head if self.part == "head" else rows.n_tokens, self.needs_input)


def products(encoder: Anatomy) -> Iterator[Product]:
    """Every product of a pass, first to last, with the gradients that training needs of it."""
    is_before = False  # whether anything before learns
    for layer in encoder.inputs:
        yield Product("inputs", "layer", layer, is_before)
        is_before |= layer.learns
    stream = encoder.has_learning_inputs
    for block in encoder.blocks:
        first, second = block.attention_norm, block.ff_norm
        is_post = encoder.config.norm == "post"
        read = stream or (first and not is_post)
        attended = read or any(layer.learns for layer in block.qkv)
        added = stream or attended or block.out.learns or (first and is_post)
        normed = added or (second and not is_post)
        inside = normed or block.up.learns
        stream = inside or block.down.learns or (second and is_post)
        is_again = stream and block.can_be_recomputed
        for layer in block.qkv:
            yield Product("blocks", "qkv", layer, read, is_again)
        yield Product("blocks", "attention", None, attended, is_again, _gradients_of_attention(block.qkv, read))
        for name, layer, needs_input in (("out", block.out, attended), ("up", block.up, normed)):
            yield Product("blocks", name, layer, needs_input, is_again)
        yield Product("blocks", "down", block.down, inside, is_again)
    is_before = stream or encoder.has_learning_norm
    layers = () if encoder.head is None else encoder.head.layers
    for index, layer in enumerate(layers):
        is_decoder = encoder.head_name == "mlm" and index + 1 == len(layers)
        yield Product("head", "decoder" if is_decoder else "layer", layer, is_before)
        is_before |= layer.learns or (encoder.head is not None and encoder.head.norm)


def _gradients_of_attention(projections: tuple[Layer, ...], is_read: bool) -> int:
    """Products of the backward pass: the scores', where queries or keys want a gradient, and one for each of these."""
    wanted = [is_read or layer.learns for layer in projections]
    query, key, value = wanted if len(wanted) == 3 else wanted * 3
    return (query or key) + query + key + value


def operations_of(
    steps: Iterable[Product], rows: Rows, width: int, *, is_training: bool = False, is_recomputing: bool = False
) -> float:
    """Operations of products for so many rows; in training with their gradients, and with what is recomputed."""
    total = 0.0
    for step in steps:
        forward = step.forward(rows, width)
        total += forward
        if is_training:
            total += step.backward(rows, width)
        if is_recomputing and step.is_recomputed:
            total += forward
    return total
