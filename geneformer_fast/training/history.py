"""What happened in a run."""

from __future__ import annotations

from dataclasses import dataclass, field


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
