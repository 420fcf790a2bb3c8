"""Where events of torch's profiler belong: operations, calls, blocks and parts of a step, on made-up events."""

from __future__ import annotations

from collections.abc import Iterable

from geneformer_fast.profiling.meters.events import (
    Event,
    Place,
    Sorted,
    parts_of_device,
    parts_of_host,
    sorted_out,
    totals,
)

MAIN, OTHER = 1, 2
NODE = "autograd::engine::evaluate_function: "


def within(name: str, start: int, end: int, **more: int) -> Event:
    return Event(name, start, end, more.pop("thread", MAIN), is_range=True, **more)


def op(name: str, start: int, end: int, **more: int) -> Event:
    return Event(name, start, end, more.pop("thread", MAIN), **more)


def kernel(name: str, start: int, end: int, **more: int) -> Event:
    return Event(name, start, end, 7, is_on_device=True, **more)


def labels(found: Sorted) -> dict[str, tuple[int, int]]:
    return dict(totals((place, own) for _, place, own in found.host))


def sort(events: Iterable[Event]) -> Sorted:
    return sorted_out([within("ProfilerStep#3", 0, 100), *events])


def test_the_innermost_operation_has_the_time_and_torch_has_the_rest() -> None:
    found = sort(
        [
            within("block 0", 10, 60),
            within("feed_forward", 12, 40),
            op("aten::linear", 14, 24),
            op("aten::addmm", 15, 24),
            within("linear", 26, 36),  # an operation within another one
            op("aten::addmm", 27, 30),
            op("aten::add", 45, 50),
            op("aten::add", 51, 53),
            op("aten::copy_", 51, 52),
        ]
    )
    assert labels(found) == {"feed_forward": (1, 18), "linear": (1, 10), "aten::add": (2, 7)}
    assert {place.block for event, place, _ in found.host if event.name != "ProfilerStep#3"} == {0}


def test_a_function_that_calls_another_one_of_its_operation_is_one_call() -> None:
    found = sort(
        [within("varlen_attention", 0, 30), within("varlen_attention", 5, 25), within("varlen_attention", 30, 40)]
    )
    assert labels(found) == {"varlen_attention": (2, 40)}


def test_a_backward_pass_belongs_to_the_calls_that_made_it() -> None:
    """Number 5 is seen by what only looks at it, too: the last one that begins with it has made the step."""
    found = sort(
        [
            within("block 1", 0, 30),
            op("aten::empty", 1, 2, sequence=5),
            within("linear", 3, 10),
            op("aten::t", 4, 5, sequence=5),
            op("aten::addmm", 6, 9, sequence=6),
            op("aten::gelu", 12, 20, sequence=7),
            op(NODE + "GeluBackward0", 50, 60, sequence=7, forward_thread=MAIN, thread=OTHER),
            op("GeluBackward0", 51, 60, sequence=7, thread=OTHER),
            op(NODE + "AddmmBackward0", 60, 70, sequence=6, forward_thread=MAIN, thread=OTHER),
            op("aten::mm", 61, 65, thread=OTHER),
            op(NODE + "TBackward0", 70, 71, sequence=5, forward_thread=MAIN, thread=OTHER),
            op(NODE + "torch::autograd::AccumulateGrad", 72, 75, thread=OTHER),
        ]
    )
    assert labels(found) == {
        "aten::empty": (1, 1),
        "linear": (1, 7),
        "linear backward": (1, 11),
        "aten::gelu": (1, 8),
        "aten::gelu backward": (1, 10),
        "AccumulateGrad": (1, 3),
    }
    backward = [place for event, place, _ in found.host if event.thread == OTHER]
    assert {place.phase for place in backward} == {"backward"}
    assert [place.block for place in backward] == [1, 1, 1, 1, 1, None]


def test_what_is_recomputed_counts_under_its_operation_and_in_the_backward_pass() -> None:
    found = sort(
        [
            within("block 2", 0, 20),
            within("linear", 1, 9),
            op("aten::addmm", 2, 8, sequence=1),
            op(NODE + "AddmmBackward0", 30, 60, sequence=1, forward_thread=MAIN),
            within("linear", 32, 40),
            op("aten::addmm", 33, 39, sequence=2),
        ]
    )
    assert labels(found) == {"linear": (2, 16), "linear backward": (1, 22)}
    assert parts_of_host(found) == {"backward": 30, "forward": 20}
    assert [place.block for _, place, _ in found.host][1:] == [2] * 6


