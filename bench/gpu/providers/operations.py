"""Candidates of the cases for single operations: ours, torch as people write it, torch.compile of the same, cuBLAS.

A problem is a function of tensors and the plain torch expression it equals. Both work on the same numbers; the
expression in float64 is the truth.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from geneformer_kernels.on_device import DTYPE_NAMES

from bench.gpu.card import half_dtype
from bench.gpu.impls import Question, with_impls
from bench.gpu.measure import Candidate, Place, Prepared, Unavailable, Variant, Work
from bench.lengths import real_lengths

EPS = 1e-12
Tensors = dict[str, torch.Tensor]
#: Of inputs by name: one tensor or several, of which the first is compared and all are differentiated.
Function = Callable[[Tensors], Any]
# What is off by less is rounding of a 16-bit dtype, here and there twice; int8 loses more and is judged by itself.
TOLERANCE = 0.02
# What torch.compile may take, of each expression.
PLAIN_COMPILE_S = 10.0
# Rows that are compared: all of a large problem in float64 would not fit beside it.
CHECKED_ROWS = 2048


@dataclass(frozen=True)
class Problem:
    """One operation on one set of inputs.

    Attributes
    ----------
    name, what
        Of the variant.
    make
        Inputs by name, in the dtypes the operation is called with.
    plain
        The torch expression: of inputs in any dtype.
    ours
        This project's function; looked up late, because it may not be there.
    rivals
        Other ways than the plain expression, eager and compiled.
    work
        What it needs at least, backward included where ``gradients`` names any.
    gradients
        Inputs whose gradients are computed, timed and compared.
    row_inputs
        Inputs with one row per output row: results are compared on the first rows only, with these cut.
    tolerance
        Relative error allowed.
    has_plain
        Whether the plain expression itself, eager and compiled, is a rival.
    op, shape
        What ``choose`` is asked: the operation, and the problem's sizes and flags.
    """

    name: str
    what: str
    op: str
    shape: Mapping[str, int]
    make: Callable[[torch.device, torch.dtype], Tensors]
    plain: Function
    ours: Callable[[Tensors], Function]
    work: Work
    rivals: Mapping[str, tuple[str, Callable[[Tensors], Function]]] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    row_inputs: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    has_plain: bool = True


def operation(name: str, op: str | None = None) -> Callable[..., Any]:
    """A function of geneformer_kernels, or :class:`Unavailable` where this version has none."""
    for module in ("geneformer_kernels", f"geneformer_kernels.ops.{op or name}.op"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise Unavailable(f"this version has no {name}")


def variant_of(problem: Problem, place: Place) -> Variant:
    """The problem as a variant."""
    state = _State(problem, place)
    return Variant(
        name=problem.name,
        what=problem.what,
        work=problem.work,
        build=state.build,
        truth=state.truth,
        tolerance=dict.fromkeys(("out", *problem.gradients), problem.tolerance),
        question=state.question.as_json(),
    )


class _State:
    """A problem with its inputs."""

    def __init__(self, problem: Problem, place: Place) -> None:
        self.problem, self.place = problem, place
        self.inputs: Tensors = {}
        dtype = DTYPE_NAMES[half_dtype(place.device)]
        self.question = Question(problem.op, dtype, {**problem.shape, "needs_grad": bool(problem.gradients)})

    def build(self) -> Sequence[Candidate]:
        """Makes the inputs; gives all candidates."""
        problem = self.problem
        self.inputs = problem.make(self.place.device, half_dtype(self.place.device))
        ours = Candidate("ours", "this project", lambda: self._prepared(problem.ours(self.inputs)), is_ours=True)
        chosen = with_impls(ours, self.question, self.place.device)
        named = {"eager": ("torch, eager", lambda inputs: problem.plain)} if problem.has_plain else {}
        for name, (what, make) in {**named, **problem.rivals}.items():
            chosen.append(Candidate(name, what, lambda make=make: self._prepared(make(self.inputs))))
            compiled = lambda make=make: self._prepared(make(self.inputs), self.place.compiled)  # noqa: E731
            tag = "compile" if name == "eager" else f"{name}-compile"
            chosen.append(Candidate(tag, f"{what}, torch.compile", compiled, compile_s=PLAIN_COMPILE_S))
        return chosen

    def truth(self) -> Mapping[str, torch.Tensor]:
        """The plain expression on upcast inputs, on the first rows only."""
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in self._checked().items()}
        return self._compared(self.problem.plain, inputs)

    def _checked(self) -> Tensors:
        cut = self.problem.row_inputs
        return {name: x[:CHECKED_ROWS] if name in cut else x for name, x in self.inputs.items()}

    def _compared(self, function: Function, inputs: Tensors) -> Mapping[str, torch.Tensor]:
        wanted = self.problem.gradients
        leaves = {name: x.detach().clone().requires_grad_(name in wanted) for name, x in inputs.items()}
        with torch.set_grad_enabled(bool(wanted)):
            outs = _as_tuple(function(leaves))
        found = {"out": outs[0].detach()}
        if wanted:
            gradients = torch.autograd.grad(outs, [leaves[name] for name in wanted], _gradients_like(outs))
            found |= dict(zip(wanted, gradients, strict=True))
        return found

    def _prepared(self, function: Function, compiled: Callable[[Function], Function] = lambda f: f) -> Prepared:
        # A compiled function is compared uncompiled: on other sizes it would be compiled once more.
        result = lambda: self._compared(function, self._checked())  # noqa: E731
        timed = compiled(function)
        if not self.problem.gradients:

            def forward() -> Any:
                with torch.no_grad():
                    return timed(self.inputs)

            return Prepared(forward, result)
        leaves = {name: x.detach().requires_grad_(name in self.problem.gradients) for name, x in self.inputs.items()}
        wanted = [leaves[name] for name in self.problem.gradients]
        gradients = _gradients_like(_as_tuple(function(leaves)))

        def both() -> None:
            torch.autograd.grad(_as_tuple(timed(leaves)), wanted, gradients)

        return Prepared(both, result)


def _as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(out) if isinstance(out, list | tuple) else (out,)


def _gradients_like(outs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of the outputs, the same numbers for every candidate; 1 for a loss."""
    found = []
    for out in outs:
        if not out.ndim:
            found.append(torch.ones_like(out))
            continue
        generator = torch.Generator(out.device).manual_seed(1)
        found.append(torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype))
    return found


