"""The card of a pretrained model."""

from __future__ import annotations

import math
import os
from pathlib import Path

from geneformer_fast import families
from geneformer_fast.checkpoints.hf import is_bert
from geneformer_fast.checkpoints.model_card import ModelCard, Score, as_code, listed, name_of
from geneformer_fast.config import EncoderConfig
from geneformer_fast.data.described import described
from geneformer_fast.encoder import Encoder
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.training.history import History
from geneformer_fast.training.recipe import MACHINE, Recipe

_USE = """import geneformer_fast as gf

embeddings = gf.embed("tokens", ".", pool="mean")  # ".": the folder of this card"""


def pretrained_card(
    out: Path,
    model: Encoder,
    tokens: TokenFolder,
    recipe: Recipe,
    history: History,
    *,
    n_train: int,
    n_eval: int,
    init: str | os.PathLike[str] | None,
) -> ModelCard:
    """What there is to say.

    Parameters
    ----------
    out
        Folder of the model.
    model, tokens, recipe, history
        What was trained, on what, how, and what came of it.
    n_train, n_eval
        Cells.
    init
        The model that training went on from.
    """
    last = (history.best if recipe.is_best_restored else None) or next(reversed(history.evaluations), None)
    scores, said = [], "No cells were held out."
    if last is not None and n_eval:
        loss = last["loss"]
        said = listed({"validation loss": f"{loss:.4f}", "perplexity": f"{math.exp(min(loss, 700)):.2f}"})
        said += f"\n\nOf masked genes in {n_eval:,} cells that were held out, after step {int(last['step']):,}."
        scores = [Score("fill-mask", "masked genes", tokens.path.absolute().name, {"loss": loss})]
    about = {**described(tokens), "training cells": f"{n_train:,}", "validation cells": f"{n_eval:,}"}
    base = None if init is None else Path(init)
    begun = "from fresh weights" if base is None else f"on from {name_of(base)}"
    return ModelCard(
        title=name_of(out),
        lead=f"A transformer encoder over ranked genes of single cells, trained {begun} to name masked genes.",
        sections=[
            ("Use", as_code(_USE, "python")),
            ("Model", _geometry(model.config)),
            ("Data", listed(about)),
            ("Scores", said),
            ("Recipe", as_code(plain_recipe(recipe))),
        ],
        base=base,
        library="transformers" if is_bert(model) else "geneformer-fast",
        task="fill-mask",
        family=families.family_name(model.config),
        scores=scores,
    )


def plain_recipe(recipe: Recipe) -> dict[str, object]:
    """What of a recipe decides a model: nothing about the machine, and nothing that is not set."""
    return {name: value for name, value in recipe.to_dict().items() if name not in MACHINE and value is not None}


def _geometry(config: EncoderConfig) -> str:
    return listed(
        {
            "blocks": config.n_layers,
            "width": config.width,
            "heads": config.n_heads,
            "feed-forward width": config.ff_width,
            "longest cell": f"{config.max_len:,} tokens",
            "vocabulary": f"{config.vocab_size:,} tokens" + (f" ({config.vocabulary})" if config.vocabulary else ""),
        }
    )
