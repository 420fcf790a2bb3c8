"""mlm_cross_entropy in bfloat16 on the CPU: many chunks of the vocabulary, any number of threads, sharp logits."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels import mlm_cross_entropy
from geneformer_kernels.ops.mlm_cross_entropy import host, op
from test_mlm_cross_entropy import LargestTensor, check, gradients, inputs


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_CHUNK_BYTES", 4096)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize(
    ("n_rows", "width", "n_vocab"), [(37, 24, 333), (1, 8, 2500), (64, 16, 32), (5, 3, 1), (150, 8, 100)]
)
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
    tensors, weights = inputs(150, 24, 333, torch.bfloat16), torch.ones(150)
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


OPERATORS = {each.overload: each.function for each in (op.mlm_cross_entropy_fwd, op.mlm_cross_entropy_bwd)}


class LargestInside(LargestTensor):
    """Looks into the operators of the loss, which are one operation for torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in OPERATORS:
            return super().__torch_dispatch__(func, types, args, kwargs)
        with self:
            return OPERATORS[func](*args, **(kwargs or {}))


def test_memory_does_not_grow_with_the_square_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is larger than the decoder's gradient, hidden's, or a chunk, however many rows there are."""
    monkeypatch.setattr(host, "_CHUNK_BYTES", 2**14)
    torch.set_num_threads(1)  # what a thread allocates, only that thread's mode sees
    width, n_vocab = 16, 2000
    for n_rows in (1024, 4096):
        tensors = inputs(n_rows, width, n_vocab, torch.bfloat16)
        with LargestInside() as largest:
            gradients(mlm_cross_entropy, tensors, torch.ones(n_rows), impl="torch")
        # The last chunk of the vocabulary may be a narrow one.
        assert 4 * n_vocab * width <= largest.n_bytes <= max(4.2 * n_vocab * width, 4 * n_rows * width, 2**14)


def test_nan_is_not_hidden() -> None:
    hidden, weight, bias, targets = inputs(6, 8, 50, torch.bfloat16)
    hidden[3, 2] = float("nan")
    loss, d_hidden, *_ = gradients(mlm_cross_entropy, [hidden, weight, bias, targets], torch.ones(6), impl="torch")
    assert loss.isnan().tolist() == [row == 3 for row in range(6)]
    assert d_hidden[3].isnan().all()
