"""A pytest plugin (``-p old_card``): tensors on the CPU count as lying on the card that ``OLD_CARD`` names."""

from __future__ import annotations

import os

from geneformer_kernels import on_device
from geneformer_kernels.target import CARDS

on_device.target_of = lambda _: CARDS[os.environ["OLD_CARD"]]  # type: ignore[assignment]
