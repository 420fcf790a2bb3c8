"""What a file is that is not what its name says: an unfetched download, a web page, a file of another program."""

from __future__ import annotations

import os

# How files of other kinds begin, what that is, and what to do.
_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of git-lfs and not the file itself; run `git lfs pull` where it lies"),
    (b"<!doctype html", "a web page and no data, as sites send it in place of a download; download the file again"),
    (b"<html", "a web page and no data, as sites send it in place of a download; download the file again"),
    (b"GGUF", "a GGUF file of llama.cpp; take the same model's safetensors"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes it; name it pytorch_model.bin"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as TensorFlow writes weights; take the same model's safetensors"),
    (b"\x80\x02", "a pickle, as torch.save once wrote it; name it pytorch_model.bin"),
)
_N_BYTES = 64


def foreign_kind(path: str | os.PathLike[str]) -> str | None:
    """What a file shows itself to be by its first bytes, and what to do about it; None where they say nothing.

    Only for a file that could not be read as what it should be, or in front of reading it.
    """
    try:
        with open(path, "rb") as file:
            beginning = file.read(_N_BYTES)
    except OSError:
        return None
    if not beginning:
        return "empty (0 bytes), as a download leaves it that did not begin; download or copy it again"
    lowered = beginning.lstrip().lower()
    for known, what in _BEGINNINGS:
        if beginning.startswith(known) or lowered.startswith(known):
            return what
    return None
