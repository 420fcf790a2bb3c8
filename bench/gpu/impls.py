"""The implementations that ``choose`` picks from, side by side: rows from which it learns what a card measured.

An operation's ``ours`` runs what is chosen by itself; beside it stands, asked for by name, what was not chosen. Every
such row says which implementation it timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from geneformer_kernels.dispatch import Impl, ImplUnavailableError, choose, use_impl
from geneformer_kernels.target import target_of

from bench.gpu.measure import Candidate, Prepared, Unavailable

COMPARED = (Impl.TRITON, Impl.TORCH)
#: What attention may run on without being asked: ``choose`` knows no such implementation and learns nothing from it.
CUDNN = "cudnn"


@dataclass(frozen=True)
class Question:
    """What ``choose`` is asked: the operation, its dtype, and the problem's sizes and flags."""

    op: str
    dtype: str
    shape: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"op": self.op, "dtype": self.dtype, "shape": {name: int(size) for name, size in self.shape.items()}}


def uses_cudnn(run: Callable[[], Any]) -> bool:
    """Whether attention within is left to cuDNN, as cells of one length are in inference; watched, not asked."""
    from geneformer_kernels.ops.varlen_attention import sdpa

    with mock.patch.object(sdpa, "attend_equal", wraps=sdpa.attend_equal) as watched:
        run()
    return watched.called


def with_impls(
    ours: Candidate,
    question: Question,
    device: torch.device,
    *,
    is_cudnn: Callable[[Callable[[], Any]], bool] | None = None,
) -> list[Candidate]:
    """The candidate, which notes what it ran, then each implementation that it did not run.

    Parameters
    ----------
    ours
        Runs what is chosen.
    question
        What ``choose`` is asked.
    device
        Where.
    is_cudnn
        For an operation that may leave what was chosen for cuDNN: whether it did, when it ran. The Triton kernel is
        timed beside it then, in quick runs too.
    """
    ran: list[str] = [choose(question.op, question.dtype, target_of(device), shape=question.shape).impl]

    def noted() -> Prepared:
        prepared = ours.make()
        if is_cudnn is not None and is_cudnn(prepared.result):
            ran[:] = [CUDNN]
        return replace(prepared, notes={**prepared.notes, "impl": str(ran[0])})

    return [replace(ours, make=noted), *(_forced(ours, question.op, impl, ran, device, is_cudnn) for impl in COMPARED)]


def _forced(
    ours: Candidate, op: str, impl: Impl, ran: Sequence[str], device: torch.device, is_cudnn: object
) -> Candidate:
    def within(run: Callable[[], Any]) -> Callable[[], Any]:
        def inside() -> Any:
            with use_impl(impl, op):
                return run()

        return inside

    def make() -> Prepared:
        if impl == ran[0]:
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

    is_slow = is_cudnn is None or impl != Impl.TRITON
    return Candidate(f"ours-{impl}", f"this project, {impl} asked for", make, is_slow=is_slow)
