"""What becomes of each layer of a model that is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from geneformer_fast.config import EncoderConfig
from geneformer_fast.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

#: What a whole model may be quantized to, and so may each of its layers. ``"int8"``: int8 weights with a scale per
#: output channel, multiplied with rows of activations that are rounded to int8 as they come, where this is fastest.
#: ``"int8-weights"``: int8 weights, multiplied in the compute dtype. ``"fp8"``: as int8, in float8_e4m3fn.
SCHEMES = ("int8", "int8-weights", "fp8")
#: ... or a layer stays in floating point.
KINDS = (*SCHEMES, "half")


@dataclass(frozen=True, eq=False)
class Choice:
    """What becomes of one layer.

    Attributes
    ----------
    kind
        One of :data:`KINDS`. Tables are ``"int8-weights"`` or ``"half"``.
    smooth
        [K] float32, positive, or None: what rows are multiplied by, column by column, before they are rounded; the
        weight's columns are divided by it (SmoothQuant, Xiao et al., arXiv:2211.10438). Where :func:`folds_into` names
        a layer, that one's weights take the factor, and nothing is multiplied at run time.
    sqnr_db
        Signal-to-noise ratio of the layer's product as chosen, where it was measured.
    reason
        Why, for the report.
    """

    kind: str
    smooth: torch.Tensor | None = None
    sqnr_db: float | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnsupportedError(f"a layer is quantized to one of {', '.join(KINDS)}, not {self.kind!r}")

    @property
    def is_quantized(self) -> bool:
        """Whether weights of eight bits take the place of the layer's."""
        return self.kind != "half"


def folds_into(name: str, config: EncoderConfig) -> tuple[str, slice] | None:
    """Which layer, and which rows of its weight and bias, take the factor of a smoothed layer; None: none can.

    The projection after attention reads a mean of values, so that rows of values may be multiplied beforehand; what
    the second layer of a feed-forward reads is proportional to rows of the first where the activation is ReLU or
    SwiGLU. What a LayerNorm makes is also the residual, and what comes out of GELU is proportional to nothing: these
    factors stay with the layer that reads.

    Parameters
    ----------
    name
        Of the layer that is smoothed, such as ``"blocks.0.out"``.
    config
        Of the encoder.
    """
    block, _, layer = name.rpartition(".")
    if layer == "out":
        return f"{block}.qkv", slice(2 * config.width, 3 * config.width)
    if layer == "down" and config.activation == "relu":
        return f"{block}.up", slice(0, config.ff_width)
    if layer == "down" and config.activation == "swiglu":  # gate rows come first
        return f"{block}.up", slice(config.ff_width, 2 * config.ff_width)
    return None
