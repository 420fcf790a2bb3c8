"""Putting packed forward passes into one model, and taking them out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from geneformer_fast.arguments import checked
from geneformer_fast.drop_in import eight_bits, layers, models
from geneformer_fast.drop_in.layers import Packed
from geneformer_fast.drop_in.models import Call
from geneformer_fast.drop_in.plain import packed_forward_of
from geneformer_fast.drop_in.readers import Watch
from geneformer_fast.drop_in.reasons import check_model, containers

PADDINGS = ("zeros", "stock")
_PARTS: tuple[Callable[..., Any], ...] = (
    layers.packed_encoder,
    layers.packed_layer,
    layers.packed_attention,
    layers.packed_self_attention,
)


class PackedForward:
    """Stands as attribute ``forward`` in one module, in front of its class's.

    An object rather than a bound method: it is pickled and copied with its module, tells the stock signature, and steps
    aside where something has been wrapped around it since.

    Parameters
    ----------
    module
        Where it stands.
    function
        The packed forward pass, a function of the module and its packed inputs.
    """

    #: Tells it from what others put into that place.
    is_packed = True

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.module, self.function = module, function
        self.is_active = True
        #: How many stock forward passes of models around this one are running.
        self.n_stock = 0

    @property
    def __signature__(self) -> inspect.Signature:
        """Trainers read from it which columns a model takes, and how its loss is averaged."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> CodeType:
        """torch.export names an exported program's inputs after the place where they come in."""
        return inspect.unwrap(type(self.module).forward).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, args = self._bound_to(args)
        # A container called with anything else is part of a stock forward pass that could not be packed.
        if self.is_active and args and isinstance(args[-1], Packed):
            return self.function(module, *args)
        return type(module).forward(module, *args, **kwargs)

    def _bound_to(self, args: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
        """The module and its arguments: accelerate binds what it has unwrapped to the module once more."""
        if args and isinstance(args[0], nn.Module):
            return args[0], args[1:]
        return self.module, args

    def replicate(self) -> nn.Module:
        """What ``nn.DataParallel`` calls for a copy of the module on another device: it gets a forward of its own."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)  # type: ignore[operator]
        forward = object.__new__(type(self))
        vars(forward).update(vars(self), module=replica)
        vars(replica)["forward"] = forward
        return replica


class PackedModelForward(PackedForward):
    """The same for a whole model, which is called with transformers' arguments.

    Parameters
    ----------
    options
        Keywords for the function.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(module, function)
        self.names = tuple(
            name
            for name, parameter in self.__signature__.parameters.items()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        self.options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, args = self._bound_to(args)
        if not self.is_active or self.n_stock or len(args) > len(self.names):
            return type(module).forward(module, *args, **kwargs)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return self.function(Call(module, args, kwargs, arguments, "return_dict" in self.names), **self.options)


@dataclass(frozen=True)
class Handle:
    """What :func:`accelerate` returns.

    Attributes
    ----------
    model
        The accelerated model.
    """

    model: nn.Module

    def undo(self) -> None:
        """Leave the model as it was before: every module gets its own forward back. A second call does nothing.

        Where another tool has since wrapped the forward of a module (accelerate's ``Accelerator.prepare`` does), its
        wrapper stays, and calls the stock forward.
        """
        for module in self.model.modules():
            forward = packed_forward_of(module)
            if forward is None:
                continue
            if vars(module)["forward"] is forward:
                del vars(module)["forward"]
            forward.is_active = False
            vars(module).pop("_replicate_for_data_parallel", None)
        eight_bits.give_back(self.model)


@checked
def accelerate(model: nn.Module, *, training_logits: bool = True, padding: str = "zeros") -> Handle:
    """Make a Hugging Face BERT compute on packed cells, in place, until :meth:`Handle.undo`.

    Parameters
    ----------
    model
        transformers' ``BertModel``, ``BertForMaskedLM``, ``BertForSequenceClassification`` or
        ``BertForTokenClassification``, or a PEFT model around one. Parameters and ``state_dict`` stay what they are.
        Compile it, wrap it (DDP, FSDP, ``Accelerator.prepare``, ``Trainer``) or add adapters afterwards.
    training_logits
        Whether a training step of ``BertForMaskedLM`` can be asked for its logits [B, L, V]. They are computed when
        they are read; the loss never needs them. False makes them None and keeps no hidden states for them.

    padding
        What hidden states and logits hold at padding: ``"zeros"``, or with ``"stock"`` what the stock model computes
        there, for whatever reads it. See Notes.

    Returns
    -------
    Handle
        Its ``undo()`` takes everything out again.

    Raises
    ------
    UnsupportedError
        The model is another one, a decoder, or has relative positions, or its forward has been replaced already.
    ValueError
        ``padding`` is neither of the two.

    Notes
    -----
    Padding is removed once at the input and put back once at the output, where hidden states and attention weights are
    zero. Everything between runs on the operations of ``geneformer_kernels`` with a float32 residual stream, except
    linear layers that are wrapped, quantized or given adapters: those are called, with packed inputs [T, C]. In
    float32, loss and gradients agree with the stock model to 1e-5. What cannot be packed runs the stock forward pass,
    with one warning that says why: 3-D masks, caches and head masks; hooks of one's own inside of the encoder, and
    parts of it that somebody has exchanged, wrapped or quantized dynamically; attention functions and methods of one's
    own; ``torch.func`` transforms, forward-mode derivatives and fake tensors; labels that torch would refuse.

    With ``padding="zeros"`` nothing is computed at padding, and nothing may read it. Geneformer's own multi-task
    classifier with attention pooling (its default) does: its softmax goes over all positions, padding included, and its
    losses change. Use ``accelerate(model.bert, padding="stock")`` there: hidden states at padding are computed too, as
    queries that attend to the cell's tokens, to the stock values. It costs what padding costs, as in the stock model;
    batches of cells of similar lengths cost less. A warning says so where a loss reads padding, or a module that calls
    the encoder pools with an attention that takes no mask; other readers (a mean over all positions without a mask,
    say, in a model that is not trained) are not recognised.

    A label of -100 takes no part in the loss, as in transformers; give it to padding too, as its collators do, for
    hidden states are zero there. A batch of ``BertForMaskedLM`` without a single label has loss 0 rather than NaN.
    Logits that are read late are those of the forward pass, or refused where its weights have been overwritten since.
    A head that is hooked or wrapped is called in every forward pass, over all positions. ``torch.compile`` breaks the
    graph where the model and the padding are looked at, and nowhere else.

    Weights of eight bits stay so: those of a model made by :func:`geneformer_fast.quantize`, and of a folder that
    transformers has loaded with the package compressed-tensors. That package widens all weights in the first forward
    pass; accelerate a model before it is called, and its linear layers and tables compute on what was loaded, until
    ``undo()``. The weights do not learn; adapters and heads on top of them do. PEFT cannot merge adapters into them:
    put these on the model before it was quantized and merge them there. FSDP has to be told to leave them
    alone (``ignored_params``: all that has no ``requires_grad``), and is refused otherwise; DDP does so by itself.

    Accelerating an accelerated model again changes ``training_logits`` and ``padding`` and nothing else.

    References
    ----------
    Devlin et al., "BERT", arXiv:1810.04805; Theodoris et al., Nature 618 (2023).

    Examples
    --------
    >>> handle = geneformer_fast.accelerate(model)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> handle.undo()  # doctest: +SKIP
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, not {padding!r}")
    peeled = getattr(model, "get_base_model", None)
    base = peeled() if callable(peeled) else model
    handle = Handle(base)
    known = [forward for forward in map(packed_forward_of, base.modules()) if forward is not None]
    if not known:
        check_model(base)
    eight_bits.take_over(base)
    # After undo() inside of another tool's wrapper, some modules still hold theirs and others do not.
    holders = {id(forward.module) for forward in known}
    for forward in _forwards(base):
        if id(forward.module) not in holders:
            forward.module.forward = forward
            vars(forward.module)["_replicate_for_data_parallel"] = forward.replicate
            known.append(forward)
    for forward in known:
        forward.is_active = True
        if isinstance(forward, PackedModelForward):
            asked = dict(has_training_logits=training_logits, padding=padding)
            forward.options.update({name: value for name, value in asked.items() if name in forward.options})
    return handle


def _forwards(model: Any) -> Iterator[PackedForward]:
    has_head = type(model).__name__ != "BertModel"
    bert = model.bert if has_head else model
    # The two classifiers' own forward passes are as good as any: their heads are small.
    if type(model).__name__ == "BertForMaskedLM":
        yield PackedModelForward(model, models.packed_masked_lm, has_training_logits=True)
    if type(model).__name__ == "BertForTokenClassification":
        yield PackedModelForward(model, models.packed_token_classifier, padding="zeros")
    yield PackedModelForward(bert, models.packed_bert, padding="zeros", watch=Watch())
    for name, module in containers(bert):
        depth = 0 if name == "encoder" else 1 + name.count(".attention") + name.count(".self")
        yield PackedForward(module, _PARTS[depth])
