"""How fine-tuning is done if nobody says otherwise: Geneformer's defaults, with the best epoch kept."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from geneformer_fast.training.recipe import RECIPES, Recipe

if TYPE_CHECKING:
    from geneformer_fast.families import Family

#: Classes of cells. Geneformer: batches of 12, 10 epochs, the best by evaluation kept; 5e-5 is its rate for six layers.
CELLS = Recipe(
    epochs=10,
    batch_cells=12,
    learning_rate=5e-5,
    schedule="linear",
    warmup_share=0.1,
    weight_decay=0.001,
    monitor="macro_f1",
    is_greater_better=True,
    is_best_restored=True,
)

#: Classes of genes: one epoch.
GENES = Recipe(
    epochs=1,
    batch_cells=12,
    learning_rate=5e-5,
    schedule="linear",
    warmup_share=0.1,
    weight_decay=0.001,
    monitor="macro_f1",
    is_greater_better=True,
    is_best_restored=True,
)


def cells_of(family: Family | None) -> Recipe:
    """The recipe for classes of cells that a family's authors published, ``"<family>-cells"``; else :data:`CELLS`."""
    return CELLS if family is None else RECIPES.get(f"{family.name}-cells", CELLS)


def with_progress(recipe: Recipe, progress: bool | None) -> Recipe:
    """A recipe that shows progress as asked for; None leaves it as it is."""
    return recipe if progress is None else dataclasses.replace(recipe, progress=progress)
