"""What has to be known of every input before the first token is written, and its cells as tasks for ranking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from geneformer_fast.counts import CountBlock, CountSource, open_source
from geneformer_fast.counts.arrays import number_array
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.families.preparation import name_keys, pack_genes
from geneformer_fast.tokenization.carried import arrow_type, carried_values, no_column
from geneformer_fast.tokenization.doubts import CellNames, about_genes, warn
from geneformer_fast.tokenization.genes import GeneMap, map_genes
from geneformer_fast.tokenization.manifest import GENES_THERE, OWN_COLUMNS
from geneformer_fast.tokenization.values import ValueGenes, ids_for
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    from geneformer_kernels.ops.rank_genes.host import Columns

#: Inputs kept open between preparation and reading; further ones are opened again.
_MOST_OPEN = 8
# Cells between two that are asked for, beyond which they are not read.
_MOST_BETWEEN = 256


@dataclass(frozen=True)
class ReadOptions:
    """How inputs are read; all of it goes into the manifest.

    Attributes
    ----------
    layer, gene_column, allow_float, allow_duplicate_cells
        As in ``open_source``.
    allow_few_genes
        As in ``map_genes``.
    carried
        Name of a column in obs -> name in the token folder.
    n_counts
        ``"auto"``: the obs column n_counts where there is one, else computed; ``"computed"``; or another obs column.
    use_filter_pass
        Whether to leave out cells whose obs column filter_pass is there and not 1.
    max_len
        Longest token list of a cell, special tokens included; None is the vocabulary's.
    """

    layer: str | None = None
    gene_column: str | None = None
    allow_float: bool = False
    allow_duplicate_cells: bool = False
    allow_few_genes: bool = False
    carried: Mapping[str, str] = field(default_factory=dict)
    n_counts: str = "auto"
    use_filter_pass: bool = True
    max_len: int | None = None

    def __post_init__(self) -> None:
        names = list(self.carried.values())
        taken = [name for name in names if name in OWN_COLUMNS]
        if taken or len(set(names)) != len(names):
            wrong = taken[0] if taken else next(name for name in names if names.count(name) > 1)
            raise InputError(
                f"the name {wrong!r} for a carried obs column is taken; name it otherwise, as in "
                f"--obs another_name={[old for old, new in self.carried.items() if new == wrong][-1]}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "layer": self.layer,
            "gene_column": self.gene_column,
            "allow_float": self.allow_float,
            "allow_duplicate_cells": self.allow_duplicate_cells,
            "allow_few_genes": self.allow_few_genes,
            # A list: the order of the columns is part of the result, and JSON objects have none.
            "obs": [[old, new] for old, new in self.carried.items()],
            "n_counts": self.n_counts,
            "filter_pass": self.use_filter_pass,
            "max_len": self.max_len,
        }

    def open(self, data: Any, *, is_checked: bool = False) -> CountSource:
        """Open one input; ``is_checked`` skips what an earlier opening has checked."""
        return open_source(
            data,
            layer=self.layer,
            gene_column=self.gene_column,
            allow_float=self.allow_float,
            allow_duplicate_cells=self.allow_duplicate_cells or is_checked,
        )


@dataclass
class PreparedInput:
    """One input, looked at.

    Attributes
    ----------
    data
        Path or AnnData.
    source
        The opened source, where it was kept open.
    gene_map, columns
        Its genes, and the same tabulated for ranking; None for families that read values.
    description
        What the manifest says about it: fingerprint, shape, where counts, genes and totals come from.
    carried_types
        Arrow type of every carried column in this input.
    n_counts_column
        The obs column with total counts, None to compute them.
    rows
        Ascending rows that are asked for; None asks for all.
    """

    data: Any
    name: str
    n_cells: int
    gene_map: GeneMap
    columns: Columns | None
    description: dict[str, Any]
    carried_types: dict[str, pa.DataType]
    n_counts_column: str | None
    has_filter: bool
    source: CountSource | None
    rows: np.ndarray | None = None

    @property
    def n_asked(self) -> int:
        """Cells that are asked for."""
        return self.n_cells if self.rows is None else len(self.rows)


@dataclass
class Task:
    """One block of cells, ready to be ranked.

    Attributes
    ----------
    source
        Index of the input.
    n_counts
        [cells] totals, or None to compute them.
    is_wanted
        [cells] bool, what filter_pass says; None keeps all.
    is_asked
        [cells] bool, whether somebody asked for them; None asks for all.
    carried
        Columns of the whole input by their name in the token folder.
    keys
        [cells] uint64 of their names, to draw by; None where nothing is drawn.
    """

    source: int
    prepared: PreparedInput
    block: CountBlock
    n_counts: np.ndarray | None
    is_wanted: np.ndarray | None
    carried: dict[str, pa.Array]
    is_asked: np.ndarray | None = None
    keys: np.ndarray | None = None


def prepare(
    inputs: Iterable[Any],
    vocabulary: Vocabulary | ValueGenes,
    options: ReadOptions,
    *,
    is_resumable: bool = False,
    rows: Sequence[np.ndarray] | None = None,
) -> list[PreparedInput]:
    """Look at every input: gene ids, carried columns, fingerprint; before anything is written.

    ``is_resumable`` says that a later run may go on with what this one made, so that all of an AnnData in memory has
    to be told from another one. ``rows`` are those that are asked for of each input, ascending; None asks for all.
    """
    prepared: list[PreparedInput] = []
    known: dict[bytes, tuple[GeneMap, Columns | None]] = {}
    names = CellNames()
    inputs = list(inputs)
    try:
        for data in inputs:
            source = options.open(data)
            try:
                entry = _prepare_one(data, source, vocabulary, options, known, is_resumable)
                if len(inputs) > 1 and not options.allow_duplicate_cells:
                    names.add(source)
            except BaseException:
                source.close()
                raise
            prepared.append(entry)
            if len(prepared) > _MOST_OPEN:
                source.close()
                entry.source = None
    except BaseException:
        close_all(prepared)
        raise
    repeated = names.messages()
    for entry, asked in zip(prepared, rows or (), strict=False):
        entry.rows = asked
    for entry in prepared:
        if entry.name in repeated:
            entry.description["warnings"].append(repeated[entry.name])
            warn(repeated[entry.name])
    return prepared


def close_all(prepared: Iterable[PreparedInput]) -> None:
    """Close the inputs that are still open."""
    for entry in prepared:
        if entry.source is not None:
            entry.source.close()
            entry.source = None


def _prepare_one(
    data: Any,
    source: CountSource,
    vocabulary: Vocabulary | ValueGenes,
    options: ReadOptions,
    known: dict[bytes, tuple[GeneMap, Columns | None]],
    is_resumable: bool,
) -> PreparedInput:
    ids, gene_ids_from = ids_for(source, vocabulary, options.gene_column)
    # Files of one study mostly list the same genes: they are looked up once.
    key = sha256("\n".join(ids.tolist()).encode("utf-8", "surrogatepass")).digest()
    doubt = about_genes(source, vocabulary)
    if key in known:
        gene_map, columns = known[key]
    else:
        gene_map = map_genes(ids, vocabulary, source_name=source.name, allow_few_genes=options.allow_few_genes)
        columns = _tabulated(gene_map, vocabulary)
        known[key] = gene_map, columns
        if doubt is not None:
            warn(doubt)
    carried_types = {new: arrow_type(source, old) for old, new in options.carried.items()}
    n_counts_column = _n_counts_column(source, vocabulary, options)
    has_filter = options.use_filter_pass and "filter_pass" in source.obs_columns
    description = {
        **source.fingerprint(is_whole=is_resumable),
        "kind": source.kind,
        "n_cells": source.n_cells,
        "n_genes": source.n_genes,
        "counts_from": source.counts_from,
        "dtype": source.value_dtype.name,
        "is_dense": source.is_dense,
        "gene_ids_from": gene_ids_from,
        "n_counts_from": f"obs/{n_counts_column}" if n_counts_column else _computed_over(vocabulary),
        "n_counts_dtype": None if n_counts_column is None else _dtype_name(source.obs(n_counts_column)),
        "filter_pass": has_filter,
        **(_obs_digest(source, options, n_counts_column, has_filter) if is_resumable else {}),
        "left_out": source.left_out,
        "genes": {**gene_map.report.to_dict(), "source": source.name},
        **_genes_there(gene_map, vocabulary),
        "warnings": [] if doubt is None else [doubt],
    }
    return PreparedInput(
        data=data,
        name=source.name,
        n_cells=source.n_cells,
        gene_map=gene_map,
        columns=columns,
        description=description,
        carried_types=carried_types,
        n_counts_column=n_counts_column,
        has_filter=has_filter,
        source=source,
    )


def _tabulated(gene_map: GeneMap, vocabulary: Vocabulary | ValueGenes) -> Columns | None:
    if isinstance(vocabulary, ValueGenes):
        return None
    from geneformer_kernels.ops.rank_genes.host import prepare_columns

    return prepare_columns(gene_map.column_to_gene, gene_map.token_ids, gene_map.medians)


def _genes_there(gene_map: GeneMap, vocabulary: Vocabulary | ValueGenes) -> dict[str, str]:
    """Which genes of the list an input has, for families that read a value for every gene of it."""
    if not isinstance(vocabulary, ValueGenes) or not vocabulary.preparation.is_dense:
        return {}
    is_there = np.zeros(len(vocabulary.token_ids), dtype=bool)
    is_there[gene_map.token_ids] = True
    return {GENES_THERE: pack_genes(is_there)}


def _obs_digest(
    source: CountSource, options: ReadOptions, n_counts_column: str | None, has_filter: bool
) -> dict[str, str]:
    """SHA-256 of the columns of obs that tokens depend on, for an AnnData in memory; files have their own."""
    if source.kind != "anndata":
        return {}
    digest = sha256()
    for name in (*options.carried, n_counts_column, "filter_pass" if has_filter else None):
        if name is not None:
            values = source.obs(name)
            array = values if isinstance(values, pa.Array) else number_array(values)
            digest.update(f"{name}\0{array.type}\0".encode("utf-8", "surrogatepass"))
            digest.update("\n".join(map(repr, array.to_pylist())).encode("utf-8", "surrogatepass"))
    return {"obs_sha256": digest.hexdigest()}


def _dtype_name(values: Any) -> str:
    return np.dtype(values.type.to_pandas_dtype() if isinstance(values, pa.Array) else values.dtype).name


def _computed_over(vocabulary: Vocabulary | ValueGenes) -> str:
    return "computed over genes of the vocabulary" if vocabulary.totals_over_vocabulary else "computed over all columns"


def _n_counts_column(source: CountSource, vocabulary: Vocabulary | ValueGenes, options: ReadOptions) -> str | None:
    if options.n_counts == "computed":
        return None
    if options.n_counts == "auto":
        # Totals over other genes than the family's would not be the family's normalisation.
        is_usable = (
            "n_counts" in source.obs_columns
            and not vocabulary.totals_over_vocabulary
            and not isinstance(vocabulary, ValueGenes)
        )
        return "n_counts" if is_usable else None
    if options.n_counts not in source.obs_columns:
        raise InputError(no_column(source, options.n_counts, "for the total counts"))
    if isinstance(vocabulary, ValueGenes) and not vocabulary.preparation.uses_totals(vocabulary.options):
        raise UnsupportedError(
            f"n_counts (--n-counts) changes nothing: with the options chosen, values of {vocabulary.family} depend on "
            "no total; leave it out"
        )
    return options.n_counts


def tasks(
    prepared: list[PreparedInput],
    options: ReadOptions,
    types: Mapping[str, pa.DataType],
    *,
    source: int = 0,
    row: int = 0,
    rows: int,
    has_keys: bool = False,
) -> Iterator[Task]:
    """The cells of all inputs from a position on, in blocks of at most ``rows``; ``has_keys`` of their names."""
    for index in range(source, len(prepared)):
        entry = prepared[index]
        if not entry.n_asked:
            continue
        opened = entry.source or options.open(entry.data, is_checked=True)
        try:
            n_counts = _n_counts(opened, entry)
            is_wanted = _filter(opened) if entry.has_filter else None
            carried = {new: carried_values(opened, old, types[new]) for old, new in options.carried.items()}
            keys = name_keys(opened.cell_names().tolist()) if has_keys else None
            for block in _blocks(opened, entry, row if index == source else 0, rows):
                span = slice(block.start, block.start + block.n_cells)
                yield Task(
                    source=index,
                    prepared=entry,
                    block=block,
                    n_counts=None if n_counts is None else n_counts[span],
                    is_wanted=None if is_wanted is None else is_wanted[span],
                    carried=carried,
                    is_asked=_is_among(entry.rows, block),
                    keys=None if keys is None else keys[span],
                )
        finally:
            opened.close()
            entry.source = None


def _blocks(source: CountSource, entry: PreparedInput, start: int, rows: int) -> Iterator[CountBlock]:
    """The cells of one input from a row on, those aside that nobody asked for and that lie far from those asked for."""
    if entry.rows is None:
        yield from source.blocks(start=start, rows=rows)
        return
    asked = entry.rows[entry.rows >= start]
    breaks = np.flatnonzero(np.diff(asked) > _MOST_BETWEEN) + 1
    for run in [asked] if source.is_one_pass else np.split(asked, breaks):
        if not len(run):
            continue
        for block in source.blocks(start=int(run[0]), stop=int(run[-1]) + 1, rows=rows):
            first, last = np.searchsorted(run, [block.start, block.start + block.n_cells])
            if first < last:
                yield block
            else:
                block.release()


def _is_among(rows: np.ndarray | None, block: CountBlock) -> np.ndarray | None:
    """[cells] which cells of a block are asked for."""
    if rows is None:
        return None
    found = np.zeros(block.n_cells, dtype=bool)
    first, last = np.searchsorted(rows, [block.start, block.start + block.n_cells])
    found[rows[first:last] - block.start] = True
    return found


def _numbers(values: Any, where: str) -> np.ndarray:
    """A column as numpy numbers, missing values as NaN; floats keep their precision, which the arithmetic follows."""
    if not isinstance(values, pa.Array):
        return values
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    elif not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise InputError(f"{where} holds {values.type}, not numbers")
    if values.null_count:
        values = values.cast(values.type if pa.types.is_floating(values.type) else pa.float64())
    return values.to_numpy(zero_copy_only=False)


def _n_counts(source: CountSource, entry: PreparedInput) -> np.ndarray | None:
    if entry.n_counts_column is None:
        return None
    return _numbers(source.obs(entry.n_counts_column), f"{source.name}: obs column {entry.n_counts_column}")


def passes_filter(source: CountSource, options: ReadOptions) -> np.ndarray:
    """[n_cells] bool, which cells of an input are cells as far as its column filter_pass says so."""
    if options.use_filter_pass and "filter_pass" in source.obs_columns:
        return _filter(source)
    return np.ones(source.n_cells, dtype=bool)


def _filter(source: CountSource) -> np.ndarray:
    return _numbers(source.obs("filter_pass"), f"{source.name}: obs column filter_pass") == 1
