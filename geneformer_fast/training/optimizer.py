"""AdamW over the parameters that learn, in two groups: with weight decay and without."""

from __future__ import annotations

import torch
from torch import nn

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.training.recipe import Recipe


def decay_groups(model: nn.Module, *, decays_all: bool = False) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed) parameters that require a gradient.

    Biases and LayerNorm are not decayed, as in transformers and Megatron: shrinking them constrains nothing that the
    next matrix could not undo. ``decays_all`` puts everything into the first group.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if decays_all or parameter.ndim > 1 else spared).append(parameter)
    return decayed, spared


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) as the recipe says; one kernel per step where torch has it.

    Raises
    ------
    UnsupportedError
        Every parameter is frozen, or parameters are not float32 (they are the master weights; lower precision comes by
        autocast).
    """
    decayed, spared = decay_groups(model, decays_all=recipe.decays_all)
    if not decayed and not spared:
        raise UnsupportedError("every parameter of the model is frozen: there is nothing to train")
    kinds = {parameter.dtype for parameter in (*decayed, *spared)}
    if not kinds <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UnsupportedError(
            f"training keeps float32 weights, but the model's are {found}: load it with dtype='float32' and choose "
            "the precision of the products in the recipe"
        )
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=has_fused(decayed or spared),
    )


def has_fused(parameters: list[nn.Parameter]) -> bool:
    """Whether torch updates these parameters with one kernel."""
    return all(parameter.device.type in ("cpu", "cuda", "xpu", "mps") for parameter in parameters)
