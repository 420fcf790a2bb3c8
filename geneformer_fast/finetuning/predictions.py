"""Predictions: probabilities of cells and genes from a classifier, as tables with the source of every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_fast.data.values import values_of
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import OutputError
from geneformer_fast.extract.cells import Cells
from geneformer_fast.extract.encoding import EncodingRun
from geneformer_fast.files.writing import whole_file
from geneformer_fast.finetuning.labels import Task
from geneformer_fast.finetuning.losses import IGNORED
from geneformer_fast.finetuning.objectives import GeneMeans
from geneformer_fast.heads import CellClassifier, GeneClassifier
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder


class ClassifyingRun(EncodingRun):
    """One pass of a classifier over cells; a row of its result holds the logits of a cell."""

    what = "classifying"

    def __init__(self, encoder: Encoder, cells: Cells, token_budget: int | None, progress: bool | None) -> None:
        super().__init__(encoder, cells, "mean", "last", token_budget, progress)
        assert isinstance(encoder.head, CellClassifier | GeneClassifier)
        self.width = encoder.head.classifier.out_features

    def _pooled(self, hidden: Ragged, tokens: Ragged, measured: torch.Tensor | None) -> np.ndarray:
        return self.encoder.logits(hidden).float().cpu().numpy()

    def gene_occurrences(self, codes: np.ndarray) -> tuple[GeneMeans, np.ndarray, np.ndarray]:
        """Classify genes wherever they occur.

        Parameters
        ----------
        codes
            [V] classes of tokens; those of -100 are not asked for.

        Returns
        -------
        means, truth, probabilities
            Mean probabilities of the genes; class [N] and probabilities [N, K] float32 of every occurrence.
        """
        means = GeneMeans(codes)
        truth, found = [np.zeros(0, np.int64)], [np.zeros((0, self.width), np.float32)]
        for tokens, logits in self._of_genes(codes):
            found.append(means.add(tokens, logits).numpy())
            truth.append(codes[tokens.cpu().numpy()])
        return means, np.concatenate(truth), np.concatenate(found)

    def gene_means(self, codes: np.ndarray) -> GeneMeans:
        """Mean probabilities of the genes whose code is not -100, in memory that does not grow with the cells."""
        means = GeneMeans(codes)
        for tokens, logits in self._of_genes(codes):
            means.add(tokens, logits)
        return means

    def _of_genes(self, codes: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        asked = torch.from_numpy(codes).to(self.encoder.device)

        def finish(hidden: Ragged, tokens: Ragged, _: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            rows = (asked[tokens.values] != IGNORED).nonzero().squeeze(1)
            return tokens.values[rows], self.encoder.logits(hidden, rows)

        for _, _, result in self._results(finish):
            yield result


def some_cells(tokens: TokenFolder, cells: np.ndarray, identity: Mapping[str, Any]) -> Cells:
    """Cells of a token folder as what :class:`ClassifyingRun` goes over; row i is ``cells[i]``."""
    lengths = tokens.lengths()[cells]
    return Cells(
        lengths, lambda numbers: tokens.read(cells[numbers]), np.arange(len(cells)), len(cells), identity, [],
        tokens.column, values=None if (of_values := values_of(tokens)) is None else of_values.of(cells),
    )  # fmt: skip


def probabilities_of(logits: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """[n, K_t] float32 probabilities per task from the logits of all tasks [n, sum K_t]; rows of NaN stay so."""
    parts = np.split(np.asarray(logits, dtype=np.float64), np.cumsum(sizes)[:-1], axis=1)
    powers = [np.exp(part - part.max(1, keepdims=True)) for part in parts]
    return [(power / power.sum(1, keepdims=True)).astype(np.float32) for power in powers]


def source_columns(tokens: TokenFolder, cells: np.ndarray) -> dict[str, pa.Array]:
    """``cell`` (its index in the token folder), and where the folder knows them its file, row and name there."""
    columns: dict[str, pa.Array] = {"cell": pa.array(cells, pa.int64())}
    for name in ("source_file", "source_row", "obs_names"):
        if name in tokens.columns:
            column = tokens.column(name).combine_chunks()
            array = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            taken = array.take(pa.array(cells, pa.int64()))
            columns[name] = taken.cast(pa.string()) if pa.types.is_dictionary(taken.type) else taken
    return columns


def task_columns(
    name: str, classes: Sequence[str], probabilities: np.ndarray, truth: np.ndarray | None = None
) -> dict[str, pa.Array]:
    """Truth (if known), prediction, its probability, and the probability of every class.

    Parameters
    ----------
    name
        Of the task: the columns are ``<name>``, ``<name>_predicted``, ``<name>_probability`` and ``<name>: <class>``.
    classes
        [K] names.
    probabilities
        [n, K]; rows of NaN (cells without any gene) have no prediction.
    truth
        [n] classes, -100 where unknown.
    """
    known = ~np.isnan(probabilities[:, 0])
    predicted = np.where(known, probabilities.argmax(1), -1)
    top = probabilities.max(1)
    columns: dict[str, pa.Array] = {}
    if truth is not None:
        columns[name] = pa.array([classes[code] if code >= 0 else None for code in truth], pa.string())
    columns[f"{name}_predicted"] = pa.array([classes[c] if c >= 0 else None for c in predicted], pa.string())
    columns[f"{name}_probability"] = pa.array(top, pa.float32(), mask=~known)
    for code, label in enumerate(classes):
        columns[f"{name}: {label}"] = pa.array(probabilities[:, code], pa.float32(), mask=~known)
    return columns


def cell_table(
    tokens: TokenFolder, cells: np.ndarray, tasks: Sequence[Task], probabilities: Sequence[np.ndarray], fold: int
) -> pa.Table:
    """Predictions of the test cells of one fold."""
    columns = source_columns(tokens, cells)
    columns["fold"] = pa.array(np.full(len(cells), fold), pa.int64())
    for task, values in zip(tasks, probabilities, strict=True):
        columns |= task_columns(task.name, task.classes, values, task.codes[cells])
    return pa.table(columns)


def write_parquet(table: pa.Table, path: Path, provenance: Mapping[str, str] | None = None) -> Path:
    """A Parquet file that is there whole or not at all; provenance goes into its schema."""
    import pyarrow.parquet as pq

    if provenance:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **provenance})
    with whole_file(path) as temporary:
        pq.write_table(table, temporary)
    return path


def read_parquet(path: Path) -> pa.Table:
    """The table of a Parquet file."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{path} cannot be read ({error}); remove its folder to make that fold again") from None


def task_probabilities(table: pa.Table, name: str, classes: Sequence[str]) -> np.ndarray:
    """[n, K] probabilities of one task out of a table of predictions."""
    return np.stack([table.column(f"{name}: {label}").to_numpy() for label in classes], axis=1)
