"""The pass from counts to ranked tokens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

import geneformer_fast
from geneformer_fast.arguments import checked, renamed
from geneformer_fast.counts import expand_inputs
from geneformer_fast.errors import InputError, OutputError
from geneformer_fast.progress import Progress
from geneformer_fast.tokenization import inputs as reading
from geneformer_fast.tokenization.arguments import as_paths, checked_max_len, checked_workers, made_by
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.tokenization.carried import carried_columns, joined_types
from geneformer_fast.tokenization.doubts import about_totals, warn
from geneformer_fast.tokenization.output import SHARD_BYTES, TokenOutput
from geneformer_fast.tokenization.pipeline import ordered_map
from geneformer_fast.tokenization.ranking import Ranked, rank
from geneformer_fast.tokenization.shards import record_batch, token_schema
from geneformer_fast.tokenization.tally import add_tally, empty_tally, nothing_left
from geneformer_fast.tokenization.values import TOTAL, VALUES, ValueGenes, value_cells
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData

    from geneformer_fast.families.gene_list import GeneList

#: Cells per block of reading, ranking and writing, and so per Arrow record batch.
BLOCK_ROWS = 1024


class TokenizedCells(NamedTuple):
    """Tokens in memory.

    Attributes
    ----------
    values, cu_seqlens
        Packed tokens in the vocabulary's dtype, and [cells + 1] int64 where each cell begins and ends.
    report
        What the manifest of a token folder would say: options, vocabulary, input, genes, cells.
    kept_rows
        [cells] int64, the row of every cell in the AnnData; cells without tokens and filtered ones are missing.
    """

    values: np.ndarray
    cu_seqlens: np.ndarray
    report: dict[str, Any]
    kept_rows: np.ndarray

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.kept_rows):,} cells, {len(self.values):,} tokens)"


class TokenizedValues(TokenizedCells):
    """Cells of a family that reads values, in memory: the tokens are numbers of genes.

    Attributes
    ----------
    amounts
        float32, the value of every token.
    totals
        [cells] float64, the cells' totals, where the family needs them, else None.
    """

    amounts: np.ndarray
    totals: np.ndarray | None


@renamed(layer="counts_layer", vocabulary="dictionary")
@checked
def tokenize(
    data: str | os.PathLike[str] | AnnData | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    dictionary: str | os.PathLike[str] | Vocabulary | GeneList | ValueGenes | None = None,
    preset: str | None = None,
    family: str | None = None,
    options: Mapping[str, Any] | None = None,
    counts_layer: str | None = None,
    gene_column: str | None = None,
    allow_float: bool = False,
    allow_duplicate_cells: bool = False,
    allow_few_genes: bool = False,
    obs: str | Mapping[str, str] | Sequence[str] | None = None,
    n_counts: str = "auto",
    filter_pass: bool = True,
    max_len: int | None = None,
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> TokenFolder | TokenizedCells:
    """Turn counts into what a model reads: ranked gene tokens, identical to those of the official tokenizer, or values.

    Parameters
    ----------
    data
        An AnnData, or files, folders and globs of .h5ad, .zarr, 10x .h5, matrix folders and .mtx files, and .loom;
        several are taken in sorted order.
    out
        Folder to write. Without one, an AnnData's tokens are returned.
    dictionary, preset
        A :class:`Vocabulary`, or the folder of gene dictionaries to read it from and which one of several (``"v1"``,
        ``"v2"``, ``"bionemo"``). For a family that reads values: the file with its genes, or the folder that holds it.
    family, options
        ``"aido-cell"``, ``"scgpt"`` or ``"scbert"``: a family that reads values, and what is chosen about them
        (:doc:`/guide/values` lists the options); None: ranked tokens.
    counts_layer
        The layer that holds the counts; None takes raw.X where it holds counts, else X.
    gene_column, allow_float, allow_duplicate_cells
        Which column of var holds gene ids, and whether TPM-like values and equal cell names pass.
    allow_few_genes
        Go on where next to no gene ids match the vocabulary, or fewer than half of ids that look like Ensembl genes.
    obs
        Columns of obs to carry along: names, or ``{name in obs: name in the result}``. The names of cells (barcodes)
        always are, as ``obs_names``, or as ``{"obs_names": name in the result}`` says; ``index`` means them too, where
        obs has no column of that name.
    n_counts
        Total counts per cell: ``"auto"`` (the obs column n_counts where there is one, else computed), ``"computed"``,
        or the name of an obs column.
    filter_pass
        Leave out cells whose obs column filter_pass exists and is not 1.
    max_len
        Longest token list of a cell, special tokens included; None is the vocabulary's, and no other is longer. For
        scGPT 1,200, or any; AIDO.Cell and scBERT read every gene of their lists.
    workers
        Ranking threads; None takes all cores. The result does not depend on it.
    resume, overwrite
        Go on with an unfinished folder, or replace what is there.
    shard_bytes
        A shard is closed by the first block that makes it this large.
    progress
        Whether to show a progress bar; None shows one on a terminal, and lines of the log elsewhere.

    Returns
    -------
    TokenFolder or TokenizedCells
        The opened folder, or without ``out`` the tokens in memory.

    Raises
    ------
    InputError
        An input cannot be read, holds no counts, matches no genes, or no cell is left.
    VocabularyError
        No or no usable dictionaries.
    OutputError
        The folder holds something else already, or cannot be resumed.

    References
    ----------
    Theodoris et al., Nature 618 (2023), "Transfer learning enables predictions in network biology".
    """
    vocabulary = made_by(dictionary, preset, family, options)
    read = reading.ReadOptions(
        layer=counts_layer,
        gene_column=gene_column,
        allow_float=allow_float,
        allow_duplicate_cells=allow_duplicate_cells,
        carried={} if out is None else carried_columns(obs),
        n_counts=n_counts,
        use_filter_pass=filter_pass,
        allow_few_genes=allow_few_genes,
        max_len=checked_max_len(max_len, vocabulary),
    )
    workers = checked_workers(workers)
    is_object = hasattr(data, "obs_names")
    if out is None:
        if not is_object:
            raise OutputError("tokenize needs a folder to write to (out=) unless it is given an AnnData")
        if obs:
            raise InputError("columns of obs go into a folder (out=); in memory, adata.obs.iloc[kept_rows] has them")
        return _tokenize_in_memory(data, vocabulary, read, workers)
    entries = [data] if is_object else expand_inputs(as_paths(data))  # type: ignore[arg-type]
    _tokenize_to_folder(
        entries, Path(out), vocabulary, read, workers, resume, overwrite, shard_bytes, progress
    )  # fmt: skip
    return open_tokens(out)


def tokenize_anndata(
    adata: AnnData, dictionary: Vocabulary | ValueGenes, *, workers: int | None = None, **options: Any
) -> TokenizedCells:
    """Tokens of an AnnData in memory.

    Parameters
    ----------
    adata
        Cells x genes.
    dictionary
        The vocabulary whose tokens they are.
    workers
        Ranking threads; None takes all cores.
    options
        ``counts_layer``, ``gene_column``, ``allow_float``, ``allow_duplicate_cells``, ``allow_few_genes``,
        ``n_counts``, ``filter_pass``, ``max_len`` as in :func:`tokenize`.

    Raises
    ------
    InputError
        As :func:`tokenize`.
    """
    result = tokenize(adata, dictionary=dictionary, workers=workers, **options)
    assert isinstance(result, TokenizedCells)
    return result


def tokenize_rows(
    data: Any,
    vocabulary: Vocabulary | ValueGenes,
    options: reading.ReadOptions,
    rows: Sequence[np.ndarray],
    out: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: bool | None = None,
) -> TokenFolder | TokenizedCells:
    """As :func:`tokenize`, of some cells.

    Parameters
    ----------
    data
        An AnnData, without ``out``; or whatever names files of counts, with ``out``.
    vocabulary, options
        Whose tokens, and how counts are read.
    rows
        Per input, of files in the order of ``expand_inputs``, ascending rows to take; others are not looked at.
    out, workers, progress
        As in :func:`tokenize`.

    Raises
    ------
    InputError, OutputError
        As :func:`tokenize`.
    """
    workers = checked_workers(workers)
    if out is None:
        return _tokenize_in_memory(data, vocabulary, dataclasses.replace(options, carried={}), workers, rows)
    entries = expand_inputs(as_paths(data))
    _tokenize_to_folder(
        entries, Path(out), vocabulary, options, workers, False, False, SHARD_BYTES, progress, rows
    )  # fmt: skip
    return open_tokens(out)


def _plan(
    prepared: list[reading.PreparedInput], vocabulary: Vocabulary | ValueGenes, options: reading.ReadOptions
) -> dict[str, Any]:
    """What is made out of what: the part of the manifest that is known before the pass."""
    return {
        "written_by": f"geneformer-fast {geneformer_fast.__version__}",
        "vocabulary": {**vocabulary.identity(), "max_len": vocabulary.max_len, "special": vocabulary.special},
        **(vocabulary.plan() if isinstance(vocabulary, ValueGenes) else {}),
        "options": options.to_dict(),
        "inputs": [entry.description for entry in prepared],
    }


def _extra_types(vocabulary: Vocabulary | ValueGenes, options: reading.ReadOptions) -> dict[str, pa.DataType]:
    """Columns that a folder of values has besides."""
    if not isinstance(vocabulary, ValueGenes):
        return {}
    has_totals = vocabulary.preparation.has_totals
    extra = {VALUES: pa.list_(pa.float32()), **({TOTAL: pa.float64()} if has_totals else {})}
    for old, new in options.carried.items():
        if new in extra:
            raise InputError(
                f"the name {new!r} for a carried obs column is taken in folders of {vocabulary.family}; name it "
                f"otherwise, as in --obs another_name={old}"
            )
    return extra


def _tokenize_to_folder(
    entries: Sequence[Any],
    folder: Path,
    vocabulary: Vocabulary | ValueGenes,
    options: reading.ReadOptions,
    workers: int,
    resume: bool,
    overwrite: bool,
    shard_bytes: int,
    progress: bool | None,
    rows: Sequence[np.ndarray] | None = None,
) -> None:
    extra = _extra_types(vocabulary, options)
    prepared = reading.prepare(entries, vocabulary, options, is_resumable=True, rows=rows)
    try:
        types = joined_types([entry.carried_types for entry in prepared], options)
        names = [entry.name for entry in prepared]
        schema = token_schema(vocabulary.input_ids_dtype, types, names, extra)
        plan = {**_plan(prepared, vocabulary, options), "shard_bytes": shard_bytes}
        output = TokenOutput(
            folder, schema=schema, sources=names, plan=plan, resume=resume, overwrite=overwrite, shard_bytes=shard_bytes
        )
        try:
            if not output.is_finished:
                _write(output, prepared, vocabulary, options, types, schema, workers, progress)
        except Exception:
            output.discard_if_empty()
            raise
        finally:
            output.close()
    finally:
        reading.close_all(prepared)


def _write(
    output: TokenOutput,
    prepared: list[reading.PreparedInput],
    vocabulary: Vocabulary | ValueGenes,
    options: reading.ReadOptions,
    types: Mapping[str, pa.DataType],
    schema: pa.Schema,
    workers: int,
    progress: bool | None,
) -> None:
    start = output.progress["source"], output.progress["row"]
    cells = [dict(tally) for tally in output.progress["cells"]] or [empty_tally(entry.name) for entry in prepared]
    n_asked, n_done = sum(entry.n_asked for entry in prepared), sum(tally["read"] for tally in cells)
    bar = Progress(n_asked, "tokenizing", "cells", progress, initial=n_done)
    ranked = _ranked_blocks(prepared, vocabulary, options, types, workers, start, schema)
    try:
        for block, batch in ranked:
            add_tally(cells[block.source], block.tally)
            _warn_of_totals(prepared[block.source], block.tally)
            output.write(batch, source=block.source, row=block.next_row, cells=cells)
            bar.update(block.tally["read"])
        if not output.n_cells:
            raise InputError(nothing_left(cells))
        output.finish(source=len(prepared), cells=cells)
    finally:
        ranked.close()
        bar.close()


def _warn_of_totals(entry: reading.PreparedInput, tally: Mapping[str, Any]) -> None:
    message = about_totals(entry.name, entry.n_counts_column, tally)
    if message is not None:
        warn(message)


def _ranked_blocks(
    prepared: list[reading.PreparedInput],
    vocabulary: Vocabulary | ValueGenes,
    options: reading.ReadOptions,
    types: Mapping[str, pa.DataType],
    workers: int,
    start: tuple[int, int] = (0, 0),
    schema: pa.Schema | None = None,
) -> Generator[tuple[Ranked, pa.RecordBatch | None]]:
    """Every block of cells from a position on, as tokens, in order; as a record batch where there is a schema."""
    max_len = options.max_len or vocabulary.max_len

    def work(task: reading.Task) -> tuple[Ranked, pa.RecordBatch | None]:
        if isinstance(vocabulary, ValueGenes):
            block = value_cells(task, vocabulary, max_len)
        else:
            block = rank(task, vocabulary, max_len)
        if schema is None or not len(block.lengths):
            return block, None
        columns = {
            **block.carried,
            **block.extra,
            "length": block.lengths,
            "source_file": np.full(len(block.rows), block.source, dtype=np.int64),
            "source_row": block.rows,
        }
        return block, record_batch(schema, block.values, columns)

    source, row = start
    has_keys = isinstance(vocabulary, ValueGenes) and vocabulary.is_drawn
    tasks = reading.tasks(prepared, options, types, source=source, row=row, rows=BLOCK_ROWS, has_keys=has_keys)
    return ordered_map(work, tasks, workers=workers)


def _tokenize_in_memory(
    adata: Any,
    vocabulary: Vocabulary | ValueGenes,
    options: reading.ReadOptions,
    workers: int,
    rows: Sequence[np.ndarray] | None = None,
) -> TokenizedCells:
    prepared = reading.prepare([adata], vocabulary, options, rows=rows)
    tally = empty_tally(prepared[0].name)
    blocks = []
    try:
        ranked = _ranked_blocks(prepared, vocabulary, options, {}, workers)
        for block, _ in ranked:
            add_tally(tally, block.tally)
            _warn_of_totals(prepared[0], block.tally)
            blocks.append(block)
    finally:
        reading.close_all(prepared)
    if not tally["written"]:
        raise InputError(nothing_left([tally]))
    cu_seqlens = np.zeros(tally["written"] + 1, dtype=np.int64)
    np.cumsum(np.concatenate([block.lengths for block in blocks]), out=cu_seqlens[1:])
    tokens = TokenizedCells(
        values=np.concatenate([block.values for block in blocks]),
        cu_seqlens=cu_seqlens,
        report={**_plan(prepared, vocabulary, options), "cells": [tally]},
        kept_rows=np.concatenate([block.rows for block in blocks]),
    )
    if not isinstance(vocabulary, ValueGenes):
        return tokens
    found = TokenizedValues(*tokens)
    found.amounts = np.concatenate([block.extra[VALUES] for block in blocks])
    has_totals = vocabulary.preparation.has_totals
    found.totals = np.concatenate([block.extra[TOTAL] for block in blocks]) if has_totals else None
    return found
