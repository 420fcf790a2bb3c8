"""Which implementation of an operation runs, and why.

Every operation's ``plan.py`` lists its candidates for a target and dtype in order of preference, each with a reason.
:func:`choose` takes the first that can run, unless the caller, a :func:`use_impl` block or the environment variable
``GENEFORMER_KERNELS_IMPL`` asks for one by name; what is asked for by name runs or raises, it never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from geneformer_kernels.capability import CAPABILITY
from geneformer_kernels.target import Target

logger = logging.getLogger("geneformer_kernels")

OPERATIONS = (
    "rank_genes",
    "embed_tokens",
    "linear",
    "varlen_attention",
    "residual_layernorm",
    "feed_forward",
    "int8_linear",
    "mlm_cross_entropy",
)
ENVIRONMENT_VARIABLE = "GENEFORMER_KERNELS_IMPL"


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


_forced: ContextVar[tuple[tuple[str, Impl], ...]] = ContextVar("geneformer_kernels_forced", default=())
_told: set[tuple[str, str, str, str]] = set()


@functools.cache
def candidates(op: str, dtype: str, target: Target) -> tuple[Candidate, ...]:
    """All implementations of an operation for a dtype name and a target, best first."""
    if op not in OPERATIONS:
        raise ValueError(f"no operation named {op!r}; there are {', '.join(OPERATIONS)}")
    options = importlib.import_module(f"geneformer_kernels.ops.{op}.plan").candidates(dtype, target)
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
        return cannot("AMD and Apple devices take the torch path: these kernels are tested on NVIDIA cards only")
    if target.triton is None:
        return cannot("Triton is not installed")
    found = capability(op, dtype, target)
    if found == "none":
        return cannot(f"Triton does not compile it for sm_{target.sm}")
    if found == "fma":
        return cannot(f"Triton makes scalar arithmetic of its matrix products on sm_{target.sm}, not tensor cores")
    if found == "unknown":
        return cannot(f"nothing is known of {dtype} on sm_{target.sm}")
    return Candidate(Impl.TRITON, True, reason if found == "plain" else f"{reason}, tensor cores")


def capability(op: str, dtype: str, target: Target) -> str:
    """What the table says of the newest architecture it knows that is not newer than the target's."""
    known = [sm for name, sm, kind in CAPABILITY if name == op and kind == dtype and sm <= target.sm]
    return CAPABILITY[op, max(known), dtype] if known else "unknown"


def choose(op: str, dtype: str, target: Target, impl: Impl | str | None = None) -> Choice:
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
        candidate that can run, and logs the reason once per operation, dtype and target.

    Raises
    ------
    ImplUnavailableError
        The implementation asked for by name cannot run for this dtype on this target.
    """
    options = candidates(op, dtype, target)
    wanted, source = _wanted(op, impl)
    if wanted is not None:
        match = next((option for option in options if option.impl == wanted), None)
        if match is not None and match.can_run:
            return Choice(op, wanted, f"asked for by {source}")
        why = match.reason if match is not None else f"{op} has no {wanted} implementation on {target.kind}"
        able = ", ".join(option.impl for option in options if option.can_run)
        raise ImplUnavailableError(
            f"{op}: {wanted} was asked for by {source} but cannot run in {dtype} on {target.name or target.kind}: "
            f"{why}. What can run: {able or 'nothing'}."
        )
    for option in options:
        if option.can_run:
            choice = Choice(op, option.impl, option.reason)
            _tell_once(choice, dtype, target)
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
    """Within the block, run this implementation, of one operation or (op None) of every one; it runs or raises."""
    if op is not None and op not in OPERATIONS:
        raise ValueError(f"no operation named {op!r}; there are {', '.join(OPERATIONS)}")
    names = (op,) if op is not None else OPERATIONS
    token = _forced.set(tuple((name, Impl(impl)) for name in names) + _forced.get())
    try:
        yield
    finally:
        _forced.reset(token)


def _wanted(op: str, impl: Impl | str | None) -> tuple[Impl | None, str]:
    if impl is not None:
        return Impl(impl), "impl="
    for name, forced in _forced.get():
        if name == op:
            return forced, "use_impl"
    # "torch" for every operation, or "varlen_attention=reference,feed_forward=torch".
    for part in filter(None, os.environ.get(ENVIRONMENT_VARIABLE, "").replace(" ", "").split(",")):
        name, _, value = part.rpartition("=")
        if name in ("", op):
            try:
                return Impl(value), ENVIRONMENT_VARIABLE
            except ValueError:
                known = ", ".join(Impl)
                raise ImplUnavailableError(
                    f"{ENVIRONMENT_VARIABLE}={part!r} names no implementation; known are {known}"
                ) from None
    return None, ""


def _tell_once(choice: Choice, dtype: str, target: Target) -> None:
    key = (choice.op, dtype, target.name or target.kind, choice.impl)
    if key not in _told:
        _told.add(key)
        logger.info("%s in %s on %s: %s, because %s", choice.op, dtype, key[2], choice.impl, choice.reason)
