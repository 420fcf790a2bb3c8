"""Whether a folder holds a model at all."""

from __future__ import annotations

import json
from pathlib import Path

from geneformer_fast.errors import CheckpointError

CONFIG, ADAPTER = "config.json", "adapter_config.json"


def n_layers_in(folder: Path) -> int | None:
    """What a ``config.json`` says of the number of blocks; None where it says none, which whoever loads it says."""
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        found = said["encoder"]["n_layers"] if "encoder" in said else said["num_hidden_layers"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def check_present(folder: Path) -> None:
    """Refuse a folder without a ``config.json``.

    Raises
    ------
    CheckpointError
        It is no folder, has no such file, or holds a PEFT adapter alone.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; pass a local checkpoint folder with config.json and model.safetensors "
            "(download one first, for example with the huggingface_hub command line)"
        )
    if not (folder / CONFIG).exists():
        if (folder / ADAPTER).exists():
            raise CheckpointError(
                f"{folder} holds a PEFT adapter and no model; merge it into its base model (merge_and_unload) and save"
            )
        raise CheckpointError(f"{folder} has no {CONFIG}")
