"""The encoder through all Triton kernels, interpreted: one graph, nothing waited for, a kernel for every LayerNorm."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from geneformer_kernels.dispatch import use_impl
from torch.utils._python_dispatch import TorchDispatchMode

from geneformer_fast import Encoder, EncoderConfig, Ragged
from geneformer_fast import block as block_module

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled for the card in this process"
)
GEOMETRY = dict(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=50, max_len=64)
KINDS = {
    "post-norm": {},
    "pre-norm": dict(norm="pre", activation="gelu_tanh", final_norm=True),
}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Every operation that has a kernel runs on it."""
    with use_impl("triton"):
        yield


def model(kind: str, **changes: object) -> Encoder:
    torch.manual_seed(3)
    encoder = Encoder(EncoderConfig(**{**GEOMETRY, **KINDS[kind], **changes}), head="mlm")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 + (0.05 if parameter.ndim == 1 else 0.0))
    return encoder


def batch(*lengths: int) -> Ragged:
    generator = torch.Generator().manual_seed(len(lengths))
    return Ragged.from_cells([torch.randint(1, 50, (length,), generator=generator) for length in lengths])


def loss_of(encoder: Encoder, tokens: Ragged) -> torch.Tensor:
    rows = torch.arange(0, tokens.n_tokens, 3)
    return encoder.mlm_loss(encoder(tokens), rows, tokens.values[rows])


@pytest.mark.parametrize("kind", ["post-norm", pytest.param("pre-norm", marks=pytest.mark.slow)])
def test_one_graph_serves_batches_of_any_size(kind: str) -> None:
    """``fullgraph``: no break between tokens and loss. One compilation, though cells and tokens change in number."""
    torch._dynamo.reset()
    encoder = model(kind, n_layers=1, dropout=0.0, attention_dropout=0.0).train()
    graphs, n_graphs = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(loss_of, backend=backend, fullgraph=True, dynamic=True)
    for lengths in ((9, 1, 30), (17, 4, 2, 11)):
        found = []
        for function in (loss_of, compiled):
            encoder.zero_grad()
            loss = function(encoder, batch(*lengths))
            loss.backward()
            found.append((loss.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters()}))
        (expected, gradients), (loss, others) = found
        torch.testing.assert_close(loss, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        n_graphs.append(len(graphs))
    assert n_graphs[0] == n_graphs[1], "the second batch was compiled anew"
    names = {str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"}
    for op in ("embed_tokens_fwd", "varlen_attention_qkv_fwd", "residual_layernorm_fwd", "feed_forward_fwd",
               "mlm_cross_entropy_fwd"):  # fmt: skip
        assert any(op in name for name in names), (op, names)


class Waits(TorchDispatchMode):
    """Raises for operators whose result's size or value the host would have to ask a card for."""

    ASKING = ("_local_scalar_dense", "nonzero", "unique", "equal", "masked_select", "is_nonzero", "item")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition("::")[2].partition(".")[0]
        if name.startswith(self.ASKING) or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            raise AssertionError(f"{name} would wait for the card")
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            raise AssertionError("indexing with booleans would wait for the card")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither operators nor, within this project's own operators, methods may ask for values."""

    def guarded(name: str) -> None:
        plain = getattr(torch.Tensor, name)

        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            frame, asks = sys._getframe(1), True
            while frame is not None:
                path = frame.f_code.co_filename
                if "/triton/" in path or os.path.basename(path).startswith("kernel"):  # interpreted, as if on the card
                    asks = False
                    break
                frame = frame.f_back
            if asks:
                raise AssertionError(f"{name} would wait for the card")
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, method)

    # As on a card, where nobody looks at values of tokens and lengths.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
        guarded(name)
    try:
        with Waits():
            yield
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["post-norm", pytest.param("pre-norm", marks=pytest.mark.slow)])
def test_nothing_is_waited_for_between_tokens_and_hidden_states(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph captures; ``tests/gpu`` captures one. In training neither, up to the gradients."""
    encoder, tokens = model(kind).train(), batch(9, 1, 30)
    with torch.no_grad():
        expected = encoder.eval()(tokens).values
    rows = torch.arange(0, tokens.n_tokens, 3)
    with no_waiting(monkeypatch):
        with torch.no_grad():
            hidden = encoder(tokens).values
        loss = encoder.train().mlm_loss(encoder(tokens), rows, tokens.values[rows])
        loss.backward()
    torch.testing.assert_close(hidden, expected)
    assert torch.isfinite(loss)


def test_the_guard_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3)
    for asks in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: bool(x[0] > 1),
        lambda: x.tolist(),
    ):
        with pytest.raises(AssertionError, match="would wait"), no_waiting(monkeypatch):
            asks()


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [
        (32, "float32", 2),  # attention's and the feed-forward half's
        (128, "float16", 1),  # the second is part of the compact kernel
    ],
)
def test_every_layernorm_has_a_kernel(width: int, dtype: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape)
        return plain(*args, **kwargs)

    plain = block_module.residual_layernorm
    monkeypatch.setattr(block_module, "residual_layernorm", counting)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *_, **__: pytest.fail("torch's own LayerNorm ran"))
    encoder = model("post-norm", width=width, ff_width=64, n_layers=1).cast(dtype).eval()
    with torch.no_grad():
        encoder(batch(9, 1, 30))
    assert len(calls) == expected
