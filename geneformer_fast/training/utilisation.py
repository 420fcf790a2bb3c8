"""Which share of what this device reaches a training step uses: MFU and HFU, as in reports of profiled runs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from geneformer_fast.profiling.ceilings import product_ceiling
from geneformer_fast.profiling.figures import Figure, Missing, divided
from geneformer_fast.profiling.flops.work import Batch, anatomy_in, count_of


class Utilisation:
    """MFU and HFU of steps (:class:`geneformer_fast.profiling.figures.Flops`).

    Parameters
    ----------
    model
        Holds the encoder; what of it learns is looked at here.
    device, dtype
        Where it computes and in which precision: what is reached there is measured now, once per process.
    is_recomputing
        Whether blocks are computed twice.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, *, is_recomputing: bool) -> None:
        self._anatomy = anatomy_in(model)
        self._is_recomputing = is_recomputing
        self._ceiling = product_ceiling(device, str(dtype).removeprefix("torch."))

    def of(self, lengths: np.ndarray, n_rows: float, seconds: float) -> dict[str, float | None]:
        """``mfu`` and ``hfu`` of one step; None where the work or the ceiling is not known.

        Parameters
        ----------
        lengths
            Of the cells on this device.
        n_rows
            Of the head.
        seconds
            Of the step.
        """
        if isinstance(self._anatomy, Missing):
            return {"mfu": None, "hfu": None}
        found = count_of(
            self._anatomy, [Batch(lengths, head_rows=round(n_rows))], is_training=True,
            is_recomputing=self._is_recomputing,
        )  # fmt: skip
        return {"mfu": self._share(found.model, seconds), "hfu": self._share(found.hardware, seconds)}

    def _share(self, flops: Figure, seconds: float) -> float | None:
        share = divided(divided(divided(flops, seconds), 1e12), self._ceiling)
        return None if isinstance(share, Missing) else share
