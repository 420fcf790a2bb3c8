"""Which layers of a model bear eight bits, measured on cells: each by itself, then by the embeddings that come out."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from geneformer_fast.arguments import checked, renamed
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import QuantizedLinear
from geneformer_fast.progress import Progress
from geneformer_fast.quantization.build import default_choices, layers_of, quantized
from geneformer_fast.quantization.cells import SomeCells
from geneformer_fast.quantization.choices import Choice, folds_into
from geneformer_fast.quantization.smooth import best_smoothing, product_sqnr, table_sqnr
from geneformer_fast.quantization.watch import DECODER, Seen, Watch
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder

#: Least signal over noise of a layer's product, in dB. Noise of a thousandth of a product's energy turns it by as much
#: as the embeddings may be turned in all: a cosine of 0.9995 is 30 dB. Rounding both operands of a well-behaved product
#: to int8 leaves 38 to 42 dB. Numbers of e4m3 have four significant bits whatever their size, which leaves 28 to 32 dB
#: and nothing that smoothing could mend: there the bar only finds what is far worse.
BAR_DB = {"int8": 30.0, "int8-weights": 30.0, "fp8": 25.0}
#: Least cosine between a cell's embeddings before and after.
LEAST_COSINE = 0.9995
#: Cells that are looked at, and of these how many are embedded again and again while layers are given up.
N_CELLS, N_EMBEDDED = 256, 64
#: What the command line calls what is asked for.
FLAGS = {"bar": "--bar", "least_cosine": "--least-cosine", "max_cells": "--max-cells"}
# What smoothing has to gain where it costs nothing at run time, in dB: half a bit.
_GAIN_DB = 3.0
_TOKEN_TABLE = "embeddings.token"
_KEPT = "above the bar"


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what becomes of each layer.

    Attributes
    ----------
    scheme
        Of the model.
    choices
        Layer name to choice, of all layers that could be quantized.
    bar_db, least_cosine
        What was asked for.
    cosine
        Of a cell's embeddings before and after, the least over the cells that were embedded.
    n_cells, n_tokens
        That were looked at.
    """

    scheme: str
    choices: dict[str, Choice]
    bar_db: float
    least_cosine: float
    cosine: float
    n_cells: int
    n_tokens: int


