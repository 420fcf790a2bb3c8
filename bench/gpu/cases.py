"""Every case of ``python -m bench gpu``, the most important first: problem, goals, and the tests it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from bench.gpu.measure import Place, Variant
from bench.gpu.providers.attention import FLEX_S, AttentionCase, length_sets, mixed_sets
from bench.gpu.providers.encoder import COMPILE_S, EncoderCase
from bench.gpu.providers.int8 import int8_block_problems
from bench.gpu.providers.linear_attention import favor_problems
from bench.gpu.providers.operations import PLAIN_COMPILE_S, OperationCase, embed_problems, norm_problems
from bench.gpu.providers.products import feed_forward_problems, int8_problems, loss_problems
from bench.gpu.providers.rank import RankCase
from bench.gpu.workload import Mix

#: Operations an encoder runs on; a case of the whole encoder is refused if the tests of any failed.
ENCODER_TESTS = ("encoder", "varlen_attention", "residual_layernorm", "embed_tokens", "feed_forward")
TRAINING_TESTS = (*ENCODER_TESTS, "mlm_cross_entropy")


@dataclass(frozen=True)
class Goal:
    """What one H200 should reach, and what sounds impossible; other cards are not held to it.

    Attributes
    ----------
    variant, metric
        Where to look: a rate of the best of ours (``cells_per_s``, ``tflops``); ``peak_gb`` of ``ours``;
        ``time_against:NAME``, time of ours over that of another candidate; ``faster_than:NAME``, the inverse.
    goal, impossible
        Numbers; for ``peak_gb`` and ``time_against`` less is better.
    published
        What others reached, in words.
    impl
        The implementation whose goal it is (``"triton"``), which another one that was chosen does not reach for it;
        ``""`` for whatever of ours is the fastest.
    """

    variant: str
    metric: str
    goal: float
    impossible: float
    published: str = ""
    impl: str = ""

    @property
    def is_less_better(self) -> bool:
        """Whether it is a ceiling rather than a floor."""
        return self.metric == "peak_gb" or self.metric.startswith("time_against")

    def reached(self, rows: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The number in the rows of the variant, or None if it was not measured."""
        ours = [row for row in rows.values() if row["is_ours"]]
        if self.impl:  # it may stand beside what was chosen, asked for by name
            ours = [row for row in rows.values() if row.get("impl") == self.impl]
        kind, _, other = self.metric.partition(":")
        if not ours:
            return None
        if kind == "peak_gb":
            return rows["ours"]["peak_bytes"] / 1e9 if "ours" in rows else None
        if not other:
            return max((row[kind] for row in ours if kind in row), default=None)
        if other not in rows:
            return None
        best = min(row["ms"]["p50"] for row in ours)
        ratio = best / rows[other]["ms"]["p50"]
        return ratio if kind == "time_against" else 1 / ratio

    def as_json(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The goal and what was reached, for a result."""
        reached = self.reached(rows)
        return {**vars(self), "reached": None if reached is None else float(f"{reached:.4g}")}


class Problems(Protocol):
    """What a case measures."""

    def variants(self, place: Place) -> list[Variant]:
        """One or several problems."""


@dataclass(frozen=True)
class Case:
    """One process, one JSON file.

    Attributes
    ----------
    name
        Of the file.
    title
        One line for the tables.
    problems
        What is measured; None for the card's ceilings.
    tests
        Groups of tests (:data:`bench.gpu.tests_on_card.GROUPS`) that must be green.
    seconds
        What it is expected to take, compiling apart: what an H200 took where there is a result (a quick one takes
        0.4 of it), and a guess after these elsewhere. It is not begun when less is left.
    goals
        On one H200.
    compile_s
        For torch.compile in all variants together, besides.
    """

    name: str
    title: str
    problems: Problems | None
    tests: tuple[str, ...]
    seconds: int
    goals: tuple[Goal, ...] = ()
    compile_s: int = 0

    def expected(self, *, is_quick: bool) -> float:
        """Seconds that it takes; quick runs compile nothing."""
        return QUICK * self.seconds if is_quick else self.seconds + self.compile_s


#: A quick run's share of the time.
QUICK = 0.4


def _encoder(name: str, preset: str, mode: str, mixes: tuple[Mix, ...], seconds: int, goals: tuple[Goal, ...]) -> Case:
    tests = ENCODER_TESTS if mode == "inference" else TRAINING_TESTS
    problems, compile_s = EncoderCase(preset, mode, mixes), round(2 * COMPILE_S * len(mixes))  # ours and a rival
    return Case(f"encoder_{name}_{mode}", f"{preset}, {mode}", problems, tests, seconds, goals, compile_s)


def _attention(
    head_dim: int, mode: str, lengths: dict[str, tuple[int, ...]], seconds: int, goals: tuple[Goal, ...] = (),
    *, dropout_p: float = 0.0, name: str = "",
) -> Case:  # fmt: skip
    # One width for all head dims, that of the 104M and 106M models.
    problem = AttentionCase(head_dim, 768 // head_dim, mode, lengths, dropout_p)
    name = name or f"attention_d{head_dim}_{mode}"
    dropout = f", {dropout_p:.0%} dropout" if dropout_p else ""
    compile_s = 0 if dropout_p else round(FLEX_S * len(lengths))  # flex attention has no dropout
    title = f"attention, head dim {head_dim}, {mode}{dropout}"
    return Case(name, title, problem, ("varlen_attention",), seconds, goals, compile_s)


def _operation(name: str, problems: Any, seconds: int, goals: tuple[Goal, ...] = ()) -> Case:
    compile_s = round(PLAIN_COMPILE_S * sum(problem.has_plain + len(problem.rivals) for problem in problems(False)))
    return Case(name, name, OperationCase(problems), (name,), seconds, goals, compile_s)


_SOME, _ALL = (2048, 4096), (512, 1024, 8192, 16_384)
_TOKENS = 65_536
_INT8 = "torchao 1.7x (4090); LLM.int8 4.7x slower than fp16 (3090)"
_full: Any = partial(Mix, "full")
_real: Any = partial(Mix, "real", mean=1442)

CASES: tuple[Case, ...] = (
    Case("ceilings", "what the card reaches at most", None, (), 5),
    _attention(64, "forward", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 56, (
        Goal("2048", "tflops", 400, 460, "H100: FA3 460, cuDNN 395, Triton 396, FA2 318", "triton"),
        Goal("4096", "tflops", 400, 460, "H100: FA3 460, cuDNN 395, Triton 396, FA2 318", "triton"),
    )),
    _attention(64, "backward", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 38, (
        Goal("2048", "tflops", 300, 420, "H100: FA3 422, cuDNN 395, FA2 264", "triton"),
        Goal("4096", "tflops", 300, 420, "H100: FA3 422, cuDNN 395, FA2 264", "triton"),
    )),
    _encoder("10m", "geneformer-v1-10m", "inference",
        (_full(256, 131_072), Mix("uniform", 512, 131_072, low=300, high=2048)), 77, (
        Goal("full", "cells_per_s", 9_000, 10_500),
        Goal("uniform", "cells_per_s", 19_000, 23_000),
    )),
    _encoder("106m", "bionemo-106m", "inference", (_full(64, 65_536),), 54, (
        Goal("full", "cells_per_s", 950, 1_150),
    )),
    _encoder("10m", "geneformer-v1-10m", "training", (_full(128, 131_072),), 104, (
        Goal("full", "cells_per_s", 1_600, 2_400, "BioNeMo 23 per A100 (run), about 185 (its chart: 36 TFLOP/s)"),
    )),
    _encoder("106m", "bionemo-106m", "training", (_full(64, 65_536),), 100, (
        Goal("full", "cells_per_s", 240, 300, "5.6 to 19.8 per A100 (runs), about 58 (chart: 102 TFLOP/s)"),
        Goal("full", "peak_gb", 20, 16, "eager attention: over 190"),
    )),
    _encoder("v2-104m", "geneformer-v2-104m", "inference", (_real(128, 65_536), _full(32, 65_536)), 58, (
        Goal("real", "cells_per_s", 1_450, 1_750, "36 (bf16, GB10, stock loop)"),
        Goal("full", "cells_per_s", 350, 420),
    )),
    _encoder("v2-316m", "geneformer-v2-316m", "inference", (_real(128, 65_536), _full(32, 65_536)), 80, (
        Goal("real", "cells_per_s", 500, 600),
        Goal("full", "cells_per_s", 130, 155),
    )),
    _encoder("v2-316m", "geneformer-v2-316m", "training", (_real(64, 65_536),), 100, (
        Goal("real", "cells_per_s", 130, 170, "8.2 fine-tuning (third party)"),
    )),
    _attention(64, "both", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 65, (
        Goal("2048", "time_against:ours-no-dropout", 1.25, 1.10),
        Goal("4096", "time_against:ours-no-dropout", 1.25, 1.10),
    ), dropout_p=0.1, name="attention_d64_dropout"),
    _operation("mlm_cross_entropy", loss_problems, 37, (
        Goal("256_backward", "tflops", 500, 700, "Liger on sm_90: 706 to 738", "triton"),
        Goal("768_backward", "tflops", 500, 700, "Liger on sm_90: 706 to 738", "triton"),
    )),
    _operation("residual_layernorm", norm_problems, 34),
    _operation("feed_forward", feed_forward_problems, 60),
    _operation("int8_linear", int8_problems, 40, (
        Goal("32768x768x3072", "faster_than:eager", 1.3, 1.7, _INT8),
        Goal("32768x3072x768", "faster_than:eager", 1.3, 1.7, _INT8),
    )),
    _operation("int8_feed_forward", int8_block_problems, 60, (
        Goal("16384x768", "faster_than:eager", 1.3, 1.7, _INT8),
        Goal("65536x768", "faster_than:eager", 1.3, 1.7, _INT8),
        Goal("65536x1152", "faster_than:eager", 1.3, 1.7, _INT8),
    )),
    _operation("embed_tokens", embed_problems, 20),
    _operation("favor_attention", favor_problems, 30),
    Case("rank_genes", "rank_genes", RankCase(), ("rank_genes",), 20, (
        Goal("3000_to_2048", "cells_per_s", 2e6, 5e6, "numpy 25,000 per core"),
    )),
    _encoder("aido-100m", "aido-cell-100m", "inference", (_full(8, 77_064),), 60, (
        Goal("full", "cells_per_s", 12, 16),
    )),
    _attention(32, "forward", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 56),
    _attention(32, "backward", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 38),
    _attention(128, "forward", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 56),
    _attention(128, "backward", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 38),
    _encoder("v2-104m", "geneformer-v2-104m", "training", (_real(64, 65_536),), 100, ()),
    *(_attention(d, "both", length_sets(_TOKENS, _SOME) | mixed_sets(_TOKENS), 65, dropout_p=0.1,
                 name=f"attention_d{d}_dropout") for d in (32, 128)),
    *(_attention(d, mode, length_sets(_TOKENS, _ALL), 60, name=f"attention_d{d}_{mode}_other-lengths")
      for d in (64, 32, 128) for mode in ("forward", "backward")),
    *(_attention(d, "both", length_sets(_TOKENS, _ALL), 60, dropout_p=0.1,
                 name=f"attention_d{d}_dropout_other-lengths") for d in (64, 32, 128)),
)  # fmt: skip


#: Ceilings measured on one H200, for floors where no card is at hand.
H200 = {"product_tflops": 788.0, "copy_gbps": 4300.0, "int8_product_tflops": 1576.0}


def floors() -> list[str]:
    """Markdown rows of every variant: work, floor on one H200, goals; the int8 ceiling is a guess, twice the other."""
    import torch

    from geneformer_fast.profiling.clock import WallClock

    place = Place(torch.device("cpu"), WallClock(), H200, float("inf"))
    rows = ["| case | problem | GFLOP | MB | floor, ms | goals |", "|---|---|---:|---:|---:|---|"]
    for case in CASES:
        for variant in case.problems.variants(place) if case.problems is not None else ():
            goals = [
                f"{goal.metric} {goal.goal:,g}, {goal.impossible:,g}"
                for goal in case.goals
                if goal.variant == variant.name
            ]
            work, floor = variant.work, variant.work.floor_ms(H200)
            numbers = f"{work.flops / 1e9:,.0f} | {work.n_bytes / 1e6:,.0f} | {floor:.3f}"
            rows.append(f"| {case.name} {variant.name} | {variant.what} | {numbers} | {'; '.join(goals)} |")
    return rows


def case_named(name: str) -> Case:
    """A case by its name."""
    return next(case for case in CASES if case.name == name)
