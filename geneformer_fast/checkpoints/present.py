"""Whether a folder holds a model at all."""

from __future__ import annotations

from pathlib import Path

from geneformer_fast.errors import CheckpointError

CONFIG, ADAPTER = "config.json", "adapter_config.json"


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
