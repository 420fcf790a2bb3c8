"""Maps the gene columns of a file to the genes of a vocabulary, and says what became of each column."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast.errors import InputError
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    import scipy.sparse

# ENSG00000123456.12, ENSMUSG00000000001.4, GENCODE's ENSG00000182378.14_PAR_Y
_VERSIONED = re.compile(r"(ENS[A-Z]*[GTP][0-9]{11})(?:\.[0-9]+)?(?:_PAR_Y)?$")
# PanglaoDB's SYMBOL_ENSG00000158122.11
_SYMBOL_AND_ID = re.compile(r".*_(ENS[A-Z]*[GTP][0-9]{11})(?:\.[0-9]+)?$")
_TRAILING_VERSION = re.compile(r"(.+)\.[0-9]+$")
_N_EXAMPLES = 5
# Fewer than one column in a hundred, and fewer than this many, is next to nothing.
_MIN_FRACTION = 0.01
_MIN_MATCHED = 500


@dataclass
class GeneReport:
    """What became of the columns of one file.

    Every column is either matched or dropped. A matched column may in addition be aliased (another id, symbol or
    retired id of its gene), versioned (its version suffix was cut off), recased (matched only after upper-casing) and
    collapsed (its counts are added to those of another column of the same gene).
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
        float64 [n_genes].
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

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.token_ids
        self.aliases = vocabulary.aliases
        # only needed where some gene id is not upper-case already (symbols of other species, say)
        self.folded: dict[str, str] = {}
        for gene in self.tokens:
            if gene != gene.upper():
                self.folded.setdefault(gene.upper(), gene)

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
        upper = identifier.upper()
        match = _VERSIONED.match(upper) or _SYMBOL_AND_ID.match(upper)
        if match is not None:
            return match[1] if match[1] != upper else None
        match = _TRAILING_VERSION.match(identifier)
        # for other kinds of ids only where the rest is exactly a gene id: symbols such as RP11-34P13.7 have dots too
        if match is not None and match[1] in self.tokens:
            return match[1]
        return None


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


def map_genes(ids: Iterable[Any], vocabulary: Vocabulary, *, source_name: str) -> GeneMap:
    """Find the gene of every column.

    Follows the official tokenizer wherever that finds a gene (upper-cased id, looked up in the mapping dictionary,
    target must have a token). In addition version suffixes are removed, and columns are collapsed whenever they mean
    the same gene, also where the official tool overlooks it (literal duplicates, lower-case ids).

    Parameters
    ----------
    ids
        One id per column, as written in the file; strings, bytes or integers.
    vocabulary
        Whose genes.
    source_name
        File name for the report and for errors.

    Raises
    ------
    InputError
        No columns, or next to none matched; shows ids as found and as expected.
    """
    names = id_text(ids)
    if not names:
        raise InputError(f"{source_name}: has no genes (zero columns)")
    lookup = _Lookup(vocabulary)
    report = GeneReport(source=source_name, n_columns=len(names))
    targets = [_target(name, lookup, report) for name in names]
    _check_matched(names, report, vocabulary)

    tokens = vocabulary.token_ids
    genes = sorted({gene for gene in targets if gene is not None}, key=tokens.__getitem__)
    index = {gene: i for i, gene in enumerate(genes)}
    index_or_drop: dict[str | None, int] = {None: -1}
    index_or_drop.update(index)
    column_to_gene = np.fromiter((index_or_drop[gene] for gene in targets), dtype=np.int32, count=len(targets))
    report.n_genes = len(genes)
    _count_collapsed(names, targets, report)
    return GeneMap(
        column_to_gene=column_to_gene,
        genes=genes,
        token_ids=np.fromiter((tokens[gene] for gene in genes), dtype=np.int32, count=len(genes)),
        medians=np.fromiter((vocabulary.medians[gene] for gene in genes), dtype=np.float64, count=len(genes)),
        has_collisions=report.collapsed > 0,
        report=report,
    )


def _target(name: str, lookup: _Lookup, report: GeneReport) -> str | None:
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
    if len(shown) < _N_EXAMPLES:
        shown.append(f"{_shorten(name)} -> {gene}" if gene else _shorten(name))


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


def _check_matched(names: list[str], report: GeneReport, vocabulary: Vocabulary) -> None:
    if report.matched >= _MIN_MATCHED or (report.matched and report.matched >= _MIN_FRACTION * len(names)):
        return
    expected = list(vocabulary.token_ids)
    shown = [expected[i] for i in sorted({0, len(expected) // 2, len(expected) - 1})]
    hint = (
        "Name the column with Ensembl ids with gene_column= (--gene-column), or choose the dictionary of the right "
        "species."
    )
    n_ensembl = sum(name[:3].upper() == "ENS" for name in names)
    if len(vocabulary.aliases) <= len(vocabulary.token_ids) and 2 * n_ensembl < len(names):
        hint += " This vocabulary's mapping knows no gene symbols (Geneformer V1's does not; V2's does)."
    raise InputError(
        f"{report.source}: {report.matched} of {len(names)} gene ids match vocabulary {vocabulary.name!r}. "
        f"The ids look like {', '.join(repr(_shorten(name)) for name in names[:4])}; expected something like "
        f"{', '.join(repr(gene) for gene in shown)}. {hint}"
    )
