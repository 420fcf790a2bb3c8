"""The same fine-tuning, step by step, with a stock Hugging Face model and with an accelerated one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import geneformer_fast
from geneformer_fast.files.writing import whole_folder, write_json
from geneformer_fast.finetuning.models import CARD
from geneformer_fast.profiling.compare.quiet import quiet
from geneformer_fast.quickstart.stock import Cells, padded
from geneformer_fast.tokenization.vocabulary import Vocabulary

WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Schedule:
    """A fixed amount of training.

    Attributes
    ----------
    steps, batch_cells
        Steps, and cells of each.
    learning_rate
        At its peak; a tenth of the steps leads up to it, and it falls to nothing in a line.
    seed
        Of the classifier's weights and the order of cells.
    """

    steps: int
    batch_cells: int
    learning_rate: float
    seed: int = 0

    def batches(self, n_cells: int) -> Iterator[np.ndarray]:
        """Cells of one step after another, shuffled anew in every pass, as Hugging Face's Trainer does."""
        rng = np.random.default_rng(self.seed)
        n_passes = -(-self.steps * self.batch_cells // n_cells)
        order = np.concatenate([rng.permutation(n_cells) for _ in range(n_passes)])
        for step in range(self.steps):
            yield order[step * self.batch_cells : (step + 1) * self.batch_cells]


@dataclass(frozen=True)
class Trained:
    """Two trainings beside each other.

    Attributes
    ----------
    stock_losses, losses
        [steps] losses in nats, of the stock and of the accelerated model.
    stock_seconds, seconds
        Of all steps but the first.
    """

    stock_losses: list[float]
    losses: list[float]
    stock_seconds: float
    seconds: float

    @property
    def largest_difference(self) -> float:
        """Between losses of the same step, in nats."""
        return max(abs(a - b) for a, b in zip(self.stock_losses, self.losses, strict=True))

    @property
    def times_faster(self) -> float:
        """Seconds of the stock model over those of the accelerated one."""
        return self.stock_seconds / self.seconds


def finetune(
    folder: Path,
    cells: Cells,
    classes: Sequence[str],
    codes: np.ndarray,
    schedule: Schedule,
    *,
    device: str,
    on_step: Callable[[int, float], None],
) -> tuple[Any, Trained]:
    """Train a stock BertForSequenceClassification and an accelerated one, the same steps in turns.

    Parameters
    ----------
    folder
        The model to begin with.
    cells, codes
        Tokens of every cell, and its class.
    classes
        Names of the classes.
    schedule
        How much of it.
    device
        Where.
    on_step
        Told the number of steps done, and the loss.

    Returns
    -------
    model
        The accelerated one, trained.
    Trained
        What both did.
    """
    stock = _classifier(folder, classes, schedule.seed).to(device).train()
    ours = copy.deepcopy(stock)
    geneformer_fast.accelerate(ours)
    loops = [_Loop(model, schedule) for model in (stock, ours)]
    for step, chosen in enumerate(schedule.batches(len(cells)), start=1):
        ids, mask = padded([cells[i] for i in chosen], stock.config.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.from_numpy(codes[chosen])}
        for loop in loops:
            loop.step({name: values.to(device) for name, values in batch.items()})
        on_step(step, loops[1].losses[-1])
    first, second = loops
    return ours, Trained(first.losses, second.losses, first.seconds, second.seconds)


class _Loop:
    """A plain training loop around one model."""

    def __init__(self, model: Any, schedule: Schedule) -> None:
        self.model = model
        self.losses: list[float] = []
        self.seconds = 0.0
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=0.01)
        n_warmup = max(1, round(WARMUP_SHARE * schedule.steps))
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / n_warmup, (schedule.steps - step) / max(1, schedule.steps - n_warmup)),
        )

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        begin = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.rate.step()
        # The first step sets up more than it trains.
        self.seconds += time.perf_counter() - begin if self.losses else 0.0
        self.losses.append(loss.item())


def save_classifier(model: Any, folder: Path, classes: Sequence[str], task: str, vocabulary: Vocabulary) -> None:
    """Leave a folder that transformers loads and ``geneformer-fast predict`` reads, whole or not at all."""
    with whole_folder(folder) as made, quiet():
        model.save_pretrained(made)
        vocabulary.save(made)
        write_json(made / CARD, {"kind": "cells", "tasks": [{"name": task, "classes": list(classes)}]})


def _classifier(folder: Path, classes: Sequence[str], seed: int) -> Any:
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    with quiet():
        return BertForSequenceClassification.from_pretrained(
            folder,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: code for code, name in enumerate(classes)},
            problem_type="single_label_classification",
        )
