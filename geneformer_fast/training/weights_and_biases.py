"""What a run says to Weights & Biases, beside its own log."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.files.schema import read_json
from geneformer_fast.files.writing import write_json

#: Which run of Weights & Biases a folder's run is; it goes on with the same one.
RUN_ID = "wandb.json"


class WeightsAndBiases:
    """A run of Weights & Biases: scalars under ``train/`` and ``evaluation/``, by step; the recipe as its config.

    What the library needs to know besides (who logs in, offline or not, where its files go) it takes from the
    environment, as ever.

    Parameters
    ----------
    folder
        Of the run; its path is the name there.
    project
        Of Weights & Biases.
    config
        What decides the run, in plain values.

    Raises
    ------
    UnsupportedError
        The library is not installed, or does not begin a run.
    """

    is_active = True

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        wandb = library()
        path = folder / RUN_ID
        known = read_json(path, OutputError) if path.exists() else {}
        # Of another project it is another run.
        number = known.get("id") if known.get("project") == project else None
        if number is None:
            number = uuid.uuid4().hex[:12]
            write_json(path, {"project": project, "id": number})
        try:
            self._run = wandb.init(project=project, id=number, resume="allow", name=str(folder), config=dict(config))
        except wandb.errors.Error as error:
            raise UnsupportedError(
                f"Weights & Biases does not begin a run ({error}): log in with its command, wandb login, or set "
                "WANDB_MODE=offline, or leave it off"
            ) from None

    def step(self, values: Mapping[str, Any]) -> None:
        """Scalars under ``train/``; of steps that are made again it keeps the first."""
        self._add("train", values)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """Scalars under ``evaluation/``."""
        self._add("evaluation", values)

    def _add(self, group: str, values: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in values.items() if name != "step" and isinstance(value, int | float)}
        self._run.log({f"{group}/{name}": value for name, value in numbers.items()}, step=values["step"])

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def library() -> Any:
    """The library.

    Raises
    ------
    UnsupportedError
        It is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UnsupportedError(
            "Weights & Biases is not installed here: pip install 'geneformer-fast[wandb]', or leave it off (--wandb)"
        ) from None
    return wandb
