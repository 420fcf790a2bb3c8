"""What the processes do that ``test_killed.py`` starts."""

from __future__ import annotations

from typing import Any


def main(out: str, files_until_killed: int | None, workers: int, resume: bool) -> None:
    """Perturb cells of the fixtures; this process is killed before it can write down one file more than that."""
    import os
    import signal

    import torch
    from isp_scenarios import ISP, cells_folder

    import geneformer_fast as gf
    from geneformer_fast.perturbation import folder, store

    torch.set_num_threads(1)
    store._ROWS_PER_FILE = 100
    written, left = folder.write_block, files_until_killed

    def write_or_die(*entry: Any) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left = None if left is None else left - 1
        written(*entry)

    folder.write_block = write_or_die
    gf.perturb(
        cells_folder("V1"), ISP / "model_v1", out, mode="cell_and_gene", dtype="float32", device="cpu", max_cells=6,
        token_budget=600, progress=False, workers=workers, resume=resume,
    )  # fmt: skip
