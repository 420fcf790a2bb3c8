"""The report of a training run, as ``profile=`` of :func:`geneformer_fast.training.loop.fit` asks for it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from geneformer_fast.errors import GeneformerFastError, OutputError, ProfileError, UnsupportedError
from geneformer_fast.profiling.loop.writing import check_place, paths_of, reports_in
from geneformer_fast.profiling.run import Run, profile
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.recipe import Recipe

logger = logging.getLogger(__name__)
#: A label that asks for nothing.
IGNORED = -100
#: Name of the folder, in that of the run, that a report goes to where nobody names another place.
FOLDER = "profile"
Asked = Run | str | os.PathLike[str] | bool | None
P = TypeVar("P", bound=Asked)


def place_of(asked: Asked, out: Path | None) -> Path | None:
    """Where the report goes; None where it is not asked for.

    Raises
    ------
    UnsupportedError
        No place is named, and the run has no folder.
    """
    if asked is None or asked is False or isinstance(asked, Run):
        return None
    if not isinstance(asked, bool):
        return Path(asked)
    if out is None:
        raise UnsupportedError("profile=True writes into the folder of the run, and there is none: name a place for it")
    return out / FOLDER


# What the first process finds of a place, for all of them.
_FREE, _KEPT, _REFUSED = 0.0, 1.0, 2.0


def checked_place(
    asked: P,
    out: Path | None,
    *,
    is_resuming: bool,
    is_replacing: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 - of a single process, and frozen
    device: torch.device | None = None,
) -> P | Path | bool:
    """What is asked for, once it is sure that it can be done: looked at before anything is written.

    Parameters
    ----------
    asked
        As :func:`profiled` takes it.
    out
        Folder of the run.
    is_resuming
        Whether a run goes on: a report that an earlier part of it has left stays, with a warning, and this part is not
        profiled.
    is_replacing
        Whether a report in the folder of the run goes, because all of that folder does.
    ranks, device
        Of this process where there are several; the first one looks, and all do the same.

    Raises
    ------
    OutputError
        No report can go there, or one is there already; in every process.
    UnsupportedError
        No place is named, and the run has no folder; what draws a page is not installed.
    """
    place = place_of(asked, out)
    if place is None:
        return asked
    refusal: GeneformerFastError | None = None
    found = _FREE
    if ranks.is_first:
        is_ours = is_replacing and out is not None and place.absolute() == (out / FOLDER).absolute()
        there = reports_in(place)
        if is_resuming and there and not is_ours:
            found = _KEPT
            warnings.warn(
                f"{there[0]} is there already, of an earlier part of this run, and stays: the rest is not profiled; "
                "name another place for a report of it",
                stacklevel=3,
            )
        else:
            try:
                check_place(place, is_replacing=is_ours, how="remove it")
            except GeneformerFastError as error:
                refusal, found = error, _REFUSED
    if device is not None:
        found = ranks.first(found, device)
    if found == _REFUSED:
        raise refusal or OutputError(f"{place} cannot be written, as the first process says")
    return False if found == _KEPT else place


@contextlib.contextmanager
def profiled(
    asked: Asked, step: nn.Module, *, out: Path | None, recipe: Recipe, ranks: Ranks, name: str, dtype: str, cells: str
) -> Iterator[Run | None]:
    """Measure the steps of a training run.

    A training that is too short to be measured, or whose report cannot be written in the end, ends as it would have,
    with a warning.

    Parameters
    ----------
    asked
        A place, True for one in ``out``, a run of one's own, or nothing.
    step
        What is called with a batch, and gives its loss.
    out
        Folder of the run.
    recipe, ranks
        Of the run; every process measures its own part, and the first one writes.
    name, dtype, cells
        Of the model and of the data.

    Yields
    ------
    Run or None
        To be told of every step.

    Raises
    ------
    ProfileError
        A run of one's own is not open.
    """
    if isinstance(asked, Run):
        if not asked.is_running:
            raise ProfileError("the run that is to profile the training is not open: train within its with-block")
        asked.follow(step)  # the head and its loss are part of the forward pass
    place = place_of(asked, out)
    if place is None:
        yield asked if isinstance(asked, Run) else None
        return
    run = profile(
        step, name=name, mode="train", dtype=dtype, tokens=cells, out=place if ranks.is_first else None,
        settings=_settings(recipe, ranks),
    )  # fmt: skip
    run.__enter__()
    try:
        yield run
    except BaseException:
        run.__exit__(*sys.exc_info())
        raise
    try:
        run.__exit__(None, None, None)
    except (ProfileError, OutputError) as error:
        warnings.warn(f"there is no report of the training: {error}", stacklevel=3)
        return
    if ranks.is_first:
        logger.info("how fast it trains is told in %s", paths_of(place)[-1])


def _settings(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """What of a recipe decides how fast it is."""
    found: dict[str, Any] = {
        "token_budget": recipe.token_budget, "batch_cells": recipe.batch_cells, "batch_tokens": recipe.batch_tokens,
        "workers": recipe.workers,
    }  # fmt: skip
    if ranks.world_size > 1:
        found |= {"processes": ranks.world_size, "parallel": recipe.parallel}
    return {name: value for name, value in found.items() if value is not None}


def rows_of_head(batch: Any) -> int | None:
    """Rows that the head will be asked for, of a batch on the host; None where it reads cells as wholes."""
    rows = getattr(batch, "rows", None)
    if isinstance(rows, torch.Tensor):
        return len(rows)
    targets = getattr(batch, "targets", None)
    if not isinstance(targets, torch.Tensor) or targets.ndim != 1:
        return None
    return int((targets != IGNORED).sum())
