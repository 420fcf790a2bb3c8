"""How much the tour does, what it says meanwhile, and what its report holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geneformer_fast
from geneformer_fast.quickstart.ready import MADE_BY, MOST_CELLS, REPORT

if TYPE_CHECKING:
    import anndata

    from geneformer_fast import Encoder
    from geneformer_fast.quickstart.finetune import Trained
    from geneformer_fast.quickstart.side_by_side import Comparison
    from geneformer_fast.tokenization.arrow import TokenFolder

N_STEPS = 7


@dataclass(frozen=True)
class Work:
    """How much is done: the same on every machine, however long it takes there.

    Attributes
    ----------
    n_cells
        Of the example's 500 cells, the first ones; they stand in turns, one of each type.
    n_compared
        Of these, what stock transformers embed too.
    n_layers, width, n_heads, ff_width
        The encoder.
    steps, batch_cells, learning_rate
        Of fine-tuning.
    """

    n_cells: int = MOST_CELLS
    n_compared: int = 48
    n_layers: int = 2
    width: int = 64
    n_heads: int = 2
    ff_width: int = 128
    steps: int = 20
    batch_cells: int = 8
    learning_rate: float = 3e-3


WORK = Work()


@dataclass
class Tour:
    """Where the output goes, how to speak, and what is known so far."""

    out: Path
    work: Work
    seed: int
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Announce a step and take its time."""
        self.say(f"[{len(self.seconds) + 1}/{N_STEPS}] {title}")
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin

    def tell(self, text: str) -> None:
        """Say something about the step at hand."""
        self.say(f"      {text}")


def tell_comparison(tour: Tour, comparison: Comparison) -> None:
    tour.tell(f"{'':<66}{'cells/s':>9}{'peak memory':>14}")
    for each in comparison.measured.values():
        tour.tell(f"{each.what:<66}{each.cells_per_s:>9.1f}{each.peak_bytes / 1e6:>11,.0f} MB")
    tour.tell(
        f"largest difference of embeddings in float32: {comparison.largest_difference:.1e} "
        f"(values go up to {comparison.largest_value:.1f})"
    )
    for name in ("extractor", "stock"):
        tour.tell(
            f"{comparison.times_faster(name):.1f} times as fast as {comparison.measured[name].what}, "
            f"in {comparison.share_of_memory(name):.0%} of its memory"
        )
    if comparison.auto_difference is not None:
        extractor, stock = (comparison.times_faster(name, ours="ours-auto") for name in ("extractor", "stock"))
        tour.tell(
            f"in {comparison.ours.dtype}, the default here: {extractor:.1f} and {stock:.1f} times as fast as "
            f"these, largest difference {comparison.auto_difference:.1e}"
        )
    tour.tell(
        f"(the extractor's own batches of 100 cells would need {comparison.extractor_logits_bytes / 1e9:.0f} GB for "
        "logits, which embeddings do not need)"
    )


def described(model: Encoder) -> str:
    """What the encoder is, for the title of the picture."""
    config = model.config
    return (
        f"encoder as Geneformer's with {config.n_layers} layers of width {config.width}, "
        f"{config.vocab_size:,} tokens; gene vectors from co-expression, the rest random, not trained"
    )


def device_here() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def fastest_dtype() -> str:
    from geneformer_fast.config import matmul_dtype

    return str(matmul_dtype("auto", device_here())).removeprefix("torch.")


def machine_here() -> dict[str, Any]:
    """Where it ran: facts, and one line of them."""
    import torch

    from geneformer_fast.doctor import examine

    report = examine()
    facts = report.devices[-1].facts if device_here() != "cpu" else report.devices[0].facts
    packages = {package.name: package.version for package in report.packages if package.version}
    n_threads = torch.get_num_threads()
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages)
    return {
        "packages": packages,
        "facts": facts | {"system": report.system, "threads": n_threads},
        "shown": f"{facts['model']}, {n_threads} thread{'s' * (n_threads > 1)}; {versions}",
    }


def report_of(
    tour: Tour,
    adata: anndata.AnnData,
    tokens: TokenFolder,
    model: Encoder,
    comparison: Comparison,
    trained: Trained,
    machine: dict[str, Any],
) -> dict[str, Any]:
    seconds = {name: round(value, 2) for name, value in tour.seconds.items()}
    return {
        "made_by": MADE_BY,
        "is_finished": True,
        "version": geneformer_fast.__version__,
        "packages": machine["packages"],
        "machine": machine["facts"],
        "work": asdict(tour.work) | {"seed": tour.seed},
        "cells": {"n_cells": adata.n_obs, "n_genes": adata.n_vars, "n_tokens": tokens.n_tokens},
        "model": model.config.to_dict(),
        "seconds": seconds | {"total": round(sum(tour.seconds.values()), 2)},
        "embedding": asdict(comparison)
        | {
            what: {
                ours: {name: getattr(comparison, what)(name, ours=ours) for name in ("extractor", "stock")}
                for ours in comparison.measured
                if ours.startswith("ours")
            }
            for what in ("times_faster", "share_of_memory")
        },
        "finetuning": asdict(trained)
        | {
            "largest_difference": trained.largest_difference,
            "times_faster": trained.times_faster,
        },
    }


def say_what_next(tour: Tour, report: dict[str, Any]) -> None:
    out = tour.out
    tour.say(
        f"""
Done in {report["seconds"]["total"]:.0f} s. The picture: {out / "quickstart.png"}; all numbers: {out / REPORT}
The weights of that encoder are not trained. With a published checkpoint and your own cells:

  geneformer-fast tokenize CELLS.h5ad --out tokens --preset v2 --dictionary FOLDER    Geneformer's own dictionaries
  geneformer-fast embed tokens --model CHECKPOINT --out embeddings.npy                its folder from Hugging Face
  geneformer-fast embed CELLS.h5ad --model CHECKPOINT --dictionary FOLDER --out embedded.h5ad

For another species, or a corpus of your own, make the vocabulary first:

  geneformer-fast medians CELLS... --out vocabulary

And to look around in what was just made:

  geneformer-fast embed {out / "cells.h5ad"} --model {out / "model"} --out {out / "embedded.h5ad"}
  geneformer-fast predict {out / "cells.h5ad"} --model {out / "finetuned" / "final"} --out {out / "labelled.h5ad"}
  geneformer-fast doctor"""
    )
