"""The implementations that ``choose`` picks from, side by side: rows from which it learns what a card measured.

An operation's ``ours`` runs what is chosen by itself; beside it stands, asked for by name, what was not chosen. Every
such row says which implementation it timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from geneformer_kernels.dispatch import Impl, ImplUnavailableError, choose, use_impl
from geneformer_kernels.target import target_of

from bench.gpu_measure import Candidate, Prepared, Unavailable

COMPARED = (Impl.TRITON, Impl.TORCH)


@dataclass(frozen=True)
class Question:
    """What ``choose`` is asked: the operation, its dtype, and the problem's sizes and flags."""

    op: str
    dtype: str
    shape: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"op": self.op, "dtype": self.dtype, "shape": {name: int(size) for name, size in self.shape.items()}}


def with_impls(ours: Candidate, question: Question, device: torch.device) -> list[Candidate]:
    """The candidate, which notes what it ran, then each implementation that it did not run."""
    chosen = choose(question.op, question.dtype, target_of(device), shape=question.shape).impl

    def noted() -> Prepared:
        prepared = ours.make()
        return replace(prepared, notes={**prepared.notes, "impl": str(chosen)})

    return [replace(ours, make=noted), *(_forced(ours, question.op, impl, chosen, device) for impl in COMPARED)]


def _forced(ours: Candidate, op: str, impl: Impl, chosen: Impl, device: torch.device) -> Candidate:
    def within(run: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with use_impl(impl, op):
                return run()

        return inside

    def make() -> Prepared:
        if impl == chosen:
            raise Unavailable("ours runs it already")
        if device.type != "cuda":
            raise Unavailable("needs CUDA: elsewhere nothing is to choose")
        try:
            prepared = within(ours.make)()
            within(prepared.result)()
        except ImplUnavailableError as error:
            raise Unavailable(str(error)) from None
        notes = {**prepared.notes, "impl": str(impl)}
        return Prepared(within(prepared.run), within(prepared.result), notes)

    return Candidate(f"ours-{impl}", f"this project, {impl} asked for", make, is_slow=True)