def draw(device: torch.device, *shape: int, spread: float = 1.0, mean: float = 0.3, seed: int = 0) -> torch.Tensor:
    """Random float32 away from zero."""
    generator = torch.Generator(device).manual_seed(seed + sum(shape))
    return torch.randn(shape, device=device, generator=generator) * spread + mean


@dataclass(frozen=True)
class OperationCase:
    """The problems of one operation; ``problems(is_tiny)`` gives them."""

    problems: Callable[[bool], Sequence[Problem]]

    def variants(self, place: Place) -> list[Variant]:
        """One per problem."""
        return [variant_of(problem, place) for problem in self.problems(place.is_tiny)]


def norm_problems(is_tiny: bool) -> list[Problem]:
    """residual_layernorm at the widths of the presets: inference, and with gradients."""
    return [
        _norm_problem(n_tokens, width, has_gradients)
        for n_tokens, width in ([(64, 32)] if is_tiny else [(131_072, 256), (65_536, 768), (65_536, 1152)])
        for has_gradients in (False, True)
    ]


def _norm_problem(n_tokens: int, width: int, has_gradients: bool) -> Problem:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        return {
            "x": draw(device, n_tokens, width).to(dtype),
            "residual": draw(device, n_tokens, width, seed=1),
            "weight": draw(device, width, mean=1.0, spread=0.1),
            "bias": draw(device, width, spread=0.1, mean=0.0, seed=2),
        }

    def plain(t: Tensors) -> Any:
        total = t["x"].to(t["residual"].dtype) + t["residual"]
        stream = F.layer_norm(total, total.shape[-1:], t["weight"], t["bias"], EPS)
        return stream, stream.to(t["x"].dtype)

    def ours(_: Tensors) -> Function:
        function = operation("residual_layernorm")
        return lambda t: function(t["x"], t["residual"], t["weight"], t["bias"], eps=EPS, norm="post")

    # Read x and residual, write stream and out; backward: read both gradients and the stream, write two gradients.
    per_element = (2 + 4 + 4 + 2) + ((4 + 2 + 4 + 2 + 4) if has_gradients else 0)
    return Problem(
        name=f"{width}" + ("_backward" if has_gradients else ""),
        what=f"{n_tokens:,} rows of {width}" + (", forward and backward" if has_gradients else ""),
        op="residual_layernorm", shape={"width": width},
        make=make, plain=plain, ours=ours, work=Work(n_bytes=n_tokens * width * per_element),
        gradients=("x", "residual", "weight", "bias") if has_gradients else (), row_inputs=("x", "residual"),
    )  # fmt: skip


