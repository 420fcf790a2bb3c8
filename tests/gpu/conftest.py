"""Where these tests run: on the CPU, by torch and by interpreted kernels, and with ``-m gpu`` on a card."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import interpreted
import pytest
import torch

interpreted.settle()


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
        from geneformer_kernels.dispatch import use_impl

        with use_impl("triton") if self.name == "interpreted" else contextlib.nullcontext():
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
