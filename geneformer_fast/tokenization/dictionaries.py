"""Finds and reads the dictionary files of a folder: Geneformer's, or those that a family lists its tokens in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from geneformer_fast import families
from geneformer_fast.errors import VocabularyError
from geneformer_fast.families.family import TokenLayout
from geneformer_fast.files.schema import read_json
from geneformer_fast.tokenization.pickles import read_pickle

SAVED_FILE = "vocabulary.json"

_FILE = re.compile(
    r"(?P<kind>token_dictionary|gene_median_dictionary|ensembl_mapping_dict|gene_name_id_dict|medians)"
    r"(?:_(?P<release>[A-Za-z0-9]+))?\.(?:pkl|pickle|json)$"
)
# Geneformer's package keeps the V1 dictionaries in this subfolder.
_SUBFOLDERS = ("", "gene_dictionaries_30m")
_BRACKETED = re.compile(r"<(\w+)>$|\[(\w+)\]$")


@dataclass(frozen=True)
class Contents:
    """What the files of a folder say of a vocabulary; attributes as those of :class:`geneformer_fast.Vocabulary`."""

    name: str
    family: str
    token_ids: dict[str, int]
    medians: dict[str, float]
    aliases: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, str] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)


@dataclass
class Release:
    """The dictionary files that share one folder and one suffix (gc30M, gc95M, ... or none)."""

    label: str
    files: dict[str, Path] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)

    def read(self, kind: str) -> Any:
        """A dictionary as its file has it, empty where there is none."""
        if kind not in self.content:
            self.content[kind] = _read_mapping(self.files[kind]) if kind in self.files else {}
        return self.content[kind]

    @property
    def medians(self) -> dict[str, float]:
        """Gene to median."""
        kind = "gene_median_dictionary"
        return checked_numbers(self.read(kind), float, self._where(kind))

    @property
    def aliases(self) -> dict[str, str]:
        """Symbol or other id to gene."""
        return checked_strings(self.read("ensembl_mapping_dict"), self._where("ensembl_mapping_dict"))

    @property
    def symbols(self) -> dict[str, str]:
        """Gene name to gene."""
        return checked_strings(self.read("gene_name_id_dict"), self._where("gene_name_id_dict"))

    @property
    def special(self) -> set[str]:
        """Special tokens that the token dictionary has beside genes."""
        found = (_BRACKETED.match(str(key)) for key in self.read("token_dictionary"))
        return {match[1] or match[2] for match in found if match}

    @property
    def family(self) -> str:
        """The layout of its tokens, told by the special ones."""
        special, known = self.special, _of_dictionaries()
        exact = [name for name, layout in known.items() if special == set(layout.special)]
        return next(iter([*exact, *(name for name, layout in known.items() if self.fits(layout))]), next(iter(known)))

    def fits(self, layout: TokenLayout) -> bool:
        """Whether its tokens may be of a layout: both have a token before the genes, or none."""
        return layout.read is None and ("cls" in layout.special) == ("cls" in self.special)

    def _where(self, kind: str) -> str:
        return str(self.files.get(kind, kind))


def _of_dictionaries() -> dict[str, TokenLayout]:
    """Layouts whose tokens come in Geneformer's dictionaries."""
    return {name: layout for name, layout in families.layouts().items() if layout.read is None}


def read_contents(folder: Path, preset: str | None) -> Contents:
    """What the dictionaries of ``folder`` say; see ``Vocabulary.from_folder``."""
    releases = _find_releases(folder)
    has_dictionaries = any("token_dictionary" in release.files for release in releases)
    for family, layout in families.layouts().items():
        listed = next((folder / name for name in layout.files if (folder / name).is_file()), None)
        if layout.read is None or preset not in (None, family):
            continue
        if listed is not None and preset is None and has_dictionaries:
            title = families.layout_family(family).title
            raise VocabularyError(
                f"{folder}: holds {listed.name} of {title} and Geneformer's dictionaries; pass preset (--preset)"
            )
        if listed is not None:
            return layout.read(listed, partial(_find_medians, folder, listed, releases))
        if preset == family and layout.derive is not None and layout.derived_from is not None:
            return layout.derive(_choose(folder, releases, layout.derived_from))
    return _from_release(_choose(folder, releases, preset), preset)


def checked_numbers(content: Any, kind: type, where: str) -> dict[str, Any]:
    """A dict of str to `kind` (int or float), or VocabularyError naming the first entry that is not."""
    checked = _as_dict(content, where)
    for key, value in checked.items():
        # Whole numbers of any length are JSON; none of these can be meant.
        is_whole = type(value) is int and abs(value) < 2**63
        number = is_whole or (kind is float and type(value) is float)
        if type(key) is not str or not number:
            raise VocabularyError(f"{where}: entry {_short(key)}: {_short(value)} is not a string and {_NUMBER[kind]}")
    return {key: kind(value) for key, value in checked.items()} if kind is float else checked


