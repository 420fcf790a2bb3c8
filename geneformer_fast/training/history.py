"""What happened in a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from geneformer_fast.files.schema import number, whole


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes
    ----------
    step
        Counted from 1.
    epoch
        Epochs done after this step, a fraction.
    loss
        Mean over the step's terms; 0 where there were none.
    weight
        Number of those terms, or sum of their weights.
    grad_norm
        Of the mean loss, before clipping.
    learning_rate
        Of this step.
    n_cells, n_tokens
        Over all ranks.
    seconds
        Since the previous step ended.
    """

    step: int
    epoch: float
    loss: float
    weight: float
    grad_norm: float
    learning_rate: float
    n_cells: int
    n_tokens: int
    seconds: float


@dataclass
class History:
    """What happened in a call of :func:`fit`.

    Attributes
    ----------
    steps
        Every step of this call; one that continued a run begins after the checkpoint's.
    evaluations
        Metrics with ``"step"``, of the whole run.
    best
        The evaluation with the best monitored metric, or None.
    is_stopped_early
        Whether patience ran out.
    """

    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    is_stopped_early: bool = False

    @property
    def losses(self) -> list[float]:
        """Of the steps."""
        return [record.loss for record in self.steps]

    @property
    def tokens_per_s(self) -> float:
        """Over all ranks, evaluations and checkpoints left out."""
        seconds = sum(record.seconds for record in self.steps)
        return sum(record.n_tokens for record in self.steps) / seconds if seconds else 0.0


@dataclass
class LoopState:
    """What a checkpoint says of the loop; metrics that are not finite are null."""

    step: whole(0)  # type: ignore[valid-type]
    evaluations: list[dict[str, float | None]]
    best: dict[str, float | None] | None
    n_worse: whole(0)  # type: ignore[valid-type]
    seconds: number(0)  # type: ignore[valid-type]
    scaler: dict[str, Any]


def metrics_for_json(metrics: Any) -> Any:
    """Metrics, or a list of them, with null for what is not finite: JSON has no NaN."""
    if isinstance(metrics, list):
        return [metrics_for_json(entry) for entry in metrics]
    if metrics is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def metrics_from(content: Any) -> Any:
    """The inverse of :func:`metrics_for_json`."""
    if isinstance(content, list):
        return [metrics_from(entry) for entry in content]
    if content is None:
        return None
    return {name: math.nan if value is None else value for name, value in content.items()}
