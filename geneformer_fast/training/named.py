"""A recipe from whatever names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_fast.arguments import with_new_names
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.files.schema import read_json
from geneformer_fast.training.recipe import RECIPES, RENAMED, Recipe

# The two ways to state a length, a batch, and a warm-up exclude each other: what is asked for unsets the other.
_RIVALS = (
    *(("batch_cells", "batch_tokens"), ("batch_tokens", "batch_cells")),
    *(("epochs", "steps"), ("warmup_share", "warmup_steps")),
)


def recipe_of(
    recipe: Recipe | str | os.PathLike[str] | None,
    config: Any = None,
    changes: Mapping[str, Any] | None = None,
    *,
    where: str | os.PathLike[str] | None = None,
) -> Recipe:
    """A recipe from whatever names it, with fields changed; ``where`` is the file that the changes are from.

    Raises
    ------
    UnsupportedError
        There is no such recipe or field.
    """
    if recipe is None:
        recipe = RECIPES.get(config, Recipe()) if isinstance(config, str) else Recipe()
    elif not isinstance(recipe, Recipe) and str(recipe).endswith(".json"):
        recipe = Recipe.from_dict(read_json(Path(recipe), UnsupportedError), where=recipe)
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.preset(str(recipe))
    changes = with_new_names("recipe" if where is None else str(where), RENAMED, changes or {})
    for name, rival in _RIVALS:
        if changes.get(name) is not None and rival not in changes:
            changes[rival] = None
    return Recipe.from_dict({**recipe.to_dict(), **changes}, where=where)
