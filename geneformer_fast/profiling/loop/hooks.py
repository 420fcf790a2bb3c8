"""When a model's forward passes and an optimizer's steps begin and end: hooks, taken out again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from geneformer_fast.profiling.loop.steps import BACKWARD, FORWARD, OPTIMIZER, OTHER

Mark = Callable[[str], None]
Called = Callable[[tuple[Any, ...], dict[str, Any]], None]
Took = Callable[[float], None]


class Hooks:
    """Marks the parts of a step as they come by.

    What lies between a forward pass whose result has a gradient and whatever is marked next counts as the backward
    pass: losses that are computed outside of the model are in it, and with accumulated gradients the wait for the next
    piece.

    Parameters
    ----------
    model
        The outermost module that is called in the loop; None marks no forward pass.
    optimizer
        None: every optimizer of torch.
    mark
        Told what begins.
    called
        Told the arguments of every forward pass.
    took
        Told the seconds of every forward pass, by the host's clock.

    Attributes
    ----------
    optimizer
        The one that stepped last, or that was given; None before any did.
    n_calls, n_updates
        Forward passes and steps of optimizers so far.
    n_at_once
        Most forward passes that ran at the same time, each in its thread: where they are several, the time between two
        marks belongs to none of them.
    """

    def __init__(
        self, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, mark: Mark, called: Called, took: Took
    ) -> None:
        self._mark, self._called, self._took = mark, called, took
        self.optimizer = optimizer
        self.n_calls = self.n_updates = self.n_at_once = 0
        self._depth: dict[int, int] = {}
        self._begun: dict[int, float] = {}
        self._lock = threading.Lock()
        self._handles: list[Any] = []
        if model is not None:
            self._handles.append(model.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._forward_ends, always_call=True))
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._update_begins))
            self._handles.append(optimizer.register_step_post_hook(self._update_ends))
        else:
            self._handles.append(register_optimizer_step_pre_hook(self._update_begins))
            self._handles.append(register_optimizer_step_post_hook(self._update_ends))

    def remove(self) -> None:
        """Take them all out; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        thread = threading.get_ident()
        with self._lock:
            depth = self._depth[thread] = self._depth.get(thread, 0) + 1
            if depth > 1:  # the model calls itself
                return
            self.n_calls += 1
            self.n_at_once = max(self.n_at_once, len(self._depth))
            self._called(args, kwargs)
            self._mark(FORWARD)
            self._begun[thread] = time.perf_counter()

    def _forward_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        thread = threading.get_ident()
        with self._lock:
            depth = self._depth[thread] = self._depth.get(thread, 1) - 1
            if depth > 0:
                return
            self._depth.pop(thread, None)
            if thread in self._begun:
                self._took(time.perf_counter() - self._begun.pop(thread))
            self._mark(BACKWARD if torch.is_grad_enabled() and _has_gradient(output) else OTHER)

    def _update_begins(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.optimizer = optimizer
        self._mark(OPTIMIZER)

    def _update_ends(self, *_: Any) -> None:
        self.n_updates += 1
        self._mark(OTHER)


def _has_gradient(value: Any, depth: int = 3) -> bool:
    """Whether something a model returned leads to a backward pass; containers are looked into, not all the way."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    if depth == 0 or value is None or isinstance(value, str | int | float):
        return False
    if isinstance(value, dict):
        # A read of lazy logits would compute them: losses come first and decide.
        return any(_has_gradient(each, depth - 1) for each in dict.values(value))
    if isinstance(value, list | tuple):
        return any(_has_gradient(each, depth - 1) for each in value)
    values = getattr(value, "values", None)  # of packed cells
    return isinstance(values, torch.Tensor) and values.requires_grad
