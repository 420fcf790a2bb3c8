"""Dropout of bfloat16 on the CPU: chance, one mask for both passes, on any number of threads, seeded by torch."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import dropout as module
from geneformer_kernels.dropout import dropout, seeded_dropout

P = 0.3
SHAPE = (700, 300)  # more than one piece, and not a multiple of its size


def test_keeps_and_scales() -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16() + 3
    out = dropout(x, P)
    kept = out != 0
    torch.testing.assert_close(out[kept], (x[kept].double() / (1 - P)).bfloat16())
    # Six standard deviations of a mean over independent draws.
    assert abs(kept.double().mean() - (1 - P)) < 6 * (P * (1 - P) / x.numel()) ** 0.5
    for axis in (0, 1):
        shares = kept.double().mean(axis)
        assert (shares - (1 - P)).abs().max() < 6 * (P * (1 - P) / x.shape[axis]) ** 0.5
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept, dropout(x, P) != 0)):
        agree, expected = (a == b).double().mean(), P**2 + (1 - P) ** 2
        assert abs(agree - expected) < 6 * (expected * (1 - expected) / a.numel()) ** 0.5


def test_the_gradient_has_the_same_mask() -> None:
    x = torch.ones(SHAPE, dtype=torch.bfloat16).t().requires_grad_()  # not contiguous
    out = dropout(x, P)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert torch.equal(x.grad, out.detach())


def test_seed_decides_alone() -> None:
    x, before = torch.ones(SHAPE).bfloat16(), torch.get_num_threads()
    found = []
    try:
        for n_threads, seed in ((1, 4), (2, 4), (3, 4), (1, 5)):
            torch.set_num_threads(n_threads)
            torch.manual_seed(seed)
            found.append(dropout(x, P))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(10).bfloat16()
    assert dropout(x, 0.0) is x
    assert dropout(x, 1.0).tolist() == [0.0] * 10
    assert dropout(torch.ones(0, 3).bfloat16(), P).shape == (0, 3)
    assert dropout(torch.ones(9, dtype=torch.float64), P).dtype == torch.float64
    # Pieces of a mask are not one piece over and over.
    monkeypatch.setattr(module, "_PIECE", 8)
    pieces = seeded_dropout(torch.ones(800).bfloat16(), torch.tensor([1]), 0.5).view(-1, 8)
    assert len(pieces.unique(dim=0)) > 50


def test_registered_as_torch_wants_it() -> None:
    arguments = (torch.randn(6, 5).bfloat16().requires_grad_(), torch.tensor([2**40 + 7]), P)
    torch.library.opcheck(seeded_dropout.overload, arguments)
