"""Profiling within transformers' Trainer."""

from __future__ import annotations

import contextlib
import os
import warnings
from pathlib import Path
from typing import Any

from geneformer_fast.arguments import checked
from geneformer_fast.errors import OutputError, ProfileError, UnsupportedError

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError as error:
    raise UnsupportedError(
        "profiling transformers' Trainer needs transformers: pip install 'geneformer-fast[hf]'"
    ) from error

from geneformer_fast.profiling.loop.writing import check_place
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.run import Run, profile


class ProfilerCallback(TrainerCallback):
    """Measures the training of Hugging Face's ``Trainer``: ``Trainer(..., callbacks=[ProfilerCallback("out")])``.

    Models may be stock or accelerated (:func:`geneformer_fast.accelerate`). Cells are read from what the model is
    called with; evaluations and the saving of checkpoints are left out. Under several processes each measures its own
    part, and the first one writes.

    Parameters
    ----------
    out
        Where the report goes: a ``.json``, an ``.html``, or a folder for both. None: nowhere, see :attr:`report`.
    n_warmup, n_steps, n_active, trace, energy, ceilings, name, tokens, settings, overwrite
        As in :func:`geneformer_fast.profile`.

    Raises
    ------
    OutputError
        The report cannot go there, or one is there already; said before the training, and not after it.

    Notes
    -----
    A training that is too short to be measured ends as it would have, with a warning.
    """

    #: The one whose training goes on, or has ended with an error: nobody tells callbacks of that.
    _open: ProfilerCallback | None = None

    @checked
    def __init__(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        n_warmup: int = 3,
        n_steps: int | None = None,
        n_active: int = 2,
        trace: str | os.PathLike[str] | None = None,
        energy: bool = True,
        ceilings: bool = True,
        name: str | None = None,
        tokens: str = "",
        settings: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if out is not None:
            check_place(Path(out), is_replacing=overwrite)
        self._out = out
        self._options: dict[str, Any] = {
            "n_warmup": n_warmup, "n_steps": n_steps, "n_active": n_active, "trace": trace, "energy": energy,
            "ceilings": ceilings, "name": name, "tokens": tokens, "overwrite": overwrite,
        }  # fmt: skip
        self._settings = dict(settings or {})
        self._run: Run | None = None
        self._pause: contextlib.ExitStack | None = None

    @property
    def report(self) -> Report:
        """What it came to, once the training is over.

        Raises
        ------
        ProfileError
            It has not begun, still goes on, or was too short.
        """
        if self._run is None:
            raise ProfileError("the training has not begun")
        return self._run.report

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Enter the run; what runs before the first step (an evaluation) is left out."""
        if ProfilerCallback._open is not None:
            ProfilerCallback._open._break_off()
        settings = {
            "batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "workers": args.dataloader_num_workers,
            **self._settings,
        }
        # accelerate turns autocast on within the model's forward pass, where nobody sees it from outside.
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
        out = self._out if state.is_world_process_zero else None
        self._run = profile(model, mode="train", out=out, dtype=dtype, settings=settings, **self._options)
        self._run.__enter__()
        ProfilerCallback._open = self
        self._pause_run()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on after an evaluation."""
        self._resume()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        run = self._run
        if run is None or not run.is_running:
            return
        run.step()
        if control.should_evaluate or control.should_save:
            self._pause_run()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the run, and write its report."""
        self._resume()
        ProfilerCallback._open = None
        if self._run is None or not self._run.is_running:
            return
        try:
            self._run.__exit__(None, None, None)
        except (ProfileError, OutputError) as fault:
            warnings.warn(f"the training is not in a report: {fault}", stacklevel=2)

    def _pause_run(self) -> None:
        assert self._run is not None
        self._pause = contextlib.ExitStack()
        self._pause.enter_context(self._run.paused())

    def _break_off(self) -> None:
        """The training has ended with an error."""
        ProfilerCallback._open = None
        self._resume()
        if self._run is not None and self._run.is_running:
            self._run.__exit__(RuntimeError, RuntimeError("the training was broken off"), None)

    def _resume(self) -> None:
        pause, self._pause = self._pause, None
        if pause is not None:
            pause.close()
