"""Operations of the measured steps: by formula for encoders and BERTs, else as torch counts one step, else unknown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from geneformer_fast.profiling.figures import Figure, Missing, Operation, times
from geneformer_fast.profiling.flops.bert import Shape, shape_of
from geneformer_fast.profiling.flops.foreign import FORMULA, UNKNOWN, ForeignCounter
from geneformer_fast.profiling.flops.needs import BACKWARD, Need, joined_in
from geneformer_fast.profiling.flops.work import Batch, Count, count_of
from geneformer_fast.profiling.loop.inputs import Seen, on_host
from geneformer_fast.profiling.loop.subject import STOCK, Profiled

_ATTENTION = "varlen_attention"
_UNTOLD_ROWS = "nobody said how many rows the head computed: run.step(head_rows=...) tells it"


class Counting:
    """Adds up what steps compute.

    Parameters
    ----------
    about
        The model.
    n_layers
        Blocks that are computed; None for all.
    is_training
        Asked whenever something is counted: whether steps have a backward pass.

    Attributes
    ----------
    shape
        How the model computes a batch, or why that does not follow from the lengths of its cells.
    """

    def __init__(self, about: Profiled, n_layers: int | None, is_training: Callable[[], bool]) -> None:
        self._about, self._is_training = about, is_training
        self.shape: Shape | Missing = Missing("no model was given") if about.model is None else shape_of(about.model)
        if not isinstance(self.shape, Missing) and n_layers is not None:
            anatomy = self.shape.anatomy
            self.shape = replace(self.shape, anatomy=replace(anatomy, blocks=anatomy.blocks[:n_layers]))
        self._model: Figure = 0.0
        self._hardware: Figure = 0.0
        self._counter: ForeignCounter | None = None
        self._result: tuple[Figure, str, str] | None = None
        self._shapes: set[object] = set()
        self._counted: object = None
        self._n_steps, self._has_padding = 0, False

    @property
    def is_packed(self) -> bool:
        """Whether padding is left out of what is computed, as far as anybody knows before."""
        return self._about.is_packed if isinstance(self.shape, Missing) else self.shape.is_packed

    @property
    def wants_a_step(self) -> bool:
        """Whether a step of its own is needed, to count it operator by operator."""
        return isinstance(self.shape, Missing) and self._about.model is not None

    def add(self, passes: Sequence[Seen]) -> None:
        """Count some forward passes, whose lengths are on the host."""
        if isinstance(self.shape, Missing):
            self._has_padding |= any(map(_is_padded, passes))
            return
        found = self.count(passes, None)
        if isinstance(found, Missing):
            self._model = self._hardware = found
            return
        self._model, self._hardware = _plus(self._model, found.model), _plus(self._hardware, found.hardware)

    def add_step(self, shapes: object) -> None:
        """A step of the window whose inputs had these shapes."""
        self._n_steps += 1
        if len(self._shapes) < 2:  # more do not matter
            self._shapes.add(shapes)

    def begin_step(self) -> None:
        """The next step is counted operator by operator."""
        if self._about.model is not None:
            self._counter = ForeignCounter(self._about.model)
            self._counter.__enter__()

    def end_step(self, shapes: object, *, is_whole: bool = True) -> None:
        """That step is over."""
        counter, self._counter = self._counter, None
        if counter is not None:
            counter.__exit__(None, None, None)
            if is_whole:
                self._result, self._counted = counter.result(), shapes

    def figures(self) -> tuple[Figure, Figure, str, str]:
        """Operations of model and hardware, how they were counted, and a note."""
        if not isinstance(self.shape, Missing):
            if isinstance(self._model, Missing):
                return self._model, self._hardware, UNKNOWN, self._model.not_available
            return self._model, self._hardware, FORMULA, "from the lengths of the cells and the rows of the head"
        if self._result is None:
            why = self.shape if self._about.model is None else Missing("the loop ended before a step was counted")
            return why, why, UNKNOWN, why.not_available
        flops, basis, note = self._result
        if not isinstance(flops, Missing) and self._shapes != {self._counted}:
            flops = Missing("batches had several shapes, and the operations of one of them were counted")
            return flops, flops, UNKNOWN, flops.not_available
        hardware = times(flops, float(self._n_steps))
        return self._without_padding(hardware), hardware, basis, note

    def count(self, passes: Sequence[Seen], dtype: str | None, joined: str | None = None) -> Count | Missing:
        """Operations of some passes, alone; ``joined``: the loop that did what several operations do."""
        if isinstance(self.shape, Missing):
            return self.shape
        batches = []
        for each in map(on_host, passes):
            batch = self._batch(each, self.shape)
            if isinstance(batch, Missing):
                return batch
            batches.append(batch)
        encoder = self._about.encoder
        found = count_of(
            self.shape.anatomy, batches, is_training=self._is_training(), is_recomputing=self.shape.is_recomputing,
            dtype=dtype, compute_dtype=None if encoder is None else str(encoder.dtype).removeprefix("torch."),
            joined=joined,
        )  # fmt: skip
        if all(each.is_rectangle_known for each in passes):
            return found
        return Count(found.model, Missing("nobody said what the cells were padded to"), {})

    def needs(self, passes: Sequence[Seen], dtype: str | None, operations: Sequence[Operation]) -> dict[str, Need]:
        """What each operation of some passes needs, of those that ran; nothing where that is not known."""
        calls = {each.name: each.calls for each in operations}
        found = self.count(passes, dtype, joined_in(calls)) if passes else Missing("no step was watched")
        if isinstance(found, Missing):
            return {}
        return _by_torch(found.operations) if self._about.engine == STOCK else found.operations

    def _without_padding(self, hardware: Figure) -> Figure:
        """Of a foreign model: the same, where nothing is known to have been computed for nothing."""
        if self._has_padding:
            return Missing("some positions were padding, and what the others take is not known")
        if self._about.is_recomputing and self._is_training():
            return Missing("blocks were computed twice, and what once takes is not known")
        return hardware

    def _batch(self, seen: Seen, shape: Shape) -> Batch | Missing:
        if not isinstance(seen.lengths, np.ndarray):
            return Missing("nobody said how long the cells are")
        name, told = shape.anatomy.head_name, seen.head_rows
        assert told is None or isinstance(told, int)
        if self._about.encoder is not None:
            # Its forward pass ends before the head; a loss calls that for the cells, or for rows that it knows.
            if told is None and self._is_training() and name not in (None, "cells", "pooler"):
                return Missing(_UNTOLD_ROWS)
            rows = told if told is not None else seen.n_cells if self._is_training() and name is not None else 0
            return shape.batch(seen.lengths, head_rows=rows, asked_rows=rows)
        if shape.is_packed and name == "mlm":  # logits are computed when they are read
            if told is None:
                return Missing(_UNTOLD_ROWS)
            return shape.batch(seen.lengths, padded_to=seen.padded_to, head_rows=told, asked_rows=told)
        return shape.batch(seen.lengths, padded_to=seen.padded_to, asked_rows=told)


def _by_torch(needs: dict[str, Need]) -> dict[str, Need]:
    """Needs by the names of torch's operators, as a stock model calls them: attention, and all other products."""
    found: dict[str, Need] = {}
    for suffix in ("", BACKWARD):
        of_products = [n for name, n in needs.items() if n.flops and name.endswith(BACKWARD) == bool(suffix)]
        attention = needs.get(_ATTENTION + suffix)
        linear = [each for each in of_products if each is not attention]
        if linear:
            whole = Need(sum(n.flops for n in linear), sum(n.n_bytes for n in linear), linear[0].dtype)
            found["aten::linear" + suffix] = whole
        if attention is not None:
            for name in ("aten::scaled_dot_product_attention", "aten::matmul"):
                found[name + suffix] = attention
    return found


def _is_padded(seen: Seen) -> bool:
    """Whether more was computed than there are tokens."""
    return seen.padded_to is not None and seen.lengths is not None and bool((seen.lengths < seen.padded_to).any())


def _plus(first: Figure, second: Figure) -> Figure:
    for each in (first, second):
        if isinstance(each, Missing):
            return each
    return first + second  # type: ignore[operator]
