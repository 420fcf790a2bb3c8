"""Where memory goes: made-up records by hand, and real steps against counts of one's own."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.profiler import profile

from geneformer_fast import Encoder, EncoderConfig, Ragged
from geneformer_fast.profiling.figures import KINDS, Alive, Memory, Missing
from geneformer_fast.profiling.meters import memory as memories
from geneformer_fast.profiling.meters.alive import Change, Known, Moment, Peak, peak_of
from geneformer_fast.profiling.meters.events import MEMORY, Place
from geneformer_fast.profiling.meters.memory import MemoryWatch
from geneformer_fast.profiling.meters.resident import ResidentPeak, resident

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20
LINEAR, FEED, HEAD = Place("linear", 1, 0, "forward"), Place("feed_forward", 2, 0, "forward"), Place("head", 3)
GELU_BACKWARD = Place("aten::gelu backward", 4, 0, "backward")
ADAM = Place("AdamW.step", 5, None, "optimizer")
W = {100: Known("weight", "weights", 1000)}


def peak(*steps: tuple[int, int, int, Place], later: dict[int, Known] | None = None, **options: Any) -> Peak:
    """Of (time, address, bytes, place); ``later`` is known at the end."""
    changes = [Change(MEMORY, time, time, 1, address=address, n_bytes=n) for time, address, n, _ in steps]
    places = {id(change): place for change, (*_, place) in zip(changes, steps, strict=True)}
    moments = [Moment(-1, W), Moment(90, later or W)]
    return peak_of(changes, places, moments, **options)


def test_the_peak_is_where_most_is_alive() -> None:
    found = peak(
        (1, 1, 10, LINEAR),  # outlives its operation
        (2, 2, 40, FEED),  # given back within it
        (3, 2, -40, FEED),
        (4, 3, 20, FEED),
        (5, 4, 30, HEAD),
        (6, 1, -10, FEED),
    )
    assert found.parts == {"weights": 1000, "activations": 30, "logits": 30}
    assert found.alive == [
        Alive("weight", 1000),
        Alive("head: logits", 30),
        Alive("feed_forward: activations", 20),
        Alive("linear: activations", 10),
    ]
    inside = peak((1, 1, 10, LINEAR), (2, 2, 50, FEED), (3, 2, -50, FEED), (4, 1, -10, FEED))
    assert inside.parts == {"weights": 1000, "activations": 10, "workspace": 50}


def test_what_goes_when_something_comes_was_not_there_with_it() -> None:
    assert sum(peak((1, 1, 10, LINEAR), (2, 1, -10, FEED), (2, 2, 15, FEED)).parts.values()) == 1015


def test_gradients_and_the_optimizers_state_are_known_by_address() -> None:
    gradient = {**W, 7: Known("weight.grad", "gradients", 40)}
    steps = (
        (1, 7, 40, FEED),  # another block at the same address, before
        (2, 7, -40, LINEAR),
        (3, 7, 40, GELU_BACKWARD),
        (4, 8, 5, ADAM),
        (5, 9, 60, ADAM),
        (6, 9, -60, ADAM),
    )
    found = peak(*steps, later=gradient)
    assert found.parts == {"weights": 1000, "gradients": 40, "optimizer": 5, "workspace": 60}
    assert Alive("weight.grad", 40) in found.alive


def test_gradients_of_the_step_before_go_before_the_backward_pass() -> None:
    """Nobody says when a CPU's allocator takes back what was given before the record began."""
    before = {**W, 7: Known("weight.grad", "gradients", 400)}
    changes = [Change(MEMORY, 5, 5, 1, address=8, n_bytes=300)]
    places = {id(changes[0]): GELU_BACKWARD}
    later = {**W, 8: Known("weight.grad", "gradients", 300)}
    moments = [Moment(-1, before), Moment(9, later)]
    assert peak_of(changes, places, moments, dropped_at=3).parts == {"weights": 1000, "gradients": 400}
    kept = [Moment(-1, before), Moment(9, {**before, **later})]
    assert peak_of(changes, places, kept, dropped_at=3).parts == {"weights": 1000, "gradients": 700}


def test_what_is_as_large_as_logits_is_of_them() -> None:
    """The same in float32, and their gradient."""
    known = {**W, 5: Known("logits", "logits", 800)}
    found = peak((1, 5, 800, LINEAR), (2, 6, 400, LINEAR), (3, 7, 80, LINEAR), later=known)
    assert found.parts == {"weights": 1000, "logits": 1200, "activations": 80}


def model(head: str | None = "mlm", **changes: Any) -> Encoder:
    torch.manual_seed(1)
    values = dict(n_layers=2, width=64, n_heads=2, ff_width=128, vocab_size=5000, max_len=256)
    return Encoder(EncoderConfig(**{**values, **changes}), head=head)


def batch(n_cells: int = 4, length: int = 200) -> Ragged:
    torch.manual_seed(0)
    return Ragged.from_cells([torch.randint(2, 5000, (length,)) for _ in range(n_cells)])


