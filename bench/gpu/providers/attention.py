"""Candidates of the attention cases: ours, torch's SDPA by backend, its varlen and flex attention, flash-attn."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from geneformer_kernels.on_device import DTYPE_NAMES

from bench.gpu.card import half_dtype
from bench.gpu.impls import Question, uses_cudnn, with_impls
from bench.gpu.measure import Candidate, Place, Prepared, Unavailable, Variant, Work
from bench.lengths import real_lengths, uniform_lengths
from geneformer_fast.ragged import Ragged

# bfloat16 attention is off by 0.3 to 1 %. With dropout the mean weight is exact up to chance, its variance estimated.
TOLERANCE = {"out": 0.02, "dq": 0.03, "dk": 0.03, "dv": 0.03, "mean_weight": 0.02, "variance": 0.3}
# What torch.compile may take.
FLEX_S = 15.0
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """Head dim and heads, ``"forward"``, ``"backward"`` or ``"both"``, dropout, and sets of lengths by name."""

    head_dim: int
    n_heads: int
    mode: str
    lengths: Mapping[str, tuple[int, ...]]
    dropout_p: float = 0.0

    def variants(self, place: Place) -> list[Variant]:
        """One per set of lengths."""
        found = []
        for name, lengths in self.lengths.items():
            chosen, heads = list(lengths), self.n_heads
            if place.is_tiny:
                chosen, heads = [max(1, round(n * 24 / max(lengths))) for n in lengths[:3]], 2
            found.append(_Problem(self, name, chosen, heads, place).variant())
        return found


def length_sets(n_tokens: int, uniform: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Equal lengths at about one number of tokens, by name."""
    return {str(n): (n,) * max(1, n_tokens // n) for n in uniform}


def mixed_sets(n_tokens: int) -> dict[str, tuple[int, ...]]:
    """Real lengths of mean 1,442, and uniform ones from 300 to 2,048."""
    return {
        "real": tuple(real_lengths(round(n_tokens / 1442), mean=1442)),
        "uniform": tuple(uniform_lengths(round(n_tokens / 1174), 300, 2048)),
    }


class _Problem:
    """q, k, v and the output's gradient, packed; truth in float64 for the first and the last cell, one head each."""

    def __init__(self, case: AttentionCase, name: str, lengths: list[int], n_heads: int, place: Place) -> None:
        self.case, self.name, self.lengths, self.n_heads, self.place = case, name, lengths, n_heads, place
        self.device, self.dtype = place.device, half_dtype(place.device)
        self.needs_grad = case.mode != "forward"
        flags = {"needs_grad": self.needs_grad, "has_dropout": case.dropout_p > 0}
        shape = {"head_dim": case.head_dim, "length": sum(lengths) // len(lengths), **flags}
        self.question = Question("varlen_attention", DTYPE_NAMES[self.dtype], shape)

    def variant(self) -> Variant:
        """Work: 4 L² H D forward, 2.5 times that backward (five products instead of two), as papers count."""
        factor = {"forward": 1.0, "backward": 2.5, "both": 3.5}[self.case.mode]
        width = self.n_heads * self.case.head_dim
        flops = factor * sum(4 * n**2 * width for n in self.lengths)
        dropout = f", dropout {self.case.dropout_p}" if self.case.dropout_p else ""
        longest = max(self.lengths)
        what = f"{len(self.lengths)} cells, {sum(self.lengths):,} tokens, longest {longest:,}"
        return Variant(
            name=self.name,
            what=f"{self.case.mode}, {self.n_heads} heads of {self.case.head_dim}, {what}{dropout}",
            work=Work(flops=flops, counts={"tokens": sum(self.lengths)}),
            build=self.build,
            truth=self.truth,
            # A few rows say nothing of a variance.
            tolerance=TOLERANCE | ({"variance": 5.0, "mean_weight": 0.5} if self.place.is_tiny else {}),
            question=self.question.as_json(),
        )

    def build(self) -> Sequence[Candidate]:
        """Makes the inputs; gives all candidates."""
        shape = (sum(self.lengths), 3, self.n_heads, self.case.head_dim)
        # Means away from zero, as biases make them: values without show neither a lost mask nor a lost scale.
        qkv = torch.randn(shape, device=self.device) + 0.3
        self.qkv = qkv.to(self.dtype)
        self.ragged = Ragged.from_lengths(torch.zeros(shape[0], device=self.device), self.lengths)
        self.gradient = torch.randn(shape[0], *shape[2:], device=self.device).to(self.dtype)
        return candidates(self)

    def truth(self) -> Mapping[str, torch.Tensor]:
        """Slices ``(cell, head)`` of what each candidate gives, computed by plain float64 attention."""
        found: dict[str, list[torch.Tensor]] = {}
        for start, stop, head in self.slices():
            dtype = torch.float64 if stop - start <= 4096 else torch.float32
            q, k, v = (x[start:stop, head].to(dtype).requires_grad_() for x in self.qkv.unbind(1))
            weights = torch.softmax(q @ k.T * self.case.head_dim**-0.5, dim=-1)
            if self.case.dropout_p:
                p = self.case.dropout_p
                found.setdefault("mean_weight", []).append(torch.ones(1, device=self.device))
                found.setdefault("variance", []).append((p / (1 - p) * (weights**2).sum(1).mean()).detach()[None])
                continue
            out = weights @ v
            found.setdefault("out", []).append(out.detach())
            if self.needs_grad:
                gradients = torch.autograd.grad(out, (q, k, v), self.gradient[start:stop, head].to(dtype))
                for name, value in zip(("dq", "dk", "dv"), gradients, strict=True):
                    found.setdefault(name, []).append(value)
        return {name: torch.cat([part.double() for part in parts]) for name, parts in found.items()}

    def slices(self) -> list[tuple[int, int, int]]:
        """First cell, first head; last cell, last head."""
        bounds = self.ragged.cu_seqlens.tolist()
        return [(bounds[0], bounds[1], 0), (bounds[-2], bounds[-1], self.n_heads - 1)]

    def prepared(
        self, function: Function, pack: Callable[[torch.Tensor], torch.Tensor], unpack: Callable[..., torch.Tensor]
    ) -> Prepared:
        """What is timed and compared of one way to attend.

        Parameters
        ----------
        function
            q, k, v -> output, in the layout the candidate likes.
        pack
            From packed [T, H, D] into that layout.
        unpack
            And back.
        """
        inputs = [pack(x).detach().clone().requires_grad_(self.needs_grad) for x in self.qkv.unbind(1)]
        gradient = pack(self.gradient)

        def forward() -> torch.Tensor:
            with torch.set_grad_enabled(self.needs_grad):
                return function(*inputs)

        def both() -> None:
            torch.autograd.grad(function(*inputs), inputs, gradient)

        if self.case.dropout_p:
            # A weight of 1 on every value: rows of the output are sums of weights.
            ones = torch.ones_like(inputs[2])
            result: Callable[[], Mapping[str, torch.Tensor]] = lambda: self._sums(unpack(function(*inputs[:2], ones)))  # noqa: E731
        else:
            result = lambda: self._sliced(unpack, function, inputs, gradient)  # noqa: E731
        if self.case.mode == "forward":
            return Prepared(forward, result)
        if self.case.mode == "both":
            return Prepared(both, result)
        out = forward()
        return Prepared(lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True), result)

    def _sliced(
        self,
        unpack: Callable[..., torch.Tensor],
        function: Function,
        inputs: list[torch.Tensor],
        gradient: torch.Tensor,
    ) -> Mapping[str, torch.Tensor]:
        out = function(*inputs)
        values = {"out": out.detach()}
        if self.needs_grad:
            values |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, gradient), strict=True))
        return {name: self._slice(unpack(value)) for name, value in values.items()}

    def _slice(self, packed: torch.Tensor) -> torch.Tensor:
        return torch.cat([packed[start:stop, head] for start, stop, head in self.slices()])

    def _sums(self, packed: torch.Tensor) -> Mapping[str, torch.Tensor]:
        parts = [packed[start:stop, head].detach().double()[:, 0] for start, stop, head in self.slices()]
        means = torch.stack([packed.detach().double().mean()] * len(parts))
        return {"mean_weight": means, "variance": torch.stack([part.var() for part in parts])}

    @property
    def is_uniform(self) -> bool:
        """Whether all cells have one length."""
        return len(set(self.lengths)) == 1


