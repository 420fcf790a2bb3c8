"""SHA-256 of files and tensors: what was written is what is read, and a run goes on with what it began with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geneformer_fast.errors import GeneformerFastError
from geneformer_fast.files.writing import whole_file

if TYPE_CHECKING:
    import torch

#: Checksums of the files of a folder, as ``sha256sum -c SHA256SUMS`` reads them.
SUMS = "SHA256SUMS"
_BLOCK = 1 << 20


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as hex; other threads run meanwhile."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Put the checksums of some files of a folder into its ``SHA256SUMS``, in place of what it said before."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in sorted(names)]
    with whole_file(folder / SUMS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path, error: type[GeneformerFastError]) -> dict[str, str]:
    """File name to SHA-256 from a folder's ``SHA256SUMS``; empty where there is none.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``: the file is no list of checksums.
    """
    path = folder / SUMS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path} cannot be read ({reason}); remove it to go without checksums") from None
    sums = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        name = name.removeprefix("*")
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or not name or Path(name).name != name:
            raise error(f"{path} holds a line that is no checksum and file name; remove it to go without checksums")
        sums[name] = digest
    return sums


def check_file(path: Path, expected: str, error: type[GeneformerFastError], advice: str) -> None:
    """Compare a file with its checksum.

    Raises
    ------
    GeneformerFastError
        Of the class ``error``, with ``advice``: the file changed after it was written.
    """
    found = sha256_of(path)
    if found != expected:
        raise error(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., but it was written with {expected[:12]}...; {advice}"
        )


def fingerprint_of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, whatever file they come from and in whatever order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(flat.data)
    return digest.hexdigest()
