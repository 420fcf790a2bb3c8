"""The vocabulary files of BioNeMo Geneformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from geneformer_fast.errors import VocabularyError
from geneformer_fast.files.schema import read_json
from geneformer_fast.tokenization.dictionaries import Contents, Release, checked_strings

FILES = ("vocab.txt", "geneformer.vocab")
_SPECIAL = {"[CLS]": "cls", "[MASK]": "mask", "[PAD]": "pad", "[SEP]": "sep", "[UKW]": "unk", "[UNK]": "unk"}
_ORDER = ("cls", "mask", "pad", "sep", "unk")


def read(path: Path, beside: Callable[[], Release]) -> Contents:
    """vocab.txt has one token per line, the line number is the id; geneformer.vocab is JSON {"gene_to_ens": ...}."""
    release = beside()
    medians = release.medians
    special: dict[str, int] = {}
    genes: dict[str, int] = {}
    symbols: dict[str, str] = {}
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise VocabularyError(f"{path}: cannot be read ({error})") from None
        for i, token in enumerate(line.strip() for line in lines):
            if token in genes or _SPECIAL.get(token) in special:
                raise VocabularyError(f"{path}: line {i + 1}: token {token!r} appears twice")
            if token in _SPECIAL:
                special[_SPECIAL[token]] = i
            elif token:
                genes[token] = i
    else:
        content = read_json(path, VocabularyError)
        symbols = checked_strings(content.get("gene_to_ens"), f"{path}: gene_to_ens")
        special = numbered()
        genes = {gene: len(special) + i for i, gene in enumerate(symbols.values())}
        if len(genes) != len(symbols):
            raise VocabularyError(f"{path}: several gene names share one Ensembl id; token ids would be ambiguous")
    return Contents(f"{path.parent.name}/{path.name}", "bionemo", genes, medians, release.aliases, symbols, special)


def derive(release: Release) -> Contents:
    """BioNeMo numbers the genes in the order of Geneformer's V1 median dictionary, after its five special tokens."""
    medians, special = release.medians, numbered()
    genes = {gene: len(special) + i for i, gene in enumerate(medians)}
    return Contents("custom-bionemo", "bionemo", genes, medians, release.aliases, release.symbols, special)


def numbered() -> dict[str, int]:
    """The special tokens and their ids."""
    return {name: i for i, name in enumerate(_ORDER)}
