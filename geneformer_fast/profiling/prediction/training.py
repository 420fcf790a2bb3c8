"""Time of training steps on a card: their operations as they were measured one by one, and what lies between them.

A step takes as long as attention, residual + LayerNorm and the masked loss take by themselves (a line through the
measurements of each), products at the ceiling that was measured, and a rest in proportion to the numbers that pass
through memory: activations, dropout, biases, conversions. Or as long as the host needs to hand all that over, which was
measured as well, where that is more. Whole steps decide the rest alone, so that two problems are enough to leave one
out: the error is the largest over problems, each predicted without its own steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from geneformer_fast.config import EncoderConfig
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.prediction.measurements import Machine, Timed

# Steps whose host was as busy as this share of them say nothing of the card.
_HOST_BOUND = 0.95


@dataclass(frozen=True)
class Step:
    """One measurement of whole steps.

    Attributes
    ----------
    problem
        Measurements of one problem are left out together.
    operations_s
        What its operations take by themselves (:func:`operations_s`).
    numbers, launches
        As of :class:`geneformer_fast.profiling.prediction.fitted.Work`.
    seconds
        How long it took.
    host_s
        How long the host was busy with it.
    """

    problem: str
    operations_s: float
    numbers: float
    launches: float
    seconds: float
    host_s: float


@dataclass(frozen=True)
class StepFit:
    """What whole steps decide.

    Attributes
    ----------
    per_number, per_launch
        Seconds: of the rest, and of the host.
    error
        The largest relative error over problems that were left out; None where there is only one.
    """

    per_number: float
    per_launch: float
    error: float | None

    def seconds(self, operations_s: float, numbers: float, launches: float) -> float:
        """Time of some steps."""
        return max(operations_s + self.per_number * numbers, self.per_launch * launches)


def fit_steps(steps: Sequence[Step]) -> StepFit | None:
    """Fit whole steps; None where they tell nothing of the card."""
    errors: list[float] = []
    for problem in sorted({step.problem for step in steps}):
        found = _coefficients([step for step in steps if step.problem != problem])
        if found is None:
            errors.clear()
            break
        for step in (step for step in steps if step.problem == problem):
            said = StepFit(*found, None).seconds(step.operations_s, step.numbers, step.launches)
            errors.append(abs(math.log(said / step.seconds)))
    whole = _coefficients(steps)
    return None if whole is None else StepFit(*whole, math.expm1(max(errors)) if errors else None)


def _coefficients(steps: Sequence[Step]) -> tuple[float, float] | None:
    """(seconds per number, seconds per launch): squares of relative errors are least, and none is negative."""
    told = [step for step in steps if step.host_s < _HOST_BOUND * step.seconds]
    if not told:
        return None
    share = np.array([step.numbers / step.seconds for step in told])
    left = np.array([1 - step.operations_s / step.seconds for step in told])
    per_number = max(0.0, float((share * left).sum() / (share**2).sum()))
    return per_number, median(step.host_s / step.launches for step in steps)


def operations_s(
    machine: Machine, config: EncoderConfig, n_tokens: float, sum_of_squares: float, head_rows: float
) -> float | None:
    """What the operations of training on some cells take by themselves; None where one of them was not measured.

    Parameters
    ----------
    machine
        A card.
    config
        Of the model.
    n_tokens, sum_of_squares, head_rows
        Tokens of all cells, their squared lengths added up, and masked genes.
    """
    if machine.product_tflops is None or config.inputs != "tokens":
        return None
    linear = encoder_flops(config, n_tokens, 0.0) + head_flops(config, head_rows)
    decoder = 2.0 * head_rows * config.width * config.vocab_size
    seconds = 3 * (linear - decoder) / (machine.product_tflops * 1e12)
    heads, width = config.n_heads, config.width
    # Two norms in a block, one before or behind all blocks, and that of the head.
    normed = n_tokens * (2 * config.n_layers + 1) + head_rows
    needed: dict[str, dict[str, float]] = {
        "varlen_attention": {
            "pairs": config.n_layers * heads * sum_of_squares, "rows": config.n_layers * heads * n_tokens,
        },
        "residual_layernorm": {"numbers": normed * width},
        "mlm_cross_entropy": {"flops": 3 * decoder, "logits": head_rows * config.vocab_size},
    }  # fmt: skip
    for name, amounts in needed.items():
        rows = [each for each in machine.operations if each.operation == name and is_like(each, config)]
        if not rows:
            return None
        seconds += _on_line(rows, amounts)
    return seconds


def is_like(timed: Timed, config: EncoderConfig) -> bool:
    """Whether an operation was measured as a model runs it."""
    if timed.head_dim is None:
        return True
    return timed.head_dim == config.head_dim and timed.has_dropout == (config.attention_dropout > 0)


def _on_line(rows: Sequence[Timed], amounts: Mapping[str, float]) -> float:
    """Seconds of so much, on the line through some measurements; no coefficient is negative."""
    from scipy.optimize import nnls

    names = list(amounts)
    scaled = np.array([[row.amounts[name] / row.seconds for name in names] for row in rows])
    size = scaled.max(0)
    solved, _ = nnls(scaled / size, np.ones(len(rows)))
    return float(sum(amounts[name] * each for name, each in zip(names, solved / size, strict=True)))
