"""The tour, step by step: each step uses the public functions as one would with own data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import geneformer_fast
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.writing import write_json
from geneformer_fast.quickstart.example import example_cells
from geneformer_fast.quickstart.ready import EARLIER_REPORT, MADE_BY, REPORT, check_folder, check_ready
from geneformer_fast.quickstart.tour import (
    WORK,
    Tour,
    Work,
    described,
    device_here,
    fastest_dtype,
    machine_here,
    report_of,
    say_what_next,
    tell_comparison,
)

if TYPE_CHECKING:
    import anndata

    from geneformer_fast import Encoder, Vocabulary
    from geneformer_fast.quickstart.finetune import Trained
    from geneformer_fast.quickstart.side_by_side import Comparison
    from geneformer_fast.tokenization.arrow import TokenFolder

# What a run leaves, and what the next run into the same folder may therefore replace.
FILES = ("cells.h5ad", "embeddings.npy", "embeddings.npy.json", "embeddings.cells.parquet", "quickstart.png")
FOLDERS = ("vocabulary", "tokens", "model", "finetuned")
#: What the picture shows, and what the model is taught: sort gates, and their five lineages.
LABEL, TAUGHT = "cell_type", "lineage"
POOL, LAYER = "cls", "last"


def quickstart(
    out: Path, *, n_cells: int | None = None, seed: int = 0, work: Work = WORK, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Real cells to tokens and embeddings, stock transformers beside us, and a short fine-tuning.

    Parameters
    ----------
    out
        Folder for everything. An earlier tour in it is replaced; a folder of anything else is refused.
    n_cells
        Cells of the example to take; None takes what ``work`` says, all 500.
    seed
        Of weights and of the order of cells.
    work
        How much is done.
    say
        Receives every line for the reader.

    Returns
    -------
    dict
        What ``report.json`` holds: what was measured and how far it agrees, seconds per step, versions.

    Raises
    ------
    OutputError
        The folder holds something that is not an earlier tour, another process is writing into it, or there is no room.
    UnsupportedError
        matplotlib, umap-learn or transformers is missing, there are too few or too many cells, or the seed is none.
    """
    work = work if n_cells is None else replace(work, n_cells=n_cells)
    check_ready(work.n_cells, seed)
    check_folder(out)
    with folder_lock(out):
        _prepare_folder(out)
        return _tour(Tour(out, work, seed, say))


def _tour(tour: Tour) -> dict[str, Any]:
    """Everything, into a folder that is ready and locked."""
    adata = _take_cells(tour)
    vocabulary = _make_vocabulary(tour)
    tokens = _tokenize(tour, vocabulary)
    model = _make_model(tour, adata, vocabulary)
    embeddings = _embed(tour, tokens)
    comparison = _compare(tour, adata, vocabulary)
    trained = _finetune(tour, adata, tokens, vocabulary)
    machine = machine_here()
    with tour.step("picture", f"Picture: {tour.out / 'quickstart.png'}"):
        from geneformer_fast.quickstart import picture

        panels = picture.Panels(
            embeddings=embeddings,
            labels=adata.obs[LABEL].astype(str).to_numpy(),
            model=described(model),
            pool=f"{POOL.upper()} of the {LAYER} layer",
            comparison=comparison,
            trained=trained,
            machine=machine["shown"],
        )
        picture.draw(panels, tour.out / "quickstart.png")
    report = report_of(tour, adata, tokens, model, comparison, trained, machine)
    write_json(tour.out / REPORT, report, indent=2)
    say_what_next(tour, report)
    return report


def _prepare_folder(out: Path) -> None:
    """Clear an earlier tour out of the folder. Hidden files are no content of it."""
    check_folder(out)
    (out / EARLIER_REPORT).unlink(missing_ok=True)
    write_json(out / REPORT, {"made_by": MADE_BY, "is_finished": False})
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def _take_cells(tour: Tour) -> anndata.AnnData:
    with tour.step("cells", "Cells: real ones, sorted from blood (Zheng et al. 2017), which came with the package"):
        adata = example_cells()[: tour.work.n_cells].copy()
        adata.write_h5ad(tour.out / "cells.h5ad", compression="gzip")
    detected = np.diff(adata.X.indptr)
    tour.tell(
        f"{adata.n_obs:,} cells of {adata.obs[LABEL].nunique()} types, {adata.n_vars:,} genes, "
        f"{np.percentile(detected, 10):,.0f} / {np.median(detected):,.0f} / {np.percentile(detected, 90):,.0f} of them "
        f"detected (10th, 50th, 90th percentile) -> {tour.out / 'cells.h5ad'}"
    )
    return adata


def _make_vocabulary(tour: Tour) -> Vocabulary:
    with tour.step("medians", "Vocabulary: the median of every gene's non-zero normalised counts"):
        vocabulary = geneformer_fast.medians(tour.out / "cells.h5ad", name="quickstart", progress=False)
        vocabulary.save(tour.out / "vocabulary")
    tour.tell(f"{len(vocabulary.token_ids):,} genes -> {tour.out / 'vocabulary'}")
    return vocabulary


