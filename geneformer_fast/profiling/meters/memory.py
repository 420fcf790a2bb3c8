"""Where the memory of one step goes, and what was alive when most of it was in use."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd import profiler as autograd_profiler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from geneformer_fast.profiling.figures import KINDS, Alive, Figure, Memory, Missing, divided
from geneformer_fast.profiling.meters.alive import Change, Known, Moment, Peak, peak_of
from geneformer_fast.profiling.meters.events import MEMORY, Sorted, read_events, sorted_out
from geneformer_fast.profiling.meters.resident import ResidentPeak
from geneformer_fast.profiling.meters.silence import start_quietly

#: Rows of what was alive; the rest of it is one more.
MOST_ALIVE = 20
# Ranges by which moments are found again among the profiler's events.
_MOMENT = "memory watch "
_NO_RESERVE = Missing("a CPU has no reserving allocator")


class MemoryWatch:
    """Follows every block of memory of one step: ``with MemoryWatch(model) as watch: step()``, then ``watch.memory()``.

    Torch's profiler reports what its allocator gives and takes back, which makes the step slower: it is none to be
    timed. It sees the thread that enters the block, and what autograd starts from there. What counts as what:

    - ``weights``, ``gradients``, ``optimizer``: storages of the model's parameters and buffers, of the gradients of
      parameters, and of the optimizer's state; what several tensors share counts once.
    - ``workspace``: what an operation takes and gives back before it ends.
    - ``logits``: what the head, or a loss over its output, leaves behind.
    - ``activations``: everything else that a step takes: inputs, hidden states, what the backward pass needs, and the
      gradients of all that.
    - ``other``: of a card what was in use before the step and is none of these; of a process what is no tensor.

    Parameters
    ----------
    model
        None where there is none to be known: what was there before is then all ``other``.
    optimizer
        Whose state is known before the step; what it takes within the step is found without.
    device
        Where the model computes; None is where its parameters are.
    """

    def __init__(
        self,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.device = _device_of(model) if device is None else torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._moments: list[dict[int, Known]] = []
        self._profiler: Any = None
        self._why_not = "no step was watched"
        self._resident = ResidentPeak()
        self._handles: list[Any] = []
        self._is_card = self.device.type == "cuda"
        self._most = 0, 0

    def __enter__(self) -> MemoryWatch:
        self._moments = [self._known()]
        self._handles.append(register_optimizer_step_pre_hook(lambda *_: self._note(self._known())))
        if self.model is not None:
            self._handles.append(self.model.register_forward_hook(lambda *called: self._note(_logits_of(called[-1]))))
        if self._is_card:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        if autograd_profiler._is_profiler_enabled:
            self._why_not = "another profiler of torch is on, and there can be one at a time"
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            start_quietly(self._profiler)
        self._resident.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._is_card:
            torch.cuda.synchronize(self.device)
            self._most = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        self._resident.stop()
        while self._handles:
            self._handles.pop().remove()
        self._note(self._known())
        if self._profiler is not None:
            self._profiler.stop()

    def memory(self) -> Memory:
        """What was found; the step has to be over."""
        peak = None if self._profiler is None else self._peak()
        parts: dict[str, Figure] = dict.fromkeys(KINDS, Missing(self._why_not))
        if peak is not None:
            parts |= {kind: float(peak.parts.get(kind, 0)) for kind in KINDS}
        reserved: Figure = _NO_RESERVE
        whole = self._resident.peak()
        if self._is_card:
            whole = float(self._most[0])
            reserved = float(self._most[1] if peak is None else peak.reserved)
        if peak is not None:
            parts["other"] = _rest(whole, sum(peak.parts.values()))
        in_use = float(peak.allocated) if self._is_card and peak is not None else whole
        unused = divided(in_use, reserved, "what the allocator reserved")
        return Memory(
            parts=parts,
            peak_bytes=whole,
            reserved_bytes=reserved,
            fragmentation=unused if isinstance(unused, Missing) else max(0.0, 1.0 - unused),
            process_bytes=self._resident.most(),
            at_peak=[] if peak is None else _first(peak.alive),
        )

    def _peak(self) -> Peak:
        recorded = self._profiler.profiler.kineto_results
        changes = sorted(_changes(recorded, self.device), key=lambda change: change.start)
        found = sorted_out([*read_events(recorded.events()), *changes])
        places = {id(event): place for event, place, _ in found.host if isinstance(event, Change)}
        times = {event.name: event.start for event, _, _ in found.host if event.name.startswith(_MOMENT)}
        moments = [Moment(times.get(f"{_MOMENT}{i}", math.nan), known) for i, known in enumerate(self._moments)]
        return peak_of(changes, places, moments, dropped_at=_when_dropped(found))

    def _note(self, known: dict[int, Known]) -> None:
        """Keep what is known now, and leave a mark by which the moment is found."""
        if known and self._profiler is not None:
            with autograd_profiler.record_function(f"{_MOMENT}{len(self._moments)}"):
                self._moments.append(known)

    def _known(self) -> dict[int, Known]:
        """Weights, gradients and the optimizer's state by address."""
        found: dict[int, Known] = {}
        for name, kind, tensor in self._tensors():
            storage = _storage(tensor, self.device)
            if storage is not None and storage.data_ptr():
                found.setdefault(storage.data_ptr(), Known(name, kind, storage.nbytes()))
        return found

    def _tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        if self.model is not None:
            parameters = list(self.model.named_parameters())
            yield from ((name, "weights", tensor) for name, tensor in [*parameters, *self.model.named_buffers()])
            yield from ((f"{name}.grad", "gradients", p.grad) for name, p in parameters if p.grad is not None)
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                tensors = state.items() if isinstance(state, dict) else ()
                yield from ((f"optimizer: {key}", "optimizer", t) for key, t in tensors if isinstance(t, torch.Tensor))


