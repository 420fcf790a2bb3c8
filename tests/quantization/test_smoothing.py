"""What rounding costs a product, against float64, and what moving scale from rows into weights wins."""

from __future__ import annotations

import math

import pytest
import torch

from geneformer_fast.quantization.smooth import (
    SHARES,
    best_smoothing,
    decibels,
    product_sqnr,
    rounded_rows,
    rounded_weight,
    smoothing,
    table_sqnr,
)

WIDTH, COLUMNS = 96, 40


def rows_and_weight(outlier: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of mean 0.3 with three columns that are ``outlier`` times as large, and weights as much smaller there."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(64, WIDTH, generator=generator) + 0.3
    weight = torch.randn(COLUMNS, WIDTH, generator=generator)
    rows[:, [3, 50, 95]] *= outlier
    weight[:, [3, 50, 95]] /= outlier
    return rows, weight


def test_decibels_are_ten_times_the_logarithm_of_energies() -> None:
    signal = torch.full((2, 3), 10.0)
    assert decibels(signal, torch.ones(2, 3)) == pytest.approx(20.0)
    assert decibels(signal, torch.zeros(2, 3)) == math.inf
    assert decibels(torch.zeros(2, 3), torch.ones(2, 3)) == -math.inf
    assert decibels(torch.zeros(2, 3), torch.zeros(2, 3)) == math.inf


def oracle(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """Each row rounded in float64, by its definition."""
    x = x.double()
    largest = x.abs().amax(1, keepdim=True)
    if scheme != "fp8":
        return torch.round(x / largest * 127) * largest / 127
    scaled = x / largest * 448
    exponent = scaled.abs().clamp(min=2.0**-6).log2().floor()  # subnormal numbers below
    step = torch.exp2(exponent - 3)
    return torch.round(scaled / step) * step * largest / 448


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8"])
def test_rows_and_weights_are_rounded_as_the_scheme_says(scheme: str) -> None:
    rows, weight = rows_and_weight(7.0)
    expected = rows.double() if scheme == "int8-weights" else oracle(rows, scheme)
    assert torch.allclose(rounded_rows(rows, scheme).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(rounded_weight(weight, scheme).double(), oracle(weight, scheme), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scheme", "least", "most"), [("int8", 37, 43), ("int8-weights", 40, 46), ("fp8", 26, 32)])
def test_a_well_behaved_product_keeps_what_the_bars_presume(scheme: str, least: float, most: float) -> None:
    rows, weight = rows_and_weight()
    exact = rows.double() @ weight.double().T
    rounded_x = rows.double() if scheme == "int8-weights" else oracle(rows, scheme)
    found = product_sqnr(rows, weight, scheme)
    assert found == pytest.approx(decibels(exact, rounded_x @ oracle(weight, scheme).T - exact), abs=0.05)
    assert least < found < most


def test_a_table_is_rounded_row_by_row() -> None:
    table = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    table[::2] *= 1000.0  # one scale for all rows would leave the others nothing
    assert table_sqnr(table[1::2]) == pytest.approx(table_sqnr(table), abs=1.0)
    assert decibels(table.double(), oracle(table, "int8") - table.double()) == pytest.approx(
        table_sqnr(table), abs=0.01
    )


@pytest.mark.parametrize("share", SHARES)
def test_factors_are_powers_of_two_and_change_no_product(share: float) -> None:
    rows, weight = rows_and_weight(37.0)
    factors = smoothing(rows.abs().amax(0), weight.abs().amax(0), share)
    assert (torch.frexp(factors).mantissa == 0.5).all()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w, f = rows.to(dtype), weight.to(dtype), factors.to(dtype)
        assert torch.equal((x * f) / f, x)
        assert torch.equal((w / f) * f, w)
        assert torch.equal((x * f).double() @ (w / f).double().T, x.double() @ w.double().T)


def test_factors_follow_smoothquant() -> None:
    x, w = torch.tensor([1.0, 4.0, 64.0, 1.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 1 / 16, 1.0])
    # max|w| ** (1 - share) / max|x| ** share, over the median of them.
    assert smoothing(x, w, 1.0).tolist() == [4.0, 1.0, 1 / 16, 4.0, 1.0]
    assert smoothing(x, w, 0.5).tolist() == [2.0, 1.0, 1 / 4, 1 / 2, 1.0]


def test_columns_that_were_never_seen_or_have_no_weight_are_left_alone() -> None:
    x, w = torch.tensor([0.0, 2.0, 2.0, 1e30, 0.0]), torch.tensor([1.0, 0.0, 2.0, 1e-30, 0.0])
    for share in SHARES:
        factors = smoothing(x, w, share)
        assert factors[[0, 1, 4]].tolist() == [1.0, 1.0, 1.0]
        assert factors.isfinite().all()
        assert (factors > 0).all()
    assert smoothing(torch.zeros(3), torch.zeros(3), 0.5).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("outlier", [30.0, 100.0])
@pytest.mark.parametrize("scheme", ["int8", "int8-weights"])
def test_smoothing_brings_back_what_outliers_cost(scheme: str, outlier: float) -> None:
    rows, weight = rows_and_weight(outlier)
    plain, without = product_sqnr(rows, weight, scheme), product_sqnr(*rows_and_weight(), scheme)
    factors, found = best_smoothing(rows, rows.abs().amax(0), weight, scheme)
    assert plain < 30 < without - 9
    assert found > without - 1.5  # factors that are powers of two cost a little
    assert found == product_sqnr(rows, weight, scheme, factors)


def test_outliers_cost_float8_little_and_smoothing_wins_nothing() -> None:
    rows, weight = rows_and_weight(30.0)
    plain, without = product_sqnr(rows, weight, "fp8"), product_sqnr(*rows_and_weight(), "fp8")
    assert plain == pytest.approx(without, abs=1.0)
    assert best_smoothing(rows, rows.abs().amax(0), weight, "fp8")[1] == pytest.approx(plain, abs=1.0)
