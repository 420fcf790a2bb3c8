"""``geneformer_fast.profile``: a report of whatever loop runs within it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from geneformer_fast.arguments import checked
from geneformer_fast.config import usable_device
from geneformer_fast.errors import ProfileError
from geneformer_fast.profiling.loop.measuring import Run
from geneformer_fast.profiling.loop.phases import MODES, Options
from geneformer_fast.profiling.loop.subject import device_of, profiled
from geneformer_fast.profiling.loop.writing import check_place, check_trace

__all__ = ["Run", "profile"]


@checked
def profile(
    model: nn.Module | None = None,
    *,
    name: str | None = None,
    device: str | torch.device | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    n_warmup: int = 3,
    n_steps: int | None = None,
    n_active: int = 2,
    trace: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    energy: bool = True,
    ceilings: bool = True,
    tokens: str = "",
    mode: str = "loop",
    engine: str | None = None,
    dtype: str | None = None,
    n_layers: int | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Run:
    """Measure a loop of one's own, of training or of inference, around any torch module.

    ``with profile(model) as run:`` around the loop, ``run.step()`` after every batch (in training after the optimizer's
    step), and then ``run.report``. The cells of a step are read from what the model is called with (a
    :class:`geneformer_fast.Ragged`, or ``attention_mask`` and ``input_ids`` as transformers have them), or told to
    :meth:`Run.step`.

    Parameters
    ----------
    model
        The outermost module that the loop calls, so that all of the forward pass lies within it; wrapped (DDP, FSDP,
        ``torch.compile``) or not. None: nothing is known of parts of a step, of operations and of weights.
    name
        What to call it; None: its class.
    device
        Where it computes; None: where its weights are.
    optimizer
        Whose steps end a training step, and whose state is told apart in memory; None: every optimizer of torch.
    n_warmup
        Steps that are left out, because things are compiled and allocated in them.
    n_steps
        Steps of the window; later ones, up to ``n_active`` + 2, are for memory and for torch's profiler (one more to
        count the work of a model that is no BERT), and all others are not measured. None: the window is five steps and,
        after those for memory and the profiler, all that follow.
    n_active
        Steps that torch's profiler watches, which are no part of the window; 0 for none.
    trace
        Where to write what it saw, for Perfetto or ``chrome://tracing``: a ``.json.gz``.
    out
        Where the report goes: a ``.json``, an ``.html``, or a folder for both. None: nowhere.
    energy
        Whether to read counters of energy, where there are any. Idle power takes two seconds before the loop.
    ceilings
        Whether to measure what products and copies reach here, after the loop; without, there is no MFU.
    tokens
        In words, where the cells come from.
    mode
        ``"embed"``, ``"train"``, ``"tokenize"`` or ``"loop"``; ``"train"`` says that gradients are computed where no
        optimizer of torch shows it.
    engine
        Who computes; None: as the model looks.
    dtype
        Of matrix products, such as ``"bfloat16"`` or ``"int8"``; None: as the first forward pass runs.
    n_layers
        Blocks that are computed, where not all of them are.
    settings
        What else was chosen, for the report.
    overwrite
        Whether ``out`` and ``trace`` may replace files that are there.

    Returns
    -------
    Run
        To be entered by ``with``, once.

    Raises
    ------
    ProfileError
        The model lies elsewhere than ``device`` says; a number is negative; there is no such mode.
    OutputError
        ``out`` or ``trace`` is there already, names a folder where a file should be or the other way round, or cannot
        be written.
    UnsupportedError
        torch cannot use ``device``; or what draws a page is not installed.

    Notes
    -----
    The device is waited for at the beginning and the end of the window only, and outside of watched steps nothing costs
    more than some marks of a clock. Definitions of all figures are in :mod:`geneformer_fast.profiling.figures`.
    """
    if mode not in MODES:
        raise ProfileError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    for what, number, least in (
        ("n_warmup", n_warmup, 0), ("n_active", n_active, 0), ("n_steps", n_steps, 1), ("n_layers", n_layers, 0),
    ):  # fmt: skip
        if number is not None and number < least:
            raise ProfileError(f"{what} must be at least {least}, not {number}")
    if out is not None:
        check_place(Path(out), is_replacing=overwrite)
    if trace is not None:
        check_trace(Path(trace), is_replacing=overwrite)
    place = device_of(model, None if device is None else usable_device(device))
    options = Options(
        name, mode, engine, dtype, tokens, dict(settings or {}), n_layers, int(n_warmup),
        None if n_steps is None else int(n_steps), int(n_active), None if trace is None else Path(trace),
        None if out is None else Path(out), bool(energy), bool(ceilings), bool(overwrite),
    )  # fmt: skip
    return Run(profiled(model), place, optimizer, options)
