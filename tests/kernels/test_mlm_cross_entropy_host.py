"""mlm_cross_entropy in bfloat16 on the CPU: many chunks of the vocabulary, any number of threads, sharp logits."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import mlm_cross_entropy
from geneformer_kernels.ops.mlm_cross_entropy import host
from test_mlm_cross_entropy import check, gradients, inputs


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CHUNK_BYTES", 4096)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize(("n_rows", "width", "n_vocab"), [(37, 24, 333), (1, 8, 2500), (64, 16, 32), (5, 3, 1)])
def test_many_chunks(n_rows: int, width: int, n_vocab: int) -> None:
    generator = torch.Generator().manual_seed(1)
    check(inputs(n_rows, width, n_vocab, torch.bfloat16), "torch", torch.rand(n_rows, generator=generator) + 0.5)


@pytest.mark.usefixtures("_small_chunks")
def test_sharp_logits() -> None:
    """Logits of hundreds of nats, of both signs, lose nothing and overflow nowhere."""
    hidden, weight, bias, targets = inputs(37, 24, 333, torch.bfloat16)
    for factor in (40.0, -40.0):
        check([hidden * factor, weight, bias, targets], "torch", torch.ones(37))


@pytest.mark.usefixtures("_small_chunks")
def test_threads_change_nothing() -> None:
    tensors, weights = inputs(37, 24, 333, torch.bfloat16), torch.ones(37)
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(gradients(mlm_cross_entropy, tensors, weights, impl="torch"))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one, other)


def test_nan_is_not_hidden() -> None:
    hidden, weight, bias, targets = inputs(6, 8, 50, torch.bfloat16)
    hidden[3, 2] = float("nan")
    loss, d_hidden, *_ = gradients(mlm_cross_entropy, [hidden, weight, bias, targets], torch.ones(6), impl="torch")
    assert loss.isnan().tolist() == [row == 3 for row in range(6)]
    assert d_hidden[3].isnan().all()
