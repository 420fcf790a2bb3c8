"""Attention's cells: derived once per forward pass and handed down, and never known from a pass before."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from geneformer_kernels import attention_cells, attention_scores, varlen_attention, varlen_attention_qkv
from geneformer_kernels.dispatch import use_impl
from geneformer_kernels.ops.varlen_attention import cells as module
from geneformer_kernels.ops.varlen_attention import launches, library, reference, sdpa
from geneformer_kernels.ops.varlen_attention.cells import AttentionCells
from geneformer_kernels.ops.varlen_attention.plan import TorchPlan

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.ragged import Ragged

LENGTHS, OTHERS = [5, 0, 33, 12], [20, 3, 0, 27]
CONFIG = EncoderConfig(
    vocab_size=40, width=32, n_layers=3, n_heads=2, ff_width=48, max_len=64, dropout=0.0, attention_dropout=0.0
)


def bounds_of(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def qkv_of(device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(sum(LENGTHS), 3, 2, 16, generator=generator) + 0.5).to(device)


def by_numpy(bounds: torch.Tensor, values: torch.Tensor) -> None:
    bounds.numpy()[:] = values.numpy()


def by_data(bounds: torch.Tensor, values: torch.Tensor) -> None:
    bounds.data.copy_(values)


def by_dlpack(bounds: torch.Tensor, values: torch.Tensor) -> None:
    torch.from_dlpack(bounds.__dlpack__()).copy_(values)


def in_place(bounds: torch.Tensor, values: torch.Tensor) -> None:
    bounds.copy_(values)


WRITERS = [by_numpy, by_data, by_dlpack, in_place]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the tiles of every list that is made."""
    made: list[int] = []
    real = launches.varlen_attention_tiles.function

    def counted(cu_seqlens: torch.Tensor, n_tokens: int, block_rows: int) -> torch.Tensor:
        made.append(block_rows)
        return real(cu_seqlens, n_tokens, block_rows)

    counted.function = counted
    monkeypatch.setattr(launches, "varlen_attention_tiles", counted)
    return made


