"""Counts to a vocabulary, tokens and embeddings, by the commands a new user types.

``python tools/first_run.py [FOLDER]`` needs what ``pip install geneformer-fast`` brings and nothing else, so it tells
whether an install without extras works: CI runs it on a fresh machine, the conda recipe in the package's test,
``tests/test_base_install.py`` in an environment that lacks the extras. Without FOLDER nothing is left behind.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

import geneformer_fast
from geneformer_fast import Encoder, EncoderConfig, Vocabulary, load, save
from geneformer_fast.cli import COMMANDS, main

N_CELLS, N_GENES = 40, 200
KEY = "X_geneformer"


def run(*arguments: str | Path) -> None:
    """Run one command; ends the program where it fails."""
    words = [str(argument) for argument in arguments]
    print("$ geneformer-fast", *words, flush=True)
    if code := main(words):
        sys.exit(f"geneformer-fast {words[0]} ended with exit code {code}")


def write_cells(path: Path) -> None:
    """Random counts as an ``.h5ad``."""
    counts = np.random.default_rng(0).poisson(0.7, (N_CELLS, N_GENES)).astype(np.float32)
    obs = pd.DataFrame({"kind": ["a", "b"] * (N_CELLS // 2)}, index=[f"cell{i}" for i in range(N_CELLS)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)])
    anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var).write_h5ad(path)


def write_model(folder: Path, vocabulary: Vocabulary) -> None:
    """A small encoder with random weights, and its vocabulary beside it."""
    sizes = dict(n_layers=2, width=32, n_heads=2, ff_width=64)
    of = dict(vocabulary=vocabulary.name, vocabulary_fingerprint=vocabulary.fingerprint)
    save(Encoder(EncoderConfig(**sizes, vocab_size=vocabulary.n_tokens, max_len=vocabulary.max_len, **of)), folder)
    vocabulary.save(folder)


def first_run(folder: Path) -> None:
    """The commands in their order, and what they must have written."""
    cells, words, tokens, model = (folder / name for name in ("cells.h5ad", "vocabulary", "tokens", "model"))
    write_cells(cells)
    run("medians", cells, "--out", words, "--name", "first-run", "--quiet")
    run("tokenize", cells, "--dictionary", words, "--obs", "kind", "--out", tokens, "--quiet")
    write_model(model, Vocabulary.from_folder(words))
    run("embed", tokens, "--model", model, "--out", folder / "embeddings.npy")
    run("embed", tokens, "--model", model, "--pool", "gene", "--out", folder / "genes.parquet")
    run("embed", cells, "--model", model, "--out", folder / "embedded.h5ad")
    run("doctor")
    of_tokens = np.load(folder / "embeddings.npy")
    of_counts = anndata.read_h5ad(folder / "embedded.h5ad").obsm[KEY]
    width = load(model).config.width
    if of_tokens.shape != (N_CELLS, width) or not np.isfinite(of_tokens).all():
        sys.exit(f"embeddings.npy holds {of_tokens.shape}, expected {N_CELLS} cells of {width} finite numbers")
    if not np.array_equal(of_tokens, of_counts):
        sys.exit("embeddings of the tokens and of the counts they came from differ")
    if not (n_genes := len(pd.read_parquet(folder / "genes.parquet"))):
        sys.exit("genes.parquet holds no gene")
    where = Path(geneformer_fast.__file__).parent
    print(f"geneformer-fast {geneformer_fast.__version__} ({where}): {N_CELLS} cells and {n_genes} genes embedded")


def explain_commands() -> None:
    """``--help`` of every command: none may need an extra for that."""
    for name in COMMANDS:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                main([name, "--help"])
        except SystemExit as end:
            if end.code:
                sys.exit(f"geneformer-fast {name} --help ended with exit code {end.code}")


if __name__ == "__main__":
    explain_commands()
    if sys.argv[1:]:
        first_run(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            first_run(Path(place))
