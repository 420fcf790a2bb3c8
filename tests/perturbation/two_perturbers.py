"""What each of two processes does for ``test_two_processes.py``."""

from __future__ import annotations


def main(out: str, resume: bool) -> None:
    """Perturb cells of the fixtures, in genes that the first process chooses, into a folder that both write."""
    import torch
    from isp_scenarios import ISP, cells_folder

    import geneformer_fast as gf
    from geneformer_fast.perturbation import store

    torch.set_num_threads(1)
    store._ROWS_PER_FILE = 100
    gf.perturb(
        cells_folder("V2"), ISP / "model_v2", out, dtype="float32", device="cpu", progress=False, token_budget=600,
        resume=resume, screen="gradient", best=60,
    )  # fmt: skip
