"""What transformers' BERT, stock or accelerated, and our own encoder compute: their anatomy and how they pad."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.profiling.figures import Missing
from geneformer_fast.profiling.flops.anatomy import (
    Anatomy,
    BlockParts,
    HeadParts,
    Layer,
    anatomy_of,
    chain,
    layer_of,
    learns,
)
from geneformer_fast.profiling.flops.work import Batch, encoder_in

_MODELS = {"BertForMaskedLM": "mlm", "BertForSequenceClassification": "cells", "BertForTokenClassification": "genes"}
_ATTENTIONS = ("BertSelfAttention", "BertSdpaSelfAttention", "BertFlashAttention2")


@dataclass(frozen=True)
class Shape:
    """How a model computes a batch.

    Attributes
    ----------
    anatomy
        Its products, and what of them learns.
    is_packed
        Whether padding is left out of the blocks.
    is_attention_packed
        Whether it is left out of attention, as FlashAttention does.
    is_recomputing
        Whether a training step computes blocks again.
    """

    anatomy: Anatomy
    is_packed: bool
    is_attention_packed: bool
    is_recomputing: bool

    def batch(
        self,
        lengths: np.ndarray,
        *,
        padded_to: int | None = None,
        head_rows: int | None = None,
        asked_rows: int | None = None,
    ) -> Batch:
        """What one forward pass computes.

        Parameters
        ----------
        lengths
            Real tokens of each cell.
        padded_to
            Length of the batch that the model is given; None where nothing is padded.
        head_rows
            Rows of the head. None: one per cell for heads of cells; all positions of the batch where the model is
            stock, or its head is (``"genes"``); none for masked genes in packed models, which compute rows when asked.
        asked_rows
            Those that somebody wanted.
        """
        n_cells = len(lengths)
        n_positions = int(np.sum(lengths)) if padded_to is None else n_cells * padded_to
        if head_rows is None:
            name = self.anatomy.head_name
            is_late = name == "mlm" and self.is_packed
            head_rows = n_cells if name in ("cells", "pooler") else 0 if name is None or is_late else n_positions
        if self.is_packed:
            return Batch(lengths, head_rows=head_rows, asked_rows=asked_rows)
        if self.is_attention_packed:
            return Batch(lengths, positions=n_positions, head_rows=head_rows, asked_rows=asked_rows)
        return Batch(lengths, padded_to=padded_to, head_rows=head_rows, asked_rows=asked_rows)


def shape_of(model: nn.Module) -> Shape | Missing:
    """The shape of a model whose work follows from its cells' lengths.

    Parameters
    ----------
    model
        An :class:`Encoder`, or transformers' ``BertModel``, ``BertForMaskedLM``, ``BertForSequenceClassification`` or
        ``BertForTokenClassification``, stock, accelerated, or with adapters of low rank; or what holds one of them and
        no other matrices.

    Returns
    -------
    Shape or Missing
        Missing, with the reason, for everything else.
    """
    if any(isinstance(module, Encoder) for module in model.modules()):
        encoder = encoder_in(model)
        found = encoder if isinstance(encoder, Missing) else anatomy_of(encoder)
        if isinstance(encoder, Missing) or isinstance(found, Missing):
            return found  # type: ignore[return-value]
        return Shape(found, True, True, encoder.is_recomputing)
    berts = [module for module in model.modules() if _stock_name(module) == "BertModel"]
    if len(berts) != 1:
        return Missing(
            f"{type(model).__qualname__} is no BERT of transformers' and holds no encoder of geneformer_fast"
        )
    return _shape_of_bert(model, berts[0])


def _stock_name(module: nn.Module) -> str | None:
    """The name of transformers' own class of BERT, also where sharding has made a subclass of it."""
    kind = type(module)
    first, *others = kind.__bases__
    if others and first.__name__ == "FSDPModule":
        kind = others[0]
    return kind.__name__ if kind.__module__ == "transformers.models.bert.modeling_bert" else None


