"""Dictionaries that lie inside a model: in an archive of NeMo, or in the context of a NeMo 2 folder."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from geneformer_fast.errors import VocabularyError
from geneformer_fast.files.archives import opened_archive

_ARCHIVE, _CONTEXT = ".nemo", "context"
# NeMo puts a number of its own before the name of what it packs beside weights.
_BUNDLED = re.compile(
    r"(?:[0-9a-f]{4,64}_)?((?:geneformer\.vocab|vocab\.txt)|(?:medians|gene_median_dictionary\w*)\.(?:json|pkl))$"
)
_LISTS = ("geneformer.vocab", "vocab.txt")


def is_archive(place: Path) -> bool:
    """Whether a path is of an archive that dictionaries may be inside of."""
    return place.suffix == _ARCHIVE and place.is_file()


def _archive_of(place: Path) -> Path | None:
    """The archive that a path is of, or that a folder holds alone."""
    if is_archive(place):
        return place
    found = sorted(place.glob(f"*{_ARCHIVE}")) if place.is_dir() else []
    return found[0] if len(found) == 1 else None


def _bare(names: Iterator[str], where: Path) -> dict[str, str]:
    """Names without such numbers to names as they are."""
    found: dict[str, str] = {}
    for name in names:
        match = _BUNDLED.match(name.rpartition("/")[2])
        if match is None:
            continue
        if match[1] in found:
            raise VocabularyError(
                f"{where}: both {found[match[1]]} and {name} are in it; name a folder with one of them"
            )
        found[match[1]] = name
    return found


def has_dictionaries(place: Path) -> bool:
    """Whether a model has a list of its tokens, and their medians, inside."""
    context = place / _CONTEXT
    if context.is_dir():
        names = _bare((path.name for path in sorted(context.iterdir())), context)
    elif (archive := _archive_of(place)) is not None:
        with opened_archive(archive, VocabularyError) as opened:
            names = _bare(iter(opened.sizes), archive)
    else:
        return False
    return any(name in names for name in _LISTS) and len(names) > 1


@contextlib.contextmanager
def dictionaries_in(place: Path) -> Iterator[Path]:
    """A folder with the dictionaries of a place: itself, or a private copy of those that a model has inside.

    Raises
    ------
    VocabularyError
        An archive is damaged, or has several of one name.
    """
    archive, context = _archive_of(place), place / _CONTEXT
    if not has_dictionaries(place):
        if is_archive(place):
            raise VocabularyError(
                f"{place} holds no list of tokens with their medians (geneformer.vocab and medians.json); name the "
                "folder that has them"
            )
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="geneformer-fast-") as scratch:
        # The folder's name becomes part of the vocabulary's.
        folder = Path(scratch) / (place.stem or _CONTEXT)
        folder.mkdir()
        if context.is_dir():
            for bare, name in _bare((path.name for path in sorted(context.iterdir())), context).items():
                shutil.copyfile(context / name, folder / bare)
        else:
            assert archive is not None
            with opened_archive(archive, VocabularyError) as opened:
                for bare, name in _bare(iter(opened.sizes), archive).items():
                    opened.copy(name, folder / bare)
        try:
            yield folder
        except VocabularyError as reason:
            raise VocabularyError(str(reason).replace(str(folder), str(place))) from None
