"""Finds and reads the dictionary files of a vocabulary folder: Geneformer's, BioNeMo's, or our own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geneformer_fast.errors import OutputError, VocabularyError
from geneformer_fast.files.checksums import DIGEST, VERIFY, check_digest
from geneformer_fast.files.schema import read_json
from geneformer_fast.tokenization.pickles import read_pickle
from geneformer_fast.tokenization.vocabulary import SAVED_FILE, Vocabulary, layout_named

_FILE = re.compile(
    r"(?P<kind>token_dictionary|gene_median_dictionary|ensembl_mapping_dict|gene_name_id_dict|medians)"
    r"(?:_(?P<release>[A-Za-z0-9]+))?\.(?:pkl|pickle|json)$"
)
_CHANGED = f"restore it, or if it was changed on purpose remove its field {DIGEST} (or set {VERIFY}=0)"
_BIONEMO_FILES = ("vocab.txt", "geneformer.vocab")
# Geneformer's package keeps the V1 dictionaries in this subfolder.
_SUBFOLDERS = ("", "gene_dictionaries_30m")
_BRACKETED = re.compile(r"<(\w+)>$|\[(\w+)\]$")
_BIONEMO_SPECIAL = {"[CLS]": "cls", "[MASK]": "mask", "[PAD]": "pad", "[SEP]": "sep", "[UKW]": "unk", "[UNK]": "unk"}


@dataclass
class _Release:
    """The dictionary files that share one folder and one suffix (gc30M, gc95M, ... or none)."""

    label: str
    files: dict[str, Path] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)

    def read(self, kind: str) -> Any:
        if kind not in self.content:
            self.content[kind] = _read_mapping(self.files[kind]) if kind in self.files else {}
        return self.content[kind]

    @property
    def family(self) -> str:
        return "v2" if "<cls>" in self.read("token_dictionary") else "v1"


def check_vocabulary_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder in which no vocabulary may be saved."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is no folder; name another one")
    if (folder / SAVED_FILE).exists() and not overwrite:
        raise OutputError(f"{folder} holds a vocabulary already; name another folder or pass --overwrite")


def read_folder(folder: Path, preset: str | None) -> Vocabulary:
    """Read the vocabulary of `folder`; see `Vocabulary.from_folder`."""
    if preset is not None:
        layout_named(preset, what="preset")
    if not folder.is_dir():
        raise VocabularyError(f"{folder}: no such folder; give the folder that holds the gene dictionaries")
    saved = folder / SAVED_FILE
    if saved.is_file():
        content = read_json(saved, VocabularyError)
        vocabulary = Vocabulary.from_dict(content, where=str(saved))
        check_digest(content, saved, VocabularyError, _CHANGED)
        if preset is not None and vocabulary.family != preset:
            raise VocabularyError(
                f"{folder}: preset {preset!r} was asked for, but this is {vocabulary.name!r} of family "
                f"{vocabulary.family!r}; use --preset {vocabulary.family}"
            )
        return vocabulary
    bionemo = next((folder / name for name in _BIONEMO_FILES if (folder / name).is_file()), None)
    releases = _find_releases(folder)
    has_geneformer = any("token_dictionary" in release.files for release in releases)
    if bionemo is not None and (preset == "bionemo" or (preset is None and not has_geneformer)):
        return _read_bionemo(bionemo, _find_medians(folder, releases))
    if bionemo is not None and preset is None:
        raise VocabularyError(
            f"{folder}: holds BioNeMo's {bionemo.name} and Geneformer's dictionaries; pass preset (--preset)"
        )
    if preset == "bionemo":
        return _bionemo_from_v1(_choose(folder, releases, "v1"))
    return _from_release(_choose(folder, releases, preset))


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


def _find_releases(folder: Path) -> list[_Release]:
    """Group the dictionary files by folder and suffix; a single token file takes whatever lies beside it."""
    releases: list[_Release] = []
    for subfolder in _SUBFOLDERS:
        here = folder / subfolder
        if not here.is_dir():
            continue
        groups: dict[str, _Release] = {}
        for path in sorted(here.iterdir()):
            match = _FILE.match(path.name)
            if match is None or not path.is_file():
                continue
            kind = "gene_median_dictionary" if match["kind"] == "medians" else match["kind"]
            release = groups.setdefault(match["release"] or "", _Release(match["release"] or ""))
            if kind in release.files:
                raise VocabularyError(f"{path}: both {release.files[kind].name} and {path.name} are here; keep one")
            release.files[kind] = path
        releases += _merge_single(groups)
    return releases


def _merge_single(groups: dict[str, _Release]) -> list[_Release]:
    tokens = [release for release in groups.values() if "token_dictionary" in release.files]
    if len(tokens) != 1:
        return list(groups.values())
    only = tokens[0]
    for release in groups.values():
        for kind, path in release.files.items():
            only.files.setdefault(kind, path)
    return [only]


def _choose(folder: Path, releases: list[_Release], family: str | None) -> _Release:
    complete = [r for r in releases if {"token_dictionary", "gene_median_dictionary"} <= r.files.keys()]
    if not complete:
        found = sorted(path.name for r in releases for path in r.files.values())
        raise VocabularyError(
            f"{folder}: no vocabulary here. Expected token_dictionary*.pkl and gene_median_dictionary*.pkl "
            f"(Geneformer), vocab.txt (BioNeMo) or {SAVED_FILE}; found {', '.join(found) or 'none of them'}"
        )
    matching = [r for r in complete if family is None or r.family == family]
    if not matching:
        raise VocabularyError(
            f"{folder}: preset {family!r} was asked for, but the folder holds only "
            + ", ".join(f"{r.files['token_dictionary'].name} ({r.family})" for r in complete)
        )
    first = matching[0]
    kinds = ("token_dictionary", "gene_median_dictionary", "ensembl_mapping_dict")
    if any(r.read(kind) != first.read(kind) for r in matching[1:] for kind in kinds):
        listed = ", ".join(f"{r.files['token_dictionary'].name} ({r.family})" for r in matching)
        families = sorted({r.family for r in matching})
        choice = f"pass preset (--preset) {' or '.join(families)}"
        advice = choice if len(families) > 1 else "keep one of them in the folder"
        raise VocabularyError(f"{folder}: several vocabularies: {listed}; {advice}")
    return first


def _from_release(release: _Release) -> Vocabulary:
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
    family = release.family
    medians = _release_medians(release)
    name = f"{path.parent.name}/{path.stem}"
    aliases = checked_strings(release.read("ensembl_mapping_dict"), _where(release, "ensembl_mapping_dict"))
    symbols = checked_strings(release.read("gene_name_id_dict"), _where(release, "gene_name_id_dict"))
    return Vocabulary(name, family, genes, medians, aliases, symbols, special).under_public_name()


def _where(release: _Release, kind: str) -> str:
    return str(release.files.get(kind, kind))


def _release_medians(release: _Release) -> dict[str, float]:
    kind = "gene_median_dictionary"
    return checked_numbers(release.read(kind), float, _where(release, kind))


def _bionemo_from_v1(release: _Release) -> Vocabulary:
    """BioNeMo numbers the genes in the order of Geneformer's V1 median dictionary, after its five special tokens."""
    medians = _release_medians(release)
    special = dict(layout_named("bionemo").special)
    genes = {gene: len(special) + i for i, gene in enumerate(medians)}
    aliases = checked_strings(release.read("ensembl_mapping_dict"), _where(release, "ensembl_mapping_dict"))
    symbols = checked_strings(release.read("gene_name_id_dict"), _where(release, "gene_name_id_dict"))
    return Vocabulary("custom-bionemo", "bionemo", genes, medians, aliases, symbols, special).under_public_name()


