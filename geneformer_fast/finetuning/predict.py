"""Labels for new cells (or genes) from a fine-tuned model: into an AnnData, an .h5ad copy, or a Parquet table."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_fast import __version__
from geneformer_fast.checkpoints import load
from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.extract.cells import Cells, is_anndata, open_cells
from geneformer_fast.extract.files import WholeFile, write_provenance
from geneformer_fast.extract.run import find_vocabulary
from geneformer_fast.finetuning.losses import IGNORED
from geneformer_fast.finetuning.models import read_card
from geneformer_fast.finetuning.predictions import ClassifyingRun, probabilities_of, task_columns
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas
    from anndata import AnnData

    from geneformer_fast.encoder import Encoder

SUFFIXES = (".parquet", ".h5ad")


def predict(
    data: AnnData | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    counts_layer: str | None = None,
    gene_column: str | None = None,
    allow_float: bool = False,
    key_added: str | None = None,
    copy: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token_budget: int | None = None,
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
        ``.parquet``, or ``.h5ad`` (a copy of an .h5ad input with the predictions added).
    dictionary, counts_layer, gene_column, allow_float
        As in :func:`geneformer_fast.embed`.
    key_added
        What the columns are called; None is the task's name (the label column it was trained on).
    copy
        For an AnnData: return a changed copy rather than change ``data``.
    dtype, device, token_budget
        As in :func:`geneformer_fast.embed`.
    overwrite
        Whether ``out`` may exist.
    progress
        Whether to show a progress bar; None shows one on a terminal.

    Returns
    -------
    AnnData, pandas.DataFrame, Path or None
        With ``out`` its path. Else for an AnnData None or the copy: per task ``obs["<task>_predicted"]``,
        ``obs["<task>_probability"]`` and ``obsm["<task>_probabilities"]`` [cells, K], with classes, model and versions
        in ``uns["<task>_predicted"]``. For files and tokens, and for models of genes, a table with file and row of
        every cell (or a row per gene). Cells without any known gene have no prediction.

    Raises
    ------
    CheckpointError
        The model has no head of classes.
    VocabularyError, InputError, OutputError, UnsupportedError
        As in :func:`geneformer_fast.embed`.
    """
    target = None if out is None else WholeFile(out, overwrite=overwrite, suffixes=SUFFIXES)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load(model, dtype=dtype, device=device)
    card = read_card(Path(model), encoder)
    is_genes = card["kind"] == "genes"
    if target is not None and target.path.suffix == ".h5ad":
        _check_h5ad(data, is_genes)
    options: dict[str, Any] = {"layer": counts_layer, "gene_column": gene_column, "allow_float": allow_float, "obs": {}}
    vocabulary = find_vocabulary(dictionary, model, encoder.config)
    with open_cells(data, vocabulary, encoder.config, options, progress) as cells:
        run = ClassifyingRun(encoder, cells, token_budget, progress)
        provenance = _provenance(card, Path(model), encoder, cells)
        if is_genes:
            table = _gene_table(run, card, vocabulary)
        else:
            sizes = [len(task["classes"]) for task in card["tasks"]]
            probabilities = probabilities_of(run.to_memory(), sizes)
            if target is None and is_anndata(data):
                return _into_anndata(data, card, probabilities, key_added, provenance, copy)
            table = _cell_table(cells, card, probabilities, key_added)
        if target is None:
            return table.to_pandas()
        with target as temporary:
            if target.path.suffix == ".h5ad":
                _write_h5ad(Path(data), temporary, card, probabilities, key_added, provenance)  # type: ignore[arg-type]
            else:
                import pyarrow.parquet as pq

                pq.write_table(table.replace_schema_metadata(_text(provenance)), temporary)
        write_provenance(target.path, provenance)
    return target.path


def _check_h5ad(data: Any, is_genes: bool) -> None:
    if not isinstance(data, str | os.PathLike) or Path(data).suffix != ".h5ad":
        raise UnsupportedError("an .h5ad output is a copy of an .h5ad input; use .parquet for other inputs")
    if is_genes:
        raise UnsupportedError("classes of genes go to .parquet")


def _provenance(card: Mapping[str, Any], model: Path, encoder: Encoder, cells: Cells) -> dict[str, Any]:
    return {
        "geneformer_fast": __version__,
        "model": model.name,
        "pretrained": str(card.get("pretrained")),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "vocabulary": str(cells.vocabulary.get("name")),
        "vocabulary_fingerprint": str(cells.vocabulary.get("fingerprint")),
        "cells": len(cells.lengths),
    }


def _cell_table(
    cells: Cells, card: Mapping[str, Any], probabilities: Sequence[np.ndarray], key: str | None
) -> pa.Table:
    """One row per cell that has a known gene, with the columns that say where it came from."""
    columns: dict[str, pa.Array] = {"row": pa.array(cells.rows, pa.int64())}
    for name in ("source_file", "source_row"):
        if name in cells.columns:
            column = cells.column(name).combine_chunks()
            columns[name] = column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column
    for task, values in zip(card["tasks"], probabilities, strict=True):
        columns |= task_columns(_named(task, card, key), task["classes"], values[cells.rows])
    return pa.table(columns)


def _gene_table(run: ClassifyingRun, card: Mapping[str, Any], vocabulary: Vocabulary | None) -> pa.Table:
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
            **task_columns(task["name"], task["classes"], probabilities),
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
    adata = adata.copy() if copy else adata
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
    with h5py.File(temporary, "r+") as file:
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


def _text(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {"geneformer_fast": json.dumps(dict(provenance))}
