"""What fine-tuning learns: the classes of cells, in one task or several, and the classes of genes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from geneformer_fast.data.random import CellRandom
from geneformer_fast.encoder import Encoder
from geneformer_fast.finetuning.labels import Task
from geneformer_fast.finetuning.losses import IGNORED, Loss, Terms
from geneformer_fast.ragged import Ragged


@dataclass(frozen=True)
class LabelledCells:
    """A batch: tokens, and the classes of cells [B, n_tasks] or of genes [T], -100 where there is none."""

    tokens: Ragged
    targets: torch.Tensor

    @property
    def n_tokens(self) -> int:
        """Tokens in it."""
        return self.tokens.n_tokens

    def to(self, device: torch.device, *, non_blocking: bool = False) -> LabelledCells:
        """The same on another device."""
        targets = self.targets.to(device, non_blocking=non_blocking)
        return replace(self, tokens=self.tokens.to(device, non_blocking=non_blocking), targets=targets)

    def pin_memory(self) -> LabelledCells:
        """The same in page-locked memory."""
        return replace(self, tokens=self.tokens.pin_memory(), targets=self.targets.pin_memory())


class CellObjective:
    """Classes of cells: one linear head per task on the pooled first token of a shared encoder.

    The heads are the rows of one matrix, dealt among the tasks in order. The loss is the mean over all labelled
    (cell, task) pairs, each weighing as its task does; a cell without a label in a task says nothing about it.

    Parameters
    ----------
    tasks
        What to tell.
    losses
        One per task.
    """

    def __init__(self, tasks: Sequence[Task], losses: Sequence[Loss]) -> None:
        self.tasks, self.losses = list(tasks), list(losses)
        self._codes = np.stack([task.codes for task in tasks], axis=1)
        chances = [chance_loss(loss, len(task.classes)) for task, loss in zip(tasks, losses, strict=True)]
        self.chance_loss = float(np.average(chances, weights=[task.weight for task in tasks]))

    def collate(self, tokens: Ragged, cells: np.ndarray, rng: CellRandom) -> LabelledCells:
        """Tokens and the labels of the cells."""
        return LabelledCells(tokens, torch.from_numpy(self._codes[cells]))

    def loss(self, model: nn.Module, batch: LabelledCells) -> Terms:
        """(sum, weight) over the cells of a batch, see the class."""
        return self._loss(cell_logits(model, batch.tokens), batch.targets)

    def metrics(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """``loss``, ``accuracy`` and ``macro_f1``; for several tasks their mean, and each as ``<task>/accuracy``.

        Tasks in which no cell is labelled do not count.
        """
        logits, targets = [], []
        for batch in batches:
            logits.append(cell_logits(model, batch.tokens).float())
            targets.append(batch.targets)
        all_logits, all_targets = torch.cat(logits), torch.cat(targets)
        total, weight = self._loss(all_logits, all_targets)
        found = {"loss": float(total) / max(float(weight), 1e-12)}
        scores = {}
        for number, part in enumerate(self._parts(all_logits)):
            truth = all_targets[:, number].cpu().numpy()
            is_asked = truth != IGNORED
            if not is_asked.any():
                continue
            scores[self.tasks[number].name] = _scores(truth[is_asked], part.argmax(1).cpu().numpy()[is_asked])
        for name in ("accuracy", "macro_f1"):
            found[name] = float(np.mean([score[name] for score in scores.values()] or [0.0]))
            if len(self.tasks) > 1:
                found |= {f"{task}/{name}": score[name] for task, score in scores.items()}
        return found

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> Terms:
        total, weight = logits.new_zeros((), dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        for number, part in enumerate(self._parts(logits)):
            part_total, part_weight = self.losses[number](part, targets[:, number])
            total = total + self.tasks[number].weight * part_total
            weight = weight + self.tasks[number].weight * part_weight
        return total, weight

    def _parts(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return logits.split([len(task.classes) for task in self.tasks], dim=1)


class GeneObjective:
    """Classes of genes: one linear head on the hidden state of every labelled gene of a cell.

    Parameters
    ----------
    train_codes, eval_codes
        [V] int64, the class of every token that training (evaluation) asks for, -100 for all others. The two name
        different genes: a cell shows both, and each is asked in its place only.
    loss
        Of the genes' classes.
    """

    def __init__(self, train_codes: np.ndarray, eval_codes: np.ndarray, loss: Loss) -> None:
        self.train_codes, self.eval_codes = torch.from_numpy(train_codes), torch.from_numpy(eval_codes)
        self._loss = loss
        self.chance_loss = chance_loss(loss, int(train_codes.max(initial=0)) + 1)

    def collate(self, tokens: Ragged, cells: np.ndarray, rng: CellRandom) -> LabelledCells:
        """Tokens and the classes of the genes to learn from."""
        return LabelledCells(tokens, self.train_codes[tokens.values])

    def loss(self, model: nn.Module, batch: LabelledCells) -> Terms:
        """(sum, weight) over the labelled genes of all cells of a batch."""
        return self._loss(*gene_logits(model, batch.tokens, batch.targets))

    def metrics(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """``loss`` over every occurrence; ``accuracy`` and ``macro_f1`` of genes, by their mean over cells."""
        total, weight = 0.0, 0.0
        means = GeneMeans(self.eval_codes.numpy())
        for batch in batches:
            targets = self.eval_codes.to(batch.tokens.values.device)[batch.tokens.values]
            logits, asked = gene_logits(model, batch.tokens, targets)
            part_total, part_weight = self._loss(logits, asked)
            total, weight = total + float(part_total), weight + float(part_weight)
            means.add(batch.tokens.values[targets != IGNORED], logits)
        genes, probabilities, _ = means.result()
        truth = self.eval_codes.numpy()[genes]
        return {"loss": total / max(weight, 1e-12), **_scores(truth, probabilities.argmax(1))}


def chance_loss(loss: Loss, n_classes: int) -> float:
    """What a loss is, in the mean over classes, where every logit is 0."""
    total, weight = loss(torch.zeros(n_classes, n_classes), torch.arange(n_classes))
    return float(total) / max(float(weight), 1e-12)


class GeneMeans:
    """Mean probabilities of genes over the cells in which they occur.

    Parameters
    ----------
    codes
        [V] classes of tokens; those of -100 are not asked for.
    """

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = codes
        self._sums: torch.Tensor | None = None
        self._counts = torch.zeros(len(codes), dtype=torch.int64)

    def add(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Add occurrences, [R] tokens and [R, K] logits; returns their probabilities [R, K], on the CPU."""
        tokens, probabilities = tokens.cpu(), logits.float().softmax(1).cpu()
        if self._sums is None:
            self._sums = torch.zeros(len(self.codes), logits.shape[1], dtype=torch.float64)
        self._sums.index_add_(0, tokens, probabilities.double())
        self._counts += torch.bincount(tokens, minlength=len(self.codes))
        return probabilities

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens [G] that occurred, ascending; mean probabilities [G, K]; [G] in how many cells)."""
        seen = (self._counts > 0).nonzero().squeeze(1)
        if self._sums is None:
            return seen.numpy(), np.zeros((0, 1)), self._counts[seen].numpy()
        means = self._sums[seen] / self._counts[seen, None]
        return seen.numpy(), means.numpy(), self._counts[seen].numpy()


def cell_logits(model: nn.Module, tokens: Ragged) -> torch.Tensor:
    """[B, n_classes] of an encoder with a head of cells."""
    encoder = cast(Encoder, model)
    return encoder.logits(encoder(tokens))


def gene_logits(model: nn.Module, tokens: Ragged, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, n_classes] of the positions whose target is not -100, their targets [R])."""
    encoder = cast(Encoder, model)
    rows = (targets != IGNORED).nonzero().squeeze(1)
    return encoder.logits(encoder(tokens), rows), targets[rows]


def _scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    if not len(truth):
        return {"accuracy": 0.0, "macro_f1": 0.0}
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
    }