def candidates(problem: _Problem) -> list[Candidate]:
    """All ways to attend."""
    p = problem.case.dropout_p
    packed = lambda function: lambda: problem.prepared(function(), lambda x: x, lambda x: x)  # noqa: E731
    ours = Candidate("ours", "this project", packed(lambda: _ours(problem, p)), is_ours=True)
    chosen = [
        *with_impls(ours, problem.question, problem.device, is_cudnn=uses_cudnn),
        *(
            Candidate(f"sdpa-{name}", f"torch SDPA, {what}", lambda backend=backend: _sdpa(problem, backend, p))
            for name, backend, what in (
                ("flash", "FLASH_ATTENTION", "flash"),
                ("cudnn", "CUDNN_ATTENTION", "cuDNN"),
                ("efficient", "EFFICIENT_ATTENTION", "memory-efficient"),
            )
        ),
        Candidate("torch-varlen", "torch.nn.attention.varlen", packed(lambda: _torch_varlen(problem))),
        Candidate("flex", "torch flex attention, compiled", lambda: _flex(problem), compile_s=FLEX_S),
        Candidate("flash-attn", "flash-attn 2", packed(lambda: _flash_attn(problem, p))),
        Candidate("flash-attn-3", "flash-attn 3", packed(lambda: _flash_attn_3(problem))),
    ]
    if not p:
        return chosen
    without = Candidate(
        "ours-no-dropout", "this project without dropout", packed(lambda: _ours(problem, 0.0)), is_same=False
    )
    return [chosen[0], without, *chosen[1:]]