def checked_strings(content: Any, where: str) -> dict[str, str]:
    """A dict of str to str, or VocabularyError naming the first entry that is not."""
    checked = _as_dict(content, where)
    for key, value in checked.items():
        if type(key) is not str or type(value) is not str:
            raise VocabularyError(f"{where}: entry {_short(key)}: {_short(value)} is not a pair of strings")
    return checked


def _short(value: Any) -> str:
    if type(value) is int and value.bit_length() > 200:  # too long for Python to write out
        return "a number of very many digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_NUMBER = {int: "an integer", float: "a number"}


def _as_dict(content: Any, where: str) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise VocabularyError(f"{where}: holds a {type(content).__name__}, expected a dictionary")
    return content


def _read_mapping(path: Path) -> dict[Any, Any]:
    return _as_dict(read_json(path, VocabularyError) if path.suffix == ".json" else read_pickle(path), str(path))


def _find_releases(folder: Path) -> list[Release]:
    """Group the dictionary files by folder and suffix; a single token file takes whatever lies beside it."""
    releases: list[Release] = []
    for subfolder in _SUBFOLDERS:
        here = folder / subfolder
        if not here.is_dir():
            continue
        groups: dict[str, Release] = {}
        for path in sorted(here.iterdir()):
            match = _FILE.match(path.name)
            if match is None or not path.is_file():
                continue
            kind = "gene_median_dictionary" if match["kind"] == "medians" else match["kind"]
            release = groups.setdefault(match["release"] or "", Release(match["release"] or ""))
            if kind in release.files:
                raise VocabularyError(f"{path}: both {release.files[kind].name} and {path.name} are here; keep one")
            release.files[kind] = path
        releases += _merge_single(groups)
    return releases


def _merge_single(groups: dict[str, Release]) -> list[Release]:
    tokens = [release for release in groups.values() if "token_dictionary" in release.files]
    if len(tokens) != 1:
        return list(groups.values())
    only = tokens[0]
    for release in groups.values():
        for kind, path in release.files.items():
            only.files.setdefault(kind, path)
    return [only]


def _choose(folder: Path, releases: list[Release], family: str | None) -> Release:
    complete = [r for r in releases if {"token_dictionary", "gene_median_dictionary"} <= r.files.keys()]
    if not complete:
        found = sorted(path.name for r in releases for path in r.files.values())
        raise VocabularyError(
            f"{folder}: no vocabulary here. Expected token_dictionary*.pkl and gene_median_dictionary*.pkl "
            f"(Geneformer), {''.join(_listed())}or {SAVED_FILE}; found {', '.join(found) or 'none of them'}"
        )
    wanted = None if family is None else families.layout(family)
    matching = [r for r in complete if wanted is None or r.fits(wanted)]
    if not matching:
        raise VocabularyError(
            f"{folder}: preset {family!r} was asked for, but the folder holds only "
            + ", ".join(f"{r.files['token_dictionary'].name} ({r.family})" for r in complete)
        )
    first = matching[0]
    kinds = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict")
    if any(r.read(kind) != first.read(kind) for r in matching[1:] for kind in kinds):
        listed = ", ".join(f"{r.files['token_dictionary'].name} ({r.family})" for r in matching)
        told = sorted({r.family for r in matching})
        choice = f"pass preset (--preset) {' or '.join(told)}"
        advice = choice if len(told) > 1 else "keep one of them in the folder"
        raise VocabularyError(f"{folder}: several vocabularies: {listed}; {advice}")
    return first


def _listed() -> Iterator[str]:
    """Files besides Geneformer's in which families list their tokens, each with a comma."""
    for family, layout in families.layouts().items():
        if layout.files:
            yield f"{layout.files[0]} ({families.layout_family(family).title}), "


def _from_release(release: Release, preset: str | None) -> Contents:
    path = release.files["token_dictionary"]
    tokens = checked_numbers(release.read("token_dictionary"), int, str(path))
    special: dict[str, int] = {}
    genes: dict[str, int] = {}
    for key, value in tokens.items():
        match = _BRACKETED.match(key)
        if match is None:
            genes[key] = value
        else:
            special[match[1] or match[2]] = value
    name = f"{path.parent.name}/{path.stem}"
    family = preset or release.family
    return Contents(name, family, genes, release.medians, release.aliases, release.symbols, special)


def _find_medians(folder: Path, listed: Path, releases: list[Release]) -> Release:
    holding = [r for r in releases if "gene_median_dictionary" in r.files]
    if len(holding) != 1:
        found = ", ".join(str(r.files["gene_median_dictionary"].name) for r in holding) or "none"
        raise VocabularyError(
            f"{folder}: {listed.name} needs one file with medians beside it (medians.json or "
            f"gene_median_dictionary*.pkl); found {found}"
        )
    return holding[0]
