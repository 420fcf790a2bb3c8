"""A quickstart of few cells, for tests of what a reader does after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys


def made_up_comparison():  # type: ignore[no-untyped-def]
    """What the quickstart's comparison with stock transformers might give."""
    from geneformer_fast.quickstart.side_by_side import Comparison, Measured

    measured = {
        name: Measured(f"way {name}", 10.0 + place, 1e9 - 1e8 * place, "float32", None)
        for place, name in enumerate(("extractor", "stock", "ours", "ours-auto"))
    }
    return Comparison(measured, 1e-6, None, 3.0, 30, 900, 10**9)


def small_tour(out: Path) -> None:
    """Make what the quickstart leaves, from 50 cells, without UMAP and without processes of stock transformers."""
    from geneformer_fast.quickstart import run, side_by_side
    from geneformer_fast.quickstart.tour import Work

    work = Work(n_cells=50, n_compared=4, width=32, ff_width=32, steps=2, batch_cells=4)
    with pytest.MonkeyPatch.context() as patch:
        toys.draw_without_umap(patch)
        patch.setattr(side_by_side, "compare", lambda *_, **__: made_up_comparison())
        run.quickstart(out, work=work, say=lambda line: None)
