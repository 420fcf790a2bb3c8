"""Embeddings of cells and genes from an encoder: AnnData, count files or token folders in; obsm, .npy or Arrow out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from geneformer_fast.checkpoints import load
from geneformer_fast.config import EncoderConfig
from geneformer_fast.data.identity import FAMILIES
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import UnsupportedError, VocabularyError
from geneformer_fast.extract.cells import Cells, is_anndata, labels_of, open_cells
from geneformer_fast.extract.encoding import EncodingRun
from geneformer_fast.extract.files import (
    ArrowWriter,
    H5adWriter,
    NpyWriter,
    RowWriter,
    WholeFile,
    read_cells,
    write_provenance,
)
from geneformer_fast.plot import check_picture, plot_umap
from geneformer_fast.tokenization.genes import map_genes
from geneformer_fast.tokenization.sources.source import GENE_COLUMNS
from geneformer_fast.tokenization.vocabulary import Vocabulary

if TYPE_CHECKING:
    from anndata import AnnData

POOLS = ("cls", "mean", "gene")
KEY = "X_geneformer"


def embed(
    data: AnnData | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: Encoder | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    pool: str | None = None,
    layer: str | int = "penultimate",
    dictionary: str | os.PathLike[str] | Vocabulary | None = None,
    counts_layer: str | None = None,
    gene_column: str | None = None,
    allow_float: bool = False,
    obs: Mapping[str, str] | Sequence[str] | None = None,
    key_added: str = KEY,
    copy: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    token_budget: int | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    plot: str | os.PathLike[str] | None = None,
    color: str | None = None,
) -> AnnData | np.ndarray | Path | None:
    """Embed cells or genes.

    Parameters
    ----------
    data
        An AnnData of counts; a file, folder, glob or list of them that ``tokenize`` reads; or a token folder.
    model
        An encoder, or a checkpoint folder.
    out
        A file to stream to: ``.npy``, ``.arrow``, or ``.h5ad`` (a copy of an .h5ad input with the embeddings added).
    pool
        ``"cls"``: the hidden state of the CLS token. ``"mean"``: the mean over a cell's genes, special tokens excluded.
        ``"gene"``: for every gene, the mean of its hidden states over all cells that express it. None: ``"cls"`` where
        the vocabulary has that token (Geneformer V2), else ``"mean"``.
    layer
        ``"penultimate"`` (as Geneformer's extractor does by default), ``"last"``, ``"embeddings"``, or a block from 0.
        Blocks beyond it are not computed.
    dictionary
        Folder of gene dictionaries, or a :class:`Vocabulary`, for counts; of a folder with several versions the model's
        is taken. None looks for ``vocabulary.json`` in the model's folder.
    counts_layer, gene_column, allow_float
        As ``layer``, ``gene_column`` and ``allow_float`` of ``tokenize``.
    obs
        Columns of obs that an Arrow output carries along, as in ``tokenize``; token folders bring theirs.
    key_added
        Key in ``obsm`` (``varm`` for ``pool="gene"``) and ``uns``.
    copy
        For an AnnData: return a changed copy rather than change ``data``.
    dtype, device
        For a checkpoint folder: how and where to load it (``"auto"``: the fastest dtype; None: a GPU if there is one).
    token_budget
        Tokens per batch; None chooses by device.
    overwrite
        Whether ``out`` may exist.
    progress
        Whether to show a progress bar; None shows one on a terminal.
    plot, color
        A picture to write: the UMAP of the cell embeddings, coloured by a column of obs (or of a token folder).

    Returns
    -------
    AnnData, numpy.ndarray, Path or None
        With ``out`` its path. Else for an AnnData None, or the copy; for files float32 [cells, C], or [tokens, C] for
        ``pool="gene"``. Rows of cells without any known gene, and of genes never seen, are NaN.

    Raises
    ------
    VocabularyError
        Tokens or dictionary belong to another vocabulary than the model.
    UnsupportedError
        No such pool or layer, or ``pool="cls"`` without a CLS token.
    InputError, OutputError, CheckpointError
        As ``tokenize`` and ``load`` raise them; nothing half-written is left.

    References
    ----------
    Theodoris et al., Nature 618 (2023).
    """
    target = None if out is None else WholeFile(out, overwrite=overwrite)
    if pool is not None and pool not in POOLS:
        raise UnsupportedError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
    if token_budget is not None and token_budget < 1:
        raise UnsupportedError(f"token_budget must be at least 1, not {token_budget}")
    if target is not None and target.path.suffix == ".h5ad":
        _check_h5ad(data, pool)
    if plot is not None:
        if pool == "gene":
            raise UnsupportedError("the picture shows cells; pool 'gene' has none")
        check_picture(plot)
    carried = dict(obs) if isinstance(obs, Mapping) else {name: name for name in obs or ()}
    if color is not None and not is_anndata(data) and color not in carried.values():
        carried[color] = color
    options = {"layer": counts_layer, "gene_column": gene_column, "allow_float": allow_float, "obs": carried}
    encoder = _as_encoder(model, dtype, device)
    encoder.config.layer_index(layer)
    with contextlib.ExitStack() as stack:
        vocabulary = find_vocabulary(dictionary, model, encoder.config)
        cells = stack.enter_context(open_cells(data, vocabulary, encoder.config, options, progress))
        pool = _choose_pool(pool, cells)
        run = EncodingRun(encoder, cells, pool, layer, token_budget, progress)
        provenance = run.provenance(model)
        labels = labels_of(data, cells, color)
        result: Any
        if target is None:
            result = embeddings = run.genes() if pool == "gene" else run.to_memory()
            if is_anndata(data):
                by_row = _by_column(result, data, vocabulary, gene_column) if pool == "gene" else result
                result = _into_anndata(data, by_row, pool, key_added, provenance, copy)
        else:
            with target as temporary:
                _write(run, temporary, target.path.suffix, data, vocabulary, pool, key_added, provenance)
            write_provenance(target.path, provenance)
            result = target.path
        if plot is not None:
            shown = embeddings[cells.rows] if target is None else read_cells(target.path, cells.rows, key_added)
            plot_umap(shown, labels, plot, label=color)
    return result


def _as_encoder(model: Encoder | str | os.PathLike[str], dtype: Any, device: Any) -> Encoder:
    if isinstance(model, Encoder):
        return model.eval()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(model, dtype=dtype, device=device)


def find_vocabulary(
    dictionary: str | os.PathLike[str] | Vocabulary | None,
    model: Encoder | str | os.PathLike[str],
    config: EncoderConfig,
) -> Vocabulary | None:
    """The vocabulary that a user names, or that lies beside the model; None where there is neither."""
    if isinstance(dictionary, Vocabulary):
        return dictionary
    if dictionary is not None:
        try:
            # A folder may hold the dictionaries of several versions: the model says which one it needs.
            return Vocabulary.from_folder(Path(dictionary), FAMILIES.get(str(config.vocabulary)))
        except VocabularyError:
            # Whatever single vocabulary it holds is refused later, where both names are known.
            return Vocabulary.from_folder(Path(dictionary))
    if not isinstance(model, Encoder) and (Path(model) / "vocabulary.json").exists():
        return Vocabulary.from_folder(Path(model))
    return None


def _choose_pool(pool: str | None, cells: Cells) -> str:
    if pool is None:
        return "mean" if cells.cls_id is None else "cls"
    if pool == "cls" and cells.cls_id is None:
        raise UnsupportedError(
            f"{cells.vocabulary.get('name')} has no CLS token: its first token is the top-ranked gene. Use pool 'mean'"
        )
    return pool


def _check_h5ad(data: Any, pool: str | None) -> None:
    if not isinstance(data, str | os.PathLike) or Path(data).suffix != ".h5ad":
        raise UnsupportedError("an .h5ad output is a copy of an .h5ad input; use .npy or .arrow for other inputs")
    if pool == "gene":
        raise UnsupportedError("gene embeddings go to .npy or .arrow, or into varm of an AnnData in memory")


def _write(
    run: EncodingRun,
    temporary: Path,
    suffix: str,
    data: Any,
    vocabulary: Vocabulary | None,
    pool: str,
    key: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write one output file under a temporary name."""
    if pool == "gene":
        _write_genes(run.genes(), temporary, suffix, vocabulary, provenance)
        return
    cells = run.cells
    writer: RowWriter
    if suffix == ".npy":
        writer = NpyWriter(temporary, cells.n_rows, run.width)
    elif suffix == ".arrow":
        columns = {name: cells.column(name) for name in cells.columns}
        writer = ArrowWriter(temporary, run.width, columns, _text(provenance))
    else:
        writer = H5adWriter(Path(data), temporary, key, cells.n_rows, run.width, provenance)
    try:
        run.stream(writer)
    except BaseException:
        writer.abort()
        raise
    writer.close()


def _write_genes(
    embeddings: np.ndarray, path: Path, suffix: str, vocabulary: Vocabulary | None, provenance: Mapping[str, Any]
) -> None:
    if suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, embeddings)
        return
    seen = np.flatnonzero(~np.isnan(embeddings[:, 0]))
    columns = {"token": pa.chunked_array([pa.array(seen, pa.int64())])}
    if vocabulary is not None:
        gene_of = {token: gene for gene, token in vocabulary.token_ids.items()}
        columns["gene"] = pa.chunked_array([pa.array([gene_of.get(int(token)) for token in seen], pa.string())])
    writer = ArrowWriter(path, embeddings.shape[1], columns, _text(provenance))
    writer.write(seen, embeddings[seen])
    writer.close()


