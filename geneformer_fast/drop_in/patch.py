"""Putting packed forward passes into one model, and taking them out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from geneformer_fast.drop_in import layers, models
from geneformer_fast.drop_in.layers import Packed
from geneformer_fast.drop_in.models import Call
from geneformer_fast.drop_in.reasons import check_model, containers

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

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.module, self.function = module, function
        self.is_active = True

    @property
    def __signature__(self) -> inspect.Signature:
        """Trainers read from it which columns a model takes, and how its loss is averaged."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

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
        if not self.is_active or len(args) > len(self.names):
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
            forward = _forward_of(module)
            if forward is None:
                continue
            if vars(module)["forward"] is forward:
                del vars(module)["forward"]
            forward.is_active = False
            vars(module).pop("_replicate_for_data_parallel", None)


def accelerate(model: nn.Module, *, training_logits: bool = True) -> Handle:
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

    Returns
    -------
    Handle
        Its ``undo()`` takes everything out again.

    Raises
    ------
    UnsupportedError
        The model is another one, a decoder, or has relative positions, or its forward has been replaced already.

    Notes
    -----
    Padding is removed once at the input and put back once at the output, where hidden states and attention weights are
    zero. Everything between runs on the operations of ``geneformer_kernels`` with a float32 residual stream, except
    modules that are hooked, wrapped or quantized: those are called, with packed inputs [T, C]. In float32, loss and
    gradients agree with the stock model to 1e-5. Calls that cannot be packed (3-D masks, caches, head masks) run the
    stock forward pass, with one warning that says why.

    A label of -100 takes no part in the loss, as in transformers; give it to padding too, as its collators do, for
    hidden states are zero there. A batch of ``BertForMaskedLM`` without a single label has loss 0 rather than NaN.
    ``torch.compile`` breaks the graph where padding is removed, and nowhere else.

    Accelerating an accelerated model again changes ``training_logits`` and nothing else.

    References
    ----------
    Devlin et al., "BERT", arXiv:1810.04805; Theodoris et al., Nature 618 (2023).

    Examples
    --------
    >>> handle = geneformer_fast.accelerate(model)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    >>> handle.undo()  # doctest: +SKIP
    """
    peeled = getattr(model, "get_base_model", None)
    base = peeled() if callable(peeled) else model
    handle = Handle(base)
    known = [forward for forward in map(_forward_of, base.modules()) if forward is not None]
    if not known:
        check_model(base)
    # After undo() inside of another tool's wrapper, some modules still hold theirs and others do not.
    holders = {id(forward.module) for forward in known}
    for forward in _forwards(base):
        if id(forward.module) not in holders:
            forward.module.forward = forward
            vars(forward.module)["_replicate_for_data_parallel"] = forward.replicate
            known.append(forward)
    for forward in known:
        forward.is_active = True
        if isinstance(forward, PackedModelForward) and "has_training_logits" in forward.options:
            forward.options["has_training_logits"] = training_logits
    return handle


def _forwards(model: Any) -> Iterator[PackedForward]:
    has_head = type(model).__name__ != "BertModel"
    bert = model.bert if has_head else model
    # The two classifiers' own forward passes are as good as any: their heads are small.
    if type(model).__name__ == "BertForMaskedLM":
        yield PackedModelForward(model, models.packed_masked_lm, has_training_logits=True)
    yield PackedModelForward(bert, models.packed_bert)
    for name, module in containers(bert):
        depth = 0 if name == "encoder" else 1 + name.count(".attention") + name.count(".self")
        yield PackedForward(module, _PARTS[depth])


def _forward_of(module: nn.Module) -> PackedForward | None:
    """What :func:`accelerate` has put into a module, be it inside of other tools' wrappers."""
    forward = vars(module).get("forward")
    while forward is not None and not isinstance(forward, PackedForward):
        forward = getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return forward
