"""Which implementation of an operation runs, and why.

Every operation's ``plan.py`` lists its candidates for a target and dtype in order of preference, each with a reason;
what a kernel compiles to on a card is read from the generated table of architectures. Where a card has measured two
implementations (``measured.py``, generated too), the faster one for a problem of this shape goes first. :func:`choose`
takes the first that can run, unless the caller, a :func:`use_impl` block or the environment variable
``GENEFORMER_KERNELS_IMPL`` asks for one by name; what is asked for by name runs or raises, it never falls back.

The variable holds ``"torch"``, for every operation that has such an implementation, or names operations,
``"varlen_attention=reference,feed_forward=torch"``, or both: an operation that is named is not concerned by the rest.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, ParamSpec, TypeVar

from geneformer_kernels.capability import CAPABILITY
from geneformer_kernels.measured import MEASURED
from geneformer_kernels.target import Target

logger = logging.getLogger("geneformer_kernels")

OPERATIONS = (
    "rank_genes",
    "embed_tokens",
    "linear",
    "varlen_attention",
    "favor_attention",
    "residual_layernorm",
    "feed_forward",
    "int8_linear",
    "quantize_rows",
    "residual_layernorm_int8",
    "int8_feed_forward",
    "fp8_linear",
    "mlm_cross_entropy",
)
#: Operations that live in the folder of another one, which is made of them, but are chosen by themselves: their
#: candidates are ``quantize_candidates`` of that folder's ``plan.py``, and so on.
INSIDE = {
    "quantize_rows": ("int8_linear", "quantize_candidates"),
    "residual_layernorm_int8": ("residual_layernorm", "int8_candidates"),
}
ENVIRONMENT_VARIABLE = "GENEFORMER_KERNELS_IMPL"
#: The oldest version that all kernels were compiled with (sm_80 and sm_90, 2026-11-26).
OLDEST_TRITON = (3, 6)
#: Two implementations whose times differ by less are equally fast: the order of the plan stands.
LEAST_GAIN = 1.03
#: Sizes of a problem that are flags: they agree or the row says nothing. Others may differ up to a factor of two.
FLAGS = ("needs_grad", "has_dropout", "has_layernorm", "is_dynamic")
NOT_NVIDIA = "AMD, Apple and other devices take the torch path: these kernels are tested on NVIDIA cards only"


class Impl(StrEnum):
    """The kinds of implementation an operation may have."""

    TRITON = "triton"
    TORCH = "torch"
    NUMBA = "numba"
    REFERENCE = "reference"


@dataclass(frozen=True)
class Candidate:
    """One implementation for one target and dtype: whether it can run, and the reason either way."""

    impl: Impl
    can_run: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, and why."""

    op: str
    impl: Impl
    reason: str


class ImplUnavailableError(RuntimeError):
    """An implementation asked for by name cannot run here; the message lists what can."""


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Wish(NamedTuple):
    """What somebody asked for: an implementation of an operation, or (op "") of all that have it."""

    op: str
    impl: Impl


# Blocks of use_impl that are open, the last one first. Of the process, not of a thread or context: batches are embedded
# in worker threads, and autograd recomputes in threads of its own.
_blocks: list[Wish] = []
# What was asked for in the forward pass, while a backward pass computes it again.
_as_then: ContextVar[tuple[Wish, ...] | None] = ContextVar("geneformer_kernels_as_then", default=None)
_told: set[tuple[str, str, str, str]] = set()


@functools.cache
def candidates(op: str, dtype: str, target: Target) -> tuple[Candidate, ...]:
    """All implementations of an operation for a dtype name and a target, best first."""
    if op not in OPERATIONS:
        raise ValueError(f"no operation named {op!r}; there are {', '.join(OPERATIONS)}")
    folder, function = INSIDE.get(op, (op, "candidates"))
    plan = importlib.import_module(f"geneformer_kernels.ops.{folder}.plan")
    options: tuple[Candidate, ...] = getattr(plan, function)(dtype, target)
    if dtype == "bfloat16" and target.kind == "cuda" and target.sm < 75:
        why = f"{target.name or 'this card'} has no bfloat16 (emulated, a tenth of the speed): use float16"
        return tuple(Candidate(option.impl, False, why) for option in options)
    return options


