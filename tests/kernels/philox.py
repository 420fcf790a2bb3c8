"""Dropout masks of the kernels, computed a second time with numpy."""

from __future__ import annotations

import numpy as np
import torch


def philox(seed: int, counter: np.ndarray) -> np.ndarray:
    """Philox 4x32 with ten rounds (Salmon et al., SC 2011): [..., 4] uint32 counters -> as many random words."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        high, low = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (low >> 32) ^ c1 ^ k0, low & 0xFFFFFFFF
        c2, c3 = (high >> 32) ^ c3 ^ k1, high & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def keep_mask(seed: int, n_rows: int, width: int, dropout_p: float) -> torch.Tensor:
    """[n_rows, width] booleans, as ``tiles.keep_row`` promises: eight 16-bit numbers per (row, column // 8)."""
    n_groups = -(-width // 8)
    counter = np.zeros((n_rows, n_groups, 4), np.uint32)
    counter[..., 0], counter[..., 1] = np.arange(n_rows)[:, None], np.arange(n_groups)
    words = philox(seed, counter)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(n_rows, -1)[:, :width]
    return torch.from_numpy(halves.astype(np.int64) >= round(dropout_p * 65536))
