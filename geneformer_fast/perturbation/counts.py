"""Perturbation of counts: a gene's counts are multiplied, and the cell is ranked again, as an experiment does it.

Counts are read of the cells of a run alone and kept; before anything is computed they are ranked as they are, which has
to give the tokens of the folder.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from geneformer_fast.counts import expand_inputs
from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.perturbation.edited_cells import EditedCells
from geneformer_fast.perturbation.edits import Edits
from geneformer_fast.perturbation.variants import Variants
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization import inputs as reading
from geneformer_fast.tokenization.arrow import TokenFolder
from geneformer_fast.tokenization.vocabulary import Vocabulary

# Cells that are read, and ranked to compare them with their tokens, at a time.
_CELLS_AT_ONCE = 1024


@dataclass(frozen=True)
class CountEdits(Edits):
    """Edits of counts, for the cells of one run.

    Attributes
    ----------
    counts
        Those of the cells.
    """

    counts: CellCounts | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, edits: Edits, counts: CellCounts) -> CountEdits:
        """The same edits, of kind ``"counts"``, with the counts of the cells."""
        asked = {each.name: getattr(edits, each.name) for each in dataclasses.fields(edits) if each.init}
        return cls(**asked, counts=counts)

    def on(self, cells: Ragged, ranks: np.ndarray | None = None) -> EditedCells:
        """The edits of the cells with some ranks in the run."""
        assert self.counts is not None
        assert ranks is not None
        return CountedCells(self, cells, self.counts, np.asarray(ranks))


class CountedCells(EditedCells):
    """Variants of cells whose genes are ranked again after some of their counts were multiplied."""

    def __init__(self, edits: Edits, cells: Ragged, counts: CellCounts, ranks: np.ndarray) -> None:
        super().__init__(edits, cells)
        self._counts, self._ranks = counts, ranks

    def variants(self, start: int, stop: int) -> Variants:
        """Variants ``start`` to ``stop`` (exclusive) of the batch."""
        edits, device = self.edits, self.cells.values.device
        cell, dose, item, perturbed, _ = self._numbered(start, stop)
        factors = torch.tensor(edits.doses, dtype=torch.float64)[dose]
        values, n_tokens = self._counts.ranked(self._ranks[cell.numpy()], perturbed.numpy(), factors.numpy())
        tokens, lengths = torch.from_numpy(values), torch.from_numpy(n_tokens)
        variant = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        source = self._sources(cell[variant], tokens)
        starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        place = torch.arange(len(tokens)) - starts[variant]
        is_common = (source >= 0) & (place >= edits.front) & (place < lengths[variant] - edits.back)
        for column in perturbed.unbind(1):
            is_common &= tokens != column[variant]
        longest = int(lengths.max()) if len(lengths) else 0
        made = Ragged(tokens.to(device), starts.to(device), longest)
        return Variants(
            made, cell.to(device), cell.to(device), None, source.to(device), is_common.to(device), perturbed, item, dose
        )

    def _sources(self, cell: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[T] where each token of a cell's variant stands among the values of the batch; -1 where the cell lacks it."""
        n_tokens = int(torch.cat([tokens, self._values]).max()) + 1 if len(tokens) else 1
        keys, order = (self.cells.cell_index().cpu() * n_tokens + self._values).sort()
        wanted = cell * n_tokens + tokens
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[place] == wanted, order[place], -1)


