"""How far a result may be from the truth, judged by torch's own arithmetic rather than by a number somebody liked."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from roundings import ROUNDING, drawn

#: Draws of roundings that are looked at before a result is called wrong.
N_DRAWS = 8
#: With ``drawn`` in this variable a witness's own luck does not count: the bounds must do without it.
VARIABLE = "GENEFORMER_FAST_WITNESS"


class Witness:
    """Plain torch in the dtype under test: its result on this machine, and those it may have on others.

    ``function`` returns tensors, in lists, tuples or dicts, and can be called again and again. ``here`` is its result.
    ``draws`` gives results whose roundings are drawn at random as the arithmetic allows (``roundings``), each computed
    when it is asked for. ``witness[i]`` and ``witness.of(part)`` stand for a part of the result.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self._function = functools.partial(function, *arguments, **options)
        self.here = self._function()
        self._drawn: list[Any] = []
        self._parts: tuple[Callable[[Any], Any], ...] = ()

    def of(self, part: Callable[[Any], Any]) -> Witness:
        """The same witness about a part of what it knows; draws are shared."""
        other = copy.copy(self)
        other.here, other._parts = part(self.here), (*self._parts, part)
        return other

    def __getitem__(self, key: Any) -> Witness:
        return self.of(lambda result: result[key])

    def __iter__(self) -> Iterator[Witness]:
        return (self[i] for i in range(len(self.here)))

    def draws(self) -> Iterator[Any]:
        """Results with other roundings, the same ones every time."""
        for seed in range(N_DRAWS):
            if seed == len(self._drawn):
                self._drawn.append(drawn(self._function, seed))
            yield functools.reduce(lambda result, part: part(result), self._parts, self._drawn[seed])

    def allows(
        self, error: float, distance: Callable[[Any], float], *, factor: float = 2.0, band: float = 0.0
    ) -> float:
        """The largest error that is called right, as far as it must be known to judge ``error``.

        ``factor`` times the distance of a result from the truth, be it this machine's or a drawn one, and ``band``.
        """
        allowed = 0.0 if os.environ.get(VARIABLE) == "drawn" else factor * distance(self.here) + band
        draws = self.draws()
        while not error <= allowed and (other := next(draws, None)) is not None:
            allowed = max(allowed, factor * distance(other) + band)
        return allowed


def max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference from a float64 truth; NaN and infinity count as infinite."""
    if value.numel() == 0:
        return 0.0
    error = (value.double() - truth.double()).abs().max().item()
    return error if error == error else float("inf")


def assert_as_good_as(
    value: torch.Tensor,
    witness: Witness | Sequence[Witness],
    truth: torch.Tensor,
    *,
    factor: float = 2.0,
    slack: float = 0.0,
) -> None:
    """The error against float64 is at most ``factor`` times what a witness may have, plus one rounding band.

    Of several witnesses, who compute the same thing in different ways, the worst one counts. ``slack`` comes on top:
    what a card's arithmetic may add beyond theirs.
    """
    assert value.shape == truth.shape, f"{[*value.shape]} is not {[*truth.shape]}"
    band = ROUNDING[value.dtype] * max(truth.abs().max().item(), 1e-6) if truth.numel() else 0.0
    error, allowed = max_error(value, truth), 0.0
    for each in [witness] if isinstance(witness, Witness) else witness:
        if not error <= allowed:
            found = each.allows(error, lambda other: max_error(other, truth), factor=factor, band=band + slack)
            allowed = max(allowed, found)
    assert error <= allowed, f"error {error:.3e} against float64, allowed {allowed:.3e}"


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Smallest cosine similarity over rows, in float64."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).min().item()
