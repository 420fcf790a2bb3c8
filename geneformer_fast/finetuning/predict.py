"""Labels for new cells (or genes) from a fine-tuned model: into an AnnData, an .h5ad copy, or a table."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_fast import __version__
from geneformer_fast.arguments import checked
from geneformer_fast.checkpoints import load
from geneformer_fast.config import device_named
from geneformer_fast.data.selection import Selection
from geneformer_fast.errors import OutputError
from geneformer_fast.extract.budget import MemoryBudget, memory_budget_of
from geneformer_fast.extract.cells import Cells, asked_columns, copy_of, is_anndata, is_token_folder, open_cells
from geneformer_fast.extract.encoding import scheme_of
from geneformer_fast.extract.files import check_columns, hdf5_closing
from geneformer_fast.extract.options import PREDICT, PREDICTED, Request, check_h5ad, check_options
from geneformer_fast.extract.outputs import Output, alone, write_table
from geneformer_fast.extract.run import find_vocabulary
from geneformer_fast.finetuning import names as naming
from geneformer_fast.finetuning.losses import IGNORED
from geneformer_fast.finetuning.models import config_of_card, read_card
from geneformer_fast.finetuning.predictions import ClassifyingRun, probabilities_of, task_columns
from geneformer_fast.tokenization.values import ValueGenes
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas
    from anndata import AnnData

    from geneformer_fast.encoder import Encoder

SUFFIXES = PREDICTED
# Of a row and class: logits and probabilities in float32, what is between them in float64, the column of the table and
# what that is written as; and of a row and task, the prediction as text and its probability.
_RESULT_BYTES, _TASK_BYTES = 4 + 4 + 4 * 8 + 2 * 4, 160


@checked
def predict(
    data: AnnData | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    counts_layer: str | None = None,
    gene_column: str | None = None,
    allow_float: bool = False,
    allow_duplicate_cells: bool = False,
    allow_few_genes: bool = False,
    n_counts: str = "auto",
    obs: str | Mapping[str, str] | Sequence[str] | None = None,
    where: Mapping[str, Any] | None = None,
    max_cells: int | None = None,
    seed: int | None = None,
    key_added: str | None = None,
    copy: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token_budget: int | None = None,
    memory_budget: str | int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> AnnData | pandas.DataFrame | Path | None:
    """Tell the classes of cells, or of the genes they express, with a fine-tuned model.

    Parameters
    ----------
    data
        An AnnData of counts; a file, folder, glob or list of them that ``tokenize`` reads; or a token folder.
    model
        Folder that :func:`finetune_cells` or :func:`finetune_genes` made (``out/final``), or any
        BertForSequenceClassification or BertForTokenClassification with ``id2label``.
    out
        ``.parquet`` or ``.csv``, a table of the cells (or genes) that have predictions; or ``.h5ad``, a copy of an
        .h5ad input with the predictions added.
    dictionary, counts_layer, gene_column, allow_float, allow_duplicate_cells, allow_few_genes, n_counts
        As in :func:`geneformer_fast.embed`.
    obs
        Columns of obs that go into the table, as in ``tokenize``; a token folder brings all that it carries.
    where, max_cells, seed
        Which cells are taken, as in :func:`geneformer_fast.embed`; of genes it is the mean over these cells that is
        told. Others have no prediction, and no row in a table.
    key_added
        What the columns are called; None is the task's name (the label column it was trained on).
    copy
        For an AnnData: return a changed copy rather than change ``data``.
    dtype, device, token_budget, memory_budget
        As in :func:`geneformer_fast.embed`.
    overwrite
        Whether ``out`` may exist.
    progress
        Whether to show a progress bar; None shows one on a terminal, and lines of the log elsewhere.

    Returns
    -------
    AnnData, pandas.DataFrame, Path or None
        With ``out`` its path. Else for an AnnData None or the copy: per task ``obs["<task>_predicted"]``,
        ``obs["<task>_probability"]`` and ``obsm["<task>_probabilities"]`` [cells, K], with classes, model and versions
        in ``uns["<task>_predicted"]``; those of an earlier prediction are replaced, nothing else is. For files and
        tokens, and for models of genes, a table with name, file and row of every cell (or a row per gene). Cells
        without any known gene have no prediction.

    Raises
    ------
    CheckpointError
        The model has no head of classes, or two classes of one name.
    OutputError
        A name of the predictions is taken by something that ``predict`` did not make; or as in
        :func:`geneformer_fast.embed`.
    VocabularyError, InputError, UnsupportedError
        As in :func:`geneformer_fast.embed`.
    """
    selection = Selection.of(where, max_cells, seed)
    target = None if out is None else Output(out, overwrite=overwrite, suffixes=SUFFIXES)
    suffix = None if target is None else target.path.suffix
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(memory_budget_of(memory_budget, device_named(device)))
        encoder = load(model, dtype=dtype, device=device)
        card = read_card(Path(model), encoder)
        naming.check_card(card, Path(model))
        is_genes = card["kind"] == "genes"
        counts: dict[str, Any] = {
            "gene_column": gene_column,
            "allow_float": allow_float,
            "allow_duplicate_cells": allow_duplicate_cells,
            "allow_few_genes": allow_few_genes,
            "n_counts": n_counts,
        }
        request = Request(is_anndata(data), is_token_folder(data), suffix, is_genes, has_copy=copy)
        others = {"counts_layer": counts_layer, "obs": obs, "copy": copy, "overwrite": overwrite}
        check_options(PREDICT, request, {**counts, **others, "memory_budget": memory_budget})
        names = [_named(task, card, key_added) for task in card["tasks"]]
        if suffix == ".h5ad":
            check_h5ad(data, is_genes)
            naming.check_h5ad(Path(data), names)  # type: ignore[arg-type]
        elif request.is_in_place and not is_genes:
            naming.check_anndata(data, names)
        asked = asked_columns(obs)
        reading = {**counts, "counts_layer": counts_layer, "obs": asked}
        config = config_of_card(encoder.config, card)
        vocabulary = find_vocabulary(dictionary, model, config)
        if target is not None:
            stack.enter_context(alone(target.path, *target.beside, overwrite=overwrite))
        is_compact = not (request.is_in_place or suffix == ".h5ad")
        opened = open_cells(data, vocabulary, config, reading, progress, selection, is_compact=is_compact)
        cells = stack.enter_context(opened)
        if cells.n_not_taken and not is_genes:
            columns = ", ".join(f"{name}_predicted" for name in names)
            warnings.warn(
                f"{cells.n_not_taken:,} of {cells.n_rows:,} cells were not taken: their rows have no {columns}, and "
                "their probabilities are NaN",
                stacklevel=3,
            )
        run = ClassifyingRun(encoder, cells, token_budget, progress)
        _keep_within(run, memory, suffix, card)
        provenance = _provenance(card, Path(model), encoder, cells)
        if is_genes:
            table = _gene_table(run, card, key_added, vocabulary)
        else:
            if not request.is_in_place:
                check_columns(cells.columns, _own_columns(card, key_added))
            sizes = [len(task["classes"]) for task in card["tasks"]]
            probabilities = probabilities_of(run.to_memory(), sizes)
            if request.is_in_place:
                return _into_anndata(data, card, probabilities, key_added, provenance, copy)
            table = _cell_table(cells, card, probabilities, key_added)
        if target is None:
            return table.to_pandas()
        with target.writing(provenance) as path:
            if suffix == ".h5ad":
                _write_h5ad(Path(data), path, card, probabilities, key_added, provenance)  # type: ignore[arg-type]
            else:
                write_table(table, path, provenance)
    return target.path


def _keep_within(run: ClassifyingRun, memory: MemoryBudget | None, suffix: str | None, card: Mapping[str, Any]) -> None:
    """Hold a run to a budget of memory, with the table it makes in the end."""
    if memory is None:
        return
    if suffix == ".h5ad":
        import anndata.io  # noqa: F401
    elif suffix is None:
        import pandas  # noqa: F401
    elif suffix == ".parquet":
        from pyarrow import parquet  # noqa: F401
    if card["kind"] == "genes":
        n_genes = run.encoder.config.vocab_size
        run.keep_within(memory, result_bytes=n_genes * run.width * _RESULT_BYTES, waiting_bytes=4 * run.width)
    else:
        n_tasks = len(card["tasks"])
        row = n_tasks * _TASK_BYTES + run.width * _RESULT_BYTES
        run.keep_within(memory, result_bytes=run.cells.n_rows * row)


def _provenance(card: Mapping[str, Any], model: Path, encoder: Encoder, cells: Cells) -> dict[str, Any]:
    return {
        "geneformer_fast": __version__,
        "model": model.name,
        "pretrained": str(card.get("pretrained")),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "quantization": scheme_of(encoder),
        "vocabulary": str(cells.vocabulary.get("name")),
        "vocabulary_fingerprint": str(cells.vocabulary.get("fingerprint")),
        "cells": len(cells.lengths),
        **cells.selection,
    }


def _own_columns(card: Mapping[str, Any], key: str | None) -> list[str]:
    """What the columns of a table of cells are called, those aside that name the cells."""
    nothing = {task["name"]: np.zeros((0, len(task["classes"]))) for task in card["tasks"]}
    named = [task_columns(_named(task, card, key), task["classes"], nothing[task["name"]]) for task in card["tasks"]]
    return ["row", *(name for columns in named for name in columns)]


def _cell_table(
    cells: Cells, card: Mapping[str, Any], probabilities: Sequence[np.ndarray], key: str | None
) -> pa.Table:
    """One row per cell that has a known gene, with the columns that say which it is and where it came from."""
    columns: dict[str, Any] = {"row": pa.array(cells.places, pa.int64())}
    for name in cells.columns:
        column = cells.column(name)
        columns[name] = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    for task, values in zip(card["tasks"], probabilities, strict=True):
        columns |= task_columns(_named(task, card, key), task["classes"], values[cells.rows])
    return pa.table(columns)


def _gene_table(
    run: ClassifyingRun, card: Mapping[str, Any], key: str | None, vocabulary: Vocabulary | ValueGenes | None
) -> pa.Table:
    """One row per gene that occurs: its mean probabilities over cells."""
    config = run.encoder.config
    codes = np.zeros(config.vocab_size, dtype=np.int64)
    codes[[token for token in run.cells.special_ids if token < len(codes)]] = IGNORED
    tokens, probabilities, n_cells = run.gene_means(codes).result()
    gene_of = {} if vocabulary is None else {token: gene for gene, token in vocabulary.token_ids.items()}
    (task,) = card["tasks"]
    return pa.table(
        {
            "gene": pa.array([gene_of.get(int(token)) for token in tokens], pa.string()),
            "token": pa.array(tokens, pa.int64()),
            "n_cells": pa.array(n_cells, pa.int64()),
            **task_columns(_named(task, card, key), task["classes"], probabilities),
        }
    )


def _into_anndata(
    adata: AnnData,
    card: Mapping[str, Any],
    probabilities: Sequence[np.ndarray],
    key: str | None,
    provenance: Mapping[str, Any],
    copy: bool,
) -> AnnData | None:
    adata = copy_of(adata) if copy else adata
    for task, values in zip(card["tasks"], probabilities, strict=True):
        name, classes = _named(task, card, key), task["classes"]
        adata.obs[f"{name}_predicted"] = _categories(values, classes)
        adata.obs[f"{name}_probability"] = values.max(1)
        adata.obsm[f"{name}_probabilities"] = values
        adata.uns[f"{name}_predicted"] = {**provenance, "classes": np.array(classes, dtype=object)}
    return adata if copy else None


def _write_h5ad(
    source: Path,
    temporary: Path,
    card: Mapping[str, Any],
    probabilities: Sequence[np.ndarray],
    key: str | None,
    provenance: Mapping[str, Any],
) -> None:
    """A copy of a file with the predictions added; the rest stays as it is, byte for byte where HDF5 allows."""
    import h5py
    from anndata.io import write_elem

    shutil.copyfile(source, temporary)
    with hdf5_closing(), h5py.File(temporary, "r+") as file:
        for group in ("obsm", "uns"):
            if group not in file:
                write_elem(file, group, {})
        old = [name for name in ("obs", "obsm", "uns") if not isinstance(file[name], h5py.Group)]
        if old:
            raise OutputError(
                f"{source}: its {old[0]} is stored as anndata before 0.7 did, which cannot be added to; read and write "
                "it with a current anndata first, or choose .parquet"
            )
        obs, order = file["obs"], list(file["obs"].attrs.get("column-order", ()))
        for task, values in zip(card["tasks"], probabilities, strict=True):
            name = _named(task, card, key)
            for column, content in (
                (f"{name}_predicted", _categories(values, task["classes"])),
                (f"{name}_probability", values.max(1)),
            ):
                write_elem(obs, column, content)
                order = [*(there for there in order if there != column), column]
            write_elem(file["obsm"], f"{name}_probabilities", values)
            classes = np.array(task["classes"], dtype=object)
            write_elem(file["uns"], f"{name}_predicted", {**provenance, "classes": classes})
        obs.attrs["column-order"] = np.array(order, dtype=object)


def _categories(probabilities: np.ndarray, classes: Sequence[str]) -> Any:
    import pandas as pd

    codes = np.where(np.isnan(probabilities[:, 0]), -1, probabilities.argmax(1))
    return pd.Categorical.from_codes(codes, categories=list(classes))


def _named(task: Mapping[str, Any], card: Mapping[str, Any], key: str | None) -> str:
    if key is None:
        return str(task["name"])
    return key if len(card["tasks"]) == 1 else f"{key}_{task['name']}"