def triton_candidate(op: str, dtype: str, target: Target, reason: str = "Triton kernel") -> Candidate:
    """The Triton implementation of an operation, able to run if the generated table says that it compiles well."""

    def cannot(why: str) -> Candidate:
        return Candidate(Impl.TRITON, False, why)

    if target.kind == "cpu":
        if "triton_interpreter" in target.features:
            return Candidate(Impl.TRITON, True, "Triton's interpreter, for tests")
        return cannot("Triton kernels run on the CPU in its interpreter only (TRITON_INTERPRET=1)")
    if target.kind != "cuda":
        return cannot(NOT_NVIDIA)
    if target.triton is None:
        return cannot("Triton is not installed")
    if target.triton < OLDEST_TRITON:
        needed, installed = (".".join(map(str, version)) for version in (OLDEST_TRITON, target.triton))
        return cannot(f"these kernels compile with Triton {needed} and newer, not with {installed}")
    found = capability(op, dtype, target)
    if found == "none":
        return cannot(f"Triton does not compile it for sm_{target.sm}")
    if found == "fma":
        return cannot(f"Triton makes scalar arithmetic of its matrix products on sm_{target.sm}, not tensor cores")
    if found == "unknown":
        return cannot(f"nothing is known of {dtype} on sm_{target.sm}")
    return Candidate(Impl.TRITON, True, reason if found == "plain" else f"{reason}, tensor cores")


def compiled_int8_candidate(target: Target, what: str) -> Candidate:
    """The loops over int8 that numba compiles for a CPU; the same bits on every instruction set that has them."""
    if target.kind != "cpu":
        return Candidate(Impl.NUMBA, False, "compiled loops run on the CPU")
    name = target.int8_instructions
    if name is None:
        return Candidate(Impl.NUMBA, False, "the compiled loops need AVX2, VNNI or AMX")
    return Candidate(Impl.NUMBA, True, f"{what} in compiled loops, {name}")


def compiled_float32_candidate(dtype: str, target: Target, what: str) -> Candidate:
    """The loops over float32 that numba compiles for a CPU with AVX2, in inference."""
    if dtype != "float32":
        return Candidate(Impl.NUMBA, False, "the compiled loops compute in float32")
    if not target.has_float32_loops:
        return Candidate(Impl.NUMBA, False, "the compiled loops run on CPUs with AVX2")
    if not _has_numba():
        return Candidate(Impl.NUMBA, False, "numba, which compiles the loops, is not installed")
    return Candidate(Impl.NUMBA, True, f"{what} in compiled loops, avx2")


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def capability(op: str, dtype: str, target: Target) -> str:
    """What the table says of the newest architecture it knows that is not newer than the target's."""
    known = [sm for name, sm, kind in CAPABILITY if name == op and kind == dtype and sm <= target.sm]
    return CAPABILITY[op, max(known), dtype] if known else "unknown"


def faster_here(op: str, dtype: str, target: Target, shape: Mapping[str, int]) -> tuple[Impl, str] | None:
    """The implementation that was faster on this very card for the nearest problem measured, and how much.

    None where nothing near was measured, where the difference is noise, or where rows that are equally near disagree
    (because ``shape`` leaves out what tells them apart).
    """
    near: dict[float, list[tuple[dict[str, float], str]]] = {}
    for row, times, source in MEASURED.get((op, target.name, dtype), ()):
        distance = _distance(row, shape)
        if distance is not None and len(times) > 1:
            near.setdefault(distance, []).append((times, source))
    found = set()
    for times, source in near[min(near)] if near else ():
        first, second = sorted(times, key=times.__getitem__)[:2]
        gain = times[second] / times[first]
        found.add((first, f"{gain:.2f} times as fast as {second} on {target.name}, measured {source}", gain))
    if len({first for first, _, _ in found}) != 1 or min(gain for *_, gain in found) < LEAST_GAIN:
        return None
    first, reason, _ = min(found, key=lambda each: each[2])
    return Impl(first), reason