def _tokenize(tour: Tour, vocabulary: Vocabulary) -> TokenFolder:
    with tour.step("tokenize", "Tokens: genes ranked by count over median, as Arrow"):
        tokens = geneformer_fast.tokenize(
            tour.out / "cells.h5ad",
            tour.out / "tokens",
            dictionary=vocabulary,
            obs=[LABEL, TAUGHT],
            progress=False,
        )
    assert not isinstance(tokens, tuple)
    tour.tell(f"{tokens.n_cells:,} cells, {tokens.n_tokens:,} tokens -> {tour.out / 'tokens'}")
    return tokens


def _make_model(tour: Tour, adata: anndata.AnnData, vocabulary: Vocabulary) -> Encoder:
    """An encoder with untrained weights, as a Hugging Face folder with its vocabulary."""
    from geneformer_fast.quickstart.weights import encoder_from_counts

    work = tour.work
    config = geneformer_fast.EncoderConfig(
        n_layers=work.n_layers,
        width=work.width,
        n_heads=work.n_heads,
        ff_width=work.ff_width,
        vocab_size=vocabulary.n_tokens,
        max_len=vocabulary.max_len,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=work.width**-0.5,
        vocabulary=vocabulary.name,
        vocabulary_fingerprint=vocabulary.fingerprint,
    )
    gene_ids = adata.var["ensembl_id"].to_numpy()
    model = encoder_from_counts(adata.X, gene_ids, vocabulary, config, seed=tour.seed)
    geneformer_fast.save(model, tour.out / "model")
    vocabulary.save(tour.out / "model")
    return model


def _embed(tour: Tour, tokens: TokenFolder) -> np.ndarray:
    path = tour.out / "embeddings.npy"
    with tour.step("embed", "Embeddings, by a small encoder like Geneformer's with untrained weights"):
        geneformer_fast.embed(tokens.path, tour.out / "model", path, pool=POOL, layer=LAYER, progress=False)
        embeddings = np.load(path, allow_pickle=False)
    tour.tell(f"{embeddings.shape[0]:,} x {embeddings.shape[1]} -> {path}")
    return embeddings


def _compare(tour: Tour, adata: anndata.AnnData, vocabulary: Vocabulary) -> Comparison:
    from geneformer_fast.quickstart.side_by_side import compare

    n_cells = min(tour.work.n_compared, adata.n_obs)
    title = f"The same weights, {n_cells} cells: stock transformers beside geneformer-fast, in processes of their own"
    with tour.step("compare", title), tempfile.TemporaryDirectory(prefix="geneformer_fast_") as folder:
        tokens = geneformer_fast.tokenize(
            adata[:n_cells].copy(), Path(folder) / "tokens", dictionary=vocabulary, progress=False
        )
        assert not isinstance(tokens, tuple)
        comparison = compare(
            tour.out / "model",
            tokens.path,
            _token_lists(tokens),
            vocabulary.n_tokens,
            Path(folder),
            device=device_here(),
            auto=fastest_dtype(),
        )
    tell_comparison(tour, comparison)
    return comparison


def _finetune(tour: Tour, adata: anndata.AnnData, tokens: TokenFolder, vocabulary: Vocabulary) -> Trained:
    from geneformer_fast.quickstart import finetune as finetuning

    work, labels = tour.work, adata.obs[TAUGHT].cat
    title = (
        f"Fine-tuning on {TAUGHT}, {work.steps} steps of {work.batch_cells} cells: stock, and after accelerate(model)"
    )
    with tour.step("finetune", title):
        model, trained = finetuning.finetune(
            tour.out / "model",
            _token_lists(tokens),
            list(labels.categories),
            labels.codes.to_numpy().astype(np.int64),
            finetuning.Schedule(work.steps, work.batch_cells, work.learning_rate, tour.seed),
            device=device_here(),
            on_step=_teller(tour),
        )
        final = tour.out / "finetuned" / "final"
        finetuning.save_classifier(model, final, list(labels.categories), TAUGHT, vocabulary)
    tour.tell(f"largest difference of losses: {trained.largest_difference:.1e} nats")
    tour.tell(
        f"transformers {trained.stock_seconds:.1f} s, accelerated {trained.seconds:.1f} s: "
        f"{trained.times_faster:.1f} times as fast -> {final}"
    )
    return trained


def _teller(tour: Tour) -> Callable[[int, float], None]:
    """Says how the loss falls, four times."""
    steps = tour.work.steps

    def on_step(step: int, loss: float) -> None:
        if step % max(1, steps // 4) == 0:
            tour.tell(f"step {step:>3} of {steps}  loss {loss:.3f}")

    return on_step


def _token_lists(tokens: TokenFolder) -> list[np.ndarray]:
    values, bounds = tokens.read(np.arange(tokens.n_cells))
    return np.split(values, bounds[1:-1])
