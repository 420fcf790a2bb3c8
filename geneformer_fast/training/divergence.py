"""When training comes apart: the loss is far above what guessing gives, and stays a number."""

from __future__ import annotations

from collections import deque

# One step may be far off: a few hard cells, a class that is not learnt yet. A loss of so many times that of guessing
# is no such step, nor is a mean over so many steps that is twice as high: a model that learns nothing is at that of
# guessing, one whose weights are fresh hardly above it.
_AT_ONCE, _IN_THE_MEAN, _STEPS = 10.0, 2.0, 50


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
