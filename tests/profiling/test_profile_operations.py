"""Time per operation, as torch's profiler sees real steps: ours, stock models, several threads, recomputation."""

from __future__ import annotations

import gzip
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from geneformer_kernels import linear, ranges, varlen_attention
from torch.autograd import profiler
from torch.profiler import profile

from geneformer_fast import Encoder, EncoderConfig, Ragged, quantize
from geneformer_fast.profiling.figures import Ceilings, Missing, Operation
from geneformer_fast.profiling.flops.needs import Need
from geneformer_fast.profiling.meters import operations
from geneformer_fast.profiling.meters.operations import OperationWatch, Watched, with_needs
from geneformer_fast.profiling.meters.silence import start_quietly

LENGTHS = (5, 1, 17, 9)
STEPS = 2


def tokens(model: Encoder, seed: int = 0) -> Ragged:
    torch.manual_seed(seed)
    return Ragged.from_cells([torch.randint(2, model.config.vocab_size, (n,)) for n in LENGTHS])


def learner(**changes: Any) -> Encoder:
    torch.manual_seed(1)
    config = EncoderConfig(n_layers=3, width=32, n_heads=2, ff_width=48, vocab_size=60, max_len=20, **changes)
    return Encoder(config, head="mlm").train()


def learning(model: Encoder) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = tokens(model)
    rows = torch.arange(0, batch.n_tokens, 3)

    def step() -> None:
        optimizer.zero_grad()
        model.mlm_loss(model(batch), rows, batch.values[rows]).backward()
        optimizer.step()

    return step


def watched(step: Callable[[], object], n_steps: int = 1 + STEPS, **options: Any) -> Watched:
    with OperationWatch("cpu", **options) as watch:
        for _ in range(n_steps):
            step()
            watch.step()
    return watch.finish()


def calls(found: Watched) -> dict[str, int]:
    return {row.name: row.calls for row in found.operations}


@pytest.fixture(autouse=True)
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_LEAST_SHARE", 0.0)


def test_a_training_step_by_operation_block_and_part() -> None:
    model = learner()
    found = watched(learning(model))
    per_step = {"linear": 6, "varlen_attention": 3, "feed_forward": 3, "residual_layernorm": 7, "embed_tokens": 1}
    for name, n in {**per_step, "mlm_cross_entropy": 1}.items():
        assert calls(found)[name] == calls(found)[f"{name} backward"] == n * STEPS, name
    assert calls(found)["AdamW.step"] == calls(found)["AdamW.zero_grad"] == STEPS
    assert found.n_steps == STEPS
    assert not found.notes
    times = {row.name: row.time_ms for row in found.operations}
    assert 0.5e3 * found.wall_s < sum(times.values()) <= 1e3 * found.wall_s
    assert sum(row.share for row in found.operations) == pytest.approx(sum(times.values()) / 1e3 / found.wall_s)
    assert [row.time_ms for row in found.operations] == sorted(times.values(), reverse=True)
    assert all(isinstance(row.roof_share, Missing) for row in found.operations)
    # Blocks hold what lies in them, forward and backward: all of it but the ends of the model.
    outside = sum(
        n for name, n in times.items() if name.split()[0] in ("embed_tokens", "mlm_cross_entropy", "head", "embeddings")
    )
    assert len(found.blocks) == 3
    assert min(found.blocks) > 0.1 * sum(found.blocks)
    assert sum(found.blocks) <= sum(times.values()) - outside
    assert sum(found.blocks) > times["varlen_attention"] + times["varlen_attention backward"]
    known = {name: part for name, part in found.parts.items() if not isinstance(part, Missing)}
    assert sum(known.values()) == pytest.approx(found.wall_s / STEPS)
    assert {name for name, part in known.items() if part} >= {"forward", "backward", "optimizer"}
    assert set(found.parts) - set(known) == {"copies", "host_gaps"}


def test_time_is_that_of_the_loop() -> None:
    """Most of a step that sleeps in one operation is that operation's, on whatever side the clock is read."""
    model, inner = learner(), []

    def slow(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.03)
        return x * 2.0

    named = ranges.ranged("linear")(slow)

    def step() -> None:
        start = time.perf_counter()
        named(torch.ones(3))
        inner.append(time.perf_counter() - start)

    found = watched(step)
    assert model is not None
    row = next(row for row in found.operations if row.name == "linear")
    assert row.time_ms == pytest.approx(1e3 * sum(inner[1:]), rel=0.05)
    assert row.share > 0.9
    assert found.parts["forward"] == pytest.approx(sum(inner[1:]) / STEPS, rel=0.05)


