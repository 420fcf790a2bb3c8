"""The tour, step by step: each step uses the public functions as one would with own data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import geneformer_fast
from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import write_json
from geneformer_fast.quickstart import evaluate, picture, synthetic

if TYPE_CHECKING:
    import anndata

    from geneformer_fast import Encoder, Vocabulary
    from geneformer_fast.tokenization.arrow import TokenFolder
    from geneformer_fast.training.history import History, StepRecord
    from geneformer_fast.training.recipe import Recipe

SUMMARY = "summary.json"
MADE_BY = "geneformer-fast quickstart"
# What a run leaves, and what the next run into the same folder may therefore replace.
FILES = ("cells.h5ad", "embeddings.npy", "embeddings.npy.json", "embeddings.cells.parquet", "quickstart.png")
FOLDERS = ("vocabulary", "tokens", "model")

N_STEPS = 7
HELD_OUT_DONORS = 3
# Small cells for a small model: their 48 highest ranks say most of what they are.
MAX_LEN = 48


@dataclass
class Tour:
    """Where the output goes, how to speak, and what is known so far."""

    out: Path
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


def quickstart(
    out: Path, *, n_cells: int = 3000, max_seconds: float = 90.0, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Make cells, a vocabulary, tokens, a small trained model and embeddings, and classify cells of unseen donors.

    Parameters
    ----------
    out
        Folder for everything. An earlier tour in it is replaced; a folder of anything else is refused.
    n_cells
        Cells to make.
    max_seconds
        Training ends after this time at the latest.
    seed
        Of cells, weights, masks and held-out donors.
    say
        Receives every line for the reader.

    Returns
    -------
    dict
        What ``summary.json`` holds: seconds per step, speeds, losses, scores, versions.

    Raises
    ------
    OutputError
        The folder holds something that is not an earlier tour, another process is writing into it, or there is no room.
    UnsupportedError
        matplotlib or scikit-learn is missing, or there are too few cells to hold donors out.
    """
    _check_ready(n_cells)
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder with --out")
    with folder_lock(out):
        _prepare_folder(out)
        return _tour(out, n_cells, max_seconds, seed, say)


