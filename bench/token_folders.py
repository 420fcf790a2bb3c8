"""Token folders out of nothing but lengths, for measurements that depend on how long cells are, not on their genes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geneformer_fast import EncoderConfig

# Published vocabularies name few special tokens, the first ones.
_FIRST_GENE = 5


def token_folder(folder: Path, lengths: Sequence[int], config: EncoderConfig) -> Path:
    """Cells of so many tokens, by a seed, as the official tokenizer saves them for a model of that configuration.

    Cells of Geneformer V2 begin with CLS and end with EOS, so they need two tokens at least.
    """
    import datasets
    import pyarrow as pa

    ids = np.random.default_rng(0).integers(_FIRST_GENE, config.vocab_size, sum(lengths), dtype=np.int32)
    bounds = np.cumsum([0, *lengths])
    if config.vocabulary == "geneformer-v2":
        ids[bounds[:-1]], ids[bounds[1:] - 1] = 2, 3
    lists = pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pa.array(ids))
    datasets.disable_progress_bars()
    table = pa.table({"input_ids": lists, "length": np.asarray(lengths, dtype=np.int64)})
    datasets.Dataset(table).save_to_disk(str(folder))
    return folder
