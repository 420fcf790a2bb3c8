"""How much rounding costs a product, and moving scale from rows into weights where a few columns make it costly."""

from __future__ import annotations

import math

import torch
from geneformer_kernels import quantize_rows, quantize_weight

#: How much of the spread between columns of rows goes into the weight, from little to all: SmoothQuant's own choice is
#: 0.5, and rows with few outliers far beyond the rest want more.
SHARES = (0.25, 0.5, 0.75, 1.0)
# Columns that were never seen above zero, or whose weights are all zero, are moved no further than this.
_MOST = 2.0**16
_FP8_MOST = 448.0  # the largest number of float8_e4m3fn


def smoothing(largest: torch.Tensor, largest_weight: torch.Tensor, share: float) -> torch.Tensor:
    """What rows are multiplied by, column by column, before they are rounded; the weight's columns are divided by it.

    SmoothQuant's ``max|w|^(1 - share) / max|x|^share``, rounded to powers of two: multiplying by them, and dividing
    weights by them, rounds nothing in any floating dtype, so that a smoothed layer computes what it did.

    Parameters
    ----------
    largest
        [K], the largest magnitude that each column of rows was seen to have.
    largest_weight
        [K], the largest magnitude in each column of the weight.
    share
        From 0, where only the weight's columns are made equal, to 1, where only those of rows are.

    Returns
    -------
    torch.Tensor
        [K] float32, positive; 1 where a column was never seen above zero or has no weight.

    References
    ----------
    Xiao et al., "SmoothQuant", arXiv:2211.10438.
    """
    x, w = largest.double(), largest_weight.double()
    is_used = (x > 0) & (w > 0)
    exponent = torch.where(is_used, (1 - share) * w.log2() - share * x.log2(), 0.0)
    # Only ratios between columns count: around 1, rows stay within the range of float16.
    middle = exponent[is_used].median() if is_used.any() else exponent.new_zeros(())
    exponent = torch.where(is_used, exponent - middle, 0.0).round()
    return torch.exp2(exponent).clamp(1 / _MOST, _MOST).float()


def rounded_rows(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """[R, K] float32 rows as a scheme's products read them."""
    if scheme == "int8-weights":
        return x.float()
    return _rounded(x, scheme)


def rounded_weight(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """[N, K] float32 weights as a scheme keeps them, with a scale per output channel."""
    if scheme == "fp8":
        return _rounded(weight, scheme)
    q, scale = quantize_weight(weight)
    return q.float() * scale[:, None]


def _rounded(x: torch.Tensor, scheme: str) -> torch.Tensor:
    if scheme == "fp8":
        scale = x.float().abs().amax(-1, keepdim=True) / _FP8_MOST
        scale = torch.where(scale > 0, scale, 1.0)
        return (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    q, scale = quantize_rows(x)
    return q.float() * scale[..., None]


def product_sqnr(rows: torch.Tensor, weight: torch.Tensor, scheme: str, smooth: torch.Tensor | None = None) -> float:
    """Signal over noise, in dB, of the product of rows and a weight that a scheme has rounded.

    Parameters
    ----------
    rows
        [R, K] of what the layer reads.
    weight
        [N, K].
    scheme
        ``"int8"``, ``"int8-weights"`` or ``"fp8"``.
    smooth
        [K], as :func:`smoothing` gives it, or None.

    Returns
    -------
    float
        Infinite where nothing is lost.
    """
    rows, weight = rows.float(), weight.float()
    exact = rows @ weight.T
    if smooth is not None:
        rows, weight = rows * smooth, weight / smooth
    noise = rounded_rows(rows, scheme) @ rounded_weight(weight, scheme).T - exact
    return decibels(exact, noise)


def table_sqnr(table: torch.Tensor) -> float:
    """Signal over noise, in dB, of rows of an embedding table that are int8 with a scale per row."""
    return decibels(table.float(), rounded_weight(table, "int8") - table.float())


def decibels(signal: torch.Tensor, noise: torch.Tensor) -> float:
    """Ten times the logarithm of signal over noise, in energy."""
    wanted, lost = (float(x.double().square().sum()) for x in (signal, noise))
    if lost == 0:
        return math.inf
    return 10 * math.log10(wanted / lost) if wanted > 0 else -math.inf


def best_smoothing(
    rows: torch.Tensor, largest: torch.Tensor, weight: torch.Tensor, scheme: str
) -> tuple[torch.Tensor, float]:
    """The factors, of all :data:`SHARES`, with which a scheme loses least on these rows, and their SQNR in dB."""
    largest_weight = weight.float().abs().amax(0)
    tried = [smoothing(largest, largest_weight, share) for share in SHARES]
    found = [product_sqnr(rows, weight, scheme, smooth) for smooth in tried]
    best = max(range(len(tried)), key=found.__getitem__)
    return tried[best], found[best]
