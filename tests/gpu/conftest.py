"""Where these tests run: on the CPU, by torch and by interpreted kernels, and with ``-m gpu`` on a card."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Place:
    """A device, and how this project's operations run there.

    Attributes
    ----------
    name
        ``"cpu"``: torch operations. ``"interpreted"``: Triton kernels, line by line, on the CPU. ``"cuda"``: a card.
    """

    name: str

    @property
    def device(self) -> torch.device:
        """For tensors."""
        return torch.device("cuda" if self.name == "cuda" else "cpu")

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """What runs within uses the implementations of this place."""
        from geneformer_kernels.dispatch import OPERATIONS, Impl, candidates, use_impl
        from geneformer_kernels.target import target_of

        with contextlib.ExitStack() as stack:
            if self.name == "interpreted":
                target = target_of("cpu")
                for op in OPERATIONS:
                    if Impl.TRITON in [option.impl for option in candidates(op, "float32", target) if option.can_run]:
                        stack.enter_context(use_impl(Impl.TRITON, op))
            yield


@pytest.fixture(params=["cpu", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Place:
    """The CPU twice, and a card."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "interpreted" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled for the card in this process")
    return Place(request.param)


@pytest.fixture
def card() -> torch.device:
    """A card, for what only a card can show."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
