"""What was in memory when most of it was in use, from the record of what an allocator gave and took back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from geneformer_fast.profiling.figures import Alive
from geneformer_fast.profiling.meters.events import Event, Place

# Operations whose results are logits, or as large: the head, and losses over what it gives.
_LOGITS = frozenset(
    (
        *("head", "mlm_cross_entropy", "aten::cross_entropy_loss", "aten::nll_loss", "aten::nll_loss_nd"),
        *("aten::log_softmax", "aten::nll_loss_forward"),
    )
)


@dataclass(slots=True)
class Change(Event):
    """Memory that an allocator gave, or (a negative number of bytes) took back.

    Attributes
    ----------
    allocated, reserved
        What a card's allocator had given, and held, after that.
    """

    address: int = 0
    n_bytes: int = 0
    allocated: int = 0
    reserved: int = 0


@dataclass(frozen=True)
class Known:
    """Memory that somebody can name: kind as in :data:`~geneformer_fast.profiling.figures.KINDS`."""

    name: str
    kind: str
    n_bytes: int


@dataclass(frozen=True)
class Moment:
    """What was known at some time, by address."""

    time: float
    known: Mapping[int, Known]


@dataclass(frozen=True)
class Peak:
    """The moment when most was in use.

    Attributes
    ----------
    parts
        Bytes by kind, of what is known of them.
    alive
        Largest first; what one kind of operation left behind is one row.
    allocated, reserved
        What a card's allocator had given, and held; 0 where nobody said.
    """

    parts: dict[str, int]
    alive: list[Alive]
    allocated: int
    reserved: int


@dataclass
class _Span:
    """A block of memory from when it was given to when it was taken back."""

    address: int
    n_bytes: int
    start: float
    place: Place
    end: float = math.inf
    ended_in: Place | None = None
    known: Known | None = None


@dataclass
class _Book:
    """All blocks there were."""

    spans: list[_Span] = field(default_factory=list)
    open: dict[int, _Span] = field(default_factory=dict)

    def give(self, address: int, n_bytes: int, time: float, place: Place, known: Known | None = None) -> None:
        """A block is given; another one at its address must have gone, whether somebody said so or not."""
        self.take(address, time, None)
        self.open[address] = _Span(address, n_bytes, time, place, known=known)
        self.spans.append(self.open[address])

    def take(self, address: int, time: float, place: Place | None) -> None:
        """A block is taken back."""
        span = self.open.pop(address, None)
        if span is not None:
            span.end, span.ended_in = time, place


def peak_of(
    changes: Sequence[Change], places: Mapping[int, Place], moments: Sequence[Moment], *, dropped_at: float = -math.inf
) -> Peak:
    """The peak of a step.

    Parameters
    ----------
    changes
        In the order of time.
    places
        Where each change belongs, by ``id``.
    moments
        What was known: before the step, at whatever moments within it, and after it; at least two.
    dropped_at
        When gradients went that were known before and at no later moment: allocators of CPUs do not say.
    """
    before, *later = moments
    book = _Book()
    for address, known in before.known.items():
        book.give(address, known.n_bytes, -math.inf, Place(), known)
    for change in changes:
        if change.n_bytes > 0:
            book.give(change.address, change.n_bytes, change.start, places[id(change)])
        else:
            book.take(change.address, change.start, places[id(change)])
    _let_go(book.spans, later, dropped_at)
    _name(book.spans, later)
    sizes = {
        known.n_bytes // 2**i for m in later for known in m.known.values() if known.kind == "logits" for i in (0, 1)
    }
    kinds = [_kind(span, sizes) for span in book.spans]
    return _at(_moment_of_most(book.spans), book.spans, kinds, changes)


def _let_go(spans: Iterable[_Span], later: Sequence[Moment], dropped_at: float) -> None:
    """Gradients of before the step that are gone."""
    kept = {address for moment in later for address, known in moment.known.items() if known.kind == "gradients"}
    for span in spans:
        is_gradient = span.known is not None and span.known.kind == "gradients"
        if is_gradient and span.end == math.inf and span.address not in kept:
            span.end = dropped_at


def _name(spans: Iterable[_Span], later: Sequence[Moment]) -> None:
    """Give blocks the names that somebody knew while they were there."""
    for span in spans:
        if span.known is None:
            found = (
                moment.known[span.address]
                for moment in later
                if span.start <= moment.time < span.end and span.address in moment.known
            )
            span.known = next(found, None)


def _kind(span: _Span, logits: set[int]) -> str:
    if span.known is not None:
        return span.known.kind
    place, ended_in = span.place, span.ended_in
    if place.phase == "optimizer":
        return "optimizer" if span.end == math.inf else "workspace"
    if (
        ended_in is not None
        and place.label is not None
        and (ended_in.label, ended_in.call) == (place.label, place.call)
    ):
        return "workspace"
    is_of_head = place.label is not None and place.label.removesuffix(" backward") in _LOGITS
    return "logits" if is_of_head or span.n_bytes in logits else "activations"


def _moment_of_most(spans: Iterable[_Span]) -> float:
    """When the blocks add up to most; the first such moment."""
    changes = [(span.start, span.n_bytes) for span in spans] + [(span.end, -span.n_bytes) for span in spans]
    # What goes at the very moment that something comes has gone before.
    changes.sort(key=lambda change: (change[0], change[1]))
    total = most = 0
    when = -math.inf
    for time, n_bytes in changes:
        total += n_bytes
        if total > most:
            most, when = total, time
    return when


def _at(when: float, spans: Sequence[_Span], kinds: Sequence[str], changes: Sequence[Change]) -> Peak:
    parts: dict[str, int] = {}
    alive: dict[str, int] = {}
    for span, kind in zip(spans, kinds, strict=True):
        if span.start <= when < span.end:
            parts[kind] = parts.get(kind, 0) + span.n_bytes
            name = span.known.name if span.known is not None else f"{span.place.label or 'the loop'}: {kind}"
            alive[name] = alive.get(name, 0) + span.n_bytes
    last = next((change for change in reversed(changes) if change.start <= when), None)
    rows = [Alive(name, n_bytes) for name, n_bytes in sorted(alive.items(), key=lambda each: (-each[1], each[0]))]
    return Peak(parts, rows, 0 if last is None else last.allocated, 0 if last is None else last.reserved)
