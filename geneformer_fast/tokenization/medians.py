"""Corpus medians, from which a vocabulary for an own corpus or species is made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geneformer_fast import families
from geneformer_fast.arguments import checked, renamed
from geneformer_fast.counts import expand_inputs
from geneformer_fast.counts.identifiers import id_text, is_missing, without_version
from geneformer_fast.errors import InputError
from geneformer_fast.files.locks import folder_lock
from geneformer_fast.files.writing import write_json
from geneformer_fast.progress import Progress
from geneformer_fast.tokenization import inputs as reading
from geneformer_fast.tokenization.arguments import resolve_vocabulary
from geneformer_fast.tokenization.doubts import about_totals, totals_tally, warn
from geneformer_fast.tokenization.pipeline import default_workers, ordered_map
from geneformer_fast.tokenization.quantiles import MedianSearch, normalised_values
from geneformer_fast.tokenization.totals import cell_totals
from geneformer_fast.tokenization.vocabulary import Vocabulary, check_vocabulary_folder

if TYPE_CHECKING:
    from anndata import AnnData

#: Memory for the search, in bytes.
MEMORY_BYTES = 192 * 2**20
#: What the folder says about the corpus beside the vocabulary.
CORPUS_FILE = "corpus.json"
_BLOCK_ROWS = 1024


@renamed(layer="counts_layer", mapping="dictionary")
@checked
def medians(
    data: str | os.PathLike[str] | AnnData | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    family: str = families.DEFAULT_LAYOUT,
    name: str = "custom",
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    preset: str | None = None,
    counts_layer: str | None = None,
    gene_column: str | None = None,
    allow_float: bool = False,
    allow_duplicate_cells: bool = False,
    allow_few_genes: bool = False,
    n_counts: str = "auto",
    filter_pass: bool = True,
    min_cells: int = 1,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> Vocabulary:
    """Make a vocabulary from a corpus: per gene the exact median of its non-zero ``x / n_counts * 10000``.

    Reads the corpus a few times (mostly three), in bounded memory.

    Parameters
    ----------
    data
        As in ``tokenize``.
    out
        Folder to save the vocabulary in, with a ``corpus.json`` that says what it was made of; None saves nothing.
    family
        ``"v1"``, ``"v2"`` or ``"bionemo"`` (:func:`geneformer_fast.families.layouts`): special tokens and length.
    name
        What the vocabulary is called.
    dictionary, preset
        Gene dictionaries, as in ``tokenize``, whose aliases turn the ids of the files into gene ids, and to whose genes
        the result is restricted. Without them, ids are taken as they are, less the version of an Ensembl id.
    counts_layer, gene_column, allow_float, allow_duplicate_cells, allow_few_genes, n_counts, filter_pass
        As in ``tokenize``.
    workers, progress
        As in ``tokenize``.
    min_cells
        Leave out genes found in fewer cells.
    overwrite
        Replace a vocabulary that the folder holds.
    memory_bytes
        For the search; less memory means more passes.

    Returns
    -------
    Vocabulary
        Token ids follow the sorted gene ids.

    Raises
    ------
    InputError
        An input cannot be read or holds no counts, or no gene is found in enough cells.
    OutputError
        The folder holds something already, or another process is writing into it.

    References
    ----------
    Theodoris et al., Nature 618 (2023), "Transfer learning enables predictions in network biology" (there with t-digest
    approximations).
    """
    if preset is not None and dictionary is None:
        raise InputError("preset (--preset) chooses among the dictionaries of dictionary= (--dictionary); give both")
    given = None if dictionary is None else resolve_vocabulary(dictionary, preset)
    if out is not None:
        check_vocabulary_folder(Path(out), overwrite)
    with contextlib.nullcontext() if out is None else _writing_alone(Path(out), overwrite):
        is_object = hasattr(data, "obs_names")
        entries = [data] if is_object else expand_inputs(data)  # type: ignore[arg-type]
        options = reading.ReadOptions(
            layer=counts_layer,
            gene_column=gene_column,
            allow_float=allow_float,
            allow_duplicate_cells=allow_duplicate_cells,
            allow_few_genes=allow_few_genes,
            n_counts=n_counts,
            use_filter_pass=filter_pass,
        )
        known = given or Vocabulary.from_medians(dict.fromkeys(_all_genes(entries, options), 1.0), family, name=name)
        prepared = reading.prepare(entries, known, options)
        search = MedianSearch(known.n_tokens, memory_bytes)
        try:
            n_passes = _search(search, prepared, known, options, workers or default_workers(), progress)
        finally:
            reading.close_all(prepared)
        found = {
            gene: float(search.medians[token])
            for gene, token in known.token_ids.items()
            if search.counts[token] >= max(min_cells, 1)
        }
        if not found:
            raise InputError(f"no gene is found in {max(min_cells, 1)} cells or more; nothing to make a vocabulary of")
        vocabulary = Vocabulary.from_medians(
            found,
            family,
            name=name,
            aliases={alias: gene for alias, gene in known.aliases.items() if gene in found},
            symbols={symbol: gene for symbol, gene in known.symbols.items() if gene in found},
        )
        if out is not None:
            _save(vocabulary, Path(out), prepared, options, search, known, n_passes)
    return vocabulary


@contextlib.contextmanager
def _writing_alone(folder: Path, overwrite: bool) -> Iterator[None]:
    """While nobody else makes a vocabulary in a folder; one that was made for it is gone again after a failure."""
    is_new = not folder.exists()
    try:
        with folder_lock(folder):
            check_vocabulary_folder(folder, overwrite)  # again, since another process may have ended meanwhile
            yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _all_genes(entries: Iterable[Any], options: reading.ReadOptions) -> list[str]:
    genes: dict[str, None] = {}
    for data in entries:
        with options.open(data) as source:
            for identifier in id_text(source.gene_ids()):
                if not is_missing(identifier):
                    genes[without_version(identifier) or identifier] = None
    return list(genes)


def _search(
    search: MedianSearch,
    prepared: list[reading.PreparedInput],
    known: Vocabulary,
    options: reading.ReadOptions,
    workers: int,
    progress: bool | None,
) -> int:
    """Show the search the corpus until every median is known; returns how often that was."""
    genes_of = [_gene_tables(entry) for entry in prepared]
    tallies: dict[int, dict[str, int]] = {}

    def work(task: reading.Task) -> tuple[int, np.ndarray, np.ndarray]:
        block = task.block
        totals = np.asarray(cell_totals(task, known), dtype=np.float64)
        is_wanted = np.ones(block.n_cells, dtype=np.bool_) if task.is_wanted is None else task.is_wanted
        found = normalised_values(
            block.indptr, block.indices, block.data, totals, is_wanted, *genes_of[task.source], known.n_tokens
        )
        n_cells = block.n_cells
        if not block.start:
            tallies[task.source] = totals_tally(task)
        block.release()
        return n_cells, *found

    n_passes = 0
    n_cells = sum(entry.n_cells for entry in prepared)
    while not search.is_done:
        n_passes += 1
        tasks = reading.tasks(prepared, options, {}, rows=_BLOCK_ROWS)
        results = ordered_map(work, tasks, workers=workers)
        with Progress(n_cells, f"medians, pass {n_passes}", "cells", progress) as bar:
            try:
                for n_block, genes, values in results:
                    search.add(genes, values)
                    bar.update(n_block)
            finally:
                results.close()
        search.end_pass()
    for source, tally in sorted(tallies.items()):
        message = about_totals(prepared[source].name, prepared[source].n_counts_column, tally)
        if message is not None:
            prepared[source].description["warnings"].append(message)
            warn(message)
    return n_passes


def _gene_tables(entry: reading.PreparedInput) -> tuple[np.ndarray, np.ndarray]:
    """Per column the token id, -1 for none, and whether other columns share it."""
    tokens = entry.gene_map.column_to_token
    counts = np.bincount(tokens[tokens >= 0], minlength=int(tokens.max(initial=0)) + 1)
    return tokens, (tokens >= 0) & (counts[tokens] > 1)


def _save(
    vocabulary: Vocabulary,
    folder: Path,
    prepared: list[reading.PreparedInput],
    options: reading.ReadOptions,
    search: MedianSearch,
    known: Vocabulary,
    n_passes: int,
) -> None:
    """The vocabulary last: a folder with vocabulary.json is whole."""
    content = {
        "vocabulary": vocabulary.identity(),
        "options": options.to_dict(),
        "inputs": [entry.description for entry in prepared],
        "n_passes": n_passes,
        "cells_per_gene": {gene: int(search.counts[known.token_ids[gene]]) for gene in sorted(vocabulary.token_ids)},
    }
    write_json(folder / CORPUS_FILE, content)
    vocabulary.save(folder)
