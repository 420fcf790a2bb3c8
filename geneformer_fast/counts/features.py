"""Which features of a matrix are gene expression: antibodies, guides and peaks have names of genes, but are none."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np

from geneformer_fast.counts.block import CountMatrix
from geneformer_fast.counts.columns import ColumnSubset
from geneformer_fast.counts.identifiers import is_missing
from geneformer_fast.counts.table import Table, as_text
from geneformer_fast.errors import InputError

GENE_EXPRESSION = "Gene Expression"
#: What features without a type are called in reports.
UNTYPED = "no type"
_MOST_SHOWN = 5

# Names of columns as letters and digits: feature_types, feature_type, feature-type, and the feature_types-0 of joined
# tables; then names that may mean something else, and are believed only where a value says gene expression.
_TYPE_COLUMN = re.compile(r"features?types?[0-9]*")
_MAYBE_TYPE_COLUMN = re.compile(r"modalit(?:y|ies)|types?|librarytypes?|assays?")
# Values as letters and digits. CELLxGENE's feature_type holds biotypes (protein_coding), which say nothing of the kind.
_EXPRESSION = frozenset({"geneexpression", "gex"})
_EXPRESSION_AMONG_OTHERS = frozenset({"gene", "genes", "rna", "mrna"})
_OTHER_TYPES = frozenset(("antibodycapture", "antibody", "antibodies", "adt", "hto", "abseq", "protein", "proteins"))
_OTHER_TYPES |= {"proteinexpression", "antigencapture", "multiplexingcapture", "crisprguidecapture", "crispr"}
_OTHER_TYPES |= {"custom", "peak", "peaks", "atac", "chromatinaccessibility", "prot", "citeseq", "antibodyderivedtag"}
_OTHER_TYPES |= {"hashtag", "hashtags", "hashtagoligo", "guide", "guides", "grna", "sgrna", "crisprguide"}


def gene_expression(
    name: str, matrix: CountMatrix, var: Table, *, is_typed: bool = False
) -> tuple[CountMatrix, Table, dict[str, int]]:
    """Keep the features that are gene expression, where a column of var says what they are.

    Parameters
    ----------
    name
        File, for errors.
    matrix
        Cells x features.
    var
        A row per feature.
    is_typed
        Whether the format says that a column feature_types holds types, whatever they are (10x).

    Returns
    -------
    matrix, var, left_out
        What is kept, and how many features of each other type are not.

    Raises
    ------
    InputError
        No feature is gene expression, or most have no type.
    """
    types = _types(var)
    is_gene = None if types is None else is_expression(types)
    if types is None or is_gene is None or not len(types):
        if types is not None and (shown := _foreign(types, is_typed=is_typed)):
            raise InputError(
                f"{name}: no feature is {GENE_EXPRESSION!r}; there are {', '.join(shown)}. Give the matrix of counts "
                "of genes."
            )
        _warn_of_unknown(name, types or ())
        return matrix, var, {}
    if is_gene.all():
        return matrix, var, {}
    left_out = Counter(UNTYPED if is_missing(text) else text.strip() for text in np.asarray(types)[~is_gene])
    _check_untyped(name, var, types, left_out[UNTYPED])
    return ColumnSubset(matrix, is_gene), var.subset(is_gene), dict(sorted(left_out.items()))


def expression_of(var: Table) -> np.ndarray | None:
    """[n_features] bool, whether each is gene expression; None where no column of var says so."""
    types = _types(var)
    return None if types is None else is_expression(types)


def is_expression(types: Sequence[str]) -> np.ndarray | None:
    """[n_features] bool, or None where these are no types of features, or none of them is gene expression."""
    plain = {text: _plain(text) for text in set(types)}
    present = set(plain.values())
    accepted = _EXPRESSION
    if present & _EXPRESSION_AMONG_OTHERS and present - _EXPRESSION_AMONG_OTHERS <= _OTHER_TYPES | {""} | _EXPRESSION:
        accepted = _EXPRESSION | _EXPRESSION_AMONG_OTHERS
    if not present & accepted:
        return None
    is_accepted = {text: plain_text in accepted for text, plain_text in plain.items()}
    return np.fromiter((is_accepted[text] for text in types), dtype=bool, count=len(types))


def _plain(text: str) -> str:
    return "" if is_missing(text) else re.sub(r"[^a-z0-9]", "", text.lower())


def _types(var: Table) -> list[str] | None:
    """The type of every feature, the first that is not missing where joining tables made several columns of them."""
    names = {column: _plain(column) for column in var.columns}
    columns = [column for column, plain in names.items() if _TYPE_COLUMN.fullmatch(plain)]
    if columns:
        types = as_text(var.read(columns[0])).tolist()
        for column in columns[1:]:
            more = as_text(var.read(column)).tolist()
            types = [one if not is_missing(one) else other for one, other in zip(types, more, strict=True)]
        if is_expression(types) is not None:
            return types
    for column in (column for column, plain in names.items() if _MAYBE_TYPE_COLUMN.fullmatch(plain)):
        try:
            maybe = as_text(var.read(column)).tolist()
        except InputError:
            continue  # a column nobody asked for may be of a kind that nobody can read
        if is_expression(maybe) is not None:
            return maybe
    return types if columns else None


def _foreign(types: Sequence[str], *, is_typed: bool) -> list[str]:
    """The types of a file without gene expression; none where these are no types of features."""
    present = sorted({text.strip() for text in types if not is_missing(text)})
    is_known = all(_plain(text) in _OTHER_TYPES for text in present)
    return present if is_typed or is_known else []


def _warn_of_unknown(name: str, types: Sequence[str]) -> None:
    """Say that nothing is left out where some features are called genes, and others something unknown."""
    present = {text.strip() for text in set(types) if not is_missing(text)}
    if len(present) > 1 and {_plain(text) for text in present} & _EXPRESSION_AMONG_OTHERS:
        shown = ", ".join(repr(text) for text in sorted(present)[:_MOST_SHOWN]) + ", ..." * (len(present) > _MOST_SHOWN)
        warnings.warn(
            f"{name}: features have the types {shown}, which say nothing known about what they are: all are read as "
            f"genes. If some are none, call the others {GENE_EXPRESSION!r} in a column feature_types",
            stacklevel=2,
        )


def _check_untyped(name: str, var: Table, types: Sequence[str], n_untyped: int) -> None:
    if not n_untyped:
        return
    if 2 * n_untyped > len(types):
        raise InputError(
            f"{name}: {n_untyped} of {len(types)} features have no type, others are {GENE_EXPRESSION!r}: fill the "
            "column of feature types, or remove it if all are genes"
        )
    names = [row for row, text in zip(var.index().tolist(), types, strict=True) if is_missing(text)]
    shown = ", ".join(repr(row) for row in names[:3]) + ", ..." * (n_untyped > 3)
    warnings.warn(
        f"{name}: {n_untyped} features without a type ({shown}) are left out, since others are said to be "
        f"{GENE_EXPRESSION!r}; fill the column of feature types if they are genes",
        stacklevel=2,
    )