class CellCounts:
    """Counts of the cells of a run, and how a cell is ranked after some of them were multiplied.

    Attributes
    ----------
    digests
        SHA-256 of every input that the run's cells are from.
    """

    def __init__(
        self, vocabulary: Vocabulary, max_len: int, sources: Sequence[_SourceCounts], digests: Sequence[str]
    ) -> None:
        self.digests = list(digests)
        self._vocabulary, self._sources = vocabulary, sources
        self._keep = vocabulary.gene_capacity - (vocabulary.max_len - max_len)
        n_cells = sum(len(source.ranks) for source in sources)
        self._source, self._row = np.zeros(n_cells, dtype=np.int64), np.zeros(n_cells, dtype=np.int64)
        for number, source in enumerate(sources):
            self._source[source.ranks] = number
            self._row[source.ranks] = np.arange(len(source.ranks))

    @classmethod
    def read(
        cls,
        folder: TokenFolder,
        cells: np.ndarray,
        vocabulary: Vocabulary,
        counts: Any = None,
        *,
        of_run: np.ndarray | None = None,
    ) -> CellCounts:
        """Counts that some cells of a token folder were made of.

        Parameters
        ----------
        folder
            The tokens, which say of what they were made and how.
        cells
            [n] numbers of the cells, by rank.
        vocabulary
            The one that made the tokens, with its medians.
        counts
            AnnData, file or files of counts, in the order of the folder's inputs; None takes the files that the folder
            names.
        of_run
            Numbers of all cells of the run, where these are a part of it: the files of all are the run's.

        Raises
        ------
        InputError
            There are no such counts, or they are not those of the tokens.
        """
        options, files = _made_of(folder)
        sources = _named_inputs(folder, files, counts)
        file_of, row_of = _origins(folder, cells, len(sources))
        used = np.unique(file_of if of_run is None else _origins(folder, of_run, len(sources))[0])
        # Ascending rows, which are read in one pass over each file.
        ranks = [np.flatnonzero(file_of == number) for number in used]
        ranks = [each[np.argsort(row_of[each], kind="stable")] for each in ranks]
        prepared = reading.prepare(
            [sources[number] for number in used], vocabulary, options, rows=[row_of[each] for each in ranks]
        )
        try:
            for entry, each in zip(prepared, ranks, strict=True):
                if len(each) and row_of[each[-1]] >= entry.n_cells:
                    raise _other_counts(folder, entry.name, f"it has {entry.n_cells:,} cells")
            found = _read(prepared, options, ranks, vocabulary)
        finally:
            reading.close_all(prepared)
        digests = [str(entry.description["sha256"]) for entry in prepared]
        made = cls(vocabulary, options.max_len or vocabulary.max_len, found, digests)
        made._compare(folder, cells)
        return made

    def ranked(self, ranks: np.ndarray, perturbed: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of cells after the counts of some of their genes were multiplied.

        Parameters
        ----------
        ranks
            [V] the cells, as often as they have variants.
        perturbed
            [V, k] tokens of the genes, filled up with -1.
        factors
            [V] what their counts are multiplied by.

        Returns
        -------
        values, lengths
            int64 packed tokens, special tokens included, and [V] int64 how many each has.
        """
        which, lengths = self._source[ranks], np.zeros(len(ranks), dtype=np.int64)
        parts = {}
        for number in np.unique(which).tolist():
            rows = np.flatnonzero(which == number)
            block = self._sources[number].multiplied(self._row[ranks[rows]], perturbed[rows], factors[rows])
            parts[number], lengths[rows] = self._rank(self._sources[number], *block)
        if len(parts) == 1:
            return next(iter(parts.values())), lengths
        values, of = np.zeros(int(lengths.sum()), dtype=np.int64), np.repeat(which, lengths)
        for number, part in parts.items():
            values[of == number] = part
        return values, lengths

    def _rank(
        self, source: _SourceCounts, indptr: np.ndarray, indices: np.ndarray, data: np.ndarray, totals: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        from geneformer_kernels.ops.rank_genes.host import rank_block

        ends = [-1 if token is None else token for token in (self._vocabulary.cls_id, self._vocabulary.eos_id)]
        values, lengths = rank_block(
            indptr, indices, data, totals, source.columns, is_division=source.is_division, keep=self._keep,
            first=ends[0], last=ends[1], out_dtype=np.int64, is_checked=True,
        )  # fmt: skip
        if lengths.all():
            return values, lengths
        # A cell without any gene left has its special tokens still, as after a deletion.
        special = np.array([token for token in ends if token >= 0], dtype=np.int64)
        gone = np.flatnonzero(lengths == 0)
        values = np.insert(values, np.repeat(np.cumsum(lengths)[gone], len(special)), np.tile(special, len(gone)))
        return values, np.where(lengths == 0, len(special), lengths)

    def _compare(self, folder: TokenFolder, cells: np.ndarray) -> None:
        """Counts that are as they were have to give the tokens that there are."""
        for start in range(0, len(cells), _CELLS_AT_ONCE):
            ranks = np.arange(start, min(start + _CELLS_AT_ONCE, len(cells)))
            stored, bounds = folder.read(cells[ranks])
            values, lengths = self.ranked(ranks, np.full((len(ranks), 1), -1), np.ones(len(ranks)))
            is_same = lengths == np.diff(bounds)
            if is_same.all():
                is_same = np.add.reduceat(values != stored, bounds[:-1]) == 0
            if not is_same.all():
                wrong = ranks[int(np.argmin(is_same))]
                name = self._sources[self._source[wrong]].name
                raise _other_counts(folder, name, f"ranked again, they give other tokens for cell {cells[wrong]}")


@dataclass(frozen=True)
class _SourceCounts:
    """Counts of some cells of one file: a row for each of ``ranks``, as the file stores them."""

    name: str
    ranks: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    totals: np.ndarray | None
    columns: Any
    column_to_token: np.ndarray
    is_division: bool
    is_counted: np.ndarray

    def multiplied(
        self, rows: np.ndarray, perturbed: np.ndarray, factors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """indptr, indices, data and totals of rows, in which some genes' counts are multiplied."""
        from geneformer_fast.counts.loops import row_totals

        sizes = self.indptr[rows + 1] - self.indptr[rows]
        indptr = np.concatenate([[0], np.cumsum(sizes)])
        row = np.repeat(np.arange(len(rows)), sizes)
        entries = np.arange(indptr[-1]) + (self.indptr[rows] - indptr[:-1])[row]
        indices, data = self.indices[entries], self.data[entries]
        tokens = self.column_to_token[indices]
        is_changed = np.zeros(len(entries), dtype=bool)
        for column in perturbed.T:
            is_changed |= (tokens == column[row]) & (tokens >= 0)
        if is_changed.any():
            data = self._as_floats(data)
            before = data[is_changed].astype(np.float64)
            data[is_changed] = before * factors[row[is_changed]]
        if self.totals is None:
            totals = row_totals(indptr, indices, data, self.is_counted)
        else:
            totals = self.totals[rows]
            if is_changed.any():
                changes = data[is_changed].astype(np.float64) - before
                totals = self._as_floats(totals)
                totals += np.bincount(row[is_changed], changes, len(rows)).astype(totals.dtype)
        # What a row without counts is divided by does not matter.
        return indptr, indices, data, np.where(totals > 0, totals, totals.dtype.type(1))

    def _as_floats(self, values: np.ndarray) -> np.ndarray:
        """A copy that holds fractions; whole numbers take the precision that they are ranked in."""
        if values.dtype.kind == "f":
            return values.copy()
        others = np.float64 if self.totals is None else self.totals.dtype
        is_single = np.result_type(self.data.dtype, others) == np.float32
        return values.astype(np.float32 if is_single else np.float64)


def _made_of(folder: TokenFolder) -> tuple[reading.ReadOptions, list[str]]:
    """How a folder's counts were read, and from which files."""
    manifest = folder.manifest
    if manifest is None or not {"source_file", "source_row"} <= set(folder.columns):
        raise UnsupportedError(
            f"{folder.path} does not say which counts its tokens were made of, and kind 'counts' ranks those again; "
            "tokenize with geneformer-fast, which writes that down"
        )
    said = manifest.get("options")
    options = dict(said) if isinstance(said, dict) else {}
    options.pop("obs", None)
    options["use_filter_pass"] = options.pop("filter_pass", True)
    known = {each.name for each in dataclasses.fields(reading.ReadOptions)}
    # What was doubted when the tokens were made has been answered.
    asked = {name: value for name, value in options.items() if name in known} | {"allow_duplicate_cells": True}
    return reading.ReadOptions(**asked), [str(entry.get("path", "")) for entry in manifest["inputs"]]


def _named_inputs(folder: TokenFolder, files: list[str], counts: Any) -> list[Any]:
    """Where the counts of each of the folder's inputs are."""
    if counts is None:
        absent = next((name for name in files if not Path(name).exists()), None)
        if absent is not None:
            raise InputError(
                f"{folder.path} was made of {absent or 'an AnnData'}, which is not there; say where its counts are "
                "with counts (--counts)"
            )
        return list(files)
    if hasattr(counts, "obs_names"):
        found = [counts]
    else:
        paths = [counts] if isinstance(counts, str | os.PathLike) else list(counts)
        found = expand_inputs([os.fspath(path) for path in paths])
    if len(found) != len(files):
        raise InputError(
            f"{folder.path} was made of {len(files):,} inputs, and counts (--counts) names {len(found):,}; give as "
            "many, in their order"
        )
    return found


def _origins(folder: TokenFolder, cells: np.ndarray, n_sources: int) -> tuple[np.ndarray, np.ndarray]:
    """[n] input of each cell, and its row there."""
    chunks = folder.column("source_file").chunks
    file_of = np.concatenate([np.asarray(chunk.indices) for chunk in chunks])[cells].astype(np.int64)
    row_of = folder.column("source_row").to_numpy()[cells].astype(np.int64)
    if len(cells) and not (0 <= file_of.min() <= file_of.max() < n_sources and row_of.min() >= 0):
        raise InputError(f"{folder.path}: source_file or source_row name no place; tokenize again")
    return file_of, row_of


def _read(
    prepared: list[reading.PreparedInput], options: reading.ReadOptions, ranks: list[np.ndarray], vocabulary: Vocabulary
) -> list[_SourceCounts]:
    """The rows that are asked for, of every input."""
    pieces: list[list[tuple[np.ndarray, ...]]] = [[] for _ in prepared]
    for task in reading.tasks(prepared, options, {}, rows=_CELLS_AT_ONCE):
        block, is_asked = task.block, task.is_asked
        assert is_asked is not None
        sizes = np.diff(block.indptr)
        entries = np.repeat(is_asked, sizes)
        totals = np.zeros(0) if task.n_counts is None else task.n_counts[is_asked]
        # Copies: the block's memory is used again.
        pieces[task.source].append((sizes[is_asked], block.indices[entries], block.data[entries], totals))
        block.release()
    found = []
    for entry, each, rows in zip(prepared, pieces, ranks, strict=True):
        if not each:  # an input of other parts of the run
            continue
        sizes, indices, data, totals = (np.concatenate(part) for part in zip(*each, strict=True))
        assert entry.columns is not None
        codes = entry.columns.codes
        found.append(
            _SourceCounts(
                name=entry.name,
                ranks=rows,
                indptr=np.concatenate([[0], np.cumsum(sizes)]),
                indices=indices,
                data=data,
                totals=None if entry.n_counts_column is None else totals,
                columns=entry.columns,
                column_to_token=entry.gene_map.column_to_token,
                is_division=bool(entry.description["is_dense"]),
                is_counted=codes != -1 if vocabulary.totals_over_vocabulary else np.ones(len(codes), dtype=np.bool_),
            )
        )
    return found


def _other_counts(folder: TokenFolder, name: str, why: str) -> InputError:
    return InputError(
        f"{name} does not hold the counts that {folder.path} was made of: {why}; name the right ones with counts "
        "(--counts), or tokenize them again"
    )
