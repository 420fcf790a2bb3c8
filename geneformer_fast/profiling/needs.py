"""What each operation needs at least: its products, and its memory traffic if everything is read and written once.

Traffic is what an operation cannot do without: its inputs and weights are read, its results written, once. What stays
inside (hidden units of the feed-forward, scores, logits of the loss) is not, nor are biases, statistics of LayerNorm
and boundaries of cells, which are less than a hundredth. Weights are read once for every batch, in the dtype of the
products; of the token table as many rows as there are tokens, at most all. The residual stream is float32. Gradients
are read, written and added up in the dtype of the products. Products of integers read rows of int8 and their scales.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from geneformer_fast.profiling.anatomy import Anatomy, Layer
from geneformer_fast.profiling.products import Product, Rows, products

_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
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
    """
    ledger = _Ledger(encoder, rows, n_passes, is_training, dtype, compute_dtype if dtype in _EIGHT_BITS else dtype)
    ledger.embeddings()
    for product in products(encoder):
        ledger.product(product, is_recomputing)
    ledger.norms(is_recomputing)
    return {
        name: Need(ledger.flops[name], ledger.n_bytes[name], ledger.dtypes.get(name))
        for name in ledger.n_bytes
        if ledger.n_bytes[name] or ledger.flops[name]
    }


@dataclass
class _Ledger:
    encoder: Anatomy
    rows: Rows
    n_passes: int
    is_training: bool
    dtype: str
    wide_dtype: str
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    n_bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    dtypes: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of a number that layers give out."""
        return _SIZES[self.wide_dtype]

    @property
    def stream_size(self) -> int:
        return max(4, self.size)

    def add(self, name: str, flops: float, n_bytes: float, dtype: str | None = None) -> None:
        self.flops[name] += flops
        self.n_bytes[name] += n_bytes
        if flops and dtype is not None:
            self.dtypes[name] = dtype

    def embeddings(self) -> None:
        """Tables looked up, added and normalised."""
        config, width = self.encoder.config, self.encoder.config.width
        if config.inputs != "tokens":
            return
        tables = min(self.rows.n_tokens, self.n_passes * config.vocab_size) * width * 4
        out = self.rows.n_tokens * width * (self.stream_size + (self.size if self.size < self.stream_size else 0))
        self.add("embed_tokens", 0.0, tables + out + 8 * self.rows.n_tokens)
        if self.is_training and self.encoder.has_learning_inputs:
            self.add("embed_tokens" + BACKWARD, 0.0, self.rows.n_tokens * width * self.stream_size + tables)

    def product(self, product: Product, is_recomputing: bool) -> None:
        """One product, and its gradients."""
        name, width = self._name(product), self.encoder.config.width
        forward, backward = product.forward(self.rows, width), product.backward(self.rows, width)
        dtype = self.dtype if self._is_narrow(product) else self.wide_dtype
        times = 2 if is_recomputing and product.is_recomputed else 1
        if product.layer is None:
            qkv = 3 * self.rows.n_tokens * width * self.size
            self.add(name, times * forward, times * qkv * 4 / 3, dtype)
            if self.is_training and product.needs_input:
                self.add(name + BACKWARD, backward, qkv * 8 / 3, dtype)
            return
        n_bytes = self._forward_bytes(product, product.layer)
        self.add(name, times * forward, times * n_bytes, dtype)
        if self.is_training and backward:
            # Both gradients of rows and both of weights, each as large as what it is the gradient of.
            self.add(name + BACKWARD, backward, self._backward_bytes(product, product.layer), dtype)

    def norms(self, is_recomputing: bool) -> None:
        """LayerNorms with the residual addition before them."""
        config = self.encoder.config
        name = "residual_layernorm_int8" if self.dtype == "int8" else "residual_layernorm"
        per_row = self._norm_bytes()
        n_in_blocks = 2 * len(self.encoder.blocks)
        is_all = len(self.encoder.blocks) == config.n_layers
        if config.norm == "pre" and is_all and not config.final_norm:
            n_in_blocks -= 1  # nothing reads what the last block leaves
        times = 2 if is_recomputing else 1
        tokens = self.rows.n_tokens * config.width
        self.add(name, 0.0, times * n_in_blocks * tokens * per_row)
        if self.is_training:
            self.add("residual_layernorm" + BACKWARD, 0.0, n_in_blocks * tokens * 2 * per_row)
        # Of one input and one result: the first of pre-norm, that of the masked-gene head.
        n_single = int(config.norm == "pre" and len(self.encoder.blocks) > 0)
        single = n_single * tokens * (self.stream_size + self.size)
        if self.encoder.head_name == "mlm":
            single += self.rows.head * config.width * 2 * self.size
        self.add("residual_layernorm", 0.0, single)
        if self.is_training:
            self.add("residual_layernorm" + BACKWARD, 0.0, single * 3 / 2)

    def _norm_bytes(self) -> float:
        """Per element: what is added and the stream are read; the stream and what products read are written."""
        written = _SIZES[self.dtype] if self.dtype in _EIGHT_BITS else self.size
        is_one = self.encoder.config.norm == "post" and written == self.stream_size  # one tensor is both
        return self.size + 2 * self.stream_size + (0 if is_one else written)

    def _is_narrow(self, product: Product) -> bool:
        """Whether a product is one of eight bits: layers of the blocks are."""
        return self.dtype in _EIGHT_BITS and product.part == "blocks" and product.layer is not None

    def _name(self, product: Product) -> str:
        if product.part == "inputs":
            return "embeddings"
        if product.part == "head":
            return "mlm_cross_entropy" if product.operation == "decoder" and self.is_training else "head"
        if product.operation == "attention":
            return "varlen_attention"
        is_half = product.operation in ("up", "down")
        if self.dtype == "int8":
            return "int8_feed_forward" if is_half else "int8_linear"
        if self.dtype == "fp8":
            return "fp8_linear"
        return "feed_forward" if is_half else "linear"

    def _forward_bytes(self, product: Product, layer: Layer) -> float:
        n_rows = self.rows.head if product.part == "head" else self.rows.n_tokens
        is_narrow = self._is_narrow(product)
        number = _SIZES[self.dtype] if is_narrow else self.size
        # Hidden units stay where they are: only what goes in above and comes out below is traffic.
        read = (
            0.0 if product.operation == "down" and self.dtype != "fp8" else n_rows * (layer.k * number + 4 * is_narrow)
        )
        is_inside = product.operation == "up" and self.dtype != "fp8"
        is_loss = product.operation == "decoder" and self.is_training
        written = n_rows * 4 if is_loss else 0.0 if is_inside else n_rows * layer.n * self.size
        return read + written + self.n_passes * self._weights(layer) * number

    def _backward_bytes(self, product: Product, layer: Layer) -> float:
        n_rows = self.rows.head if product.part == "head" else self.rows.n_tokens
        is_loss = product.operation == "decoder"
        n_bytes = 0.0
        if product.operation != "down":  # of a feed-forward: input, and its gradient
            n_bytes += n_rows * layer.k * self.size * (layer.learns + product.needs_input)
        if product.operation != "up":
            n_bytes += n_rows * (4 if is_loss else layer.n * self.size)
        weights = self.n_passes * self._weights(layer) * self.size
        return n_bytes + weights * (product.needs_input + layer.has_learning_weight)

    @staticmethod
    def _weights(layer: Layer) -> int:
        return layer.k * layer.n + sum(each.rank for each in layer.adapters) * (layer.k + layer.n)
