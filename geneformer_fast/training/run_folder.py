"""The folder of a run: what it is a run of, its checkpoints, its best weights.

``run.json``
    What a run must agree with to be continued.
``log.jsonl``, ``tensorboard/``
    What it said.
``checkpoints/step-00001000/``
    Where it can be continued.
``best-00001000.safetensors``
    Weights of the best evaluation, where the recipe asks for them.

Hidden files are no content: what a killed process left of a file, a lock, what a file manager puts there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from geneformer_fast.errors import OutputError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import remove_leftovers, write_json
from geneformer_fast.training.checkpoint import checkpoints_in
from geneformer_fast.training.distributed import Ranks
from geneformer_fast.training.identity import check_same
from geneformer_fast.training.occupied import RESUME, RUN, check_is_no_file, check_run_folder

_locked: ContextVar[tuple[Path, ...]] = ContextVar("_locked", default=())


@contextlib.contextmanager
def writing_alone(folder: Path | None, ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Nobody else trains into this folder meanwhile.

    The first process has the lock for all that torchrun started, and the outermost block for those within.

    Raises
    ------
    OutputError
        Another run is being made there; in every process.
    """
    if folder is None or folder.absolute() in _locked.get():
        yield
        return
    check_is_no_file(folder)
    with contextlib.ExitStack() as stack:
        refusal: OutputError | None = None
        if ranks.is_first:
            try:
                stack.enter_context(folder_lock(folder))
            except OutputError as error:
                refusal = error
        if ranks.first(float(refusal is not None), device):
            raise refusal or OutputError(f"{folder} cannot be written, as the first process says")
        token = _locked.set((*_locked.get(), folder.absolute()))
        try:
            yield
        finally:
            _locked.reset(token)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs, also of earlier versions, left of unfinished files in a folder that is locked."""
    remove_leftovers(folder)
    for pattern in (".*.partial", ".*.json.tmp"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class RunFolder:
    """The folder of a run, which :func:`writing_alone` has locked.

    Parameters
    ----------
    path
        Made if absent.
    identity
        From :func:`identity_of_run`.
    is_resuming
        Whether a run in the folder is to be continued.
    ranks
        Of this process; the first one writes.

    Attributes
    ----------
    last
        The checkpoint to continue from, or None.

    Raises
    ------
    OutputError
        The folder holds another run, or one that was not to be continued, or files of something else.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, is_resuming: bool, ranks: Ranks) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        check_run_folder(path, is_resuming=is_resuming)
        if (path / RUN).exists():
            check_same(path, read_json(path / RUN, OutputError), identity, what="run")
        ranks.barrier()  # everybody has looked before anybody writes
        if ranks.is_first:
            for folder in (path, self.checkpoints):
                remove_unfinished(folder)
            write_json(path / RUN, identity)
        ranks.barrier()
        self.last = next(reversed(checkpoints_in(self.checkpoints)), None)

    def weights_of(self, evaluation: Mapping[str, float] | None) -> Path:
        """The file with the weights of an evaluation. It goes by the step, since a checkpoint may be older than it."""
        assert evaluation is not None
        return self.path / f"best-{int(evaluation['step']):08d}.safetensors"

    def forget_all_but(self, best: Mapping[str, float] | None) -> None:
        """Remove weights of evaluations that the last checkpoint does not call the best."""
        for path in self.path.glob("best-*.safetensors"):
            if best is None or path != self.weights_of(best):
                path.unlink()


def interrupted_message(folder: Path) -> str:
    """What to say when a run is interrupted: how far it is, and how to go on."""
    there = checkpoints_in(folder / "checkpoints")
    if not (folder / RUN).exists():
        return "nothing was written yet; run the same command again"
    kept = f"the last checkpoint is of step {int(there[-1].name[5:]):,}" if there else "there is no checkpoint yet"
    return f"{kept}, in {folder}; run the same command with {RESUME} to go on"
