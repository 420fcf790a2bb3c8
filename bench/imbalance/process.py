"""What runs in a process of its own, so that its peak memory is one model's: preparing, and the rows of a model."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geneformer_fast as gf
from bench.finetune_real import SEED, VARIANTS, _log_counts, _pca
from bench.imbalance.models import Model, positions
from bench.imbalance.study import BASELINE, Row, Study
from geneformer_fast.data.identity import identity_of
from geneformer_fast.errors import TrainingError
from geneformer_fast.files.writing import write_json
from geneformer_fast.finetuning.cells import CellWork
from geneformer_fast.finetuning.labels import read_task
from geneformer_fast.finetuning.models import scale_classifier, with_head
from geneformer_fast.finetuning.recipes import CELLS
from geneformer_fast.finetuning.samplers import ClassSampler, over_sample, under_sample
from geneformer_fast.finetuning.scores import score
from geneformer_fast.finetuning.splits import Split
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.training.loop import fit

_SAMPLERS = {"over-sampled": over_sample, "under-sampled": under_sample}


def main(work: str, model: str, what: str, seconds: float) -> None:
    """``what``: ``"prepare"`` (cells, a pretrained encoder), or ``"rows"``, of which none begins after ``seconds``."""
    study = Study(Path(work))
    torch.set_num_threads(study.asked.threads)
    if what == "prepare":
        one = Model(study, model)
        one.pretrained()
        one.tokens("labelled")
        return
    end = time.monotonic() + seconds
    computed = _Baseline(study) if model == BASELINE else _Finetuned(study, model)
    for row in study.missing(model):
        if time.monotonic() > end:
            break
        study.keep(row, computed.row(row))


class _Baseline:
    """Principal components and logistic regression, all of it fitted to the training cells alone."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.codes, self.names = study.labels()
        self.counts = _log_counts(Path(study.asked.cells))[0]

    def row(self, row: Row) -> dict[str, Any]:
        """Scores of one row."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        split, begin = self.study.split(row.share, row.fold), time.perf_counter()
        features, train = _pca(self.counts, split.train), split.train
        if row.way in _SAMPLERS:
            train = train[_SAMPLERS[row.way](self.codes[train], np.random.default_rng(SEED))]
        balance = "balanced" if row.way == "weighted" else None
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight=balance))
        fitted.fit(features[train], self.codes[train])
        found = score(self.codes[split.test], fitted.predict_proba(features[split.test]), self.names)
        return _kept(found, self.study, split.train, self.codes) | {"seconds": time.perf_counter() - begin}


class _Finetuned:
    """One of the encoders, fine-tuned for every row from the same pretrained weights."""

    def __init__(self, study: Study, name: str) -> None:
        model = Model(study, name)
        self.study, self.codes = study, study.labels()[0]
        self.base = model.encoder()
        self.tokens: TokenFolder = open_tokens(model.tokens("labelled"))
        self.identity = identity_of(self.tokens, self.base.config)
        self.task = read_task(self.tokens, study.asked.label)
        self.places = np.full(len(self.codes), -1)
        self.places[self.tokens.column("source_row").to_numpy()] = np.arange(self.tokens.n_cells)
        longest = positions(self.tokens)
        asked = study.asked
        self.recipe = dataclasses.replace(
            CELLS, steps=asked.steps, batch_cells=asked.batch_cells, token_budget=asked.batch_cells * longest,
            learning_rate=asked.learning_rate, weight_decay=0.01, monitor="loss", is_greater_better=False,
            is_best_restored=False, eval_every=asked.steps, seed=SEED, progress=False, workers=0,
        )  # fmt: skip
        write_json(model.folder / "model.json", self._about(longest, is_given=model.given is not None))

    def _about(self, longest: int, *, is_given: bool) -> dict[str, Any]:
        return {
            "is_given": is_given,
            "n_parameters": sum(parameter.numel() for parameter in self.base.parameters()),
            "longest": longest,
            "mean_length": float(self.tokens.lengths().mean()),
        }

    def row(self, row: Row) -> dict[str, Any]:
        """Scores of one row, and how fast it learned."""
        wanted = {"sampler": "none", "loss": "cross-entropy", **VARIANTS[row.way]}
        rows = self.study.split(row.share, row.fold)
        train, test = (self.places[part] for part in (rows.train, rows.test))
        # A model whose list has none of a cell's genes does not see that cell.
        split = Split(train[train >= 0], train[:0], test[test >= 0])
        task = self.task
        work = CellWork(
            self.tokens, self.identity, [task], {task.name: wanted["loss"]},
            ClassSampler(task.codes, wanted["sampler"]), self.recipe.token_budget,
        )  # fmt: skip
        encoder: gf.Encoder = with_head(self.base, "cells", len(task.classes), seed=SEED)
        objective, factor = work.objective(split)
        begin = time.perf_counter()
        try:
            history = fit(encoder, self.tokens, objective, self.recipe, **work.training(split))
        except TrainingError as error:
            return {"error": str(error)}
        seconds = time.perf_counter() - begin
        scale_classifier(encoder, factor)
        found = score(*work.test(encoder, split, row.fold).tasks[task.name], task.classes)
        # The first step makes buffers and compiles loops.
        step_s = float(np.median([record.seconds for record in history.steps[1:] or history.steps]))
        return {
            **_kept(found, self.study, rows.train, self.codes), "seconds": seconds, "step_s": step_s,
            "seconds_per_epoch": step_s * math.ceil(len(split.train) / self.study.asked.batch_cells),
        }  # fmt: skip


def _kept(found: dict[str, Any], study: Study, train: np.ndarray, codes: np.ndarray) -> dict[str, Any]:
    rare = study.asked.rare
    return {
        "accuracy": found["accuracy"],
        "macro_f1": found["macro_f1"],
        "rare_f1": found["per_class"][rare]["f1"],
        "n_train": len(train),
        "n_rare": int((codes[train] == study.labels()[1].index(rare)).sum()),
    }
