"""scBERT from counts to embeddings: its own file, its own cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from value_files import N_LISTED, SYMBOLS, make_value_cells

import geneformer_fast as gf
from geneformer_fast.config import EncoderConfig
from geneformer_fast.data.identity import identity_of
from geneformer_fast.encoder import Encoder
from geneformer_fast.families.gene_list import GeneList
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import open_tokens


def test_counts_become_embeddings(tmp_path: Path) -> None:
    """Means over the genes that a file has, the same whoever is in a batch of cells."""
    torch.manual_seed(0)
    config = EncoderConfig.preset(
        "scbert", n_layers=2, width=20, n_heads=2, attention_width=16, max_len=N_LISTED + 1, n_features=11, ff_width=80
    )
    model = gf.save(Encoder(config, "mlm").eval(), tmp_path / "model")
    genes = GeneList("scbert", {name: i for i, name in enumerate(SYMBOLS)})
    options = {"family": "scbert", "dictionary": genes, "options": {"min_genes": 1}}
    tokens = gf.tokenize(make_value_cells(7), tmp_path / "cells", **options)
    found = np.load(gf.embed(tokens.path, model, out=tmp_path / "found.npy", device="cpu", dtype="float32"))
    encoder = gf.load(model)
    with open_tokens(tokens.path) as folder:
        identity_of(folder, encoder.config)  # from now on the folder gives what the model reads
        values, bounds = folder.read(range(folder.n_cells))
    assert len(found) == len(bounds) - 1 > 2
    for i in range(len(found)):
        row = torch.from_numpy(np.asarray(values[bounds[i] : bounds[i + 1]])).long()
        assert len(row) == N_LISTED + 1
        assert row[-1] == 0
        assert row.max() > 0
        hidden = encoder(Ragged.from_cells([row])).values[:50]  # the file has no other genes
        np.testing.assert_allclose(found[i], hidden.mean(0).detach().numpy(), atol=1e-5)
