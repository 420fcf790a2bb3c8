"""Whether this process interprets kernels, which is settled before anything loads Triton."""

from __future__ import annotations

import functools
import os


@functools.cache
def settle() -> bool:
    """Whether it does: on a machine with a card kernels are compiled for it, and the tests marked gpu run.

    Triton reads the variable when it is imported, and transformers imports it.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return os.environ.get("TRITON_INTERPRET") == "1"
