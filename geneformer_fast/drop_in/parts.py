"""What a model is made of now: the first part that cannot be handed packed cells, if there is one.

Packed cells [T, C] may be handed to what works token by token: transformers' own containers, linear layers of any kind,
norms, dropouts, activations, and PEFT's layers around them. Nobody knows that of a module somebody has written, of
torch's dynamically quantized layers (they scale by the largest value of the batch, padding included), or of hooks.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.bert import modeling_bert

from geneformer_fast.drop_in.plain import has_foreign_hooks, origin

_LINEAR, _NORM, _DROPOUT, _ACTIVATION = "a linear layer", "a norm", "a dropout", "an activation"
_LEAVES: dict[str, tuple[type[nn.Module], ...]] = {
    _LINEAR: (nn.Linear, nn.Identity),
    _NORM: (nn.LayerNorm, nn.Identity),
    _DROPOUT: (nn.Dropout, nn.Identity),
    _ACTIVATION: (),
}
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation", "torch.nn.modules.linear")
_ATTENTIONS = ("transformers.", "torch.", "geneformer_fast.")
_ADD_NORM = {"dense": _LINEAR, "dropout": _DROPOUT, "LayerNorm": _NORM}
_ATTENTION = {"query": _LINEAR, "key": _LINEAR, "value": _LINEAR, "dropout": _DROPOUT}
# Container -> its parts: a leaf's kind, or the containers that may stand there.
_PARTS: dict[str, dict[str, str]] = {
    "BertEncoder": {"layer": "BertLayer"},
    "BertLayer": {"attention": "BertAttention", "intermediate": "BertIntermediate", "output": "BertOutput"},
    "BertAttention": {"self": "BertSelfAttention BertSdpaSelfAttention", "output": "BertSelfOutput"},
    "BertSelfAttention": _ATTENTION,
    "BertSdpaSelfAttention": _ATTENTION,
    "BertSelfOutput": _ADD_NORM,
    "BertIntermediate": {"dense": _LINEAR, "intermediate_act_fn": _ACTIVATION},
    "BertOutput": _ADD_NORM,
    "BertOnlyMLMHead": {"predictions": "BertLMPredictionHead"},
    "BertLMPredictionHead": {"transform": "BertPredictionHeadTransform", "decoder": _LINEAR},
    "BertPredictionHeadTransform": {"dense": _LINEAR, "transform_act_fn": _ACTIVATION, "LayerNorm": _NORM},
}
#: Containers whose forward accelerate() replaces: their stock forward needs padded batches.
REPLACED = ("BertEncoder", "BertLayer", "BertAttention", "BertSelfAttention", "BertSdpaSelfAttention")
_CLASSES = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, modeling_bert.BertEmbeddings, modeling_bert.BertModel)
_STOCK = (*_CLASSES, *(getattr(modeling_bert, name) for name in _PARTS if hasattr(modeling_bert, name)))
# Methods that packed forward passes stand in for.
_METHODS = ("forward", "feed_forward_chunk")
# Asked of every part in every forward pass; a class does not change what it is.
_LEAVES_SEEN: dict[tuple[type, str], bool] = {}
_NAMES_SEEN: dict[type, str | None] = {}


def why_not_encoder(bert: Any) -> str | None:
    """Why the encoder of a BertModel cannot be handed packed cells; None where it can."""
    parts = vars(bert)["_modules"]
    if stock_name(type(parts.get("embeddings"))) != "BertEmbeddings":
        return f"its embeddings are a {_called(parts.get('embeddings'))}, not transformers' own"
    pooler = parts.get("pooler")
    if pooler is not None and stock_name(type(pooler)) != "BertPooler":
        return f"its pooler is a {_called(pooler)}, which may read padding"
    return _obstacle(parts.get("encoder"), "encoder", "BertEncoder")


def why_not_head(head: Any) -> str | None:
    """Why the head of a BertForMaskedLM cannot be handed some rows only; None where it can."""
    return _obstacle(head, "cls", "BertOnlyMLMHead", minds_hooks=False)


def why_not_classifier(model: Any) -> str | None:
    """Why a BertForTokenClassification cannot be handed zeros at padding; None where it can."""
    for name, what in (("classifier", _LINEAR), ("dropout", _DROPOUT)):
        module = getattr(model, name)
        if not _is_leaf(type(module), what):
            return f"its {name} is a {_called(module)}, which may read padding"
    return patched_model(model)


def patched_class() -> str | None:
    """Why nothing can be packed: somebody has put another method into a class that BERT is built of."""
    for kind in _STOCK:
        for name in _METHODS:
            # torch.nn.Linear's stands in torch.nn.modules.linear, transformers' decorators keep their function's.
            if hasattr(kind, name) and getattr(getattr(kind, name), "__module__", None) != kind.__module__:
                return f"{kind.__name__}.{name} has been replaced"
    return None


def patched_model(model: nn.Module) -> str | None:
    """The same for the class of a model with a head."""
    if getattr(type(model).forward, "__module__", None) == modeling_bert.__name__:
        return None
    return f"{type(model).__name__}.forward has been replaced"


def why_not_attention(config: Any) -> str | None:
    """Why attention goes to the function that was registered for it: it is somebody's own, and may do anything."""
    # Before release 5 BERT chooses between classes, which are looked at as parts.
    functions = getattr(modeling_bert, "ALL_ATTENTION_FUNCTIONS", None)
    if functions is None:
        return None
    name = getattr(config, "_attn_implementation", None)
    function = functions.get(name, modeling_bert.eager_attention_forward)
    return (
        None if origin(function).startswith(_ATTENTIONS) else f"its attention {name!r} is a function of somebody's own"
    )