def _device_of(model: nn.Module | None) -> torch.device:
    parameter = None if model is None else next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _storage(tensor: torch.Tensor, device: torch.device) -> Any:
    """The memory behind a tensor, where it is on the device and there is some: shards have theirs within."""
    tensor = getattr(tensor, "_local_tensor", tensor)
    if tensor.device != device:
        return None
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a tensor that is none in memory
        return None


def _logits_of(output: Any) -> dict[int, Known]:
    """Logits in what a model of transformers returned. Those of ours are only computed when somebody asks for them."""
    if type(output).__module__.partition(".")[0] == "geneformer_fast" or not isinstance(output, dict):
        return {}
    logits = output.get("logits")
    if not isinstance(logits, torch.Tensor):
        return {}
    storage = _storage(logits, logits.device)
    return {} if storage is None else {storage.data_ptr(): Known("logits", "logits", storage.nbytes())}


def _changes(recorded: Any, device: torch.device) -> Iterator[Change]:
    """Every block that the allocator of a device gave or took back."""
    from torch._C._profiler import _EventType

    waiting = list(recorded.experimental_event_tree())
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if node.tag != _EventType.Allocation:
            continue
        what = node.typed[1]
        if what.device.type == device.type and (device.index is None or what.device.index in (device.index, None)):
            yield Change(
                name=MEMORY,
                start=node.start_time_ns,
                end=node.start_time_ns,
                thread=node.start_tid,
                address=what.ptr or 0,
                n_bytes=what.alloc_size,
                allocated=what.total_allocated,
                reserved=what.total_reserved,
            )


def _when_dropped(found: Sorted) -> float:
    """When gradients of the step before are let go: in the optimizer's ``zero_grad``, else before the backward pass."""
    zeroed = (event.end for event, _, _ in found.host if event.name.startswith("Optimizer.zero_grad"))
    backward = (event.start for event, place, _ in found.host if place.phase == "backward")
    return next(zeroed, None) or next(backward, -math.inf)


def _rest(whole: Figure, known: int) -> Figure:
    if isinstance(whole, Missing):
        return whole
    if known > whole:
        return Missing("less is resident than tensors take: part of them lies in a file that was never read")
    return whole - known


def _first(alive: list[Alive]) -> list[Alive]:
    rest = sum(each.n_bytes for each in alive[MOST_ALIVE:])
    return [*alive[:MOST_ALIVE], *([Alive(f"{len(alive) - MOST_ALIVE} more", rest)] if rest else [])]
