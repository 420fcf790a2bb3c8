"""Which files are scBERT's, by the names of tensors in them: nothing is executed, and no tensor read."""

from __future__ import annotations

import zipfile
from pathlib import Path

#: Names that such files have.
ENDINGS = (".pth", ".pt", ".ckpt", ".bin")
_CONFIG = "config.json"
# Nobody but a Performer has names like this. Not a whole name: loading says which tensor is missing.
_SIGN = b"performer.net.layers."
#: Largest list of names that is looked through: scBERT's own takes 20 kB, with an optimizer's state 100.
_MOST_BYTES = 64 << 20


def files_in(place: Path) -> list[Path]:
    """A file itself, or those of a folder, that are of scBERT; of a folder with a ``config.json`` none."""
    if place.is_file():
        return [place] if _is_performer(place) else []
    if not place.is_dir() or (place / _CONFIG).exists():
        return []
    return [path for path in sorted(place.iterdir()) if path.is_file() and _is_performer(path)]


def _is_performer(path: Path) -> bool:
    """Whether the names in a file of ``torch.save`` are a Performer's."""
    if path.suffix not in ENDINGS or path.name.startswith("."):
        return False
    try:
        if not zipfile.is_zipfile(path):  # as torch wrote before 1.6: names before numbers
            with open(path, "rb") as file:
                return _SIGN in file.read(_MOST_BYTES)
        with zipfile.ZipFile(path) as archive:
            lists = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            return any(_SIGN in archive.read(info) for info in lists if info.file_size <= _MOST_BYTES)
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError):
        return False