def _ours(problem: _Problem, dropout_p: float) -> Function:
    from geneformer_kernels import varlen_attention

    cu_seqlens = problem.ragged.cu_seqlens
    return lambda q, k, v: varlen_attention(q, k, v, cu_seqlens=cu_seqlens, dropout_p=dropout_p)


def _sdpa(problem: _Problem, backend: str, dropout_p: float) -> Prepared:
    """[B, H, L, D] as each backend likes it; padded with a mask where lengths differ."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if problem.device.type != "cuda":
        backend = "MATH"  # the procedure alone is tested there
    chosen = getattr(SDPBackend, backend)
    ragged, shape = problem.ragged, (len(problem.lengths), max(problem.lengths))
    mask = None
    if not problem.is_uniform:
        if backend == "FLASH_ATTENTION":
            raise Unavailable("takes no mask, so no cells of different lengths")
        mask = ragged.mask()[:, None, None, :]

    def pack(x: torch.Tensor) -> torch.Tensor:
        return ragged.with_values(x).to_padded(0).transpose(1, 2).contiguous()

    def unpack(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)[ragged.mask(shape[1])]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)

    return problem.prepared(attend, pack, unpack)


def _torch_varlen(problem: _Problem) -> Function:
    if problem.case.dropout_p:
        raise Unavailable("has no dropout")
    if problem.device.type != "cuda":
        raise Unavailable("needs CUDA")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unavailable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    bounds, longest = problem.ragged.cu_seqlens, max(problem.lengths)
    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, longest, longest)


def _flex(problem: _Problem) -> Prepared:
    """All cells as one sequence, blocks of one cell chosen by a mask that is made beforehand."""
    if problem.case.dropout_p:
        raise Unavailable("has no dropout")
    if problem.place.is_tiny:
        raise Unavailable("is compiled for minutes on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cell = problem.ragged.cell_index()
    n = len(cell)
    mask = create_block_mask(
        lambda b, h, i, j: cell[i] == cell[j], None, None, n, n, device=problem.device, _compile=True
    )
    compiled = problem.place.compiled(flex_attention)
    function: Any = lambda q, k, v: compiled(q, k, v, block_mask=mask)  # noqa: E731
    return problem.prepared(
        function, lambda x: x.transpose(0, 1)[None].contiguous(), lambda x: x.squeeze(0).transpose(0, 1)
    )


def _flash_attn(problem: _Problem, dropout_p: float) -> Function:
    if importlib.util.find_spec("flash_attn") is None:
        raise Unavailable("flash-attn is not installed")
    from flash_attn import flash_attn_varlen_func

    bounds, longest = problem.ragged.cu_seqlens, max(problem.lengths)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, dropout_p=dropout_p)


def _flash_attn_3(problem: _Problem) -> Function:
    if problem.case.dropout_p:
        raise Unavailable("has no dropout")
    if importlib.util.find_spec("flash_attn_interface") is None:
        raise Unavailable("flash-attn 3 is not installed")
    from flash_attn_interface import flash_attn_varlen_func

    bounds, longest = problem.ragged.cu_seqlens, max(problem.lengths)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest)
        return out[0] if isinstance(out, tuple) else out

    return attend
