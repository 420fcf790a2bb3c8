"""What gene identifiers look like: their text, their versions, and how files spell that one is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

# What may follow a stable id: Ensembl's .12, GENCODE's lift .12_3, _PAR_Y before or after it, and the -1 by which
# AnnData tells repeated names apart.
_VERSION = r"(?:\.[0-9]+)?(?:_[0-9]+)?(?:_PAR_Y)?(?:_[0-9]+)?(?:-[0-9]+)?$"
_STABLE_ID = r"(ENS[A-Z]*[GTP][0-9]{11})"
# ENSG00000123456.12, ENSMUSG00000000001.4, ENSG00000123456.5_2, ENSG00000182378.14_PAR_Y
_VERSIONED = re.compile(_STABLE_ID + _VERSION)
# PanglaoDB's SYMBOL_ENSG00000158122.11
_SYMBOL_AND_ID = re.compile(r".*_" + _STABLE_ID + r"(?:\.[0-9]+)?(?:_[0-9]+)?$")
_ENSEMBL_GENE = re.compile(r"ENS[A-Z]*G[0-9]{6}", re.IGNORECASE)
# What pandas, R, Excel and people write where a value is missing, in lower case.
_MISSING = frozenset(("", "nan", "na", "none", "<na>", "n/a", "#n/a", "n.a.", "null", "<null>", "nil", "nat"))
_MISSING |= {"missing", "unknown", "undefined", "not available", "-", "--", ".", "?", "_"}
# The same after repeated names were told apart: nan-1 by AnnData, NA.1 by R.
_NUMBERED_MISSING = re.compile(r"(?:nan|na|none|<na>|null)[-.][0-9]+")


def id_text(values: Iterable[Any]) -> list[str]:
    """Ids as text, whatever type they have: bytes are decoded, integers and integral floats written out."""
    texts = values.tolist() if isinstance(values, np.ndarray) else list(values)
    return [text if type(text) is str else _as_text(text) for text in texts]


def _as_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def is_missing(text: str) -> bool:
    """Whether this is a way to write that a value is missing: empty, nan, NA, None, <NA>, N/A, null, - and the like."""
    text = text.strip().lower()
    return text in _MISSING or (text[:1] in ("n", "<") and _NUMBERED_MISSING.fullmatch(text) is not None)


def is_ensembl_gene(identifier: str) -> bool:
    """Whether an id holds something like an Ensembl gene id, whatever stands before or after it."""
    return _ENSEMBL_GENE.search(identifier) is not None


def without_version(identifier: str) -> str | None:
    """The upper-case Ensembl id without its version, or None where this is no Ensembl id."""
    match = _VERSIONED.match(identifier.upper())
    return None if match is None else match[1]


def embedded_id(identifier: str) -> str | None:
    """The Ensembl id of ``SYMBOL_ENSG00000158122.11``, without its version, or None where there is none."""
    match = _SYMBOL_AND_ID.match(identifier.upper())
    return None if match is None else match[1]
