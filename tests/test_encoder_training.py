"""The encoder as a thing that is trained: loss on masked rows, compilation, autocast, recomputation, seeds."""

from __future__ import annotations

import threading

import pytest
import torch
from geneformer_kernels.dispatch import use_impl

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.ragged import Ragged

GEOMETRY = dict(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=50, max_len=64)
KINDS = {
    "post-norm": {},
    "pre-norm": dict(norm="pre", activation="gelu_tanh", final_norm=True),
    "swiglu": dict(norm="pre", activation="swiglu", embedding_norm=False, final_norm=True),
}


def model(kind: str = "post-norm", **changes: object) -> Encoder:
    torch.manual_seed(3)
    encoder = Encoder(EncoderConfig(**{**GEOMETRY, **KINDS[kind], **changes}), head="mlm")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 + (0.05 if parameter.ndim == 1 else 0.0))
    return encoder


def batch(seed: int = 0) -> Ragged:
    generator = torch.Generator().manual_seed(seed)
    return Ragged.from_cells([torch.randint(1, 50, (length,), generator=generator) for length in (9, 1, 30, 17)])


def masked(tokens: Ragged) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(0, tokens.n_tokens, 5)
    return rows, tokens.values[rows]


def loss_and_gradients(encoder: Encoder, tokens: Ragged) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    encoder.zero_grad()
    rows, targets = masked(tokens)
    loss = encoder.mlm_loss(encoder(tokens), rows, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_tied", [True, False])
def test_mlm_loss_is_cross_entropy_of_the_logits(is_tied: bool) -> None:
    encoder, tokens = model(tied_decoder=is_tied).double().eval(), batch()
    rows, targets = masked(tokens)
    found, gradients = loss_and_gradients(encoder, tokens)
    encoder.zero_grad()
    hidden = encoder(tokens)
    expected = torch.nn.functional.cross_entropy(encoder.logits(hidden, rows), targets)
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-6, rtol=1e-6)
    expected.backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_mlm_loss_needs_its_head() -> None:
    encoder = Encoder(EncoderConfig(**GEOMETRY))
    with pytest.raises(ValueError, match='head="mlm"'):
        encoder.mlm_loss(encoder(batch()), *masked(batch()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_dropout", [False, True])
def test_recomputation_changes_nothing(kind: str, has_dropout: bool) -> None:
    changes = {} if has_dropout else dict(dropout=0.0, attention_dropout=0.0)
    encoder, tokens = model(kind, **changes).train(), batch()
    found = []
    for encoder.is_recomputing in (False, True):
        torch.manual_seed(11)
        found.append(loss_and_gradients(encoder, tokens))
    (plain, gradients), (again, recomputed) = found
    assert torch.equal(plain, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("op", ["varlen_attention", "feed_forward", None])
def test_recomputation_makes_the_choices_of_the_forward_pass(op: str | None) -> None:
    """In other threads too, where autograd recomputes on a card."""
    encoder, tokens = model(dropout=0.0, attention_dropout=0.0).train(), batch()
    rows, targets = masked(tokens)
    found = []
    for encoder.is_recomputing in (False, True):
        with use_impl("reference", op):
            loss = encoder.mlm_loss(encoder(tokens), rows, targets)
        encoder.zero_grad()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        found.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    assert found[1]
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_choices_cannot_be_made_within_a_compiled_function() -> None:
    """Its operations are chosen while it is compiled, so the block would come too late: it breaks the graph."""
    encoder, tokens = model(n_layers=1).eval(), batch()

    def run() -> torch.Tensor:
        with use_impl("reference"):
            return encoder(tokens).values

    with torch.no_grad():
        with use_impl("reference"):
            expected = encoder(tokens).values
        torch.testing.assert_close(torch.compile(run, backend="eager")(), expected, atol=0, rtol=0)


def test_dropout_depends_on_the_seed_alone() -> None:
    encoder, tokens = model(dropout=0.3, attention_dropout=0.3).train(), batch()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(loss_and_gradients(encoder, tokens)[0]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_float32_parameters_and_stream(kind: str) -> None:
    encoder, tokens = model(kind, dropout=0.0, attention_dropout=0.0).train(), batch()
    exact, exact_gradients = loss_and_gradients(encoder, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(tokens)
        assert hidden.values.dtype == torch.float32
        found, gradients = loss_and_gradients(encoder, tokens)
    assert abs(found - exact) < 0.02 * exact
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        if exact_gradients[name].norm() > 1e-4:
            cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact_gradients[name].flatten(), dim=0)
            assert cosine > 0.98, name


@pytest.mark.parametrize(
    ("kind", "is_training"),
    [
        *(("post-norm", False), ("pre-norm", True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("post-norm", True), ("swiglu", False))),
    ],
)
def test_compiles_without_a_graph_break(kind: str, is_training: bool) -> None:
    """One layer, for the compiler takes its time for each, and each is like the first."""
    torch._dynamo.reset()
    encoder = model(kind, n_layers=1, dropout=0.0, attention_dropout=0.0).train(is_training)
    tokens = batch()
    rows, targets = masked(tokens)

    def step(tokens: Ragged) -> torch.Tensor:
        return encoder.mlm_loss(encoder(tokens), rows, targets)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    expected, gradients = loss_and_gradients(encoder, tokens)
    encoder.zero_grad()
    found = compiled(tokens)
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-5)
    found.backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


def test_parameters_are_plain() -> None:
    """What DDP and FSDP see: leaf parameters, each once, all of them with a gradient after a step."""
    encoder, tokens = model().train(), batch()
    _, gradients = loss_and_gradients(encoder, tokens)
    assert all(type(parameter) is torch.nn.Parameter and parameter.is_leaf for parameter in encoder.parameters())
    assert gradients.keys() == {name for name, _ in encoder.named_parameters()}