def _distance(row: Mapping[str, int], shape: Mapping[str, int]) -> float | None:
    """Powers of two between two problems, over the sizes both name; None where a flag or a size is too different."""
    distance = 0.0
    for name in row.keys() & shape.keys():
        if name in FLAGS:
            if row[name] != shape[name]:
                return None
            continue
        apart = abs(math.log2(max(row[name], 1) / max(shape[name], 1)))
        if apart > 1:
            return None
        distance += apart
    return round(distance, 6)


def choose(
    op: str,
    dtype: str,
    target: Target,
    impl: Impl | str | None = None,
    shape: Mapping[str, int] | None = None,
    triton_cannot: str = "",
    numba_cannot: str = "",
) -> Choice:
    """The implementation to run.

    Parameters
    ----------
    op
        Operation name, as in :data:`OPERATIONS`.
    dtype
        Name of the compute dtype, such as ``"bfloat16"``.
    target
        The device, real or made up.
    impl
        An implementation by name. None asks :func:`use_impl`, then the environment variable, then picks the first
        candidate that can run, and logs the reason once per operation, dtype and target; as a warning where a device
        made for these kernels, from Ampere on, or one that is not NVIDIA's, has to do without them.
    shape
        Sizes and flags of the problem, as rows of :data:`geneformer_kernels.measured.MEASURED` name them: ``width``,
        ``head_dim``, ``length``, ``needs_grad``, ... What is left out counts as unknown.
    triton_cannot, numba_cannot
        Why the Triton kernels, or the compiled loops, cannot serve such a problem, if they cannot.

    Raises
    ------
    ImplUnavailableError
        The implementation asked for by name cannot run for this dtype on this target.
    ValueError
        There is no operation, or no kind of implementation, of that name.
    """
    options = candidates(op, dtype, target)
    for those, why in ((Impl.TRITON, triton_cannot), (Impl.NUMBA, numba_cannot)):
        if why:
            options = tuple(
                Candidate(option.impl, False, why) if option.impl == those and option.can_run else option
                for option in options
            )
    wanted, source, is_for_all = _wanted(op, impl)
    match = next((option for option in options if option.impl == wanted), None)
    if wanted is not None and not (is_for_all and match is None):
        if match is not None and match.can_run:
            return Choice(op, wanted, f"asked for by {source}")
        why = match.reason if match is not None else f"{op} has no {wanted} implementation on {target.kind}"
        able = ", ".join(option.impl for option in options if option.can_run)
        raise ImplUnavailableError(
            f"{op}: {wanted} was asked for by {source} but cannot run in {dtype} on {target.name or target.kind}: "
            f"{why}. What can run: {able or 'nothing'}."
        )
    faster = faster_here(op, dtype, target, shape or {})
    if faster is not None:
        options = tuple(
            Candidate(option.impl, option.can_run, faster[1]) if option.impl == faster[0] else option
            for option in sorted(options, key=lambda option: option.impl != faster[0])
        )
    for i, option in enumerate(options):
        if option.can_run:
            # What would have been better, had it been able to run, is half of the reason.
            missed = "".join(f"; {other.impl} cannot: {other.reason}" for other in options[:i])
            if target.kind not in ("cpu", "cuda"):
                missed = f"; {NOT_NVIDIA}"
            choice = Choice(op, option.impl, option.reason + missed)
            tell_once(choice, dtype, target, is_fallback=bool(missed))
            return choice
    raise ImplUnavailableError(
        f"{op} cannot run in {dtype} on {target.name or target.kind}: "
        + "; ".join(f"{option.impl}: {option.reason}" for option in options)
    )


def explain(target: Target, dtype: str | None = None) -> list[Choice]:
    """For every operation, what would run on a target and why (dtype None: the target's fastest)."""
    dtype = dtype or target.fastest_dtype
    # Ranking is float64 arithmetic on every target: its exactness is the point.
    return [choose(op, "float64" if op == "rank_genes" else dtype, target) for op in OPERATIONS]


