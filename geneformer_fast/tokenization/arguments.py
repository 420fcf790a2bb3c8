"""What callers of the pass give: vocabularies, gene lists, paths and numbers, looked at before a file is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geneformer_fast import families
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError
from geneformer_fast.families.gene_list import GeneList
from geneformer_fast.tokenization.pipeline import default_workers
from geneformer_fast.tokenization.values import ValueGenes, make_value_genes
from geneformer_fast.tokenization.vocabulary import Vocabulary

# CLS, a gene, EOS.
_SHORTEST = 3


def made_by(
    dictionary: Any, preset: str | None, family: str | None, options: Mapping[str, Any] | None
) -> Vocabulary | ValueGenes:
    """What cells are made by: a vocabulary of ranked tokens, or the genes of a family that reads values.

    Raises
    ------
    VocabularyError
        No or no usable dictionaries.
    UnsupportedError
        No such family, or options that it does not have.
    """
    if isinstance(dictionary, ValueGenes) and family is None:
        family = dictionary.family
    if family is not None and families.family(family).preparation is not None:
        return make_value_genes(dictionary, family, options, preset)
    if options:
        raise UnsupportedError(
            "options (--option) are of families that read values; ranked tokens have arguments of their own"
        )
    return resolve_vocabulary(dictionary, preset)


def resolve_vocabulary(dictionary: Any, preset: str | None) -> Vocabulary:
    """The vocabulary given, or the one in a folder of dictionaries."""
    if isinstance(dictionary, GeneList):
        raise VocabularyError(f"these are the genes of {dictionary.family}; name it with family= (--family)")
    if isinstance(dictionary, Vocabulary):
        if preset is not None and preset != dictionary.family:
            raise VocabularyError(f"vocabulary {dictionary.name!r} is of family {dictionary.family}, not {preset}")
        return dictionary
    if dictionary is None:
        raise VocabularyError(
            "no gene dictionaries given: --dictionary FOLDER (dictionary=) names a folder with Geneformer's dictionary "
            "files, or with a vocabulary made by `geneformer-fast medians`"
        )
    return Vocabulary.from_folder(Path(dictionary), preset)


def as_paths(data: Any) -> list[str]:
    """Paths, of one or several."""
    entries = [data] if isinstance(data, str | os.PathLike) else list(data)
    for entry in entries:
        if not isinstance(entry, str | os.PathLike):
            raise InputError(f"cannot read counts from a {type(entry).__name__}; give paths, or one AnnData")
    return [os.fspath(entry) for entry in entries]


def checked_workers(workers: int | None) -> int:
    """Threads; all cores where nobody says how many."""
    if workers is None:
        return default_workers()
    if workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    return workers


def checked_max_len(max_len: int | None, vocabulary: Vocabulary | ValueGenes) -> int | None:
    """The longest cell that is asked for, where the vocabulary or family can have it."""
    if max_len is None:
        return None
    if isinstance(vocabulary, ValueGenes):
        if vocabulary.preparation.max_len is None:
            raise UnsupportedError(
                f"max_len (--max-len) shortens no cell of {vocabulary.family}, which reads all "
                f"{len(vocabulary.genes):,} genes of its list"
            )
        if max_len < 2:  # CLS and a gene
            raise InputError(f"max_len (--max-len) must be at least 2, not {max_len}")
        return int(max_len)
    if type(max_len) is not int or not _SHORTEST <= max_len <= vocabulary.max_len:
        raise InputError(
            f"max_len (--max-len) must be a whole number from {_SHORTEST} to {vocabulary.max_len:,}, the length of "
            f"vocabulary {vocabulary.name!r}, not {max_len!r}"
        )
    return max_len
