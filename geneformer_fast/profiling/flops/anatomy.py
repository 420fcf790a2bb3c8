"""An encoder taken apart into its matrix products, with what of it learns: which products a training step consists of.

A gradient is computed where something asks for it: that of a layer's input where anything before the layer learns, that
of its weight where the weight does. Frozen layers and adapters make these differ from layer to layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from geneformer_fast.config import EncoderConfig
from geneformer_fast.decoders import N_LAYERS, ExpressionDecoder, LayeredClassifier
from geneformer_fast.embeddings import GenesAndValues, SoftBins
from geneformer_fast.encoder import Encoder
from geneformer_fast.heads import CellClassifier, GeneClassifier, MLMHead, Pooler
from geneformer_fast.profiling.figures import Missing


@dataclass(frozen=True)
class Adapter:
    """A pair of matrices of low rank beside a layer (LoRA, arXiv:2106.09685)."""

    rank: int
    learns: bool = True


@dataclass(frozen=True)
class Layer:
    """One linear layer, ``k`` numbers of each row to ``n``.

    Attributes
    ----------
    k, n
        Columns of its input and output.
    has_learning_weight, has_learning_bias
        Which gradients of its own are computed.
    adapters
        Beside it.
    """

    k: int
    n: int
    has_learning_weight: bool = True
    has_learning_bias: bool = True
    adapters: tuple[Adapter, ...] = ()

    @property
    def learns(self) -> bool:
        """Whether what it gives out depends on anything that learns here."""
        return self.has_learning_weight or self.has_learning_bias or any(each.learns for each in self.adapters)

    def forward(self, n_rows: float) -> float:
        """Operations for so many rows."""
        return 2.0 * n_rows * (self.k * self.n + sum(each.rank for each in self.adapters) * (self.k + self.n))

    def backward(self, n_rows: float, needs_input: bool) -> float:
        """Operations of its gradients; ``needs_input``: that of its input is among them."""
        products = self.k * self.n * (needs_input + self.has_learning_weight)
        for each in self.adapters:
            if each.learns or needs_input:
                products += each.rank * self.n  # what comes to the first matrix
            products += each.rank * self.k * needs_input + each.rank * (self.k + self.n) * each.learns
        return 2.0 * n_rows * products


@dataclass(frozen=True)
class BlockParts:
    """One block: its layers, and whether its LayerNorms learn. Projections may be one layer or three.

    ``can_be_recomputed``: it is among the blocks that a training step with recomputation computes again.
    """

    qkv: tuple[Layer, ...]
    attention_norm: bool
    out: Layer
    up: Layer
    down: Layer
    ff_norm: bool
    can_be_recomputed: bool = True


@dataclass(frozen=True)
class HeadParts:
    """A head: the layers that its rows pass one after another, and whether a LayerNorm among them learns."""

    layers: tuple[Layer, ...]
    norm: bool = False


@dataclass(frozen=True)
class Anatomy:
    """An encoder, or another model of that shape.

    Attributes
    ----------
    config
        Its geometry.
    inputs
        Layers of the input layer, one after another: none where it looks up tables.
    has_learning_inputs
        Whether anything of the input layer learns, tables and LayerNorm included.
    blocks
        Those that are computed.
    has_learning_norm
        Whether the final LayerNorm learns.
    head_name, head
        ``"mlm"``, ``"cells"``, ``"genes"``, ``"pooler"``, or None.
    """

    config: EncoderConfig
    inputs: tuple[Layer, ...]
    has_learning_inputs: bool
    blocks: tuple[BlockParts, ...]
    has_learning_norm: bool
    head_name: str | None
    head: HeadParts | None


def anatomy(
    config: EncoderConfig, *, n_layers: int | None = None, head: str | None = None, n_classes: int = 2
) -> Anatomy:
    """The anatomy of a configuration in which everything learns.

    Parameters
    ----------
    config
        The geometry.
    n_layers
        Blocks that are computed; None for all.
    head
        As for :class:`Encoder`.
    n_classes
        Of a head of classes.
    """
    width, ff_width = config.width, config.ff_width
    up = Layer(width, ff_width * (2 if config.activation == "swiglu" else 1))
    block = BlockParts((Layer(width, 3 * width),), True, Layer(width, width), up, Layer(ff_width, width), True)
    n_layers = config.n_layers if n_layers is None else n_layers
    layers = _head_sizes(config, head, n_classes)
    return Anatomy(
        config,
        tuple(Layer(*sizes) for sizes in _input_sizes(config)),
        True,
        (block,) * n_layers,
        config.final_norm,
        head,
        None if head is None else HeadParts(tuple(Layer(*sizes) for sizes in layers), head == "mlm"),
    )


def _input_sizes(config: EncoderConfig) -> list[tuple[int, int]]:
    """(k, n) of the layers that embed a value: by soft bins, or by two layers (scGPT)."""
    if config.inputs == "pairs":
        return [(1, config.width), (config.width, config.width)]
    if config.inputs != "values":
        return []
    return [(1, config.n_bins), (config.n_bins, config.n_bins), (config.n_bins, config.width)]


def _head_sizes(config: EncoderConfig, head: str | None, n_classes: int) -> list[tuple[int, int]]:
    """(k, n) of a head's layers."""
    width, n_outputs = config.width, config.vocab_size if config.inputs == "tokens" else 1
    if config.inputs.startswith("pairs") and head is not None and head not in ("genes", "pooler"):
        outputs = n_classes if head == "cells" else 1
        return [(width, width)] * (N_LAYERS - 1) + [(width, outputs)]
    return {
        None: [],
        "mlm": [(width, width), (width, n_outputs)],
        "pooler": [(width, width)],
        "cells": [(width, width), (width, n_classes)],
        "genes": [(width, n_classes)],
    }[head]


