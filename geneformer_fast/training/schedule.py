"""Learning rates over a run: a rise, then a fall, as functions of the step alone (so there is no state to save)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from geneformer_fast.errors import UnsupportedError

SCHEDULES = ("constant", "linear", "cosine", "polynomial", "step")


@dataclass(frozen=True)
class Schedule:
    """The factor on the peak learning rate at every step.

    It rises linearly from 0 at step 0 to 1 at step ``warmup_steps``, then falls to ``floor``, which it reaches when
    ``n_steps`` minus ``floor_steps`` are over. Without a floor these are the schedules of
    ``transformers.get_scheduler``; with one, cosine is Megatron's and NeMo's. ``"step"`` is torch's ``StepLR``: the
    rate stays for a number of steps and is then multiplied by a factor, again and again.

    Attributes
    ----------
    kind
        ``"constant"``, ``"linear"``, ``"cosine"`` (half a period), ``"polynomial"`` or ``"step"``.
    n_steps
        Steps of the whole run.
    warmup_steps
        Steps of the rise.
    floor
        Final factor.
    floor_steps
        Steps at the end during which the rate stays there.
    power
        Of ``"polynomial"``; 1 is linear.
    decay, decay_steps
        Of ``"step"``: the factor, and after how many steps it is applied, counted from the beginning.
    """

    kind: str
    n_steps: int
    warmup_steps: int = 0
    floor: float = 0.0
    floor_steps: int = 0
    power: float = 1.0
    decay: float = 1.0
    decay_steps: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UnsupportedError(f"no schedule named {self.kind!r}; there are {', '.join(SCHEDULES)}")
        if not 0 <= self.floor <= 1 or min(self.warmup_steps, self.floor_steps) < 0:
            raise UnsupportedError("a schedule's floor must be from 0 to 1, and its numbers of steps not negative")
        if not 0 < self.decay <= 1 or not self.decay_steps > 0:
            raise UnsupportedError("a schedule's decay must be above 0 and at most 1, after a number of steps above 0")

    def __call__(self, step: float) -> float:
        """The factor at a step from 0; a share of a run works as well, with ``n_steps`` of 1."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        if self.kind == "step":
            # A little more, so that the last bit of a product does not lose a whole step.
            return max(self.floor, self.decay ** math.floor(step / self.decay_steps + 1e-9))
        falling = self.n_steps - self.floor_steps - self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / falling) if falling > 0 else 1.0
        if self.kind == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            left = (1.0 - done) ** (self.power if self.kind == "polynomial" else 1.0)
        return self.floor + (1.0 - self.floor) * left