def measured(watch: MemoryWatch, *steps: Callable[[], object]) -> Memory:
    *before, last = steps
    for step in before:
        step()
    with watch:
        last()
    return watch.memory()


def adds_up(found: Memory) -> bool:
    parts = [part for part in found.parts.values() if not isinstance(part, Missing)]
    return len(parts) == len(KINDS) and sum(parts) == pytest.approx(found.peak_bytes)


def n_bytes(tensors: Any) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_training_step_against_counts_of_ones_own() -> None:
    """Exact: weights once, gradients and two states of Adam as large as what learns."""
    encoder = model().train()
    optimizer = torch.optim.AdamW(encoder.parameters(), foreach=False)
    tokens = batch()
    rows = torch.arange(0, tokens.n_tokens, 7)

    def step() -> None:
        optimizer.zero_grad()
        encoder.mlm_loss(encoder(tokens), rows, tokens.values[rows]).backward()
        optimizer.step()

    found = measured(MemoryWatch(encoder, optimizer), step, step)
    weights = n_bytes(encoder.parameters())
    assert found.parts["weights"] == weights + n_bytes(encoder.buffers())
    steps = 4 * len(list(encoder.parameters()))
    assert found.parts["optimizer"] == pytest.approx(2 * weights + steps, rel=1e-3)
    assert adds_up(found)
    assert found.process_bytes >= found.peak_bytes
    assert isinstance(found.reserved_bytes, Missing)
    assert found.at_peak[0].n_bytes == max(each.n_bytes for each in found.at_peak)
    # All gradients are there when the optimizer begins, whether or not that is the peak.
    with (watch := MemoryWatch(encoder, optimizer)):
        step()
        big = torch.empty(64 * MIB, dtype=torch.uint8)
    assert watch.memory().parts["gradients"] == weights
    assert big.numel() == 64 * MIB


