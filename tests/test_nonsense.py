"""Packed batches and encoders given nonsense: one error that names the argument, never another batch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.errors import GeneformerFastError, InputError, VocabularyError
from geneformer_fast.ragged import Padding, Ragged

IDS = torch.tensor([5, 9, 1, 3, 3, 7])
CELLS = Ragged.from_lengths(IDS, [4, 0, 2])
CONFIG = EncoderConfig(vocab_size=12, width=16, n_layers=1, n_heads=2, ff_width=24, max_len=8)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([-1, 7], ValueError, "lengths must not be negative: cell 0 has -1"),
        ([7, -1], ValueError, "lengths must not be negative: cell 1 has -1"),
        ([4, 3], ValueError, "lengths add up to 7 but there are 6"),
        ([], ValueError, "lengths add up to 0"),
        ([4.0, 2.0], ValueError, "lengths must be integers"),
        ([3.5, 2.5], ValueError, "lengths must be integers"),
        ([True] * 6, ValueError, "lengths must be integers"),
        (torch.tensor([4.0, 2.0]), ValueError, "lengths must be integers"),
        (np.array([3.9, 2.9]), ValueError, "lengths must be integers"),
        (torch.tensor([[4, 2]]), ValueError, "lengths must have 1 axis"),
        (6, ValueError, "lengths must have 1 axis"),
        ([2**31, 6 - 2**31], ValueError, "lengths must not be negative"),
        ([2**62, 2**62, 2**62, 2**62 + 6], ValueError, "lengths must add up to less than"),
        ("42", TypeError, "lengths must be integers"),
        (["4", "2"], TypeError, "lengths must be integers"),
        ([None], TypeError, "lengths must be integers"),
        (None, TypeError, "lengths must be integers"),
        ([[4], [1, 1]], TypeError, "lengths must be integers"),
    ],
)
def test_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Ragged.from_lengths(IDS, lengths)


def test_lengths_of_every_kind_of_integer() -> None:
    for lengths in ([4, 0, 2], (4, 0, 2), np.array([4, 0, 2], dtype="u1"), torch.tensor([4, 0, 2], dtype=torch.int16)):
        found = Ragged.from_lengths(IDS, lengths)
        assert found.cu_seqlens.tolist() == [0, 4, 4, 6]
        assert found.cu_seqlens.dtype == torch.int32
        assert found.max_len == 4


FLOATS = CELLS.with_values(torch.rand(6))
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "values a list": (lambda: Ragged.from_lengths([1, 2], [2]), TypeError, "values must be a tensor, not list"),
    "values a number": (lambda: Ragged.from_lengths(torch.tensor(3), [1]), ValueError, "values must be one after"),
    "values complex": (lambda: Ragged.from_lengths(IDS.cfloat(), [6]), ValueError, "values must be real numbers"),
    "cells a tensor": (lambda: Ragged.from_cells(IDS), TypeError, "cells must be a list"),
    "cells a word": (lambda: Ragged.from_cells("ab"), TypeError, "cells must be a list"),
    "cells numbers": (lambda: Ragged.from_cells([1, 2]), TypeError, "cells must be a list"),
    "cells of two kinds": (lambda: Ragged.from_cells([[1, 2], [0.5]]), ValueError, "cells must have one dtype"),
    "padded a list": (lambda: Ragged.from_padded([[1]], torch.ones(1, 1)), TypeError, "padded must be a tensor"),
    "mask a list": (lambda: Ragged.from_padded(torch.ones(1, 1), [[1]]), TypeError, "mask must be a tensor"),
    "mask of another shape": (lambda: Ragged.from_padded(torch.ones(2, 3), torch.ones(3, 2)), ValueError, "mask"),
    "padding of another shape": (
        lambda: Padding.of(torch.ones(3, 2), 2, 3, torch.device("cpu")), ValueError, r"mask \[3, 2\] must be \[2, 3\]",
    ),
    "padding of a vector": (lambda: Padding.of(torch.ones(6), 2, 3, torch.device("cpu")), ValueError, "mask must"),
    "too short a padding": (lambda: CELLS.to_padded(length=3), ValueError, "cannot pad to 3"),
    "a broken length": (lambda: CELLS.to_padded(length=4.5), TypeError, "length must be an integer"),
    "a fill that is cut off": (lambda: CELLS.to_padded(0.5), ValueError, "fill must be a number that"),
    "a fill of another kind": (lambda: CELLS.to_padded(float("inf")), ValueError, "fill must be a number that"),
    "a fill that is too large": (lambda: CELLS.to_padded(10**400), ValueError, "fill must be a number that"),
    "too large a fill for floats": (lambda: FLOATS.to_padded(10**400), ValueError, "fill must be a number that"),
    "too long a padding": (lambda: CELLS.to_padded(length=2**40), ValueError, "length must be between 0 and"),
    "a mask of a broken length": (lambda: CELLS.mask(4.5), TypeError, "length must be an integer"),
    "a mask of negative length": (lambda: CELLS.mask(-1), ValueError, "length must be between 0 and"),
    "a mask of one axis": (lambda: Ragged.from_padded(torch.ones(3), torch.ones(3)), ValueError, "mask must have 2"),
    "cells of other axes": (
        lambda: Ragged.from_cells([torch.ones(2, 3), torch.ones(2, 4)]), ValueError, "cells must agree",
    ),
    "a cell that is a number": (lambda: Ragged.from_cells([torch.tensor(3)]), TypeError, "cells must be a list"),
    "sparse values": (lambda: Ragged.from_lengths(torch.ones(3).to_sparse(), [3]), ValueError, "values must be dense"),
    "a fill that is no number": (lambda: FLOATS.to_padded("x"), ValueError, "fill must be a number"),
    "values of others": (lambda: CELLS.with_values(IDS[1:]), ValueError, "5 values do not fit 6 tokens"),
    "values no tensor": (lambda: CELLS.with_values([1] * 6), TypeError, "values must be a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_packing_refuses(what: str) -> None:
    call, error, message = REFUSED[what]
    with pytest.raises(error, match=message):
        call()


def test_one_row_of_a_mask_is_for_all_cells() -> None:
    mask = torch.tensor([[1, 1, 0]])
    found, expected = (Padding.of(each, 2, 3, torch.device("cpu")) for each in (mask, mask.expand(2, 3)))
    assert found.cu_seqlens.tolist() == expected.cu_seqlens.tolist() == [0, 2, 4]
    assert torch.equal(found.index, expected.index)


def replaced(**parts: Any) -> Ragged:
    return dataclasses.replace(CELLS, **parts)


BROKEN = {
    "bounds that start elsewhere": (replaced(cu_seqlens=torch.tensor([1, 4, 4, 6])), ValueError, "cu_seqlens must run"),
    "bounds that end elsewhere": (replaced(cu_seqlens=torch.tensor([0, 4, 4, 5])), ValueError, "cu_seqlens must run"),
    "bounds that decrease": (
        replaced(cu_seqlens=torch.tensor([0, 5, 4, 6])),
        ValueError,
        "cu_seqlens must not decrease",
    ),
    "bounds of floats": (
        replaced(cu_seqlens=torch.tensor([0.0, 6.0])),
        ValueError,
        "cu_seqlens must be int32 or int64",
    ),
    "bounds a list": (replaced(cu_seqlens=[0, 6]), TypeError, "cu_seqlens must be a tensor"),
    "bounds elsewhere": (replaced(cu_seqlens=CELLS.cu_seqlens.to("meta")), ValueError, "cu_seqlens must be on cpu"),
    "a longest that is not": (replaced(max_len=3), ValueError, "max_len must be at least 4"),
    "a longest of floats": (replaced(max_len=4.0), TypeError, "max_len must be an integer"),
    "values a list": (replaced(values=[1] * 6), TypeError, "values must be a tensor"),
    "no batch": (IDS, TypeError, "tokens must be a Ragged"),
    "a list": ([[1, 2]], TypeError, "tokens must be a Ragged"),
    "floats": (FLOATS, InputError, "reads token ids"),
    "bytes": (replaced(values=IDS.to(torch.int8)), InputError, "reads token ids"),
    "booleans": (replaced(values=IDS.bool()), InputError, "reads token ids"),
    "rows": (replaced(values=IDS[:, None]), InputError, "reads token ids"),
    "ids below": (replaced(values=IDS - 9), VocabularyError, "token id"),
    "ids beyond": (replaced(values=IDS + 9), VocabularyError, "token id"),
    "cells too long": (Ragged.from_cells([[1] * 9]), VocabularyError, "9 tokens but the model has 8"),
}


@pytest.mark.parametrize("entry", ["forward", "hidden_states", "attention_weights"])
@pytest.mark.parametrize("what", BROKEN)
def test_an_encoder_refuses(what: str, entry: str) -> None:
    tokens, error, message = BROKEN[what]
    with pytest.raises(error, match=message):
        getattr(Encoder(CONFIG).eval(), entry)(tokens)


def test_bounds_changed_after_packing_are_seen() -> None:
    """In whichever way: their values are looked at, not a version of them."""
    encoder, tokens = Encoder(CONFIG).eval(), Ragged.from_lengths(IDS, [4, 0, 2])
    encoder(tokens)
    tokens.cu_seqlens.numpy()[1] = 5
    with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
        encoder(tokens)


@pytest.mark.parametrize("layer", [True, 1.0, -1, 5, None, "first", [0]])
def test_layers_that_there_are_not(layer: Any) -> None:
    with pytest.raises(GeneformerFastError, match="no layer"):
        Encoder(CONFIG).eval()(CELLS, layer=layer)


def test_an_encoder_over_values_refuses() -> None:
    config = EncoderConfig(
        inputs="values", n_bins=5, vocab_size=0, width=16, n_layers=1, n_heads=2, ff_width=24, max_len=8
    )
    encoder = Encoder(config).eval()
    assert encoder(FLOATS).values.isfinite().all()
    for value in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="NaN or infinite"):
            encoder(FLOATS.map(lambda values, value=value: values.clone().fill_(value)))
    with pytest.raises(InputError, match="reads values"):
        encoder(CELLS)


def test_heads_refuse() -> None:
    encoder = Encoder(CONFIG, "mlm").eval()
    hidden, targets = encoder(CELLS), torch.tensor([1, 2])
    for rows, error, message in (
        ([0, 1], TypeError, "rows must be a tensor"),
        (torch.tensor([0.0, 1.0]), ValueError, "rows must be int32 or int64 or bool"),
        (torch.tensor([[0, 1]]), ValueError, "rows must have 1 axis"),
        (torch.tensor([0, 6]), ValueError, "rows must lie between 0 and 5"),
        (torch.tensor([0, -1]), ValueError, "rows must lie between 0 and 5"),
        (torch.ones(5, dtype=torch.bool), ValueError, r"rows \[5\] must name 6 tokens"),
    ):
        with pytest.raises(error, match=re.escape(message) if "[" not in message else message):
            encoder.logits(hidden, rows)
        with pytest.raises(error, match=re.escape(message) if "[" not in message else message):
            encoder.mlm_loss(hidden, rows, targets)
    rows = torch.tensor([0, 1])
    for bad, error, message in (
        (torch.tensor([1, 12]), ValueError, "target 12 is outside"),
        (torch.tensor([1.0, 2.0]), ValueError, "targets must be integers"),
        (torch.tensor([1]), ValueError, "targets must be int64"),
        ([1, 2], TypeError, "targets must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            encoder.mlm_loss(hidden, rows, bad)
    for bad, error in (
        (hidden.values, TypeError),
        (CELLS, ValueError),
        (CELLS.with_values(torch.ones(6, 3)), ValueError),
    ):
        with pytest.raises(error, match="hidden"):
            encoder.logits(bad)
        with pytest.raises(error, match="hidden"):
            encoder.mlm_loss(bad, rows, targets)


@pytest.mark.parametrize(
    ("n_classes", "error"), [(0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError)]
)
@pytest.mark.parametrize("head", ["cells", "genes"])
def test_numbers_of_classes(head: str, n_classes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n_classes"):
        Encoder(CONFIG, head, n_classes=n_classes)
