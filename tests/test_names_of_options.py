"""One name for one thing, in all public functions and commands.

A name that is new needs a line here, with what it means; what means the same has a name already.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterator

import pytest
from test_help import commands

import geneformer_fast as gf

#: Name -> what it means.
NAMES = {
    # what is read
    "data": "cells: an AnnData, files of counts, or tokens",
    "tokens": "a token folder",
    "model": "a checkpoint folder, or a model",
    "encoder": "an encoder in memory that is saved",
    "path": "a checkpoint folder that is read or written as such",
    "folder": "a folder of tokens, dictionaries or perturbations that is opened as such",
    "counts": "counts that tokens are made of",
    "counts_layer": "the layer of a file that holds its counts",
    "gene_column": "the column of var with gene ids",
    "n_counts": "where total counts per cell are from",
    "obs": "columns of obs that are carried along",
    "dictionary": "gene dictionaries: a folder or a Vocabulary",
    "preset": "which of several dictionaries",
    "family": "the family whose cells are made, or whose special tokens and length a new vocabulary has",
    "options": "choices about the values that a family reads",
    "option": "one of them, on the command line",
    "allow_float": "whether values that are no integers pass",
    "allow_duplicate_cells": "whether cells of equal names pass",
    "allow_few_genes": "whether next to no genes may be known",
    "filter_pass": "whether cells are left out that another program did not pass",
    "verify": "whether checksums are compared",
    "partial": "whether some shards of a run are taken without the others",
    "init": "a checkpoint whose weights training goes on from",
    "config": "the geometry of a new model",
    "adapt_vocabulary": "whether a new model has the vocabulary of its tokens",
    "medians": "gene id to median",
    "aliases": "another id to gene id",
    "symbols": "gene id to symbol",
    # which cells and genes
    "where": "columns and the values whose cells are taken",
    "max_cells": "most cells that are taken",
    "seed": "what everything random is drawn by",
    "min_cells": "fewest cells of a gene, or of a class, that is not left out",
    "cap": "most cells of a class in an epoch",
    "group": "the column whose cells stay together",
    "label": "the column with classes",
    "classes": "the classes of genes",
    "ignore": "labels that stand for none",
    "drop_unlabelled": "whether cells without a label are left out",
    "drop_unknown": "whether genes that are unknown are left out",
    "cells": "how many cells are made up, or predicted",
    "lengths": "how long made-up cells are",
    "max_len": "most tokens of a cell",
    # what is done to genes
    "kind": "what is done to genes: deleted, switched on, moved",
    "genes": "which genes that is",
    "together": "whether a list of genes is perturbed at once",
    "pairs": "whether two genes are at a time",
    "anchor": "a gene that is perturbed with each of the others",
    "sets": "several lists of genes, each at once",
    "doses": "how far genes move, or their counts are multiplied",
    "states": "states of cells that are compared with",
    "column": "the column that tells states apart",
    "state_embeddings": "what these look like, made before",
    "statistic": "how many cells become one embedding",
    "screen": "what genes are chosen by before any is computed",
    "best": "how many of them are computed",
    "window": "which of the cells in their order",
    "shard": "which part of a run",
    "official": "whether faults of the official tool are kept",
    "dry_run": "whether nothing is done but to say what would be",
    # how it is computed
    "layer": "the block of the encoder whose output is taken",
    "pool": "what stands for a cell or a gene",
    "dtype": "the dtype that a model is loaded in",
    "precision": "of products in training",
    "device": "where it is computed",
    "token_budget": "most tokens in memory at once",
    "memory_budget": "most memory of the whole process",
    "memory_bytes": "memory of the search for medians",
    "workers": "threads that read, rank or mask",
    "threads": "threads of the CPU that products have",
    "recomputing": "whether blocks are computed twice",
    "parallel": "how several processes share a model",
    "scheme": "what eight bits are",
    "calibrate": "tokens that layers are measured on",
    "bar": "least signal over noise of a layer",
    "least_cosine": "least cosine of embeddings",
    "choices": "what becomes of each layer",
    "keep_embeddings": "whether tables stay in floating point",
    "check": "tokens that a quantized model is compared on",
    "padding": "how a patched model returns padded rows",
    "training_logits": "whether a patched model returns logits while it trains",
    # how it is trained
    "recipe": "all of how to train",
    "changes": "fields of a recipe that are changed",
    "set": "any field of a recipe, on the command line",
    "epochs": "passes over the cells",
    "steps": "optimizer steps",
    "max_seconds": "time after which training ends",
    "batch_cells": "cells per step",
    "batch_tokens": "tokens per step",
    "learning_rate": "the peak",
    "schedule": "how it falls",
    "warmup_steps": "steps until the peak",
    "warmup_share": "share of steps until the peak",
    "floor": "final learning rate over the peak",
    "floor_share": "share of steps spent there",
    "power": "of a polynomial schedule",
    "decay": "what a schedule of steps multiplies the rate by after every epoch",
    "betas": "of AdamW",
    "eps": "of AdamW, in the denominator",
    "weight_decay": "of AdamW, per step",
    "decays_all": "whether biases and LayerNorm decay too",
    "clip": "largest norm of the gradient",
    "masking": "how genes are masked",
    "eval_every": "steps between evaluations",
    "save_every": "steps between checkpoints",
    "keep": "checkpoints that are kept",
    "monitor": "the metric that decides",
    "greater_better": "whether more of it is better",
    "best_restored": "whether the best weights are restored",
    "patience": "evaluations without a better one until training stops",
    "log_every": "steps between lines of the log",
    "tensorboard": "whether TensorBoard files are written",
    "wandb": "a project of Weights & Biases that is reported to",
    "eval_share": "share that is evaluated on",
    "eval_tokens": "token folder that is evaluated on",
    "eval_column": "column and values that are evaluated on",
    "test_share": "share that is tested",
    "folds": "of cross-validation",
    "final": "whether a final model is made after folds",
    "loss": "the loss, and its options",
    "sampler": "how classes are balanced",
    "freeze_layers": "blocks that stay as they are",
    "freeze_embeddings": "whether embeddings do",
    "lora": "rank of adapters",
    "search": "trials of a search for hyperparameters",
    "on_step": "called after steps",
    "on_eval": "called after evaluations",
    # what comes out
    "out": "a file or folder that is written",
    "overwrite": "whether what is there is replaced",
    "resume": "whether what is there is gone on with",
    "key_added": "key of the result in an AnnData",
    "copy": "whether an AnnData is copied",
    "as_frame": "whether a data frame is returned",
    "plot": "a picture of the UMAP",
    "heatmap": "a picture of all dimensions",
    "color": "the column that pictures show",
    "name": "what something new is called",
    "shard_bytes": "size of a shard",
    "progress": "whether progress is shown",
    "quiet": "whether nothing but warnings is said",
    "verbose": "whether more is said",
    "json": "whether the answer is JSON",
    "tell": "called with what is known before the first step",
    "profile": "where a report of the speed goes",
    # what is said of them
    "runs": "perturbations that are judged",
    "goal": "the state that cells are to move towards",
    "alternative": "further states that shifts are compared with",
    "null": "perturbations of other cells that are compared with",
    "singles": "perturbations of the genes of pairs one by one",
    "dose": "which of several doses",
    "mend": "faults of official tables that are mended",
    "draws": "resamples of the bootstrap",
    "confidence": "share of intervals that hold the mean",
    "fdr": "the false discovery rate that counts",
    "correction": "how p-values are adjusted for many tests",
    "pictures": "whether pictures are drawn",
    "embeddings": "embeddings of cells that shifts are shown on",
    # profiling
    "mode": "what is measured (embedding, training), compared (cells, CLS tokens, genes), or listed (a table)",
    "seconds": "how long is measured",
    "n_steps": "steps of the window of a loop of one's own",
    "n_warmup": "steps before the window",
    "n_active": "steps that torch's profiler watches",
    "n_layers": "blocks that are computed",
    "optimizer": "whose steps end a step",
    "trace": "where torch's profiler writes",
    "energy": "whether energy is read",
    "ceilings": "whether the machine's limits are measured",
    "engine": "who computes",
    "settings": "what else a report says",
    "compare": "what is measured beside",
    "sweep": "whether token budgets are tried",
    "predict": "whether speed is predicted",
    "card": "the machine that is predicted",
}
#: Options that are flags have the name of the argument behind them in another form.
AS_FLAG = {"recompute": "recomputing"}


def plain(name: str) -> str:
    """A name without what says that it is a yes or no: ``is_final`` and ``--no-final`` are one."""
    for prefix in ("is_", "no_"):
        name = name.removeprefix(prefix)
    return AS_FLAG.get(name, name)


def names() -> Iterator[tuple[str, str]]:
    """(name, where) of every argument of a public function, field of a recipe, and option."""
    functions = [getattr(gf, name) for name in gf.__all__]
    for function in [*functions, gf.Vocabulary.from_folder, gf.Vocabulary.from_medians]:
        if inspect.isfunction(function) or inspect.ismethod(function):
            for name in inspect.signature(function).parameters:
                yield name, f"{function.__qualname__}()"
    for field in dataclasses.fields(gf.Recipe):
        yield field.name, "Recipe"
    for command, parser in commands():
        for action in parser._actions:
            if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help":
                yield action.option_strings[-1][2:].replace("-", "_"), command


def test_every_name_means_one_thing_and_every_thing_has_one_name() -> None:
    found: dict[str, set[str]] = {}
    for name, where in names():
        found.setdefault(plain(name), set()).add(where)
    unknown = {name: sorted(where) for name, where in found.items() if name not in NAMES}
    assert not unknown, "say in NAMES what these mean, unless it has a name already"
    assert set(NAMES) <= set(found), f"no longer there: {sorted(set(NAMES) - set(found))}"
    meanings = list(NAMES.values())
    assert not [meaning for meaning in meanings if meanings.count(meaning) > 1]


@pytest.mark.parametrize(
    "old", ["lr", "batch", "warmup", "warmup_ratio", "floor_ratio", "key", "vocabulary", "mapping", "mapping_preset",
            "freeze", "own_vocabulary", "n_cells", "is_showing_progress", "showing_progress"],
)  # fmt: skip
def test_old_names_are_shown_nowhere(old: str) -> None:
    assert old not in NAMES
    assert old not in {name for name, _ in names()}


def test_layer_is_a_block_wherever_it_is_shown() -> None:
    """Not the layer of a file, which tokenize once called so."""
    assert {where for name, where in names() if name == "layer"} == {
        *("embed()", "embed", "profile"), *("perturb()", "perturb", "state_embeddings()"),
    }  # fmt: skip