def test_activations_against_the_tensors_that_the_backward_pass_needs() -> None:
    """A chain of layers whose saved tensors can be counted: 8 of [4096, 64] in float32, 1 MiB each."""
    torch.manual_seed(0)
    chain = nn.Sequential(*itertools.chain.from_iterable((nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
    x = torch.randn(4096, 64)
    found = measured(MemoryWatch(chain), lambda: chain(x), lambda: chain(x))
    # Output of every layer and of every tanh; the last one is the result. Tanh keeps its own, a linear layer its input:
    # what linear gives lives on only while tanh reads it.
    kept = 4 * MIB
    assert found.parts["activations"] == pytest.approx(kept + MIB, rel=0.05)
    assert found.parts["weights"] == n_bytes(chain.parameters())
    assert found.parts["gradients"] == found.parts["optimizer"] == found.parts["logits"] == 0


def test_inference_has_no_more_than_two_or_three_tensors_at_once() -> None:
    encoder = model(head=None, n_layers=4, vocab_size=100).eval()
    tokens = Ragged.from_cells([torch.randint(2, 100, (200,)) for _ in range(20)])

    def step() -> None:
        with torch.inference_mode():
            encoder(tokens)

    found = measured(MemoryWatch(encoder), step, step)
    row = tokens.n_tokens * 64 * 4
    known = found.parts["activations"] + found.parts["workspace"]
    assert 3 * row < known < 8 * row
    assert adds_up(found)


def test_logits_of_a_stock_model_and_of_ours() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=4000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = transformers.BertForMaskedLM(config).train()
    ids = torch.randint(1, 4000, (4, 64))
    logits = 4 * 64 * 4000 * 4
    found = measured(MemoryWatch(stock), lambda: None, lambda: stock(input_ids=ids, labels=ids).loss.backward())
    assert logits <= found.parts["logits"] <= 3.1 * logits
    encoder = model().eval()
    with torch.no_grad():
        hidden = encoder(batch())
        ours = measured(MemoryWatch(encoder), lambda: encoder.logits(hidden))
    assert ours.parts["logits"] == pytest.approx(hidden.n_tokens * 5000 * 4, rel=0.05)


def test_what_tensors_share_counts_once() -> None:
    shared = nn.ModuleList([nn.Linear(256, 256), nn.Linear(256, 256)])
    shared[1].weight = shared[0].weight
    shared.register_buffer("view", shared[0].weight.detach()[:3])
    found = measured(MemoryWatch(shared), lambda: None)
    assert found.parts["weights"] == (256 * 256 + 2 * 256) * 4


def test_the_process_against_the_system() -> None:
    """A block that is filled and freed is in the peak, and not in what is resident afterwards."""
    resting = resident()

    def step() -> None:
        # Not torch's: what no allocator of torch has given is "other".
        np.full(200 * MIB, 1, dtype=np.uint8)

    found = measured(MemoryWatch(None), step)
    assert not isinstance(found.peak_bytes, Missing)
    assert found.peak_bytes == pytest.approx(resting + 200 * MIB, rel=0.05)
    assert found.parts["other"] == pytest.approx(found.peak_bytes, rel=0.01)
    again = measured(MemoryWatch(None), lambda: None)
    assert again.peak_bytes < found.peak_bytes - 150 * MIB


def test_where_the_peak_cannot_be_reset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new record tells; without one somebody has to look."""
    monkeypatch.setattr("geneformer_fast.profiling.meters.resident._INTERVAL_S", 0.001)
    (tmp_path / "clear_refs").mkdir()  # nothing that can be written
    status = tmp_path / "status"
    status.write_text("VmHWM:\t 900 kB\nVmRSS:\t 500 kB\n")
    watch = ResidentPeak(tmp_path)
    watch.start()
    status.write_text("VmHWM:\t 900 kB\nVmRSS:\t 700 kB\n")
    for _ in range(1000):
        if watch._seen == 700 * 1024:
            break
        watch._end.wait(0.005)
    status.write_text("VmHWM:\t 900 kB\nVmRSS:\t 400 kB\n")
    watch.stop()
    assert watch.peak() == 700 * 1024
    assert watch.most() == 900 * 1024
    watch.start()
    status.write_text("VmHWM:\t 950 kB\nVmRSS:\t 400 kB\n")
    watch.stop()
    assert watch.peak() == 950 * 1024
    nowhere = ResidentPeak(tmp_path / "none")
    nowhere.start()
    nowhere.stop()
    assert isinstance(nowhere.peak(), Missing)
    assert isinstance(nowhere.most(), Missing)


def test_beside_another_profiler_there_is_no_split() -> None:
    encoder = model()
    with profile():
        found = measured(MemoryWatch(encoder), lambda: None)
    assert found.parts["weights"] == Missing("another profiler of torch is on, and there can be one at a time")
    assert not isinstance(found.peak_bytes, Missing)
    assert found.at_peak == []


def test_nothing_is_left_behind() -> None:
    encoder = model().eval()
    optimizer = torch.optim.SGD(encoder.parameters())
    hooks = len(_global_optimizer_pre_hooks)
    watch = MemoryWatch(encoder, optimizer)
    with pytest.raises(ZeroDivisionError), watch:
        _ = 1 / 0
    assert not encoder._forward_hooks
    assert len(_global_optimizer_pre_hooks) == hooks
    assert not torch.autograd.profiler._is_profiler_enabled


def test_many_things_are_one_row_in_the_end() -> None:
    alive = [Alive(f"weight {i}", 100 - i) for i in range(30)]
    rows = memories._first(alive)
    assert len(rows) == memories.MOST_ALIVE + 1
    assert rows[-1] == Alive("10 more", sum(100 - i for i in range(20, 30)))
    assert memories._first(alive[:3]) == alive[:3]


class Node:
    """A record of a card's allocator, as torch hands it over."""

    def __init__(self, time: int, address: int, n_bytes: int, allocated: int, reserved: int, device: str) -> None:
        from torch._C._profiler import _EventType

        class What:
            ptr, alloc_size, total_allocated, total_reserved = address, n_bytes, allocated, reserved

        What.device = torch.device(device)
        self.tag, self.children, self.start_time_ns, self.start_tid = _EventType.Allocation, [], time, 1
        self.typed = (self.tag, What)


def test_records_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up: what is in use and reserved is the allocator's word; other cards and the host are left out."""

    class Recorded:
        def experimental_event_tree(self) -> list[Node]:
            return [
                Node(10, 1, 300, 1300, 2000, "cuda:1"),
                Node(11, 2, 500, 500, 900, "cuda:0"),
                Node(12, 3, 700, 700, 700, "cpu"),
                Node(20, 1, -300, 1000, 2000, "cuda:1"),
            ]

        def events(self) -> list[Any]:
            return []

    watch = MemoryWatch(None, device="cpu")
    watch.device, watch._is_card, watch._most = torch.device("cuda", 1), True, (1300, 2000)
    watch._moments = [{5: Known("weight", "weights", 800)}, {5: Known("weight", "weights", 800)}]
    watch._profiler = type("P", (), {"profiler": type("Q", (), {"kineto_results": Recorded()})})
    found = watch.memory()
    assert found.peak_bytes == 1300
    assert found.reserved_bytes == 2000
    assert found.fragmentation == pytest.approx(0.35)
    assert found.parts["weights"] == 800
    assert found.parts["activations"] == 300
    assert found.parts["other"] == 200
    assert adds_up(found)


def test_a_command_that_loads_torch_itself_says_nothing_of_memory_that_was_there_before() -> None:
    """In a process of its own, since torch looks at its variable while it is loaded; which is as it was then."""
    program = """
from geneformer_fast.profiling.meters.silence import import_torch_quietly
import_torch_quietly()
import os, torch
from geneformer_fast.profiling.meters.memory import MemoryWatch
assert "TORCH_CPP_LOG_LEVEL" not in os.environ
before = torch.ones(1 << 16)
with MemoryWatch(torch.nn.Linear(2, 2)) as watch:
    del before
print(watch.memory().peak_bytes > 0)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | {"PYTHONPATH": paths}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True\n", "")