def _obstacle(module: Any, name: str, expected: str, *, minds_hooks: bool = True) -> str | None:
    """The first part of a container, itself included, that is not what it should be; None where all are."""
    kind = stock_name(type(module))
    if kind is None or kind not in expected.split():
        return f"{name} is a {_called(module)}, not transformers' own {expected.split()[0]}"
    forward = vars(module).get("forward")
    if kind in REPLACED and forward is None:
        return f"{name} has been exchanged since accelerate()"
    is_own = forward is None or (kind in REPLACED and getattr(type(forward), "is_packed", False))
    if not is_own and not hasattr(module, "_hf_hook"):
        return f"somebody has replaced the forward of {name}"
    changed = _changed(module, kind)
    if changed is not None:
        return f"somebody has changed the {changed} of {name}"
    if minds_hooks and has_foreign_hooks(module):
        return _hooked(name)
    for part, what in _PARTS[kind].items():
        child, path = module._modules.get(part), f"{name}.{part}"
        if part == "layer":
            layers = child._modules.values() if isinstance(child, nn.ModuleList) else [child]
            found = (_obstacle(each, f"{path}.{i}", what, minds_hooks=minds_hooks) for i, each in enumerate(layers))
            reason = next((each for each in found if each is not None), None)
        elif what not in _LEAVES:
            reason = _obstacle(child, path, what, minds_hooks=minds_hooks)
        # A plain function may stand for an activation, as an attribute of its own.
        elif child is None and what == _ACTIVATION:
            reason = None
        else:
            reason = _leaf_obstacle(child, path, what, minds_hooks)
        if reason is not None:
            return reason
    return None


def _changed(module: nn.Module, kind: str) -> str | None:
    """What somebody has set in a container that packed cells would not see."""
    known = module.__dict__
    if kind == "BertLayer":
        return "feed_forward_chunk" if "feed_forward_chunk" in known else None
    if "query" not in module._modules:
        return None
    if known.get("is_causal"):
        return "is_causal"
    # Releases before 5 divide by the root of the size and hold no factor.
    return None if known.get("scaling") in (None, known["attention_head_size"] ** -0.5) else "scaling"


def _leaf_obstacle(leaf: Any, name: str, what: str, minds_hooks: bool) -> str | None:
    if not _is_leaf(type(leaf), what):
        return f"{name} is a {_called(leaf)}, which is not known to work token by token"
    if "forward" in vars(leaf) and not hasattr(leaf, "_hf_hook"):
        return f"somebody has replaced the forward of {name}"
    if minds_hooks and (any(map(has_foreign_hooks, leaf.modules())) if leaf._modules else has_foreign_hooks(leaf)):
        return _hooked(name)
    return None


def _is_leaf(kind: type, what: str) -> bool:
    known = _LEAVES_SEEN.get((kind, what))
    if known is None:
        known = issubclass(kind, _LEAVES[what]) or any(base.__module__.startswith("peft.") for base in kind.__mro__)
        if what == _ACTIVATION and kind is not nn.MultiheadAttention:
            known = known or kind.__module__ in _ACTIVATIONS
        _LEAVES_SEEN[kind, what] = known
    return known


def _hooked(name: str) -> str:
    return f"{name} is hooked (adapters for each row of a batch are hooks, too), and hooks expect padded batches"


def stock_name(kind: type) -> str | None:
    """The name of transformers' own class, also where torch's sharding has made a subclass of it; else None."""
    if kind not in _NAMES_SEEN:
        first, *others = kind.__bases__
        is_sharded = others and first.__name__ == "FSDPModule" and first.__module__.startswith("torch.distributed.")
        own = others[0] if is_sharded else kind
        _NAMES_SEEN[kind] = own.__name__ if own.__module__ == modeling_bert.__name__ else None
    return _NAMES_SEEN[kind]


def _called(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