def _find_medians(folder: Path, releases: list[_Release]) -> _Release:
    holding = [r for r in releases if "gene_median_dictionary" in r.files]
    if len(holding) != 1:
        found = ", ".join(str(r.files["gene_median_dictionary"].name) for r in holding) or "none"
        raise VocabularyError(
            f"{folder}: BioNeMo's vocabulary needs one file with medians beside it (medians.json or "
            f"gene_median_dictionary*.pkl); found {found}"
        )
    return holding[0]


def _read_bionemo(path: Path, release: _Release) -> Vocabulary:
    """vocab.txt has one token per line, the line number is the id; geneformer.vocab is JSON {"gene_to_ens": ...}."""
    medians = _release_medians(release)
    special: dict[str, int] = {}
    genes: dict[str, int] = {}
    symbols: dict[str, str] = {}
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise VocabularyError(f"{path}: cannot be read ({error})") from None
        for i, token in enumerate(line.strip() for line in lines):
            if token in genes or _BIONEMO_SPECIAL.get(token) in special:
                raise VocabularyError(f"{path}: line {i + 1}: token {token!r} appears twice")
            if token in _BIONEMO_SPECIAL:
                special[_BIONEMO_SPECIAL[token]] = i
            elif token:
                genes[token] = i
    else:
        content = read_json(path, VocabularyError)
        symbols = checked_strings(content.get("gene_to_ens"), f"{path}: gene_to_ens")
        special = dict(layout_named("bionemo").special)
        genes = {gene: len(special) + i for i, gene in enumerate(symbols.values())}
        if len(genes) != len(symbols):
            raise VocabularyError(f"{path}: several gene names share one Ensembl id; token ids would be ambiguous")
    aliases = checked_strings(release.read("ensembl_mapping_dict"), _where(release, "ensembl_mapping_dict"))
    name = f"{path.parent.name}/{path.name}"
    return Vocabulary(name, "bionemo", genes, medians, aliases, symbols, special).under_public_name()