def anatomy_of(encoder: Encoder, *, n_layers: int | None = None) -> Anatomy | Missing:
    """The anatomy of an encoder as it stands: what is frozen, and what adapters it has.

    Parameters
    ----------
    encoder
        Maybe quantized.
    n_layers
        Blocks that are computed; None for all.

    Returns
    -------
    Anatomy or Missing
        Missing where a layer has been exchanged for something whose work is not known.
    """
    blocks = []
    for index, block in enumerate(list(encoder.blocks)[:n_layers]):
        layers = {}
        for part in ("qkv", "out", "up", "down"):
            layer = layer_of(getattr(block, part))
            if isinstance(layer, Missing):
                return Missing(f"{part} of block {index} is {layer.not_available}")
            layers[part] = layer
        norms = learns(block.attention_norm), learns(block.ff_norm)  # type: ignore[arg-type]
        blocks.append(BlockParts((layers["qkv"],), norms[0], layers["out"], layers["up"], layers["down"], norms[1]))
    inputs, head = _inputs_of(encoder), _head_of(encoder)
    if isinstance(inputs, Missing):
        return inputs
    if isinstance(head, Missing):
        return head
    has_learning_inputs = learns(encoder.embeddings) or learns(encoder.embedding_norm)
    return Anatomy(
        encoder.config, inputs, has_learning_inputs, tuple(blocks), learns(encoder.final_norm), head[0], head[1]
    )


def learns(module: nn.Module | None) -> bool:
    """Whether any parameter of a module does."""
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def layer_of(module: nn.Module) -> Layer | Missing:
    """A linear layer of torch, of ours, or of PEFT around one."""
    if isinstance(module, nn.Linear):
        # Not by attribute: a quantized layer would widen its weight to show it.
        weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
        return Layer(
            module.in_features,
            module.out_features,
            weight is not None and weight.requires_grad,
            bias is not None and bias.requires_grad,
        )
    return _adapted(module)


def _adapted(module: nn.Module) -> Layer | Missing:
    """A layer of PEFT with adapters of low rank, as far as it is plain: other kinds compute more."""
    kind = f"a {type(module).__qualname__}, whose work is not known"
    base = getattr(module, "base_layer", None)
    if not type(module).__module__.startswith("peft.tuners.lora") or not isinstance(base, nn.Linear):
        return Missing(kind)
    layer, adapters = layer_of(base), []
    assert isinstance(layer, Layer)
    if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
        return layer
    for name in getattr(module, "active_adapters", ()):
        first, second = (getattr(module, part, {}) for part in ("lora_A", "lora_B"))
        if name not in first:
            continue
        if name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name):
            return Missing(kind)
        adapters.append(Adapter(first[name].out_features, learns(first[name]) or learns(second[name])))
    return Layer(layer.k, layer.n, layer.has_learning_weight, layer.has_learning_bias, tuple(adapters))


def chain(*modules: nn.Module) -> tuple[Layer, ...] | Missing:
    """Linear layers that rows pass one after another."""
    found: list[Layer] = []
    for module in modules:
        layer = layer_of(module)
        if isinstance(layer, Missing):
            return layer
        found.append(layer)
    return tuple(found)


def _inputs_of(encoder: Encoder) -> tuple[Layer, ...] | Missing:
    inputs = encoder.embeddings
    if isinstance(inputs, GenesAndValues):
        return chain(*filter(None, (inputs.value1, inputs.value2)))
    if not isinstance(inputs, SoftBins):
        return ()
    layers = chain(inputs.linear1, inputs.linear2)
    if isinstance(layers, Missing):
        return layers
    table = inputs.lookup_table
    return (*layers, Layer(table.num_embeddings, table.embedding_dim, learns(table), False))


def _head_of(encoder: Encoder) -> tuple[str | None, HeadParts | None] | Missing:
    head = encoder.head
    if head is None:
        return None, None
    if isinstance(head, MLMHead):
        return _mlm_head(encoder, head)
    modules: Sequence[nn.Module]
    if isinstance(head, LayeredClassifier):
        name, modules = "cells", head.linears()
    elif isinstance(head, ExpressionDecoder):
        name, modules = "expression", head.linears()
    elif isinstance(head, CellClassifier) and hasattr(head, "pooler"):
        name, modules = "cells", (head.pooler.dense, head.classifier)
    elif isinstance(head, GeneClassifier):
        name, modules = "genes", (head.classifier,)
    elif isinstance(head, Pooler):
        name, modules = "pooler", (head.dense,)
    else:
        return Missing(f"its head is a {type(head).__qualname__}, whose work is not known")
    layers = chain(*modules)
    return layers if isinstance(layers, Missing) else (name, HeadParts(layers))


def _mlm_head(encoder: Encoder, head: MLMHead) -> tuple[str, HeadParts] | Missing:
    layers = chain(head.dense) if head.decoder is None else chain(head.dense, head.decoder)
    if isinstance(layers, Missing):
        return layers
    if head.decoder is None:
        # Its weight is the token table, which is a parameter or of eight bits.
        table = getattr(encoder.embeddings, "token", None)
        weight = None if table is None else table._parameters.get("weight")
        does_learn = weight is not None and weight.requires_grad
        layers = (*layers, Layer(encoder.config.width, head.n_outputs, does_learn, head.bias.requires_grad))
    return "mlm", HeadParts(layers, learns(head.norm))