@pytest.fixture
def by_packed_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The route of a card, with plain attention in place of its kernel, which is told the longest cell."""
    told: list[int] = []

    def attend(route, q, k, v, bounds, longest, scale, dropout_p, needs_grad):
        told.append(longest)
        assert longest >= int(bounds.diff().max())
        return reference.varlen_attention(q, k, v, bounds, scale)

    monkeypatch.setattr(library, "attend", attend)
    monkeypatch.setattr(sdpa, "_route", lambda *_: TorchPlan("efficient", "for this test"))
    return told


@pytest.mark.parametrize("write", WRITERS)
def test_a_longer_cell_is_noticed_however_it_was_written(write: Callable, by_packed_kernels: list[int]) -> None:
    """Torch counts no version for three of these; a kernel told that no cell is longer than 33 would cut one off."""
    qkv, bounds = qkv_of(), bounds_of(LENGTHS)
    for lengths in (LENGTHS, [50, 0, 0, 0]):
        write(bounds, bounds_of(lengths))
        out = varlen_attention_qkv(qkv, cu_seqlens=bounds, impl="torch")
        torch.testing.assert_close(out, reference.varlen_attention(*qkv.unbind(1), bounds, 0.25))
    assert by_packed_kernels == [33, 50]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_encoder_sees_the_cells_of_every_pass(write: Callable, impl: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG).eval()
    ids = torch.randint(1, 40, (sum(LENGTHS),))
    tokens = Ragged(ids, bounds_of(LENGTHS), 33)
    with torch.no_grad(), use_impl(impl, "varlen_attention"):
        encoder(tokens)
        write(tokens.cu_seqlens, bounds_of(OTHERS))
        found = encoder(tokens).values
        expected = encoder(Ragged(ids, bounds_of(OTHERS), 27)).values
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_lists_are_made_once_per_pass_for_all_layers(made: list[int]) -> None:
    encoder, tokens = Encoder(CONFIG), Ragged(torch.randint(1, 40, (50,)), bounds_of(LENGTHS), 33)
    rows = module._tile_rows("float32", "cpu", None, (16, 0))
    with use_impl("triton", "varlen_attention"):
        with torch.no_grad():
            encoder(tokens)
        assert made == [rows[0]]
        made.clear()
        encoder(tokens).values.sum().backward()
        assert made == list(dict.fromkeys(rows))
        made.clear()
        encoder.is_recomputing = True
        encoder(tokens).values.sum().backward()
        assert made == list(dict.fromkeys(rows)), "recomputing made its own"
        made.clear()
        encoder.hidden_states(tokens)
        encoder.attention_weights(tokens)
        assert len(made) == 2 * len(set(rows))


def test_recomputing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    encoder, tokens = Encoder(CONFIG), Ragged(torch.randint(1, 40, (50,)), bounds_of(LENGTHS), 33)
    gradients = []
    with use_impl("triton", "varlen_attention"):
        for encoder.is_recomputing in (False, True):
            encoder.zero_grad()
            encoder(tokens).values.square().sum().backward()
            gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_handed_down_or_not_it_is_the_same(device: str, needs_grad: bool) -> None:
    qkv, bounds = qkv_of(device), bounds_of(LENGTHS, device)
    with torch.set_grad_enabled(needs_grad):
        cells = attention_cells(bounds, qkv, head_dim=16, impl="triton")
        assert len(cells.tiles) == (3 if needs_grad else 1)
        results = []
        for given in (bounds, cells):
            leaf = qkv.clone().requires_grad_(needs_grad)
            separate = [x.clone().requires_grad_(needs_grad) for x in qkv.unbind(1)]
            for out, leaves in (
                (varlen_attention_qkv(leaf, cu_seqlens=given, impl="triton"), [leaf]),
                (varlen_attention(*separate, cu_seqlens=given, impl="triton"), separate),
            ):
                results.append(out.detach())
                results += torch.autograd.grad(out.square().sum(), leaves) if needs_grad else []
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        assert torch.equal(one, other)


def test_a_list_of_other_tiles_is_not_used(device: str, made: list[int]) -> None:
    """Made for another dtype, by a graph that runs on another card, or without gradients in sight."""
    qkv, bounds = qkv_of(device), bounds_of(LENGTHS, device)
    rows = module._tile_rows("float32", device, 0 if device == "cuda" else None, (16, 0))
    others = [launches.varlen_attention_tiles(bounds, 50, 16)] * 3
    results = []
    for tiles in ((), others[:1], others):
        made.clear()
        leaf = qkv.clone().requires_grad_()
        out = varlen_attention_qkv(leaf, cu_seqlens=AttentionCells(bounds, 50, None, tuple(tiles)), impl="triton")
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
        assert set(made) == set(rows)
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_compiled_they_are_part_of_the_graph(device: str) -> None:
    """One list for all layers, made anew at every call; nothing of the first call's cells is in the graph."""
    qkv, found = qkv_of(device), []

    def attend(qkv: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        cells = attention_cells(bounds, qkv, head_dim=16, impl="triton")
        first = varlen_attention_qkv(qkv, cu_seqlens=cells, impl="triton")
        return varlen_attention_qkv(qkv * first[:, None], cu_seqlens=cells, impl="triton")

    def backend(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    from torch._dynamo.backends.common import aot_autograd  # which loads the compiler

    compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    with torch.no_grad():
        for lengths in (LENGTHS, OTHERS):
            bounds = bounds_of(lengths, device)
            assert torch.equal(compiled(qkv, bounds), attend(qkv, bounds))
    assert [name for name in found if "tiles" in name] == ["geneformer_kernels.varlen_attention_tiles.default"]


@pytest.mark.gpu
def test_a_captured_graph_makes_its_own(device: str) -> None:
    if device == "cpu":
        pytest.skip("no graphs")
    encoder = Encoder(CONFIG).to(device).cast("float16").eval()
    tokens = Ragged(torch.randint(1, 40, (50,)), bounds_of(LENGTHS), 33).to(device)
    with torch.no_grad():
        encoder(tokens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = encoder(tokens).values
        tokens.cu_seqlens.copy_(bounds_of(OTHERS))
        graph.replay()
        assert torch.equal(out, encoder(Ragged(tokens.values, tokens.cu_seqlens, 27)).values)


def test_what_the_host_knows_of_lengths() -> None:
    bounds = bounds_of([4, 4, 4])
    assert AttentionCells(bounds, 12).equal_length == 0
    assert AttentionCells(bounds, 12).bound() == 4
    assert AttentionCells(bounds, 12, 4).equal_length == 4
    assert AttentionCells(bounds, 12, 64).equal_length == 0
    assert AttentionCells(bounds, 12, 64).bound() == 64
    assert AttentionCells(bounds_of([4, 3]), 7, 4).equal_length == 0
    assert AttentionCells(bounds_of([]), 0, 0).equal_length == 0


@pytest.mark.parametrize("patched", [(torch.compiler, "is_compiling"), (module, "is_capturing")])
def test_nothing_is_asked_of_a_graph(patched: tuple[object, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a replay brings may be longer than anything there now: then the bound is all tokens."""
    monkeypatch.setattr(*patched, lambda *_: True)
    for longest in (None, 33):
        assert AttentionCells(bounds_of(LENGTHS), 50, longest).bound() == 50


def test_cells_that_do_not_fit_are_refused() -> None:
    qkv, bounds = qkv_of(), bounds_of(LENGTHS)
    with pytest.raises(ValueError, match="longest must be at least 33, not 12"):
        attention_cells(bounds, qkv, head_dim=16, longest=12)
    cells = attention_cells(bounds, qkv, head_dim=16)
    for call in (
        lambda: varlen_attention_qkv(qkv[:49], cu_seqlens=cells),
        lambda: varlen_attention(*qkv[:49].unbind(1), cu_seqlens=cells),
        lambda: attention_scores(*qkv[:49].unbind(1)[:2], cu_seqlens=cells),
    ):
        with pytest.raises(ValueError, match="cells of 50 tokens, and 49 are there"):
            call()
