"""A run for ``test_checkpoint.py`` to kill, in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from geneformer_fast import pretrain


def die_before_rename(number: int) -> None:
    left, rename = number, os.replace

    def dying(source, target):
        nonlocal left
        left -= Path(target).parent.name == "checkpoints"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.replace = dying


def run(tokens: Path, out: Path, config: Path, recipe: Path, n_threads: int, dies_at: int = 0) -> None:
    """With ``dies_at`` it kills itself before the rename that would finish its so-many-th checkpoint.

    Without, it takes its time after a few steps, so that whoever wants to kill it on a busy machine does not come too
    late.
    """
    torch.set_num_threads(n_threads)
    if dies_at:
        die_before_rename(dies_at)
    pretrain(
        tokens, out, config=config, recipe=recipe, eval_share=0.2, resume=True, device="cpu",
        on_step=lambda record: time.sleep(0.0 if dies_at or record.step < 5 else 0.5),
    )  # fmt: skip
