"""Files of tensors, read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from geneformer_fast.errors import GeneformerFastError
from geneformer_fast.files.checksums import check_file
from geneformer_fast.files.foreign import foreign_kind

if TYPE_CHECKING:
    import torch


def read_tensors(
    path: Path, error: type[GeneformerFastError], advice: str, *, sha256: str | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name.

    Parameters
    ----------
    path
        The file.
    error, advice
        What to raise, and what to say at its end, where the file is damaged.
    sha256
        What the file's checksum must be; None compares nothing.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: the file is absent, damaged, or something else than safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if sha256 is not None:
            check_file(path, sha256, error, advice)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as reason:
        raise not_readable(path, reason, error, advice) from None


def not_readable(path: Path, reason: Exception, error: type[GeneformerFastError], advice: str) -> GeneformerFastError:
    """An error of the class ``error``: the file is something else, or damaged."""
    if (what := foreign_kind(path)) is not None:
        return error(f"{path} is {what}")
    return error(f"{path} cannot be read ({_first_line(reason)}); {advice}")


def metadata_of(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; empty where that is nothing."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
