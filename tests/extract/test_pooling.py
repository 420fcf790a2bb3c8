"""Rules of pooling: by name, by family, without what stands for no gene."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geneformer_fast import Encoder, EncoderConfig, Ragged, families
from geneformer_fast.data.loader import as_tensor
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.extract.cells import Cells
from geneformer_fast.extract.encoding import EncodingRun
from geneformer_fast.extract.pooling import MEANS, Place, choose_pool, pooled, pools_of

AIDO = EncoderConfig.preset("aido-cell-3m", n_layers=2, width=32, n_heads=2, ff_width=48, max_len=14)
V2 = EncoderConfig(2, 32, 2, 48, 20_275, 40, vocabulary="geneformer-v2")


def test_what_families_take_where_nobody_asks() -> None:
    assert choose_pool(None, AIDO, None) == "mean-all"
    assert choose_pool(None, V2, 2) == "cls"
    assert choose_pool(None, V2, None) == "mean"
    assert families.family_reading(AIDO).layer == "last"
    assert families.family_reading(V2).layer == "penultimate"
    for each in families.all_families():
        assert set(each.reading.pools) <= {"cls", *MEANS}
        assert each.reading.pool is None or each.reading.pool in {"cls", *MEANS}


def test_rules_of_other_families_are_refused() -> None:
    assert pools_of(AIDO) == ("cls", "mean", "gene", "mean-all")
    with pytest.raises(UnsupportedError, match="pool must be one of cls, mean, gene, not 'mean-all'"):
        choose_pool("mean-all", V2, 2)
    with pytest.raises(UnsupportedError, match="aido-cell has no CLS token"):
        choose_pool("cls", AIDO, None, "aido-cell")


def test_depth_tokens_are_in_one_mean_and_not_in_the_other() -> None:
    tokens = Ragged.from_cells([torch.rand(5), torch.rand(3), torch.rand(7)])
    hidden = tokens.with_values(torch.randn(15, 4))
    place = Place(tokens, n_behind=2)
    for pool, behind in (("mean", 2), ("mean-all", 0)):
        expected = [rows[: len(rows) - behind].mean(0) for rows in hidden.cells()]
        torch.testing.assert_close(pooled(hidden, pool, place), torch.stack(expected))
    lengths = pooled(hidden, "mean", place, is_normalised=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(3))


def test_special_tokens_are_in_no_mean_over_genes() -> None:
    tokens = Ragged.from_cells([torch.tensor([2, 9, 8, 3]), torch.tensor([2, 7, 3])])
    hidden = tokens.with_values(torch.randn(7, 4))
    place = Place(tokens, special_ids=[0, 1, 2, 3])
    expected = torch.stack([hidden.values[1:3].mean(0), hidden.values[5]])
    torch.testing.assert_close(pooled(hidden, "mean", place), expected)


def cells_of(values: np.ndarray) -> Cells:
    """Dense cells as a folder gives them."""
    n_cells, length = values.shape
    bounds = np.arange(n_cells + 1) * length
    return Cells(
        np.full(n_cells, length), lambda cells: (values[cells].reshape(-1), bounds[: len(cells) + 1]),
        np.arange(n_cells), n_cells, {"name": "aido-cell", "special": {}}, [], lambda name: None,
    )  # fmt: skip


def made_up(n_cells: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = np.where(rng.random((n_cells, 14)) < 0.4, rng.random((n_cells, 14)) * 5, 0).astype(np.float32)
    values[:, -2:] = 5.0
    values[:, 3] = 0  # a gene that no cell expresses
    return values


@pytest.mark.parametrize("pool", ["mean", "mean-all"])
def test_values_are_embedded_as_they_are(pool: str) -> None:
    torch.manual_seed(0)
    encoder, values = Encoder(AIDO).eval(), made_up(5)
    found = EncodingRun(encoder, cells_of(values), pool, "last", 30, False).to_memory()
    for row, value in zip(found, values, strict=True):
        hidden = encoder(Ragged.from_cells([torch.from_numpy(value)])).values
        expected = (hidden[:-2] if pool == "mean" else hidden).mean(0)
        torch.testing.assert_close(torch.from_numpy(row), expected, atol=1e-5, rtol=1e-5)


def test_embeddings_of_genes_are_over_cells_that_express_them() -> None:
    torch.manual_seed(0)
    encoder, values = Encoder(AIDO).eval(), made_up(6)
    means, n_cells = EncodingRun(encoder, cells_of(values), "gene", "last", 30, False).genes()
    assert means.shape == (12, 32)
    assert n_cells.tolist() == (values[:, :12] > 0).sum(0).tolist()
    assert np.isnan(means[3]).all()
    hidden = torch.stack([encoder(Ragged.from_cells([torch.from_numpy(value)])).values for value in values])
    gene = int(n_cells.argmax())
    expected = hidden[torch.from_numpy(values[:, gene] > 0), gene].mean(0)
    torch.testing.assert_close(torch.from_numpy(means[gene]), expected, atol=1e-5, rtol=1e-5)


def test_numbers_stay_what_they_are() -> None:
    assert as_tensor(np.zeros(3, np.uint16)).dtype == torch.int64
    assert as_tensor(np.zeros(3, np.float32)).dtype == torch.float32
    assert as_tensor(np.zeros((3, 2), np.float32)).shape == (3, 2)
    assert replace(families.family("aido-cell").reading, normalise=True).normalise
