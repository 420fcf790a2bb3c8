"""Embeddings of cells and genes: AnnData, count files or token folders in; obsm, arrays or tables out."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_fast import families
from geneformer_fast.arguments import checked
from geneformer_fast.checkpoints import load
from geneformer_fast.config import EncoderConfig, device_named, warn_if_emulated
from geneformer_fast.data.selection import Selection
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.extract.budget import MemoryBudget, memory_budget_of
from geneformer_fast.extract.cells import (
    Cells,
    asked_columns,
    copy_of,
    is_anndata,
    is_token_folder,
    labels_of,
    open_cells,
)
from geneformer_fast.extract.encoding import EncodingRun
from geneformer_fast.extract.files import (
    TABLES,
    H5adWriter,
    NpyWriter,
    RowWriter,
    TableWriter,
    check_columns,
    embedding_names,
)
from geneformer_fast.extract.frames import cell_frame, gene_frame
from geneformer_fast.extract.genes import by_column, gene_columns
from geneformer_fast.extract.options import EMBED, SUFFIXES, Request, check_h5ad, check_options, check_pictures_asked
from geneformer_fast.extract.outputs import Output, alone, as_text, check_free, read_cells
from geneformer_fast.extract.pooling import choose_pool
from geneformer_fast.heatmap import plot_heatmap
from geneformer_fast.plot import check_enough, check_format, check_picture, plot_umap
from geneformer_fast.tokenization.bundled import has_dictionaries
from geneformer_fast.tokenization.dictionaries import SAVED_FILE
from geneformer_fast.tokenization.values import ValueGenes, has_genes, make_value_genes
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas
    from anndata import AnnData

KEY = "X_geneformer"
# A data frame's numbers, the array they come from, and those of the cells among it.
_FRAME_COPIES = 3


@checked
def embed(
    data: AnnData | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: Encoder | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    pool: str | None = None,
    layer: str | int | None = None,
    dictionary: str | os.PathLike[str] | Vocabulary | ValueGenes | None = None,
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
    as_frame: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token_budget: int | None = None,
    memory_budget: str | int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    plot: str | os.PathLike[str] | None = None,
    heatmap: str | os.PathLike[str] | None = None,
    color: str | None = None,
) -> AnnData | np.ndarray | pandas.DataFrame | Path | None:
    """Embed cells or genes.

    Parameters
    ----------
    data
        An AnnData of counts; a file, folder, glob or list of them that ``tokenize`` reads; or a token folder.
    model
        An encoder, or a checkpoint folder.
    out
        A file to stream to. ``.npy``: an array with a row per cell of the input, and beside it ``NAME.cells.parquet``,
        whose rows are the same cells. ``.arrow``, ``.parquet``: a table of the cells that have embeddings, which are
        its column ``embedding``. ``.csv``: the same, with one column per dimension, ``embedding_0`` and on. ``.h5ad``:
        a copy of an .h5ad input with the embeddings in obsm. Tables say for each cell its name (``obs_names``), the
        columns of ``obs``, its number of tokens (``length``), file and row; for each gene (``NAME.genes.parquet``)
        token, id, symbol and the number of cells that hold it, as far as the vocabulary knows them.
    pool
        ``"cls"``: the hidden state of the CLS token. ``"mean"``: the mean over a cell's genes, special tokens excluded.
        ``"gene"``: for every gene, the mean of its hidden states over all cells that express it. Families have more, by
        the names in their pages, such as ``"mean-all"``. None: what the authors of the model's family take; for
        Geneformer ``"cls"`` where the vocabulary has that token (V2), else ``"mean"``.
    layer
        ``"penultimate"``, ``"last"``, ``"embeddings"``, or a block from 0. Blocks beyond it are not computed. None:
        what the authors of the model's family take; for Geneformer ``"penultimate"``, as its extractor does by default.
    dictionary
        Folder of gene dictionaries, or a :class:`Vocabulary`, for counts; of a folder with several versions the model's
        is taken. None looks for ``vocabulary.json`` in the model's folder, and into archives and contexts of NeMo. For
        families that read values: the file with the genes, or a folder that holds it; None looks in the model's folder.
    counts_layer, gene_column, allow_float, allow_duplicate_cells, allow_few_genes, n_counts
        As in ``tokenize``.
    obs
        Columns of obs that go into the table, as in ``tokenize``; a token folder brings all that it carries.
    where
        Cells to take: column of obs (or of a token folder) -> a value, or several; of several columns all must hold.
        Then arrays, tables and data frames have rows for these cells only; an AnnData and an .h5ad output keep all
        cells, with NaN in those that were not taken.
    max_cells, seed
        Most cells to take, drawn from those by the seed; a seed of None is 0.
    key_added
        Key in ``obsm`` (``varm`` for ``pool="gene"``) and ``uns``; None is ``"X_geneformer"``.
    copy
        For an AnnData: return a changed copy rather than change ``data``.
    as_frame
        Return a pandas DataFrame: what a ``.csv`` output would hold, indexed by the names of cells (or the ids of
        genes). An AnnData stays as it is.
    dtype, device
        For a checkpoint folder: how and where to load it (``"auto"``: the fastest dtype; None: a GPU if there is one).
    token_budget
        Tokens per batch; None chooses by device.
    memory_budget
        Most memory to take: ``"2GB"``, ``"1.5GiB"``, ``"500MB"``, or bytes. On a CPU it is the resident memory of the
        whole process, libraries and weights included, as the operating system counts it; on a card what torch has
        reserved there with all that is not free otherwise. Batches become smaller, and fewer are computed at a time;
        where one cell does not fit, the smallest budget that works is said before anything is computed. None: no limit.
    overwrite
        Whether ``out``, and the picture, may exist.
    progress
        Whether to show a progress bar; None shows one on a terminal, and lines of the log elsewhere.
    plot, color
        A picture to write: the UMAP of the cell embeddings, coloured by a column of obs (or of a token folder).
    heatmap
        Another picture: the embeddings of cells, a row for each, in the order of ``color``.

    Returns
    -------
    AnnData, numpy.ndarray, pandas.DataFrame, Path or None
        With ``out`` its path, with ``as_frame`` the table. Else for an AnnData None, or the copy; for files float32
        [cells, C], or [tokens, C] for ``pool="gene"``. Rows of cells without any known gene, and of genes never seen,
        are NaN.

    Raises
    ------
    VocabularyError
        Tokens or dictionary belong to another vocabulary than the model.
    UnsupportedError
        No such pool or layer, ``pool="cls"`` without a CLS token, or an option that would do nothing here.
    InputError, OutputError, CheckpointError
        As ``tokenize`` and ``load`` raise them; nothing half-written is left.

    References
    ----------
    Theodoris et al., Nature 618 (2023).
    """
    if token_budget is not None and token_budget < 1:
        raise UnsupportedError(f"token_budget must be at least 1, not {token_budget}")
    is_genes, key = pool == "gene", key_added or KEY
    target = None if out is None else Output(out, overwrite=overwrite, suffixes=SUFFIXES, is_genes=is_genes)
    suffix = None if target is None else target.path.suffix
    selection = Selection.of(where, max_cells, seed)
    pictures = [Path(path) for path in (plot, heatmap) if path is not None]
    request = Request(
        is_anndata(data), is_token_folder(data), suffix, is_genes, bool(pictures), isinstance(model, Encoder), copy,
        as_frame,
    )  # fmt: skip
    counts: dict[str, Any] = {
        "gene_column": gene_column,
        "allow_float": allow_float,
        "allow_duplicate_cells": allow_duplicate_cells,
        "allow_few_genes": allow_few_genes,
        "n_counts": n_counts,
    }
    others = {"obs": obs, "key_added": key_added, "copy": copy, "dtype": dtype, "device": device, "color": color}
    more = {
        "counts_layer": counts_layer, "memory_budget": memory_budget, "overwrite": overwrite, "plot": plot,
        "heatmap": heatmap, "as_frame": as_frame,
    }  # fmt: skip
    check_options(EMBED, request, {**counts, **others, **more})
    if suffix == ".h5ad":
        check_h5ad(data, is_genes)
    check_pictures(plot, heatmap, color, overwrite=overwrite)
    asked = asked_columns(obs, None if is_anndata(data) else color)
    reading = {**counts, "counts_layer": counts_layer, "obs": asked}
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(model, Encoder):
        place = model.device
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(memory_budget_of(memory_budget, device_named(place)))
        encoder = model.eval() if isinstance(model, Encoder) else load(model, dtype=dtype, device=place)
        if isinstance(model, Encoder):
            warn_if_emulated(encoder.dtype, encoder.device)
        families.refuse(encoder.config, "embed")
        layer = families.family_reading(encoder.config).layer if layer is None else layer
        encoder.config.layer_index(layer)
        choose_pool(pool, encoder.config, cls_id=0)
        if target is not None:
            stack.enter_context(alone(target.path, *target.beside, overwrite=overwrite))
        for picture in pictures:
            stack.enter_context(alone(picture, overwrite=overwrite))
        vocabulary = find_vocabulary(dictionary, model, encoder.config)
        is_compact = not (request.is_in_place or suffix == ".h5ad")
        opened = open_cells(data, vocabulary, encoder.config, reading, progress, selection, is_compact=is_compact)
        cells = stack.enter_context(opened)
        if cells.n_not_taken and not is_genes:
            warnings.warn(
                f"{cells.n_not_taken:,} of {cells.n_rows:,} cells were not taken: their rows of obsm[{key!r}] are NaN; "
                "subset before neighbours",
                stacklevel=3,
            )
        if plot is not None:
            check_enough(len(cells.lengths))
        run = EncodingRun(encoder, cells, _pool_of(pool, encoder.config, cells), layer, token_budget, progress)
        keep_within(run, memory, suffix, is_genes, is_frame=as_frame)
        provenance, labels = (
            run.provenance(model),
            labels_of(data, cells, color, asked),
        )
        result: Any
        if as_frame:
            result, embeddings = gene_frame(run, vocabulary) if is_genes else cell_frame(run)
        elif target is None:
            result = embeddings = run.genes()[0] if is_genes else run.to_memory()
            if is_anndata(data):
                placed = by_column(result, data, vocabulary, gene_column, allow_few_genes) if is_genes else result
                result = _into_anndata(data, placed, run.pool, key, provenance, copy)
        else:
            (_write_genes if is_genes else _write_cells)(run, target, data, vocabulary, key, provenance)
            result = target.path
        if pictures:
            shown = embeddings[cells.rows] if target is None else read_cells(target.path, cells.rows, key)
        if plot is not None:
            plot_umap(shown, labels, plot, label=color, title=said_of(provenance))
        if heatmap is not None:
            assert labels is not None
            plot_heatmap(shown, labels, heatmap, label=str(color), title=said_of(provenance))
    return result


def check_pictures(
    plot: str | os.PathLike[str] | None,
    heatmap: str | os.PathLike[str] | None,
    color: str | None,
    *,
    overwrite: bool,
) -> None:
    """Refuse, before anything is computed, pictures that could not be written."""
    if plot is not None:
        check_picture(plot)
    if heatmap is not None:
        check_format(heatmap)
    check_pictures_asked(plot, heatmap, color)
    for path in (plot, heatmap):
        if path is not None:
            check_free(Path(path), overwrite=overwrite)


def said_of(provenance: Mapping[str, Any]) -> str:
    """What embeddings are, for the title of a picture."""
    return f"{provenance['model']}, layer {provenance['layer']}, pool {provenance['pool']}"


def keep_within(
    run: EncodingRun, memory: MemoryBudget | None, suffix: str | None, is_genes: bool, *, is_frame: bool = False
) -> None:
    """Hold a run to a budget of memory, with what its writer loads and what is kept in memory to the end."""
    if memory is None:
        return
    if suffix == ".h5ad":
        import anndata.io  # noqa: F401
    elif suffix in (".npy", ".parquet"):
        from pyarrow import parquet  # noqa: F401
    elif is_frame:
        import pandas  # noqa: F401
    width, copies = run.width, _FRAME_COPIES if is_frame else 1
    if is_genes:  # sums in float64, means in float32 twice
        n_tokens = run.n_tokens
        run.keep_within(memory, result_bytes=n_tokens * width * (8 + (1 + copies) * 4), waiting_bytes=8 * width)
    else:
        run.keep_within(memory, result_bytes=0 if suffix else run.cells.n_rows * width * 4 * copies)


def find_vocabulary(
    dictionary: str | os.PathLike[str] | Vocabulary | ValueGenes | None,
    model: Encoder | str | os.PathLike[str],
    config: EncoderConfig,
) -> Vocabulary | ValueGenes | None:
    """The vocabulary (or gene list) that a user names, or that lies beside the model; None where there is neither."""
    if isinstance(dictionary, Vocabulary | ValueGenes):
        return dictionary
    family = families.family_of(config)
    if family is not None and family.preparation is not None:
        if dictionary is not None:
            return make_value_genes(dictionary, family.name, None)
        if isinstance(model, Encoder):
            return None
        beside = Path(model)
        beside = beside.parent if beside.is_file() else beside  # scBERT's models are files
        return ValueGenes.from_folder(beside, family.name) if has_genes(beside, family.name) else None
    if dictionary is not None:
        try:
            # A folder may hold the dictionaries of several versions: the model says which one it needs.
            published = families.layout_of_vocabulary(config.vocabulary)
            return Vocabulary.from_folder(Path(dictionary), published and published[0])
        except VocabularyError:
            # Whatever single vocabulary it holds is refused later, where both names are known.
            return Vocabulary.from_folder(Path(dictionary))
    if not isinstance(model, Encoder) and ((Path(model) / SAVED_FILE).exists() or has_dictionaries(Path(model))):
        return Vocabulary.from_folder(Path(model))
    return None


def _pool_of(pool: str | None, config: EncoderConfig, cells: Cells) -> str:
    return choose_pool(pool, config, cells.cls_id, cells.vocabulary.get("name"))


def _write_cells(
    run: EncodingRun,
    target: Output,
    data: Any,
    vocabulary: Vocabulary | ValueGenes | None,
    key: str,
    provenance: dict[str, Any],
) -> None:
    """Embed cells into a file."""
    cells, suffix = run.cells, target.path.suffix
    if suffix in TABLES:
        check_columns(cells.columns, embedding_names(suffix, run.width))
    with target.writing(provenance, cells.table) as path:
        writer: RowWriter
        if suffix == ".npy":
            writer = NpyWriter(path, cells.n_rows, run.width)
        elif suffix == ".h5ad":
            writer = H5adWriter(Path(data), path, key, cells.n_rows, run.width, provenance)
        else:
            columns = {name: cells.column(name) for name in cells.columns}
            writer = TableWriter(path, run.width, columns, as_text(provenance))
        try:
            run.stream(writer)
        except BaseException:
            writer.abort()
            raise
        writer.close()


def _write_genes(
    run: EncodingRun,
    target: Output,
    data: Any,
    vocabulary: Vocabulary | ValueGenes | None,
    key: str,
    provenance: dict[str, Any],
) -> None:
    """Embed genes into a file: all tokens into an array, those that were seen into a table."""
    means, n_cells = run.genes()
    if target.path.suffix == ".npy":
        columns = gene_columns(np.arange(len(means)), n_cells, vocabulary)
        with target.writing(provenance, lambda: pa.table(columns)) as path:
            array = NpyWriter(path, *means.shape)
            array.write(np.arange(len(means)), means)
            array.close()
        return
    seen = np.flatnonzero(n_cells)
    with target.writing(provenance) as path:
        columns = gene_columns(seen, n_cells[seen], vocabulary)
        writer = TableWriter(path, run.width, columns, as_text(provenance))
        writer.write(seen, means[seen])
        writer.close()


def _into_anndata(
    adata: AnnData, embeddings: np.ndarray, pool: str, key: str, provenance: dict[str, Any], copy: bool
) -> AnnData | None:
    adata = copy_of(adata) if copy else adata
    (adata.varm if pool == "gene" else adata.obsm)[key] = embeddings
    adata.uns[key] = provenance
    return adata if copy else None
