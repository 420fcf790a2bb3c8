"""When training comes apart: the loss is far above what guessing gives, or no number any more."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# One step may be far off: a few hard cells, a class that is not learnt yet. A loss of so many times that of guessing
# is no such step, nor is a mean over so many steps that is twice as high: a model that learns nothing is at that of
# guessing, one whose weights are fresh hardly above it.
_AT_ONCE, _IN_THE_MEAN, _STEPS = 10.0, 2.0, 50
_CELLS_NAMED = 8  # cells that an error lists


class Divergence:
    """Looks at losses, and says once what is to be said.

    Parameters
    ----------
    chance
        Loss of an answer that calls everything equally likely; None where that is not known, and nothing is said.
    """

    def __init__(self, chance: float | None) -> None:
        self.chance = chance
        self._last: deque[float] = deque(maxlen=_STEPS)

    def look(self, step: int, loss: float) -> str | None:
        """A warning, the first time there is reason for one."""
        if self.chance is None:
            return None
        self._last.append(loss)
        mean = sum(self._last) / len(self._last)
        if loss > _AT_ONCE * (self.chance + 1):
            what = f"the loss is {loss:.3g}"
        elif len(self._last) == _STEPS and mean > _IN_THE_MEAN * self.chance + 1:
            what = f"the mean loss of the last {_STEPS} steps is {mean:.3g}"
        else:
            return None
        guessing, self.chance = self.chance, None
        return (
            f"step {step:,}: {what}, where calling everything equally likely gives {guessing:.3g}: training has come "
            "apart and hardly recovers; try a lower learning rate, or a longer warm-up"
        )


def not_finite_message(
    step: int, loss: float, norm: float, pieces: Sequence[np.ndarray], tokens: Path, kept: Sequence[Path]
) -> str:
    """What to say of a step whose loss or gradient is no number: its cells, the last checkpoint, and what to try."""
    cells = np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])
    named = ", ".join(map(str, cells[:_CELLS_NAMED])) + (" ..." if len(cells) > _CELLS_NAMED else "")
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
    there = f"the last checkpoint, {kept[-1]}, is untouched" if kept else "no checkpoint was written yet"
    return (
        f"step {step}: {what}, with cells {named} of {tokens}; {there}. Try a lower learning rate, a longer warm-up, "
        "or precision 'float32'"
    )