def _tour(out: Path, n_cells: int, max_seconds: float, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, into a folder that is ready and locked."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    tour = Tour(out, say)
    adata = _make_cells(tour, n_cells, seed)
    vocabulary = _make_vocabulary(tour)
    tokens = _tokenize(tour, vocabulary)
    rows = tokens.column("source_row").to_numpy()
    labels = adata.obs["cell_type"].astype(str).to_numpy()[rows]
    is_held_out = evaluate.hold_out(adata.obs["donor"].astype(str).to_numpy()[rows], HELD_OUT_DONORS, seed=seed)
    model = _untrained(vocabulary, seed)
    before = _mean_states(tokens, model)
    history, losses = _train(tour, model, vocabulary, tokens, is_held_out, max_seconds, seed)
    embeddings = _embed(tour, tokens)
    # Problems this small gain nothing from threads, which on shared cores wait for each other.
    with threadpool_limits(1):
        features = {"untrained encoder": before, "encoder": embeddings}
        scores = _classify(tour, features, adata.X[rows], labels, is_held_out)
        with tour.step("picture", f"Picture: {out / 'quickstart.png'}"):
            shown = np.flatnonzero(is_held_out)
            panels = picture.Panels(embeddings[shown], labels[shown], history.losses, losses, scores)
            picture.draw(panels, out / "quickstart.png")
    summary = _summary(tour, adata, tokens, model, history, losses, scores, is_held_out)
    write_json(out / SUMMARY, summary, indent=2)
    _say_what_next(tour, summary)
    return summary


def _check_ready(n_cells: int) -> None:
    from importlib.util import find_spec

    missing = [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"quickstart needs {' and '.join(missing)}, not installed here: pip install 'geneformer-fast[plot]'"
        )
    if n_cells < 100:
        raise UnsupportedError(f"--cells {n_cells}: too few to hold out donors of every cell type; take 100 or more")


def _prepare_folder(out: Path) -> None:
    """Clear an earlier tour out of the folder. Hidden files are no content of it."""
    if any(not path.name.startswith(".") for path in out.iterdir()):
        try:
            made_by = read_json(out / SUMMARY, OutputError).get("made_by")
        except OutputError:
            made_by = None
        if made_by != MADE_BY:
            raise OutputError(f"{out} holds files that quickstart did not make; name another folder with --out")
    write_json(out / SUMMARY, {"made_by": MADE_BY, "is_finished": False})
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def _make_cells(tour: Tour, n_cells: int, seed: int) -> anndata.AnnData:
    with tour.step("cells", "Cells: synthetic counts, since nothing is downloaded"):
        adata = synthetic.synthetic_cells(synthetic.Recipe(n_cells=n_cells), seed=seed)
        adata.write_h5ad(tour.out / "cells.h5ad")
    detected = np.diff(adata.X.indptr)
    tour.tell(
        f"{adata.n_obs:,} cells of {adata.obs['cell_type'].nunique()} types, {adata.obs['donor'].nunique()} donors, "
        f"{adata.n_vars:,} genes, a median of {np.median(detected):.0f} detected -> {tour.out / 'cells.h5ad'}"
    )
    return adata


def _make_vocabulary(tour: Tour) -> Vocabulary:
    with tour.step("medians", "Vocabulary: the median of every gene's non-zero normalised counts"):
        vocabulary = geneformer_fast.medians(tour.out / "cells.h5ad", family="v2", name="quickstart", progress=False)
        vocabulary = replace(vocabulary, max_len=MAX_LEN)
        vocabulary.save(tour.out / "vocabulary")
    tour.tell(f"{len(vocabulary.token_ids):,} genes -> {tour.out / 'vocabulary'}")
    return vocabulary


def _tokenize(tour: Tour, vocabulary: Vocabulary) -> TokenFolder:
    with tour.step("tokenize", "Tokens: genes ranked by count over median, as Arrow"):
        tokens = geneformer_fast.tokenize(
            tour.out / "cells.h5ad",
            tour.out / "tokens",
            dictionary=vocabulary,
            obs=["cell_type", "donor"],
            progress=False,
        )
    assert not isinstance(tokens, tuple)
    tour.tell(
        f"{tokens.n_cells:,} cells, {tokens.n_tokens:,} tokens -> {tour.out / 'tokens'} "
        f"({tour.seconds['tokenize']:.2f} s; on a file this small that is mostly start-up)"
    )
    return tokens


@dataclass(frozen=True)
class Losses:
    """Masked-gene losses in nats on cells of held-out donors."""

    by_frequency: float
    untrained: float
    trained: float


def _untrained(vocabulary: Vocabulary, seed: int) -> Encoder:
    import torch

    torch.manual_seed(seed)
    return geneformer_fast.Encoder(_config(vocabulary), head="mlm").eval()


def _mean_states(tokens: TokenFolder, model: Encoder) -> np.ndarray:
    embeddings = geneformer_fast.embed(tokens.path, model, pool="mean", layer="last", progress=False)
    assert isinstance(embeddings, np.ndarray)
    return embeddings


def _train(
    tour: Tour,
    model: Encoder,
    vocabulary: Vocabulary,
    tokens: TokenFolder,
    is_held_out: np.ndarray,
    max_seconds: float,
    seed: int,
) -> tuple[History, Losses]:
    with tour.step("train", "Training: a small encoder learns to name masked genes"):
        from geneformer_fast.quickstart import train as training
        from geneformer_fast.training.loop import fit

        recipe = replace(training.RECIPE, max_seconds=max_seconds, seed=seed)
        seen, unseen = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        by_frequency = training.frequency_loss(model, tokens, seen, unseen)
        with training.best_threads(model, tokens, seen, recipe) as n_threads:
            tour.tell(
                f"{model.config.n_layers} layers, width {model.config.width}, {n_parameters / 1e6:.2f} M parameters, "
                f"{n_threads} thread{'s' if n_threads > 1 else ''}"
            )
            untrained = training.held_out_loss(model, tokens, unseen, recipe)
            objective = training.objective_of(model, tokens, recipe)
            history = fit(model, tokens, objective, recipe, train_cells=seen, on_step=_teller(tour, recipe))
            losses = Losses(by_frequency, untrained, training.held_out_loss(model, tokens, unseen, recipe))
        geneformer_fast.save(model, tour.out / "model")
        vocabulary.save(tour.out / "model")
    tour.tell(f"{len(history.steps)} steps, {history.tokens_per_s:,.0f} tokens/s -> {tour.out / 'model'}")
    tour.tell(
        f"loss on cells of unseen donors: {losses.untrained:.2f} before, {losses.trained:.2f} after; "
        f"guessing by gene frequency gives {losses.by_frequency:.2f}"
    )
    return history, losses


def _config(vocabulary: Vocabulary) -> geneformer_fast.EncoderConfig:
    return geneformer_fast.EncoderConfig(
        n_layers=2,
        width=128,
        n_heads=4,
        ff_width=256,
        vocab_size=vocabulary.n_tokens,
        max_len=vocabulary.max_len,
        dropout=0.0,
        attention_dropout=0.0,
        vocabulary=vocabulary.name,
        vocabulary_fingerprint=vocabulary.fingerprint,
    )


def _teller(tour: Tour, recipe: Recipe) -> Callable[[StepRecord], None]:
    """Says how the loss falls, about eight times."""
    told, losses = 0, []
    begin = time.perf_counter()

    def on_step(record: StepRecord) -> None:
        nonlocal told
        losses.append(record.loss)
        seconds = time.perf_counter() - begin
        done = max(record.step / (recipe.steps or 1), seconds / (recipe.max_seconds or 1))
        if int(done * 8) > told:
            told = int(done * 8)
            recent = float(np.mean(losses[-25:]))
            tour.tell(f"step {record.step:>4}  loss {recent:.3f}  {seconds:4.0f} s")

    return on_step


def _embed(tour: Tour, tokens: TokenFolder) -> np.ndarray:
    with tour.step("embed", "Embeddings: the mean over each cell's genes, last layer"):
        path = tour.out / "embeddings.npy"
        geneformer_fast.embed(tokens.path, tour.out / "model", path, pool="mean", layer="last", progress=False)
        embeddings = np.load(path, allow_pickle=False)
    tour.tell(f"{embeddings.shape[0]:,} x {embeddings.shape[1]} -> {path} ({_rate(tokens, tour.seconds['embed'])})")
    return embeddings


def _rate(tokens: TokenFolder, seconds: float) -> str:
    return f"{tokens.n_cells / seconds:,.0f} cells/s, {tokens.n_tokens / seconds:,.0f} tokens/s"


def _classify(
    tour: Tour, features: dict[str, np.ndarray], counts: Any, labels: np.ndarray, is_held_out: np.ndarray
) -> dict[str, evaluate.Score]:
    with tour.step("classify", "Cell types of cells from donors that nothing was fitted to"):
        scores = {
            "majority class": evaluate.score_majority(labels, is_held_out),
            **{name: evaluate.score_features(values, labels, is_held_out) for name, values in features.items()},
            "PCA of log counts": evaluate.score_features(
                evaluate.pca_features(counts, is_held_out), labels, is_held_out
            ),
        }
    tour.tell(f"{is_held_out.sum():,} cells of {HELD_OUT_DONORS} donors     accuracy   macro-F1")
    for name, score in scores.items():
        tour.tell(f"{name:<24}   {score.accuracy:>8.3f}   {score.macro_f1:>8.3f}")
    return scores


def _summary(
    tour: Tour,
    adata: anndata.AnnData,
    tokens: TokenFolder,
    model: Encoder,
    history: History,
    losses: Losses,
    scores: dict[str, evaluate.Score],
    is_held_out: np.ndarray,
) -> dict[str, Any]:
    from geneformer_fast.doctor import examine

    report = examine()
    seconds = {name: round(value, 2) for name, value in tour.seconds.items()}
    return {
        "made_by": MADE_BY,
        "is_finished": True,
        "version": geneformer_fast.__version__,
        "packages": {package.name: package.version for package in report.packages if package.version},
        "machine": report.devices[0].facts | {"system": report.system},
        "cells": {"n_cells": adata.n_obs, "n_genes": adata.n_vars, "n_held_out": int(is_held_out.sum())},
        "model": model.config.to_dict(),
        "seconds": seconds | {"total": round(sum(tour.seconds.values()), 2)},
        "speed": {
            "tokenize_cells_per_s": round(tokens.n_cells / tour.seconds["tokenize"]),
            "train_tokens_per_s": round(history.tokens_per_s),
            "embed_cells_per_s": round(tokens.n_cells / tour.seconds["embed"]),
            "embed_tokens_per_s": round(tokens.n_tokens / tour.seconds["embed"]),
        },
        "training": {
            "n_steps": len(history.steps),
            "n_cells": sum(record.n_cells for record in history.steps),
            "n_tokens": sum(record.n_tokens for record in history.steps),
        },
        "losses_nats": {name: round(value, 4) for name, value in asdict(losses).items()},
        "scores": {name: asdict(score) for name, score in scores.items()},
    }


def _say_what_next(tour: Tour, summary: dict[str, Any]) -> None:
    out = tour.out
    tour.say(
        f"""
Done in {summary["seconds"]["total"]:.0f} s. Speeds and scores: {out / SUMMARY}
The model trained for a moment on few synthetic cells: this shows that every part works, not what a published
checkpoint can do. With one of those and your own cells:

  geneformer-fast tokenize CELLS.h5ad --out tokens --preset v2 --dictionary FOLDER    Geneformer's own dictionaries
  geneformer-fast embed tokens --model CHECKPOINT --out embeddings.npy                its folder from Hugging Face
  geneformer-fast embed CELLS.h5ad --model CHECKPOINT --dictionary FOLDER --out embedded.h5ad

For another species, or a corpus of your own, make the vocabulary first:

  geneformer-fast medians CELLS... --out vocabulary

And to look around in what was just made:

  geneformer-fast embed {out / "cells.h5ad"} --model {out / "model"} --pool mean --out {out / "embedded.h5ad"}
  geneformer-fast doctor"""
    )
