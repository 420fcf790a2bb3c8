"""What each of two processes does for ``test_profile_processes.py``: loops that are profiled while they share work.

``torchrun --nproc-per-node 2 two_profiled.py TOKENS OUT``, or forked off with torchrun's variables; OUT holds
``config.json``, a configuration.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from profiled_loops import QUICK
from torch import nn

from geneformer_fast import pretrain
from geneformer_fast.cli import main as command
from geneformer_fast.errors import OutputError
from geneformer_fast.profiling.run import profile
from geneformer_fast.training.distributed import Ranks, process_group
from geneformer_fast.training.recipe import Recipe

#: Warm-up, window, one for memory, and those that are watched.
RECIPE = Recipe(steps=3 + 5 + 1 + 3, batch_cells=6, token_budget=60, warmup_share=0.1, progress=False)
#: Steps of the loop: warm-up, window, one for memory, those that are watched, one that is counted.
N_STEPS = 1 + 4 + 1 + 3 + 1


def main(tokens: str, out: Path) -> None:
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as ranks:
        loop(ranks, out)
        pretrain(
            tokens, out / "run", config=out / "config.json", recipe=RECIPE, eval_share=0, device="cpu",
            profile=out / "fast.json",
        )  # fmt: skip
        # Where no report can go, the first process finds out for all.
        try:
            pretrain(tokens, out / "never", config=out / "config.json", device="cpu", profile=out / "fast.json")
        except OutputError as error:
            (out / f"refused.{ranks.rank}").write_text(str(error))
        ranks.barrier()
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = command(["profile", "--model", "geneformer-v1-10m", "--lengths", "real"])
        (out / f"command.{ranks.rank}").write_text(f"{code} {said.getvalue()}")


def loop(ranks: Ranks, out: Path) -> None:
    """A user's own, with torch's wrapper and a sum of its own over all processes."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)))
    optimizer = torch.optim.AdamW(model.parameters())
    with profile(model, n_warmup=1, n_steps=4, n_active=2, **QUICK) as run:
        for _ in range(N_STEPS):
            optimizer.zero_grad()
            loss = model(torch.ones(ranks.rank + 1, 64)).square().mean()
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            optimizer.step()
            run.step(n_cells=ranks.rank + 1)
    run.report.save(out / f"loop.{ranks.rank}.json")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