def _text(provenance: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in provenance.items()}


def _by_column(
    embeddings: np.ndarray, adata: AnnData, vocabulary: Vocabulary | None, gene_column: str | None
) -> np.ndarray:
    """[n_vars, C] rows of [tokens, C] gene embeddings in the order of var, NaN for genes without a token or unseen."""
    assert vocabulary is not None  # the counts were tokenized with it
    ids = _ids_of_var(adata, gene_column)
    tokens = map_genes(ids, vocabulary, source_name="<AnnData>").column_to_token
    by_column = np.full((adata.n_vars, embeddings.shape[1]), np.nan, dtype=np.float32)
    by_column[tokens >= 0] = embeddings[tokens[tokens >= 0]]
    return by_column


def _ids_of_var(adata: AnnData, gene_column: str | None) -> list[str]:
    """The gene id of every row of var; from raw.var, by name, where only that has them (counts may come from raw)."""
    columns = GENE_COLUMNS if gene_column is None else (gene_column,)
    for table in (adata.var, *(() if adata.raw is None else (adata.raw.var,))):
        column = next((name for name in columns if name in table), None)
        if column is not None:
            by_name = table[column][~table.index.duplicated()] if table is not adata.var else None
            ids = table[column] if by_name is None else by_name.reindex(adata.var_names)
            return [str(gene) for gene in ids]
    return [str(gene) for gene in adata.var_names]


def _into_anndata(
    adata: AnnData, embeddings: np.ndarray, pool: str, key: str, provenance: dict[str, Any], copy: bool
) -> AnnData | None:
    adata = adata.copy() if copy else adata
    (adata.varm if pool == "gene" else adata.obsm)[key] = embeddings
    adata.uns[key] = provenance
    return adata if copy else None