@contextlib.contextmanager
def use_impl(impl: Impl | str, op: str | None = None) -> Iterator[None]:
    """Within the block, run this implementation, of one operation or (op None) of every one that has it.

    It runs or raises, in all threads. What ``torch.compile`` has compiled keeps the choices made while it was compiled,
    so the block belongs around the first call; within the function it breaks the graph. A backward pass outside of the
    block that computes activations again chooses again, which torch refuses where the two differ; ``Encoder`` sees to
    it that it does not.

    Raises
    ------
    ValueError
        There is no operation, or no kind of implementation, of that name.
    """
    if op is not None and op not in OPERATIONS:
        raise ValueError(f"no operation named {op!r}; there are {', '.join(OPERATIONS)}")
    import torch  # plans and choices themselves are made without it

    if torch.compiler.is_compiling():  # which would trace the block, and enter it when all choices are made
        raise RuntimeError("use_impl belongs around a compiled function, not into it")
    wish = Wish(op or "", _named(impl))
    _blocks.insert(0, wish)
    try:
        yield
    finally:
        # Not simply the first: threads may leave their blocks in any order.
        del _blocks[next(i for i, other in enumerate(_blocks) if other is wish)]


def as_chosen_now(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which sees the :func:`use_impl` blocks that are open now whenever and wherever it is called.

    For activation checkpointing, whose second forward pass has to do what the first one did.
    """
    now = _open_blocks()

    # Without functools.wraps, which would copy a module's parameters into the function's attributes.
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        token = _as_then.set(now)
        try:
            return function(*arguments, **named)
        finally:
            _as_then.reset(token)

    return run


def asked_for() -> tuple[object, str]:
    """What :func:`use_impl` and the environment variable say at the moment."""
    return _open_blocks(), os.environ.get(ENVIRONMENT_VARIABLE, "")


def is_forced(op: str) -> bool:
    """Whether :func:`use_impl` or the environment variable says what runs."""
    return _wanted(op, None)[0] is not None


def _open_blocks() -> tuple[Wish, ...]:
    then = _as_then.get()
    return tuple(_blocks) if then is None else then


def _named(impl: Impl | str) -> Impl:
    try:
        return Impl(impl)
    except ValueError:
        raise ValueError(f"no implementation named {str(impl)!r}; there are {', '.join(Impl)}") from None


def _wanted(op: str, impl: Impl | str | None) -> tuple[Impl | None, str, bool]:
    """What was asked for and by whom, and whether it was asked of every operation that has it."""
    if impl is not None:
        return _named(impl), "impl=", False
    for wish in _open_blocks():
        if wish.op in ("", op):
            return wish.impl, "use_impl", not wish.op
    wishes = _in_environment(os.environ.get(ENVIRONMENT_VARIABLE, ""))
    name = op if op in wishes else ""
    return wishes.get(name), ENVIRONMENT_VARIABLE, not name


@functools.cache
def _in_environment(text: str) -> dict[str, Impl]:
    """The wishes in the environment variable, by operation; of all operations under ""."""
    wishes = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, value = part.rpartition("=")
        if name not in ("", *OPERATIONS):
            raise ImplUnavailableError(
                f"{ENVIRONMENT_VARIABLE}: {part!r} names no operation; there are {', '.join(OPERATIONS)}"
            )
        try:
            wishes[name] = _named(value)
        except ValueError as error:
            raise ImplUnavailableError(f"{ENVIRONMENT_VARIABLE}: {part!r}: {error}") from None
    return wishes


def tell_once(choice: Choice, dtype: str, target: Target, *, is_fallback: bool = False) -> None:
    """Log what was chosen and why, once per operation, dtype, target and implementation."""
    key = (choice.op, dtype, target.name or target.kind, choice.impl)
    if key not in _told:
        _told.add(key)
        # Who has a card that could do better, or bought one of another kind, should hear of it without asking. On a
        # CPU, and on Volta and Turing, what stands in for the kernels is what is meant to run.
        is_loud = target.kind not in ("cpu", "cuda") or (is_fallback and target.sm >= 80)
        level = logging.WARNING if is_loud else logging.INFO
        logger.log(level, "%s in %s on %s: %s, because %s", choice.op, dtype, key[2], choice.impl, choice.reason)
