"""Every operation called with nonsense: the same error from every implementation, with the argument's name in it."""

from __future__ import annotations

import inspect
import itertools
import re
from typing import Any

import geneformer_kernels
import numpy as np
import pytest
import torch
from geneformer_kernels import arguments
from geneformer_kernels.dispatch import ImplUnavailableError
from geneformer_kernels.ops.rank_genes import columns, host
from nonsense import CASES, INF, NAN, C, H, T, counts, error_of, floats, ints

BAD = [pytest.param(op, name, id=f"{op}-{name}") for op, case in CASES.items() for name in case.bad]


def test_every_operation_and_every_argument_is_here() -> None:
    assert set(CASES) == set(geneformer_kernels.__all__)
    for name, case in CASES.items():
        parameters = set(inspect.signature(case.function).parameters) - {"impl", "is_division"}
        assert parameters == set(case.bad) == set(case.good), name


@pytest.mark.parametrize("op", CASES)
def test_good_arguments_are_taken(op: str) -> None:
    case = CASES[op]
    for impl in (None, *case.impls):
        assert error_of(case, case.good, impl) is None


@pytest.mark.parametrize(("op", "name"), BAD)
def test_nonsense_is_refused(op: str, name: str) -> None:
    """With one error whoever computes, which names the argument, or the row of the matrix."""
    case, wrong = CASES[op], CASES[op].wrong(name)
    assert wrong
    for what, value in wrong.items():
        errors = {}
        for impl in (None, *case.impls):
            error = error_of(case, case.good | {name: value}, impl)
            assert isinstance(error, TypeError | ValueError), (what, impl, error)
            assert not isinstance(error, ImplUnavailableError), what
            errors[impl] = type(error), str(error)
        assert len(set(errors.values())) == 1, (what, errors)
        kind, message = next(iter(errors.values()))
        words = (name, *case.also.get(name, ()))
        assert any(re.search(rf"\b{word}\b", message) for word in words), (what, message)
        is_word = name in ("activation", "mode", "norm", "reduction", "device", "stabiliser")
        if isinstance(value, list | np.ndarray | str | bool) and not is_word:
            assert kind is TypeError, what


@pytest.mark.parametrize("op", CASES)
def test_an_implementation_that_there_is_not(op: str) -> None:
    case = CASES[op]
    if case.impls:
        for impl in ("cuda", 3):
            assert isinstance(error_of(case, case.good, impl), ValueError)


@pytest.mark.parametrize("op", CASES)
def test_numbers_of_numpy_are_numbers(op: str) -> None:
    case = CASES[op]
    named = {
        name: np.float32(value) if isinstance(value, float) else np.int64(value)
        for name, value in case.good.items()
        if isinstance(value, int | float)
    }
    for impl in case.impls:
        assert error_of(case, case.good | named, impl) is None


@pytest.mark.parametrize("op", CASES)
def test_values_on_a_card_are_not_looked_at(op: str) -> None:
    """It would make everybody wait. On the device ``meta`` there are none: who looks fails."""
    case = CASES[op]
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in case.good.items()}
    error = error_of(case, on_meta, "triton" if "triton" in case.impls else None)
    if case.impls or op in ("int8_mode", "quantize_rows_fp8"):
        # Kernels are not for this device, and neither is autocast, of which operations ask: the checks are over then.
        is_over = error is None or isinstance(error, ImplUnavailableError)
        assert is_over or "unknown device type for autocast" in str(error), error
    else:  # one needs values to say anything, the others are asked for the matrix to be finite
        assert isinstance(error, RuntimeError), error


def test_wrong_counts_on_a_card_are_seen_when_the_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "is_looked_into", lambda x: False)
    for value in (NAN, INF, -1.0):
        given = counts() | {"data": torch.tensor([2.0, value, 5, 3, 4])}
        with pytest.raises(ValueError, match="data must be finite and not negative"):
            geneformer_kernels.rank_genes(**given, impl="triton")


def _block() -> tuple[dict[str, Any], columns.Columns]:
    given = {name: value.numpy() for name, value in counts().items() if isinstance(value, torch.Tensor)}
    tabulated = columns.prepare_columns(given.pop("column_to_gene"), given.pop("token_ids"), given.pop("medians"))
    return given, tabulated


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("out_dtype", "int8", "out_dtype int8 does not hold token 300"),
        ("out_dtype", "float32", "out_dtype must be an integer dtype"),
        ("indices", np.array([0, 1, 3, 1, 2.5]), "indices must be integers"),
        ("indptr", np.array([0, 3.0, 5]), "indptr must be integers"),
        ("data", np.array([2.0, NAN, 5, 3, 4]), "data must be finite"),
        ("data", np.array([2, -1, 5, 3, 4]), "data must be finite and not negative"),
        ("data", np.array([2.0, INF, 5, 3, 4], dtype=np.float32), "data must be finite"),
        ("data", np.array(list("abcde")), "data must be real numbers"),
    ],
)
def test_compiled_ranking_refuses_what_it_would_have_to_change(name: str, value: Any, message: str) -> None:
    """Fractions cut off, tokens that wrap around, counts that have no order."""
    block, tabulated = _block()
    with pytest.raises(ValueError, match=message):
        host.rank_block(columns=tabulated, is_division=False, keep=2, first=300, **(block | {name: value}))


def test_tokens_that_fit_are_written_in_any_dtype() -> None:
    block, tabulated = _block()
    for dtype in ("int8", "uint8", "int16", "int64"):
        values, _ = host.rank_block(columns=tabulated, is_division=False, keep=2, **block, out_dtype=dtype)
        assert values.dtype == dtype
        assert values.tolist() == [3, 4, 4, 9]


@pytest.mark.parametrize("name", ["column_to_gene", "token_ids"])
def test_columns_are_whole_numbers(name: str) -> None:
    given = dict(column_to_gene=[0, 1], token_ids=[3, 4], medians=[1.0, 2.0])
    with pytest.raises(ValueError, match=f"{name} must be integers"):
        columns.prepare_columns(**(given | {name: [0.0, 1.5]}))
    with pytest.raises(ValueError, match="column_to_gene names a gene that is not there"):
        columns.prepare_columns(**(given | {"column_to_gene": [0, -2]}))


def test_bounds_of_every_kind_of_integer() -> None:
    q = floats(T, H, C)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        bounds = ints(*itertools.accumulate((0, 4, 0, 2)), dtype=dtype)
        out = geneformer_kernels.varlen_attention(q, q, q, cu_seqlens=bounds)
        assert torch.equal(out, geneformer_kernels.varlen_attention(q, q, q, cu_seqlens=bounds.int()))


@pytest.mark.parametrize("impl", CASES["rank_genes"].impls)
def test_ranks_of_what_wants_a_gradient(impl: str) -> None:
    case = CASES["rank_genes"]
    expected = case.function(**case.good, impl=impl)
    wanting = {name: case.good[name].clone().requires_grad_() for name in ("data", "n_counts", "medians")}
    for found, wanted in zip(case.function(**{**case.good, **wanting}, impl=impl), expected, strict=True):
        assert torch.equal(found, wanted)
