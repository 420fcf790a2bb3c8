"""What people wrap around an encoder: CUDA graphs, torch.compile, checkpointing, DDP and FSDP."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from geneformer_kernels import attention_cells
from process_groups import group_of_one
from sample_encoders import CONFIGS, SMALL, Batch, batch, config_of, gradients_of, loss_of, relative
from torch import nn

from bench.gpu.models import random_encoder
from geneformer_fast import Encoder
from geneformer_fast.ragged import Padding

GPU = pytest.mark.gpu


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Anything that makes the host wait for the card raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["small", "pre-norm"])
def test_recomputed_activations_give_the_same_gradients(name: str, place: Any) -> None:
    """torch's checkpointing around every block, dropout on: the second forward draws the same masks."""
    from torch.utils.checkpoint import checkpoint

    if place.name == "interpreted" and name != "small":
        pytest.skip("the interpreter is slow, and the masks are drawn by the same kernels")
    encoder = random_encoder(config_of(name, place.name), place.device).train()
    cells = batch(encoder.config, place.name)
    found = []
    for is_recomputed in (False, True):
        if is_recomputed:
            for block in encoder.blocks:
                plain = block.forward
                block.forward = lambda *args, plain=plain: checkpoint(plain, *args, use_reentrant=False)  # type: ignore[method-assign]
        encoder.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        with place.ours():
            loss = loss_of(encoder, cells)
            loss.backward()
        found.append((loss.item(), gradients_of(encoder)))
    (loss_plain, plain_gradients), (loss_again, again) = found
    assert loss_plain == loss_again
    for parameter in plain_gradients:
        assert torch.equal(plain_gradients[parameter], again[parameter]), parameter


@GPU
@pytest.mark.parametrize("name", ["small", "pre-norm", "v1-10m"])
def test_inference_waits_for_nothing_and_replays_as_a_graph(name: str, card: torch.device) -> None:
    config = CONFIGS[name]
    encoder = random_encoder(config, card).cast("bfloat16" if torch.cuda.is_bf16_supported(False) else "float16")
    cells, others = batch(config, "cuda"), batch(config, "cuda", seed=2)
    static = cells.tokens.with_values(cells.tokens.values.clone())
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                encoder(static)
        torch.cuda.current_stream().wait_stream(stream)
        with no_waiting():
            expected = encoder(static).values.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = encoder(static).values
        graph.replay()
        assert torch.equal(out, expected)
        static.values.copy_(others.tokens.values)
        graph.replay()
        assert torch.equal(out, encoder(others.tokens).values)
        assert not torch.equal(out, expected)


@GPU
def test_attention_of_a_padded_batch_asks_for_no_length(card: torch.device) -> None:
    """What takes padding out waits once; attention, which torch's kernels tell the longest cell, not again."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]], device=card)
    for places in (None, mask):
        for is_inference in (False, True):
            with torch.inference_mode(is_inference):
                padding = Padding.of(places, 2, 4, card)
                with no_waiting():
                    cells = attention_cells(
                        padding.cu_seqlens, torch.zeros(8, 16, device=card), head_dim=16, longest=padding.length
                    )
                    assert cells.bound() == 4


@GPU
def test_a_training_step_waits_for_nothing(card: torch.device) -> None:
    encoder = random_encoder(SMALL, card).train()
    cells = batch(SMALL, "cuda")
    loss_of(encoder, cells).backward()
    with no_waiting():
        loss = loss_of(encoder, cells)
        loss.backward()
    assert torch.isfinite(loss)


@GPU
@pytest.mark.parametrize("name", ["small", "pre-norm"])
def test_compiled_whole_it_is_the_same(name: str, card: torch.device) -> None:
    """``fullgraph``: no graph break between tokens and loss; forward, and every gradient."""
    encoder = random_encoder(CONFIGS[name], card)
    cells = batch(encoder.config, "cuda")
    compiled = torch.compile(encoder, fullgraph=True)
    with torch.no_grad():
        expected = encoder(cells.tokens).values
        torch.testing.assert_close(compiled(cells.tokens).values, expected, atol=1e-4, rtol=1e-4)
    loss = loss_of(encoder, cells)
    loss.backward()
    plain = gradients_of(encoder)
    encoder.zero_grad(set_to_none=True)
    again = torch.compile(loss_of, fullgraph=True)(encoder, cells)
    again.backward()
    torch.testing.assert_close(again, loss, atol=1e-4, rtol=1e-4)
    for parameter, gradient in gradients_of(encoder).items():
        assert relative(gradient, plain[parameter]) <= 1e-3, parameter


class Step(nn.Module):
    """What a training script wraps: tensors in, loss out."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, cells: Batch) -> torch.Tensor:
        return loss_of(self.encoder, cells)


@pytest.fixture
def one_process(place: Any, tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    import torch.distributed as dist

    backend = "nccl" if place.name == "cuda" else "gloo"
    if not dist.is_available() or (backend == "nccl" and not dist.is_nccl_available()):
        pytest.skip(f"torch has no {backend}")
    if place.name == "cuda":
        torch.cuda.set_device(0)
    with group_of_one(tmp_path, backend):
        yield


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=GPU)], indirect=True)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_wrapped_for_many_cards_it_is_the_same(wrapper: str, place: Any) -> None:
    encoder = random_encoder(config_of("small", place.name), place.device)
    cells = batch(encoder.config, place.name)
    plain = copy.deepcopy(encoder)
    with place.ours():
        expected = loss_of(plain, cells)
        expected.backward()
    step: nn.Module = Step(encoder)
    if wrapper == "ddp":
        step = nn.parallel.DistributedDataParallel(step)
    else:
        fsdp = pytest.importorskip("torch.distributed.fsdp")
        if not hasattr(fsdp, "fully_shard"):
            pytest.skip(f"torch {torch.__version__} has no fully_shard")
        mesh = torch.distributed.init_device_mesh(place.device.type, (1,))
        fsdp.fully_shard(step, mesh=mesh)
    with place.ours():
        loss = step(cells)
        loss.backward()
    torch.testing.assert_close(loss, expected)
    for (name, parameter), other in zip(encoder.named_parameters(), plain.parameters(), strict=True):
        gradient = parameter.grad
        assert gradient is not None, name
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(gradient, other.grad, atol=1e-6, rtol=1e-4)
