"""A run for ``test_checkpoint.py`` to kill: ``killed_run.py TOKENS OUT CONFIG RECIPE N_THREADS [DIES_AT]``.

With ``DIES_AT`` it kills itself before the rename that would finish its so-many-th checkpoint. Without, it takes its
time after a few steps, so that whoever wants to kill it on a busy machine does not come too late.
"""

from __future__ import annotations

import os
import signal
import sys
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


if __name__ == "__main__":
    tokens, out, config, recipe, n_threads, *dies_at = sys.argv[1:]
    torch.set_num_threads(int(n_threads))
    if dies_at:
        die_before_rename(int(dies_at[0]))
    pretrain(
        tokens, out, config=config, recipe=recipe, eval_share=0.2, resume=True, device="cpu",
        on_step=lambda record: time.sleep(0.0 if dies_at or record.step < 5 else 0.5),
    )  # fmt: skip
