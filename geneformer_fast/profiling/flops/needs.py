"""What each operation needs at least: its products, and its memory traffic if everything is read and written once.

Traffic is what an operation cannot do without: its inputs and weights are read, its results written, once. What stays
inside (hidden units of the feed-forward, scores, logits of the loss) is not, nor are biases, statistics of LayerNorm
and boundaries of cells, which are less than a hundredth. Weights are read once for every batch, in the dtype of the
products; of the token table as many rows as there are tokens, at most all. The residual stream is float32. Gradients
are read, written and added up in the dtype of the products. Products of integers read rows of int8 and their scales.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from geneformer_fast.profiling.flops.anatomy import Anatomy, Layer
from geneformer_fast.profiling.flops.products import Product, Rows, products

#: Bytes of a number, by dtype.
SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
_EIGHT_BITS = ("int8", "fp8")
BACKWARD = " backward"


@dataclass(frozen=True)
class Need:
    """Of one operation, over all batches.

    Attributes
    ----------
    flops
        Of its products; 0 where it has none.
    n_bytes
        Least traffic.
    dtype
        Of its products: what ceiling they are held against. None where it has none.
    """

    flops: float
    n_bytes: float
    dtype: str | None = None


def needs(
    encoder: Anatomy,
    rows: Rows,
    n_passes: int,
    *,
    is_training: bool = False,
    is_recomputing: bool = False,
    dtype: str = "float32",
    compute_dtype: str = "float32",
    joined: str | None = None,
) -> dict[str, Need]:
    """The needs of every operation, by name.

    Parameters
    ----------
    encoder
        What runs.
    rows
        What was computed, over all passes.
    n_passes
        Forward passes: how often weights are read.
    is_training, is_recomputing
        Whether passes had a backward pass, and whether blocks were computed again in it.
    dtype, compute_dtype
        Of products; and of everything else where products are of eight bits.
    joined
        Which operation did the work of several (:func:`joined_in`): ``"after_attention"``, all of a block that comes
        after attention, or ``"feed_forward"`` with the LayerNorm behind it.
    """
    wide_dtype = compute_dtype if dtype in _EIGHT_BITS else dtype
    ledger = _Ledger(encoder, rows, n_passes, is_training, is_recomputing, dtype, wide_dtype, joined)
    ledger.embeddings()
    for product in products(encoder):
        ledger.product(product)
    ledger.norms()
    return {
        name: Need(ledger.flops[name], ledger.n_bytes[name], ledger.dtypes.get(name))
        for name in ledger.n_bytes
        if ledger.n_bytes[name] or ledger.flops[name]
    }


def joined_in(calls: Mapping[str, int]) -> str | None:
    """Which operation did the work of several, by how often each was called: what :func:`needs` takes as ``joined``.

    A CPU computes all that follows attention in int8 in one loop; a card may have the LayerNorm within the kernel of
    the feed-forward, and then one LayerNorm per block is left of two.
    """
    if calls.get("after_attention"):
        return "after_attention"
    halves, norms = calls.get("feed_forward", 0), calls.get("residual_layernorm", 0)
    return "feed_forward" if halves > 1 and norms < 1.75 * halves else None


@dataclass
class _Ledger:
    """Adds up what operations need; ``wide_dtype`` is that of everything but products of eight bits."""

    encoder: Anatomy
    rows: Rows
    n_passes: int
    is_training: bool
    is_recomputing: bool
    dtype: str
    wide_dtype: str
    joined: str | None = None
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    n_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of a number that layers give out."""
        return SIZES[self.wide_dtype]

    @property
    def stream_size(self) -> int:
        """Bytes of a number of the residual stream."""
        return max(4, self.size)

    def add(self, name: str, flops: float, n_bytes: float, dtype: str | None = None) -> None:
        """Some work of an operation."""
        self.flops[name] += flops
        self.n_bytes[name] += n_bytes
        if flops and dtype is not None:
            self.dtypes[name] = dtype

    def embeddings(self) -> None:
        """Tables looked up, added and normalised."""
        config, width = self.encoder.config, self.encoder.config.width
        if config.inputs == "values":
            return
        name = "embed_tokens" if config.inputs == "tokens" else "embeddings"
        tables = min(self.rows.n_tokens, self.n_passes * config.vocab_size) * width * 4
        out = self.rows.n_tokens * width * (self.stream_size + (self.size if self.size < self.stream_size else 0))
        self.add(name, 0.0, tables + out + 4 * self.rows.n_tokens)
        if self.is_training and self.encoder.has_learning_inputs:
            self.add(name + BACKWARD, 0.0, self.rows.n_tokens * width * self.stream_size + tables)

    def product(self, product: Product) -> None:
        """One product, and its gradients."""
        name, width = self._name(product), self.encoder.config.width
        forward, backward = product.forward(self.rows, width), product.backward(self.rows, width)
        dtype = self.dtype if self._is_narrow(product) else self.wide_dtype
        times = 2 if self.is_recomputing and product.is_recomputed else 1
        if product.layer is None:
            qkv = 3 * self.rows.n_tokens * width * self.size
            self.add(name, times * forward, times * qkv * 4 / 3, dtype)
            if self.is_training and product.needs_input:
                self.add(name + BACKWARD, backward, qkv * 8 / 3, dtype)
            return
        self.add(name, times * forward, times * self._forward_bytes(product, product.layer), dtype)
        if self.is_training and backward:
            # Both gradients of rows and both of weights, each as large as what it is the gradient of.
            self.add(name + BACKWARD, backward, self._backward_bytes(product, product.layer), dtype)

    def norms(self) -> None:
        """LayerNorms with the residual addition before them, and those of one input and one result."""
        config, blocks = self.encoder.config, self.encoder.blocks
        is_whole = len(blocks) == config.n_layers
        for index in range(len(blocks)):
            is_end = is_whole and index + 1 == len(blocks)
            self._norm(is_second=False, is_read_in_eight_bits=True)
            if not (config.norm == "pre" and is_end and not config.final_norm):  # nothing reads what it leaves
                self._norm(is_second=True, is_read_in_eight_bits=not is_end)
        single = float(self.rows.head * 2 * self.size if self.encoder.head_name == "mlm" else 0)
        if config.norm == "pre" and blocks:
            single += self.rows.n_tokens * (self.stream_size + self.size)
        self.add("residual_layernorm", 0.0, single * config.width)
        if self.is_training:
            self.add("residual_layernorm" + BACKWARD, 0.0, single * config.width * 3 / 2)

    def _norm(self, *, is_second: bool, is_read_in_eight_bits: bool) -> None:
        """What is added and the stream are read; the stream and what products read are written."""
        has_rows = self.dtype == "int8" and is_read_in_eight_bits
        written = 1 if has_rows else self.size
        is_one = self.encoder.config.norm == "post" and written == self.stream_size  # one tensor is both
        per_number = self.size + 2 * self.stream_size + (0 if is_one else written)
        name = "residual_layernorm_int8" if has_rows else "residual_layernorm"
        if self.joined == "feed_forward" and is_second:
            name, per_number = "feed_forward", per_number - 2 * self.size  # what is added stays inside
        elif self.joined == "after_attention" and not is_second:
            name, per_number = "after_attention", self.stream_size  # which comes in once
        elif self.joined == "after_attention":
            leaving = self.stream_size + (written if has_rows else self.size)
            self.add("after_attention", 0.0, self._numbers() * leaving)
            per_number *= not has_rows  # what reads floats has a LayerNorm of its own
        self.add(name, 0.0, (2 if self.is_recomputing else 1) * self._numbers() * per_number)
        if self.is_training:
            self.add(name.removesuffix("_int8") + BACKWARD, 0.0, self._numbers() * 2 * per_number)

    def _numbers(self) -> float:
        return self.rows.n_tokens * self.encoder.config.width

    def _is_narrow(self, product: Product) -> bool:
        """Whether a product is one of eight bits: layers of the blocks are."""
        return self.dtype in _EIGHT_BITS and product.part == "blocks" and product.layer is not None

    def _is_inside(self, product: Product) -> bool:
        """Whether a layer is one of several of a loop that has rows near from context to stream."""
        return self.joined == "after_attention" and product.operation in ("out", "up", "down")

    def _name(self, product: Product) -> str:
        if product.part == "inputs":
            return "embeddings"
        if product.part == "head":
            return "mlm_cross_entropy" if product.operation == "decoder" and self.is_training else "head"
        if product.operation == "attention":
            return "varlen_attention"
        if self._is_inside(product):
            return "after_attention"
        is_half = product.operation in ("up", "down")
        if self.dtype == "int8":
            return "int8_feed_forward" if is_half else "int8_linear"
        if self.dtype == "fp8":
            return "fp8_linear"
        return "feed_forward" if is_half else "linear"

    def _forward_bytes(self, product: Product, layer: Layer) -> float:
        n_rows = self.rows.head if product.part == "head" else self.rows.n_tokens
        is_narrow = self._is_narrow(product)
        number = SIZES[self.dtype] if is_narrow else self.size
        read = n_rows * (layer.k * number + 4 * is_narrow)
        written = n_rows * layer.n * self.size
        if product.operation == "decoder" and self.is_training:
            written = n_rows * 4  # losses: logits stay inside
        if self._is_inside(product):
            read, written = (n_rows * layer.k * self.size if product.operation == "out" else 0.0), 0.0
        elif self.dtype != "fp8":  # hidden units stay inside
            read = 0.0 if product.operation == "down" else read
            written = 0.0 if product.operation == "up" else written
        return read + written + self.n_passes * _weights(layer) * number

    def _backward_bytes(self, product: Product, layer: Layer) -> float:
        n_rows = self.rows.head if product.part == "head" else self.rows.n_tokens
        is_loss = product.operation == "decoder"
        n_bytes = 0.0
        if product.operation != "down":  # of a feed-forward: input, and its gradient
            n_bytes += n_rows * layer.k * self.size * (layer.learns + product.needs_input)
        if product.operation != "up":
            n_bytes += n_rows * (4 if is_loss else layer.n * self.size)
        weights = self.n_passes * _weights(layer) * self.size
        return n_bytes + weights * (product.needs_input + layer.has_learning_weight)


def _weights(layer: Layer) -> int:
    return layer.k * layer.n + sum(each.rank for each in layer.adapters) * (layer.k + layer.n)
