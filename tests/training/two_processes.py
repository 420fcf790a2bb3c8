"""What each of two processes does for ``test_distributed.py``: pretraining by DDP and by FSDP2, and going on.

``torchrun --nproc-per-node 2 two_processes.py TOKENS OUT``, or forked off with torchrun's variables; OUT holds
``post.json`` and ``pre.json``, configurations, and ``from-one``, a run of one process that ended after its first epoch.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from pathlib import Path

import torch

from geneformer_fast import open_tokens, pretrain
from geneformer_fast.errors import InputError, OutputError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.training.distributed import Ranks, process_group

#: Of every run. Pieces are small, so that ranks have several, and not equally many.
RUN = dict(device="cpu", epochs=2, batch_cells=16, token_budget=100, learning_rate=3e-3, progress=False)
HELD_OUT = dict(eval_share=0.2)


def main(tokens: str, out: Path) -> None:
    torch.set_num_threads(1)
    post, pre = out / "post.json", out / "pre.json"
    with process_group(torch.device("cpu")) as ranks:
        assert ranks == Ranks(ranks.rank, 2)
        pretrain(tokens, out / "ddp", config=post, parallel="ddp", **HELD_OUT, **RUN)
        pretrain(tokens, out / "fsdp", config=post, parallel="fsdp", is_recomputing=True, **HELD_OUT, **RUN)
        pretrain(tokens, out / "pre-norm", config=pre, parallel="fsdp", **HELD_OUT, **RUN)
        if ranks.is_first:
            shutil.copytree(out / "fsdp", out / "again")
            forget_last(out / "again")
        ranks.barrier()
        pretrain(tokens, out / "again", config=post, parallel="fsdp", resume=True, **HELD_OUT, **RUN)
        pretrain(tokens, out / "from-one", config=post, parallel="fsdp", resume=True, **HELD_OUT, **RUN)
        all_but_one = open_tokens(tokens).column("score").to_pylist()[1:]
        try:
            pretrain(tokens, out / "few", config=post, eval_column=("score", all_but_one), **RUN)
        except InputError as error:
            (out / f"few.{ranks.rank}").write_text(str(error))
        # Somebody else trains into the folder: the first process finds out for all.
        with folder_lock(out / "taken") if ranks.is_first else contextlib.nullcontext():
            ranks.barrier()
            try:
                pretrain(tokens, out / "taken", config=post, **HELD_OUT, **RUN)
            except OutputError as error:
                (out / f"taken.{ranks.rank}").write_text(str(error))
            ranks.barrier()


def forget_last(run: Path) -> None:
    """As if the run had been killed before its last checkpoint."""
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    shutil.rmtree(run / "final")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