def test_optimizers_loaders_and_collectives_have_rows_of_their_own() -> None:
    found = sort(
        [
            within("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 10),
            op("aten::stack", 1, 9),
            within("DistributedDataParallel.forward", 10, 30),
            op("aten::linear", 12, 20),
            within("Optimizer.step#AdamW.step", 40, 60),
            op("aten::_foreach_add_", 42, 50),
            op("c10d::allreduce_", 70, 80),
            op("aten::copy_", 71, 72),
            within("somebody's own", 82, 90),
            op("aten::mul", 84, 86),
        ]
    )
    assert labels(found) == {
        "DataLoader": (1, 10),
        "aten::linear": (1, 8),
        "AdamW.step": (1, 20),
        "c10d::allreduce_": (1, 10),
        "aten::mul": (1, 2),
    }
    assert parts_of_host(found) == {"forward": 22, "optimizer": 20, "communication": 10, "data": 10}


def test_ranges_of_ones_own_may_name_the_part_of_the_step() -> None:
    found = sort([within("data", 0, 40), op("aten::stack", 5, 10), within("forward", 40, 90)])
    assert parts_of_host(found) == {"forward": 50, "data": 40}


def test_a_moment_counts_once_however_many_threads_work() -> None:
    found = sort(
        [
            op("aten::mm", 10, 50),
            op("aten::mm", 30, 80, thread=OTHER),
            op("aten::mm", 90, 130, thread=OTHER),  # ends after the step
            op(NODE + "MmBackward0", 40, 60, sequence=9, forward_thread=MAIN, thread=3),
        ]
    )
    assert parts_of_host(found) == {"backward": 20, "forward": 60}


def test_between_two_steps_of_a_backward_pass_it_goes_on() -> None:
    found = sort([op(NODE + "A", 10, 20), op(NODE + "B", 25, 40), op("aten::add", 50, 55), op(NODE + "C", 60, 70)])
    assert parts_of_host(found) == {"backward": 40, "forward": 5}


def test_kernels_belong_to_what_launched_them() -> None:
    """By the number of torch's event, or of the driver's call, which comes with the system's number of its thread."""
    found = sort(
        [
            within("varlen_attention", 5, 20, number=11),
            op("geneformer_kernels::varlen_attention_fwd", 6, 18, number=12, sequence=3),
            op("cuLaunchKernelEx", 8, 10, thread=4711, number=500, launched_by=12),
            op("cuLaunchKernelEx", 19, 20, thread=4711, number=501),  # by nothing that torch has seen
            within("rank_genes", 21, 25),
            op("cudaLaunchKernel", 22, 23, thread=4711, number=502),
            op(NODE + "Generated", 30, 40, sequence=3, forward_thread=MAIN, number=13),
            op("cudaLaunchKernel", 31, 32, thread=4711, number=12, launched_by=13),  # a number of both kinds
            within("varlen_attention", 5, 20, number=0),
            kernel("attention_kernel", 30, 50, number=500, launched_by=12),
            kernel("another", 50, 55, number=501),
            kernel("rank", 55, 56, number=502),
            kernel("attention_bwd", 60, 70, number=12, launched_by=13),
            Event("varlen_attention", 30, 55, 7, is_range=True, is_on_device=True),  # torch's copy of the range
            kernel("Memcpy HtoD (Pageable -> Device)", 70, 75),
            kernel("ncclDevKernel_AllReduce", 60, 80),
        ]
    )
    by_name = {event.name: place for event, place in found.device}
    assert by_name["attention_kernel"].label == by_name["another"].label == "varlen_attention"
    assert by_name["rank"].label == "rank_genes"
    assert by_name["attention_bwd"].label == "varlen_attention backward"
    assert by_name["Memcpy HtoD (Pageable -> Device)"] == Place()
    assert "varlen_attention" not in by_name
    # 20 ns of the collective: 10 behind work, 5 behind the copy.
    assert parts_of_device(found) == {"forward": 26, "backward": 10, "copies": 5, "communication": 5}


def test_operators_of_ours_are_known_without_a_range() -> None:
    """As in what torch has compiled."""
    found = sort(
        [
            op("CompiledFunction", 0, 50),
            op("geneformer_kernels::residual_layernorm_fwd", 51, 60),
            op("geneformer_kernels::residual_layernorm_int8", 60, 61),
            op("geneformer_kernels::residual_layernorm_bwd", 61, 70),
            op("geneformer_kernels::something_new", 70, 71),
        ]
    )
    assert set(labels(found)) == {
        "CompiledFunction",
        "residual_layernorm",
        "residual_layernorm_int8",
        "residual_layernorm backward",
        "something_new",
    }
