"""What is seen on a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]


def n_colors(image: np.ndarray) -> int:
    """Colours that at least 20 pixels have, greys and white aside."""
    flat = (image.reshape(-1, 3) * 255).astype(int)
    vivid = flat[np.ptp(flat, axis=1) > 40]
    _, counts = np.unique(vivid, axis=0, return_counts=True)
    return int((counts >= 20).sum())