@renamed(n_cells="max_cells")
@checked
def calibrate(
    encoder: Encoder,
    tokens: str | os.PathLike[str] | TokenFolder | Ragged | Sequence[Ragged],
    *,
    scheme: str = "int8",
    keep_embeddings: bool = False,
    bar: float | None = None,
    least_cosine: float = LEAST_COSINE,
    max_cells: int = N_CELLS,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Measure on cells which layers a scheme may have, and how.

    A layer whose product keeps ``bar`` dB of signal over noise is quantized as it is. One that does not is smoothed,
    and where that does not help either stays in floating point. Where the layer before takes the factors into its
    weights, smoothing is free, and taken wherever it gains 3 dB. Then cells are embedded: as long as one of them is
    turned too far, the layers that lose most stay in floating point too.

    Parameters
    ----------
    encoder
        In floating point; unchanged. It is measured in float32.
    tokens
        Token folder, or packed cells.
    scheme
        ``"int8"``, ``"int8-weights"`` or ``"fp8"``.
    keep_embeddings
        Whether tables stay in floating point, whatever they would lose.
    bar
        Least signal over noise of a layer, in dB; None: :data:`BAR_DB`.
    least_cosine
        Between a cell's embeddings before and after.
    max_cells
        Most cells of a folder that are looked at, drawn at random.
    seed
        Of cells and rows drawn.
    progress
        Whether to show progress bars; None shows them on a terminal, and lines of the log elsewhere.

    Returns
    -------
    Calibration

    Raises
    ------
    InputError
        There are no cells, or the model makes NaN or infinity of them.
    UnsupportedError
        The model is quantized already; there is no such scheme; a number that means nothing.
    VocabularyError
        The tokens belong to another vocabulary than the model.

    References
    ----------
    Xiao et al., "SmoothQuant", arXiv:2211.10438.
    """
    defaults = default_choices(encoder, scheme, keep_embeddings=keep_embeddings)
    bar = BAR_DB[scheme] if bar is None else float(bar)
    if not math.isfinite(bar):
        raise UnsupportedError(f"bar (--bar) must be a number of dB, not {bar}")
    if not 0 < least_cosine <= 1:
        raise UnsupportedError(f"least_cosine (--least-cosine) must be above 0 and at most 1, not {least_cosine}")
    if max_cells < 1:
        raise UnsupportedError(f"max_cells (--max-cells) must be at least 1, not {max_cells}")
    if encoder.quantization is not None:
        raise UnsupportedError(
            f"this model is quantized already ({encoder.quantization.scheme}); calibrate the one it was made from"
        )
    cells = SomeCells.of(tokens, encoder.config, max_cells, seed)
    exact = encoder if encoder.dtype == torch.float32 and not encoder.training else _in_float32(encoder)
    with Progress(cells.n_cells, "calibrating", "cells", progress) as shown:
        seen = Watch(exact, cells.n_tokens, seed).look(cells.batches, shown)
    choices = {
        name: choice_for(name, exact, seen, default.kind, bar) if default.is_quantized else default
        for name, default in defaults.items()
    }
    with Progress(None, "embedding with fewer layers quantized", "passes", progress) as shown:
        choices, cosine = _held(exact, choices, cells.first(N_EMBEDDED), least_cosine, shown)
    return Calibration(scheme, choices, bar, float(least_cosine), cosine, cells.n_cells, cells.n_tokens)


def _in_float32(encoder: Encoder) -> Encoder:
    return copy.deepcopy(encoder).cast("float32").eval()


@torch.no_grad()
def choice_for(name: str, encoder: Encoder, seen: Mapping[str, Seen], kind: str, bar: float) -> Choice:
    """What becomes of one layer by itself.

    Parameters
    ----------
    name
        Of a linear layer, or of an embedding table.
    encoder
        In floating point.
    seen
        What its layers read.
    kind
        What it is to be.
    bar
        Least signal over noise, in dB.
    """
    layer = layers_of(encoder)[name]
    weight = layer.weight
    if isinstance(layer, nn.Embedding):
        decoder = seen.get(DECODER) if name == _TOKEN_TABLE and encoder.config.tied_decoder else None
        sqnr = table_sqnr(weight)
        if decoder is not None:  # its product counts as well
            sqnr = min(sqnr, product_sqnr(decoder.rows.to(weight.device), weight, kind))
        return Choice(kind, None, sqnr, _KEPT) if sqnr >= bar else Choice("half", None, sqnr, _below(bar))
    if name not in seen:
        return Choice("half", reason="no cell came by it")
    rows, largest = seen[name].rows.to(weight.device), seen[name].largest.to(weight.device)
    plain = product_sqnr(rows, weight, kind)
    is_free = folds_into(name, encoder.config) is not None
    if plain >= bar and not is_free:
        return Choice(kind, None, plain, _KEPT)
    smooth, smoothed = best_smoothing(rows, largest, weight, kind)
    if smoothed >= max(bar, plain + _GAIN_DB):
        where = "within the layer before" if is_free else "as it is read"
        return Choice(kind, smooth.cpu(), smoothed, f"smoothed {where}: {plain:.1f} dB without")
    if plain >= bar:
        return Choice(kind, None, plain, _KEPT)
    return Choice("half", None, plain, f"{_below(bar)}, and {smoothed:.1f} dB smoothed")


def _below(bar: float) -> str:
    return f"below the bar of {bar:g} dB"


def _held(
    encoder: Encoder, choices: dict[str, Choice], cells: SomeCells, least_cosine: float, shown: Progress
) -> tuple[dict[str, Choice], float]:
    """Choices under which no cell's embedding is turned too far, and the least cosine that is left.

    First the layers stay as they were that turn embeddings too far by themselves, however much signal their products
    keep: one weight far beyond the rest makes a product large, and rounding small beside it. Then, where all others
    together are still too much, those that lose most, the fewest that are enough.
    """
    order = sorted((name for name, choice in choices.items() if choice.is_quantized), key=lambda n: _sqnr(choices[n]))
    exact = cells.embeddings(encoder)
    found: dict[frozenset[str], float] = {}
    alone: set[str] = set()

    def held(names: Iterable[str]) -> dict[str, Choice]:
        """Choices with nothing but these layers quantized."""
        kept = set(names)
        return {
            name: choice if name in kept or not choice.is_quantized else _given_up(choice, least_cosine, name in alone)
            for name, choice in choices.items()
        }

    def holds(names: Sequence[str]) -> bool:
        if (key := frozenset(names)) not in found:
            made = as_anywhere(quantized(encoder, held(names)))
            found[key] = _least_cosine(exact, cells.embeddings(made))
            shown.update(1)
        return found[key] >= least_cosine

    if not holds(order):
        alone |= set(_alone(order, holds))
        order = [name for name in order if name not in alone]
        order = order[_fewest(len(order), lambda n_left_out: holds(order[n_left_out:])) :]
    return held(order), found[frozenset(order)]


def _alone(names: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
    """Of layers that do not hold together those that do not by themselves; by halving, as they are few."""
    if len(names) <= 1:
        return list(names)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [name for half in halves if not holds(half) for name in _alone(half, holds)]


def _fewest(n: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest number up to ``n`` that is enough, by doubling and halving, since each answer costs a pass."""
    low, high = 0, 0
    while not is_enough(high) and high < n:
        low, high = high + 1, min(max(1, 2 * high), n)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return high


def as_anywhere(encoder: Encoder) -> Encoder:
    """Have a quantized encoder round rows of activations wherever its scheme may, and give it back.

    This machine may be one that is faster without, and others are not.
    """
    for layer in layers_of(encoder).values():
        if isinstance(layer, QuantizedLinear) and layer.scheme == "int8":
            layer.mode = "dynamic"
    return encoder


def _sqnr(choice: Choice) -> float:
    return math.inf if choice.sqnr_db is None else choice.sqnr_db


def _given_up(choice: Choice, least_cosine: float, is_alone: bool) -> Choice:
    by_itself = " by it alone" if is_alone else ""
    reason = f"given up: the embeddings' cosine fell below {least_cosine:g}{by_itself}"
    return Choice("half", None, choice.sqnr_db, reason)


def _least_cosine(exact: torch.Tensor, changed: torch.Tensor) -> float:
    """The least over cells, 1 of two that are equal; NaN where one is no number, which is at least nothing."""
    cosine = nn.functional.cosine_similarity(exact.double(), changed.double(), dim=1)
    return float(torch.where((exact == changed).all(1), 1.0, cosine).min())