def _shape_of_bert(model: nn.Module, bert: Any) -> Shape | Missing:
    whole = next((each for each in model.modules() if _stock_name(each) in _MODELS), bert)
    own = {id(parameter) for parameter in whole.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in own:
            return Missing(f"{type(model).__qualname__} holds {name} beside BERT, whose work is not known")
    strange = _strange(bert)
    if strange is not None:
        return Missing(strange)
    found = _anatomy_of_bert(whole, bert)
    if isinstance(found, Missing):
        return found
    forward = vars(bert).get("forward")
    is_packed = getattr(forward, "is_packed", False) and forward.is_active
    # With padding="stock" an accelerated model computes at padding what the stock one does.
    is_packed = is_packed and forward.options.get("padding") != "stock"
    attention = getattr(bert.config, "_attn_implementation", "eager")
    if not is_packed and attention not in ("eager", "sdpa", "flash_attention_2", None):
        return Missing(f"what its attention {attention!r} computes is not known")
    is_recomputing = any(block.can_be_recomputed for block in found.blocks)
    return Shape(found, is_packed, is_packed or attention == "flash_attention_2", is_recomputing)


def _strange(bert: Any) -> str | None:
    """What of a model's settings and parts makes it compute something else than BERT."""
    config = bert.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder, which computes more than an encoder"
    if (getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
        return f"its positions are {config.position_embedding_type}, whose work is not known"
    parts = {"embeddings": (bert.embeddings, "BertEmbeddings"), "encoder": (bert.encoder, "BertEncoder")}
    for index, layer in enumerate(bert.encoder.layer):
        name = f"encoder.layer.{index}"
        parts[name] = (layer, "BertLayer")
        if _stock_name(layer) != "BertLayer":
            break
        parts[f"{name}.attention"] = (layer.attention, "BertAttention")
        parts[f"{name}.attention.output"] = (layer.attention.output, "BertSelfOutput")
        parts[f"{name}.intermediate"] = (layer.intermediate, "BertIntermediate")
        parts[f"{name}.output"] = (layer.output, "BertOutput")
        parts[f"{name}.attention.self"] = (layer.attention.self, *_ATTENTIONS)  # type: ignore[assignment]
    for name, (part, *kinds) in parts.items():
        if _stock_name(part) not in kinds:
            return f"{name} is a {type(part).__qualname__}, not transformers' own"
    return None


def _anatomy_of_bert(whole: Any, bert: Any) -> Anatomy | Missing:
    config, blocks = bert.config, []
    for index, layer in enumerate(bert.encoder.layer):
        attention = layer.attention.self
        modules = (
            *(attention.query, attention.key, attention.value),
            *(layer.attention.output.dense, layer.intermediate.dense, layer.output.dense),
        )
        found = [layer_of(module) for module in modules]
        missing = next((each for each in found if isinstance(each, Missing)), None)
        if missing is not None:
            return Missing(f"a layer of block {index} is {missing.not_available}")
        query, key, value, out, up, down = (each for each in found if isinstance(each, Layer))
        norms = learns(layer.attention.output.LayerNorm), learns(layer.output.LayerNorm)
        is_again = bool(getattr(layer, "gradient_checkpointing", _old_checkpointing(bert)))
        blocks.append(BlockParts(_fused(query, key, value), norms[0], out, up, down, norms[1], is_again))
        if query.n != config.hidden_size:
            return Missing(f"block {index} has {query.n} columns of heads in a width of {config.hidden_size}")
    head = _head_of_bert(whole, bert)
    if isinstance(head, Missing):
        return head
    try:
        geometry = EncoderConfig(
            n_layers=len(blocks),
            width=config.hidden_size,
            n_heads=config.num_attention_heads,
            ff_width=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_len=config.max_position_embeddings,
            eps=config.layer_norm_eps,
            tied_decoder=bool(getattr(config, "tie_word_embeddings", True)),
        )
    except UnsupportedError as error:
        return Missing(f"{type(whole).__qualname__} has a geometry that is not known: {error}")
    return Anatomy(geometry, (), _has_learning_inputs(whole, bert), tuple(blocks), False, *head)


def _old_checkpointing(bert: Any) -> bool:
    """Whether all layers are recomputed, in releases whose layers do not say so one by one."""
    return getattr(bert.encoder, "gradient_checkpointing", False)


def _has_learning_inputs(whole: Any, bert: Any) -> bool:
    """Whether embeddings learn, or give out a gradient because transformers asks for one, as it does to recompute."""
    is_asked = any(vars(module).get("_require_grads_hooks") for module in (whole, bert))
    return learns(bert.embeddings) or is_asked


def _fused(*projections: Layer) -> tuple[Layer, ...]:
    """Three projections as one where they are alike: packed models multiply them together."""
    first = projections[0]
    if any(each != first for each in projections) or first.adapters:
        return projections
    return (Layer(first.k, sum(each.n for each in projections), first.has_learning_weight, first.has_learning_bias),)


def _head_of_bert(whole: Any, bert: Any) -> tuple[str | None, HeadParts | None] | Missing:
    name = _MODELS.get(_stock_name(whole) or "")
    norm, modules = False, ()  # type: bool, tuple[Any, ...]
    if name == "mlm":
        predictions = _saved(whole.cls).predictions
        modules, norm = (predictions.transform.dense, predictions.decoder), learns(predictions.transform.LayerNorm)
    elif name == "cells":
        modules = (bert.pooler.dense, _saved(whole.classifier))
    elif name == "genes":
        modules = (_saved(whole.classifier),)
    elif bert.pooler is not None:
        if whole.training and learns(bert.pooler):
            return Missing("whether the loss reads the pooler of a bare BertModel is not known")
        name, modules = "pooler", (bert.pooler.dense,)
    else:
        return None, None
    layers = chain(*modules)
    return layers if isinstance(layers, Missing) else (name, HeadParts(layers, norm))


def _saved(module: Any) -> Any:
    """What PEFT trains in place of a module, where it has put a copy of it beside it."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return module
    active = getattr(module, "active_adapters", None) or [module.active_adapter]
    copies = module.modules_to_save
    return next((copies[name] for name in active if name in copies), module.original_module)
