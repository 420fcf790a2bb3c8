"""How Geneformer is pretrained today: transformers' Trainer on padded batches, logits of all positions.

Cells come masked and in the order of the steps, as everybody else gets them: the Trainer only pads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

PAD, IGNORED = 0, -100


@dataclass(frozen=True)
class Schedule:
    """What all candidates are told of a run.

    Attributes
    ----------
    n_steps, cells_per_step
        Its length; Geneformer's batches are of 12 cells.
    learning_rate, warmup_steps, weight_decay, clip
        AdamW on a linear rise and fall (Geneformer V1-10M's numbers, but for the warm-up).
    """

    n_steps: int
    cells_per_step: int = 12
    learning_rate: float = 1e-3
    warmup_steps: int = 2
    weight_decay: float = 0.001
    clip: float = 1.0


@dataclass
class Trained:
    """Losses in nats and seconds of every step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


#: Shown tokens and labels of a cell; labels are IGNORED where nothing is asked.
Example = dict[str, torch.Tensor]


def train_by_trainer(
    model: Any, examples: Sequence[Example], schedule: Schedule, *, micro_batch: int, is_bfloat16: bool, folder: Path
) -> Trained:
    """As Geneformer's pretrainer: BertForMaskedLM, batches padded to their longest cell, losses logged.

    Parameters
    ----------
    model
        A BertForMaskedLM, with float32 parameters.
    examples
        In the order in which its length-grouped sampler shows cells, whole steps of them.
    schedule
        Of the run.
    micro_batch
        Cells that go through the model at once; steps of more are accumulated, with a loss in which every masked gene
        counts once, whatever part it is in. Whole steps take the model's own.
    is_bfloat16
        Matrix products under autocast (``bf16=True``).
    folder
        Where the Trainer may write.
    """
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=schedule.n_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=schedule.cells_per_step // micro_batch,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.clip,
        bf16=is_bfloat16,
        use_cpu=True,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    watch = _watch()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(examples),
        data_collator=padded,
        compute_loss_func=None if micro_batch == schedule.cells_per_step else _mean_over_step,
        callbacks=[watch],
    )
    trainer.train()
    return watch.trained


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch as transformers reads it, padded to its longest cell."""
    longest = max(len(example["input_ids"]) for example in examples)

    def stacked(name: str, fill: int) -> torch.Tensor:
        return torch.stack([F.pad(each[name], (0, longest - len(each[name])), value=fill) for each in examples])

    ids = stacked("input_ids", PAD)
    mask = torch.stack([torch.arange(longest) < len(each["input_ids"]) for each in examples]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": stacked("labels", IGNORED)}


def _mean_over_step(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """What BertForMaskedLM computes itself, but over all masked genes of the step instead of a part of it."""
    logits = outputs.logits.view(-1, outputs.logits.shape[-1])
    total = F.cross_entropy(logits, labels.view(-1), ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch


def _watch() -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Takes the time between steps, and the losses that are logged."""

        def __init__(self) -> None:
            self.trained = Trained()
            self.last = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.trained.seconds.append(now - self.last)
            self.last = now

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                self.trained.losses.append(float(logs["loss"]))

    return Watch()