def embed_problems(is_tiny: bool) -> list[Problem]:
    """embed_tokens for V1-10M and V2-104M, real lengths."""
    chosen = (
        [("256", 40, 32, 97, 32)]
        if is_tiny
        else [("256", 131_072, 256, 25_426, 2048), ("768", 65_536, 768, 20_275, 4096)]
    )
    return [_embed_problem(*sizes, has_gradients) for sizes in chosen for has_gradients in (False, True)]


def _embed_problem(name: str, n_tokens: int, width: int, n_vocab: int, max_len: int, has_gradients: bool) -> Problem:
    lengths = [10, 1, 29] if n_tokens < 1000 else real_lengths(round(n_tokens / 1100), mean=1100, max_len=max_len)
    total = sum(lengths)

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        generator = torch.Generator(device).manual_seed(0)
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        starts = torch.repeat_interleave(bounds[:-1].long(), torch.tensor(lengths))
        return {
            "ids": torch.randint(2, n_vocab, (total,), device=device, generator=generator),
            "bounds": bounds.to(device),
            "positions": (torch.arange(total) - starts).to(device),
            "like": torch.empty(0, device=device, dtype=dtype),
            "token": draw(device, n_vocab, width),
            "position": draw(device, max_len, width, seed=1),
            "type": draw(device, width, seed=2),
            "weight": draw(device, width, mean=1.0, spread=0.1),
            "bias": draw(device, width, spread=0.1, mean=0.0, seed=3),
        }

    def plain(t: Tensors) -> Any:
        hidden = F.embedding(t["ids"], t["token"]) + t["type"] + F.embedding(t["positions"], t["position"])
        stream = F.layer_norm(hidden, hidden.shape[-1:], t["weight"], t["bias"], EPS)
        return stream, stream.to(t["like"].dtype)

    def ours(inputs: Tensors) -> Function:
        function = operation("embed_tokens")
        names = ("ids", "bounds", "token", "position", "type", "weight", "bias")
        return lambda t: function(*(t[key] for key in names), eps=EPS, out_dtype=t["like"].dtype)

    # Read ids and both tables once, write stream and out; backward: read their gradients, write the tables' gradients.
    n_bytes = total * 8 + (n_vocab + max_len) * width * 4 + total * width * (4 + 2)
    return Problem(
        name=name + ("_backward" if has_gradients else ""),
        what=f"{total:,} tokens of {len(lengths)} cells, width {width}"
        + (", forward and backward" if has_gradients else ""),
        op="embed_tokens", shape={"width": width},
        make=make, plain=plain, ours=ours, work=Work(n_bytes=n_bytes * (2 if has_gradients else 1)),
        gradients=("token", "position", "weight", "bias") if has_gradients else (),
    )  # fmt: skip
