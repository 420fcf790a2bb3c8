"""Maps the gene columns of a file to the genes of a vocabulary, and says what became of each column."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from geneformer_fast.counts.identifiers import (
    embedded_id,
    id_text,
    is_ensembl_gene,
    is_missing,
    without_version,
)
from geneformer_fast.errors import InputError

if TYPE_CHECKING:
    import scipy.sparse

_TRAILING_VERSION = re.compile(r"(.+)\.[0-9]+$")
_N_EXAMPLES = 5
# Fewer than one column in twenty, and fewer than this many, is next to nothing: of made-up names and of symbols of far
# species one or two in a hundred are old symbols of human genes by chance (g1, G6).
_MIN_FRACTION = 0.05
_MIN_MATCHED = 500
# Annotations list all genes, also the many that no model knows: where most genes of the vocabulary are found, ids that
# are not in it are no sign of ids gone wrong.
_MOST_OF_VOCABULARY = 2 / 3


class Genes(Protocol):
    """What columns are looked up in: a vocabulary of ranked tokens, or the genes of a family that reads values."""

    @property
    def name(self) -> str:
        """For errors."""

    @property
    def token_ids(self) -> Mapping[str, int]:
        """Gene id to token id."""

    @property
    def aliases(self) -> Mapping[str, str]:
        """UPPER-CASE other id to gene id."""

    @property
    def medians(self) -> Mapping[str, float] | None:
        """Gene id to median; None where there are none."""


@dataclass
class GeneReport:
    """What became of the columns of one file.

    Every column is either matched or dropped. A matched column may in addition be aliased (another id, symbol or
    retired id of its gene), versioned (its version suffix was cut off), recased (matched only after upper-casing) and
    collapsed (its counts are added to those of another column of the same gene). A dropped column may be missing (it
    has no id, or a word for none) or known to the mapping without a token.
    """

    source: str
    n_columns: int
    matched: int = 0
    aliased: int = 0
    versioned: int = 0
    recased: int = 0
    collapsed: int = 0
    duplicated: int = 0
    dropped: int = 0
    missing: int = 0
    known_without_token: int = 0
    n_genes: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.matched} of {self.n_columns} columns matched, {self.n_genes} genes"]
        explain = {
            "aliased": "mapped from a symbol, alias or retired id",
            "versioned": "version suffix removed",
            "recased": "matched after upper-casing (the official tokenizer leaves such columns uncollapsed)",
            "collapsed": "added to another column of the same gene",
            "duplicated": "of these repeat an id literally (the official tokenizer repeats their tokens)",
            "dropped": "not in the vocabulary",
            "missing": "of these have no id: empty, or a word for a missing value such as nan or NA",
            "known_without_token": "of these known to the mapping, but their gene has no token",
        }
        for key, text in explain.items():
            count = getattr(self, key)
            if count:
                shown = self.examples.get(key, [])
                lines.append(f"  {key}: {count} ({text})" + (f", e.g. {', '.join(shown)}" if shown else ""))
        return "\n".join(lines)


@dataclass
class GeneMap:
    """Columns of a file to genes of a vocabulary.

    Attributes
    ----------
    column_to_gene
        int32 [n_columns], index into `genes`, or -1 for a dropped column.
    genes
        Unique gene ids in ascending order of token id, so that the order of indices is the order of tokens.
    token_ids
        int32 [n_genes].
    medians
        float64 [n_genes]; NaN where there are none.
    has_collisions
        True where several columns belong to one gene and have to be summed.
    report
        Counts and examples.
    """

    column_to_gene: np.ndarray
    genes: list[str]
    token_ids: np.ndarray
    medians: np.ndarray
    has_collisions: bool
    report: GeneReport

    @cached_property
    def column_to_token(self) -> np.ndarray:
        """int32 [n_columns]: token id, or -1 for a dropped column."""
        return np.where(self.column_to_gene >= 0, self.token_ids[self.column_to_gene], -1).astype(np.int32)

    def collapse_matrix(self, dtype: np.dtype | type = np.float64) -> scipy.sparse.csr_matrix:
        """Sparse [n_columns, n_genes] of ones: ``counts @ collapse_matrix()`` sums all columns of each gene."""
        import scipy.sparse

        columns = np.flatnonzero(self.column_to_gene >= 0)
        indptr = np.zeros(len(self.column_to_gene) + 1, dtype=np.int32)
        np.cumsum(self.column_to_gene >= 0, out=indptr[1:])
        ones = np.ones(len(columns), dtype=dtype)
        shape = (len(self.column_to_gene), len(self.genes))
        return scipy.sparse.csr_matrix((ones, self.column_to_gene[columns], indptr), shape=shape)


class _Lookup:
    """One id to its gene, following the official mapping first and then what the official tool misses."""

    def __init__(self, vocabulary: Genes) -> None:
        self.tokens = vocabulary.token_ids
        self.aliases = vocabulary.aliases
        # only needed where some gene id is not upper-case already (symbols of other species, say)
        self.folded: dict[str, str] = {}
        for gene in self.tokens:
            if gene != gene.upper():
                self.folded.setdefault(gene.upper(), gene)

    def knows(self, identifier: str) -> bool:
        """Whether the mapping has this id, though perhaps for a gene without a token."""
        stripped = self.stripped(identifier)
        return identifier.upper() in self.aliases or (stripped is not None and stripped.upper() in self.aliases)

    def direct(self, identifier: str) -> str | None:
        upper = identifier.upper()
        gene = self.aliases.get(upper)
        if gene is not None and gene in self.tokens:
            return gene
        if identifier in self.tokens:
            return identifier
        if upper in self.tokens:
            return upper
        return self.folded.get(upper)

    def stripped(self, identifier: str) -> str | None:
        """The id without its version or leading symbol, or None where nothing is to be cut."""
        gene = without_version(identifier) or embedded_id(identifier)
        if gene is not None:
            return gene if gene != identifier.upper() else None
        match = _TRAILING_VERSION.match(identifier)
        # for other kinds of ids only where the rest is exactly a gene id: symbols such as RP11-34P13.7 have dots too
        if match is not None and match[1] in self.tokens:
            return match[1]
        return None


def map_genes(ids: Iterable[Any], vocabulary: Genes, *, source_name: str, allow_few_genes: bool = False) -> GeneMap:
    """Find the gene of every column.

    Follows the official tokenizer wherever that finds a gene (upper-cased id, looked up in the mapping dictionary,
    target must have a token). In addition version suffixes are removed, and columns are collapsed whenever they mean
    the same gene, also where the official tool overlooks it (literal duplicates, lower-case ids). Words for a missing
    value (nan, NA) are no ids, although the mapping of V2 takes some for symbols of genes; only where one occurs once,
    among symbols that are all different, it is the symbol.

    Parameters
    ----------
    ids
        One id per column, as written in the file; strings, bytes or integers.
    vocabulary
        Whose genes.
    source_name
        File name for the report and for errors.
    allow_few_genes
        Go on where next to none match, or fewer than half of ids that look like Ensembl genes.

    Raises
    ------
    InputError
        No columns, none matched, or too few; shows ids as found and as expected.
    """
    names = id_text(ids)
    if not names:
        raise InputError(f"{source_name}: has no genes (zero columns)")
    lookup = _Lookup(vocabulary)
    report = GeneReport(source=source_name, n_columns=len(names))
    missing = _missing(names, vocabulary)
    targets = [_target(name, lookup, report, missing) for name in names]
    tokens, medians = vocabulary.token_ids, vocabulary.medians
    genes = sorted({gene for gene in targets if gene is not None}, key=tokens.__getitem__)
    index = {gene: i for i, gene in enumerate(genes)}
    index_or_drop: dict[str | None, int] = {None: -1}
    index_or_drop.update(index)
    column_to_gene = np.fromiter((index_or_drop[gene] for gene in targets), dtype=np.int32, count=len(targets))
    report.n_genes = len(genes)
    _check_matched(names, targets, report, lookup, vocabulary, allow_few_genes)
    _count_collapsed(names, targets, report)
    return GeneMap(
        column_to_gene=column_to_gene,
        genes=genes,
        token_ids=np.fromiter((tokens[gene] for gene in genes), dtype=np.int32, count=len(genes)),
        medians=np.fromiter(
            (math.nan if medians is None else medians[gene] for gene in genes), dtype=np.float64, count=len(genes)
        ),
        has_collisions=report.collapsed > 0,
        report=report,
    )


def _missing(names: Sequence[str], vocabulary: Genes) -> frozenset[str]:
    """The names that say that an id is missing."""
    # an Ensembl id has 15 characters: most names need no closer look
    found = [name for name in names if len(name) < 15 and is_missing(name)]
    if len(found) == 1 and found[0].upper() in vocabulary.aliases and len(set(names)) == len(names):
        # NAN is an old symbol of SCN11A: a column of unique symbols may really mean it, one of Ensembl ids may not.
        n_ensembl = sum(map(is_ensembl_gene, names))
        if 2 * n_ensembl < len(names):
            return frozenset()
    return frozenset(found)


def _target(name: str, lookup: _Lookup, report: GeneReport, missing: frozenset[str]) -> str | None:
    if name in missing:
        _note(report, "dropped", name)
        _note(report, "missing", repr(name))
        return None
    if name in lookup.tokens and lookup.aliases.get(name, name) == name:
        report.matched += 1
        return name
    used = name
    gene = lookup.direct(name)
    if gene is None:
        stripped = lookup.stripped(name)
        if stripped is not None:
            gene = lookup.direct(stripped)
            used = stripped
            if gene is not None:
                _note(report, "versioned", name)
    if gene is None:
        _note(report, "dropped", name)
        if used.upper() in lookup.aliases:
            _note(report, "known_without_token", name)
        return None
    report.matched += 1
    if used.upper() != gene.upper():
        _note(report, "aliased", name, gene)
    # symbols are commonly written in mixed case: only ids whose spelling hides them from the official collapse count
    if name != name.upper() and name != gene:
        _note(report, "recased", name)
    return gene


def _note(report: GeneReport, kind: str, name: str, gene: str | None = None) -> None:
    setattr(report, kind, getattr(report, kind) + 1)
    shown = report.examples.setdefault(kind, [])
    text = f"{_shorten(name)} -> {gene}" if gene else _shorten(name)
    if len(shown) < _N_EXAMPLES and text not in shown:
        shown.append(text)


def _shorten(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."


def _count_collapsed(names: list[str], targets: list[str | None], report: GeneReport) -> None:
    if report.n_genes == report.matched:
        return
    first: dict[str, str] = {}
    for name, gene in zip(names, targets, strict=True):
        if gene is None:
            continue
        if gene not in first:
            first[gene] = name
            continue
        report.collapsed += 1
        examples = report.examples.setdefault("collapsed", [])
        if len(examples) < _N_EXAMPLES:
            examples.append(f"{_shorten(name)} + {_shorten(first[gene])} -> {gene}")
    seen: set[str] = set()
    for name, gene in zip(names, targets, strict=True):
        if gene is not None and name in seen:
            _note(report, "duplicated", name)
        seen.add(name)


def _check_matched(
    names: list[str],
    targets: list[str | None],
    report: GeneReport,
    lookup: _Lookup,
    vocabulary: Genes,
    allow_few_genes: bool,
) -> None:
    is_next_to_nothing = report.matched < _MIN_MATCHED and report.matched < max(1, _MIN_FRACTION * len(names))
    has_few = _most_ensembl_ids_are_unknown(names, targets, report, lookup)
    if not (is_next_to_nothing or has_few) or (allow_few_genes and report.matched):
        return
    expected = list(vocabulary.token_ids)
    shown = [expected[i] for i in sorted({0, len(expected) // 2, len(expected) - 1})]
    dropped = [name for name, gene in zip(names, targets, strict=True) if gene is None and not is_missing(name)]
    n_ensembl = sum(map(is_ensembl_gene, names))
    if 2 * n_ensembl > len(names):
        hint = (
            "These are Ensembl ids of other genes, or with something around them that is not known: choose the "
            "dictionary of the right species, or correct them."
        )
    else:
        hint = (
            "Name the column with Ensembl ids with gene_column= (--gene-column), or choose the dictionary of the right "
            "species."
        )
    # A list of genes knows best what to do: it may be of symbols.
    hint = getattr(vocabulary, "hint", hint)
    if (
        vocabulary.medians is not None
        and len(vocabulary.aliases) <= len(vocabulary.token_ids)
        and 2 * n_ensembl < len(names)
    ):
        hint += " This vocabulary's mapping knows no gene symbols (Geneformer V1's does not; V2's does)."
    if report.matched:
        hint += " To go on with so few genes, pass --allow-few-genes (allow_few_genes=True)."
    raise InputError(
        f"{report.source}: {report.matched} of {len(names)} gene ids match vocabulary {vocabulary.name!r}. "
        f"{'Unmatched ids' if report.matched else 'The ids'} look like "
        f"{', '.join(repr(_shorten(name)) for name in (dropped or names)[:4])}; expected something like "
        f"{', '.join(repr(gene) for gene in shown)}. {hint}"
    )


def _most_ensembl_ids_are_unknown(
    names: list[str], targets: list[str | None], report: GeneReport, lookup: _Lookup
) -> bool:
    """Whether this is a file of Ensembl ids of which the dictionaries know fewer than half: the ids went wrong."""
    if 2 * report.matched >= len(names) or report.n_genes >= _MOST_OF_VOCABULARY * len(lookup.tokens):
        return False
    ensembl = [(name, gene) for name, gene in zip(names, targets, strict=True) if is_ensembl_gene(name)]
    if 2 * len(ensembl) <= len(names) - report.missing:
        return False
    n_unknown = sum(gene is None and not lookup.knows(name) for name, gene in ensembl)
    return 2 * n_unknown > len(ensembl)
