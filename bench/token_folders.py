"""Token folders out of nothing but lengths, for measurements that depend on how long cells are, not on their genes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geneformer_fast import EncoderConfig, families

# Published vocabularies name few special tokens, the first ones.
_FIRST_GENE = 5


def is_framed(config: EncoderConfig) -> bool:
    """Whether cells of the model's vocabulary begin with CLS and end with EOS."""
    published = families.layout_of_vocabulary(config.vocabulary)
    return published is not None and published[1].is_framed


def token_folder(folder: Path, lengths: Sequence[int], config: EncoderConfig) -> Path:
    """Cells of so many tokens, by a seed, as the official tokenizer saves them for a model of that configuration.

    Cells of Geneformer V2 begin with CLS and end with EOS, so they need two tokens at least.
    """
    ids = np.random.default_rng(0).integers(_FIRST_GENE, config.vocab_size, sum(lengths), dtype=np.int32)
    bounds = np.cumsum([0, *lengths])
    if is_framed(config):
        ids[bounds[:-1]], ids[bounds[1:] - 1] = 2, 3
    return _saved(folder, ids, bounds)


def perturbable_folder(
    folder: Path, lengths: Sequence[int], config: EncoderConfig, n_common: int
) -> tuple[Path, list[int]]:
    """The same with every gene of a cell once, and ``n_common`` genes, spread over the ranks, that all cells have.

    Returns
    -------
    folder, genes
        ``genes``: tokens of those.
    """
    rng, has_frame = np.random.default_rng(0), is_framed(config)
    common = np.arange(_FIRST_GENE, _FIRST_GENE + n_common, dtype=np.int32)
    cells = []
    for length in lengths:
        n_genes = length - 2 * has_frame
        others = rng.permutation(np.arange(_FIRST_GENE + n_common, config.vocab_size, dtype=np.int32))
        cell = others[: n_genes - n_common]
        # Places before which the common ones stand, of those that the others have.
        cell = np.insert(cell, ((np.arange(n_common) + 0.5) / n_common * (len(cell) + 1)).astype(int), common)
        cells.append(np.concatenate([[2], cell, [3]]).astype(np.int32) if has_frame else cell)
    return _saved(folder, np.concatenate(cells), np.cumsum([0, *lengths])), common.tolist()


def _saved(folder: Path, ids: np.ndarray, bounds: np.ndarray) -> Path:
    import datasets
    import pyarrow as pa

    lists = pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pa.array(ids))
    datasets.disable_progress_bars()
    table = pa.table({"input_ids": lists, "length": np.diff(bounds)})
    datasets.Dataset(table).save_to_disk(str(folder))
    return folder
