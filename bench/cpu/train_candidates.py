"""What is timed when a model is pretrained: ours and transformers' Trainer, on the same masked cells and weights."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cpu.embed_candidates import GEOMETRIES, real_cells
from bench.cpu.train_rival import IGNORED, Example, Schedule, Trained, train_by_trainer

GEOMETRY = GEOMETRIES["v1-10m"]
#: Dropout of Geneformer V1-10M.
DROPOUT = 0.02
_SEED = 0


@dataclass(frozen=True)
class Workplace:
    """A folder with a checkpoint of random weights and the tokens of real cells, in the order of the steps."""

    folder: Path

    @property
    def tokens(self) -> Path:
        """The tokens, as ``datasets`` saves them."""
        return self.folder / "tokens"

    def model(self, dropout: float) -> Path:
        """The checkpoint; all have the same weights."""
        return self.folder / f"model-dropout-{dropout}"

    def prepare(self, n_cells: int, cells_per_step: int) -> None:
        """Make checkpoints, and put cells into the order in which Geneformer's length-grouped sampler shows them."""
        import datasets
        from transformers import BertForMaskedLM
        from transformers.trainer_pt_utils import LengthGroupedSampler

        for dropout in (DROPOUT, 0.0):
            config = GEOMETRY.stock_config()
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
            torch.manual_seed(_SEED)
            BertForMaskedLM(config).save_pretrained(self.model(dropout))
        table = real_cells(GEOMETRY.family, n_cells)
        lengths = table["length"].to_pylist()
        generator = torch.Generator().manual_seed(_SEED)
        order = list(LengthGroupedSampler(cells_per_step, lengths=lengths, generator=generator))
        shutil.rmtree(self.tokens, ignore_errors=True)
        datasets.disable_progress_bars()
        datasets.Dataset(table.take(order)).save_to_disk(str(self.tokens))

    def examples(self, schedule: Schedule) -> list[Example]:
        """All cells of a run as ours masks them, one after another."""
        from geneformer_fast import EncoderConfig, open_tokens
        from geneformer_fast.data.batches import BatchPlan
        from geneformer_fast.data.loader import load_pieces

        found = []
        with open_tokens(self.tokens) as tokens:
            plan = BatchPlan(
                tokens.lengths(),
                np.arange(tokens.n_cells),
                batch_cells=schedule.cells_per_step,
                token_budget=2**30,
                seed=_SEED,
                sampler=AsTheyAre(),
            )
            objective = _objective(tokens, EncoderConfig.preset("geneformer-v1-10m"))
            pieces = plan.pieces(0, schedule.n_steps)
            for _, batch in load_pieces(tokens, pieces, objective.collate, seed=_SEED, workers=0):
                labels = torch.full((batch.n_tokens,), IGNORED)
                labels[batch.rows] = batch.targets
                for start, stop in itertools.pairwise(batch.tokens.cu_seqlens.tolist()):
                    found.append({"input_ids": batch.tokens.values[start:stop], "labels": labels[start:stop]})
        return found


class AsTheyAre:
    """A sampler that keeps the order of the folder."""

    def order(self, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The cells."""
        return cells


def _objective(tokens: Any, config: Any) -> Any:
    from geneformer_fast.data.identity import identity_of
    from geneformer_fast.data.kinds import TokenKinds
    from geneformer_fast.data.masking import Masking
    from geneformer_fast.training.masked_genes import MaskedGenes

    return MaskedGenes(TokenKinds.of(identity_of(tokens, config), config), Masking())


#: Train for a schedule, with so much dropout, so many cells at once (rivals).
Run = Callable[[Workplace, Schedule, float, int], Trained]


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes
    ----------
    what
        One line for the tables.
    run
        Loads the checkpoint and trains it.
    is_ours
        Ours choose themselves what goes through the model at once.
    is_bfloat16
        Matrix products in bfloat16.
    """

    what: str
    run: Run
    is_ours: bool
    is_bfloat16: bool


def _ours(precision: str) -> Run:
    def train(place: Workplace, schedule: Schedule, dropout: float, micro_batch: int) -> Trained:
        from geneformer_fast import load, open_tokens
        from geneformer_fast.training.loop import fit
        from geneformer_fast.training.recipe import Recipe

        model = load(place.model(dropout), dtype="float32", device="cpu")
        recipe = Recipe(
            steps=schedule.n_steps,
            batch_cells=schedule.cells_per_step,
            learning_rate=schedule.learning_rate,
            warmup_steps=schedule.warmup_steps,
            weight_decay=schedule.weight_decay,
            clip=schedule.clip,
            precision=precision,
            seed=_SEED,
            progress=False,
        )
        with open_tokens(place.tokens) as tokens:
            cells = np.arange(tokens.n_cells)
            objective = _objective(tokens, model.config)
            history = fit(model, tokens, objective, recipe, train_cells=cells, sampler=AsTheyAre())
        return Trained(history.losses, [record.seconds for record in history.steps])

    return train


def _trainer(is_bfloat16: bool, *, is_accelerated: bool = False) -> Run:
    def train(place: Workplace, schedule: Schedule, dropout: float, micro_batch: int) -> Trained:
        from transformers import BertForMaskedLM

        logging.getLogger("transformers").setLevel(logging.ERROR)
        model = BertForMaskedLM.from_pretrained(place.model(dropout))
        if is_accelerated:
            from geneformer_fast import accelerate

            accelerate(model)
            micro_batch = schedule.cells_per_step
        return train_by_trainer(
            model,
            place.examples(schedule),
            schedule,
            micro_batch=micro_batch,
            is_bfloat16=is_bfloat16,
            folder=place.folder / "trainer",
        )

    return train


CANDIDATES = {
    "ours": Candidate("this project, bfloat16", _ours("bfloat16"), True, True),
    "accelerated": Candidate(
        "transformers' Trainer with bf16=True on `accelerate(model)`", _trainer(True, is_accelerated=True), True, True
    ),
    "ours-float32": Candidate("this project, float32", _ours("float32"), True, False),
    "trainer": Candidate(
        "transformers' Trainer as Geneformer calls it: float32, default attention, padded, all logits",
        _trainer(False),
        False,
        False,
    ),
    "trainer-bfloat16": Candidate(
        "the same with bf16=True and the number of cells at once that is fastest here", _trainer(True), False, True
    ),
}