def test_what_is_recomputed_is_called_twice() -> None:
    model = learner()
    plain = calls(watched(learning(model)))
    model.is_recomputing = True
    again = watched(learning(model))
    # The last operation of a block is not computed again: nobody has kept anything of it.
    assert calls(again)["varlen_attention"] == 2 * plain["varlen_attention"]
    assert calls(again)["linear"] == 2 * plain["linear"]
    assert calls(again)["varlen_attention backward"] == plain["varlen_attention backward"]
    assert len(again.blocks) == 3


@pytest.mark.parametrize("all_threads", [True, False])
def test_batches_in_worker_threads(all_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``embed`` computes them on a CPU. Where torch cannot see other threads, it is said."""
    model = learner().eval()
    if not all_threads:

        def refuse(**_: object) -> None:
            raise TypeError("profile_all_threads is unknown")

        monkeypatch.setattr(torch._C._profiler, "_ExperimentalConfig", refuse)

    def step() -> None:
        threads = [threading.Thread(target=lambda: model(tokens(model))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    found = watched(step)
    if all_threads and hasattr(torch._C._profiler._ExperimentalConfig(), "trace_only"):
        assert calls(found)["varlen_attention"] == 2 * 3 * STEPS
        assert not found.notes
    if not all_threads:
        assert "varlen_attention" not in calls(found)
        assert "records the thread" in found.notes[0]
    assert sum(row.share for row in found.operations) <= 1 + 1e-9


def test_operations_of_quantized_models() -> None:
    model = toys.encoder(width=64, n_heads=2, ff_width=128)
    quantized = quantize(model, scheme="int8")
    batch = tokens(model)

    def step() -> None:
        with torch.inference_mode():
            quantized(batch)

    found = calls(watched(step))
    assert found["embed_tokens"] == STEPS
    assert found.get("after_attention", 0) in (0, 3 * STEPS)
    assert found["varlen_attention"] == 3 * STEPS
    assert "int8_linear" in found or "linear" in found  # by what this processor multiplies


def test_an_accelerated_model_and_a_stock_one() -> None:
    transformers = pytest.importorskip("transformers")
    from geneformer_fast import accelerate

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config).train()
    ids = torch.randint(1, 40, (3, 11))
    mask = torch.arange(11) < torch.tensor([[11], [4], [7]])
    labels = ids.where(mask, -100)

    def step() -> None:
        model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()

    stock = watched(step, modules=list(model.bert.encoder.layer))
    assert "aten::linear backward" in calls(stock)
    assert len(stock.blocks) == 2
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.bert.encoder.layer)
    handle = accelerate(model)
    ours = watched(step)
    handle.undo()
    assert calls(ours)["varlen_attention"] == calls(ours)["varlen_attention backward"] == 2 * STEPS
    assert calls(ours)["mlm_cross_entropy"] == STEPS
    assert len(ours.blocks) == 2


def test_nothing_is_opened_while_no_profiler_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a range was opened")

    monkeypatch.setattr(profiler, "record_function", refuse)
    model = learner()
    model.mlm_loss(model(tokens(model)), torch.arange(3), torch.tensor([4, 5, 6])).backward()
    monkeypatch.setattr(profiler, "_is_profiler_enabled", True)
    with pytest.raises(AssertionError, match="a range was opened"):
        model(tokens(model))


def test_a_range_that_is_off_costs_less_than_a_microsecond() -> None:
    """The smallest of many, on the processor's clock: neighbours on the machine count for nothing."""

    def nothing(x: object, *, impl: object = None) -> object:
        return x

    named = ranges.ranged("linear")(nothing)

    def seconds(function: Callable[..., object]) -> float:
        best = 1.0
        for _ in range(30):
            start = time.thread_time()
            for _ in range(2000):
                function(None, impl=None)
            best = min(best, time.thread_time() - start)
        return best / 2000

    assert seconds(named) - seconds(nothing) < 1e-6
    assert seconds(lambda _, impl: ranges.within("block 1", nothing, None, impl=impl)) - seconds(nothing) < 1e-6


def test_the_compiler_sees_nothing() -> None:
    """No break, and no second compilation when somebody begins to profile."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = learner().eval()
    batch = tokens(model)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: model(batch).values, backend=backend, fullgraph=True)
    with torch.no_grad():
        plain = compiled()
        with profile():
            profiled = compiled()
            torch._dynamo.reset()
            torch.compile(lambda: model(batch).values, backend=backend, fullgraph=True)()
    assert len(graphs) == 2
    assert torch.equal(plain, profiled)
    assert not any("record_function" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_functions_are_what_they_were() -> None:
    assert linear.__name__ == "linear"
    assert "x @ weight.T + bias" in str(linear.__doc__)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'cu_seqlens'"):
        varlen_attention(*[torch.ones(2, 1, 8)] * 3)


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_trace(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / name
    found = watched(learning(learner()), trace=path)
    assert found.trace == path
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith("gz") else path.read_text()
    names = {event.get("name") for event in json.loads(text)["traceEvents"]}
    assert {"varlen_attention", "block 2", "head", "embeddings"} <= names
    assert [file.name for file in path.parent.iterdir()] == [name]


def test_a_trace_that_would_be_too_large_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, said in (("MOST_EVENTS", "would be too large"), ("MOST_TRACE_BYTES", "no trace was kept")):
        with monkeypatch.context() as patched:
            patched.setattr(operations, limit, 10)
            found = watched(learning(learner()), trace=tmp_path / "trace.json.gz")
        assert found.trace is None
        assert said in found.notes[-1]
        assert found.operations
        assert not list(tmp_path.iterdir())


def test_nothing_is_recorded_while_it_waits() -> None:
    states = []

    def step() -> None:
        states.append(profiler._is_profiler_enabled)

    found = watched(step, n_steps=9, n_wait=3, n_warmup=2, n_active=2)
    assert states == [False] * 5 + [True] * 2 + [False] * 2
    assert found.n_steps == 2


@pytest.mark.parametrize(
    ("n_steps", "n_wait", "n_watched", "said"),
    [(0, 3, 0, "before torch's profiler was started"), (3, 2, 0, "recorded a step"), (0, 0, 0, "recorded a step"),
     (5, 3, 1, None)],
)  # fmt: skip
def test_a_loop_that_ends_early(n_steps: int, n_wait: int, n_watched: int, said: str | None) -> None:
    found = watched(learning(learner()), n_steps=n_steps, n_wait=n_wait)
    assert found.n_steps == n_watched
    assert [said] == [None] if not found.notes else said is not None and said in found.notes[0]
    assert bool(found.operations) == bool(n_watched)
    assert not profiler._is_profiler_enabled


def test_torchs_library_is_silent_and_its_variable_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Profiler:
        def start(self) -> None:
            seen.append(os.environ.get("KINETO_LOG_LEVEL"))

    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    start_quietly(Profiler())
    assert "KINETO_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("KINETO_LOG_LEVEL", "1")
    start_quietly(Profiler())
    assert seen == ["6", "1"]
    assert os.environ["KINETO_LOG_LEVEL"] == "1"


def test_a_loop_that_fails_leaves_no_profiler_on() -> None:
    steps = iter([1, 1, 1, 0])
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 / next(steps), n_steps=9, n_active=5)
    assert not profiler._is_profiler_enabled


def test_a_profiler_that_is_on_already_is_left_alone() -> None:
    with profile() as theirs:
        found = watched(lambda: torch.ones(2) + 1)
    assert not found.operations
    assert found.notes == ["another profiler of torch is on, and there can be one at a time"]
    assert any(event.key == "aten::add" for event in theirs.key_averages())


def test_numbers_of_steps_that_make_no_sense() -> None:
    for wrong in (dict(n_wait=-1), dict(n_warmup=0), dict(n_active=0)):
        with pytest.raises(ValueError, match="n_warmup and n_active at least 1"):
            OperationWatch("cpu", **wrong)


def test_the_place_under_the_roofline() -> None:
    """By hand: 1e9 operations at 2e12 per second take 0.5 ms, 1e8 bytes at 50e9 per second 2 ms."""
    why = Missing("not counted")
    rows = [Operation(name, 1, 4.0, 0.5, why, why, why) for name in ("linear", "int8_linear", "aten::add")]
    ceilings = Ceilings({"float32": 2.0, "int8": Missing("no int8 here")}, 50.0)
    needs = {"linear": Need(1e9, 1e8), "int8_linear": Need(1e9, 1e8, "int8")}
    found = {row.name: row for row in with_needs(rows, needs, ceilings, "float32")}
    assert found["linear"].roof_share == pytest.approx(0.5)
    assert (found["linear"].flops, found["linear"].n_bytes) == (1e9, 1e8)
    assert found["int8_linear"].roof_share == Missing("no int8 here")
    assert found["aten::add"] == rows[2]
    compute = with_needs(rows, {"linear": Need(8e9, 1e8, "float32")}, ceilings)[0]
    assert compute.roof_share == pytest.approx(1.0)
    # What multiplies nothing needs no ceiling of products; one of 0 is none.
    assert with_needs(rows, {"int8_linear": Need(0.0, 1e8)}, ceilings)[1].roof_share == pytest.approx(0.5)
    nothing = Ceilings({"float32": 0.0}, 50.0)
    assert with_needs(rows, needs, nothing, "float32")[0].roof_share == Missing("a ceiling of 0 was measured")
