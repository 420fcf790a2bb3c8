"""Embeddings against references: published numbers, transformers pooled as Geneformer's extractor does, brute force."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fixtures import bert_tiny, read_fixture

from geneformer_fast import Encoder, embed, load
from geneformer_fast.extract import encoding
from geneformer_fast.extract.cells import Cells
from geneformer_fast.extract.encoding import EncodingRun, token_batches
from geneformer_fast.tokenization.run import tokenize_anndata

V1_TOKENS, V2_TOKENS = 25_426, 20_275


def listed(token_lists: list[list[int]], special: dict[str, int]) -> Cells:
    """Cells from token lists, without files."""
    lengths = np.array([len(tokens) for tokens in token_lists])

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = [token_lists[i] for i in numbers]
        return np.concatenate(chosen), np.concatenate([[0], np.cumsum(lengths[numbers])])

    rows = np.arange(len(lengths))
    return Cells(lengths, read, rows, len(rows), {"special": special}, [], {}.__getitem__)


def test_published_numbers_of_every_pooling(shared_dir: Path) -> None:
    fixture = read_fixture(shared_dir, "hf_bert_tiny")
    model = bert_tiny(fixture, "mlm", fixture["mlm_keys_sorted_without_decoder"])
    pairs = zip(fixture["input_ids"], fixture["attention_mask"], strict=True)
    token_lists = [ids[: sum(mask)] for ids, mask in pairs]
    v2, v1 = {"pad": 0, "mask": 1, "cls": 2, "eos": 3}, {"pad": 0, "mask": 1}
    expected = {
        ("emb_layer_-1_cls", "cls", "penultimate"): v2,
        ("emb_layer_-1_cell_V2_excl_cls_eos", "mean", "penultimate"): v2,
        ("emb_layer_-1_cell_V1_all", "mean", "penultimate"): v1,
        ("emb_layer_0_cls", "cls", "last"): v2,
    }
    for (name, pool, layer), special in expected.items():
        result = EncodingRun(model, listed(token_lists, special), pool, layer, None, False).to_memory()
        # The model is float64; results are stored as float32.
        np.testing.assert_allclose(result, np.array(fixture[name]), atol=2e-7, rtol=0, err_msg=name)


@pytest.mark.parametrize(("family", "n_tokens"), [("V1", V1_TOKENS), ("V2", V2_TOKENS)])
def test_real_cells_as_the_extractor_pools_them(shared_dir: Path, tmp_path: Path, family: str, n_tokens: int) -> None:
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    from bench.cpu.embed_rival import extractor_embeddings

    torch.manual_seed(0)
    longest = 2048 if family == "V1" else 4096
    config = transformers.BertConfig(
        vocab_size=n_tokens, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=longest, hidden_act="relu", layer_norm_eps=1e-12, pad_token_id=0,
    )  # fmt: skip
    stock = transformers.BertForMaskedLM(config).eval()
    stock.save_pretrained(tmp_path / "model")
    official = shared_dir / "data" / "reference_official" / f"pbmc3k__{family}.parquet"
    table = pq.read_table(official).slice(40, 20)
    token_lists = table.column("input_ids").to_pylist()
    # As the official tokenizer leaves it: no manifest, only what datasets writes.
    datasets.Dataset(table.select(["input_ids", "length"])).save_to_disk(str(tmp_path / "tokens"))
    model = load(tmp_path / "model", dtype="float32")
    pools = [("mean", "cell")] + ([("cls", "cls")] if family == "V2" else [])
    for pool, emb_mode in pools:
        for layer, emb_layer in (("penultimate", -1), ("last", 0)):
            # Without the MLM head, whose logits would take most of the time and change nothing here.
            theirs = extractor_embeddings(
                stock.bert, token_lists, emb_mode=emb_mode, emb_layer=emb_layer, has_cls=family == "V2", batch_size=7
            )
            ours = embed(tmp_path / "tokens", model, pool=pool, layer=layer)
            assert ours.shape == theirs.shape
            assert np.abs(ours - theirs).max() <= 1e-5
            # The order of cells is part of it: rows differ by more than the tolerance.
            assert np.abs(ours - theirs[::-1]).max() > 1e-3


def test_counts_of_real_cells_equal_their_official_tokens(shared_dir: Path, tmp_path: Path) -> None:
    """From counts, and from the tokens that the official tool made of the same counts: the same embeddings."""
    import anndata

    datasets = pytest.importorskip("datasets")
    adata = anndata.read_h5ad(shared_dir / "data" / "pbmc_facs" / "pbmc_facs_test100.h5ad")[:40].copy()
    official = pq.read_table(shared_dir / "data" / "reference_official" / "pbmc_facs_test100__V2.parquet").slice(0, 40)
    datasets.Dataset(official.select(["input_ids", "length"])).save_to_disk(str(tmp_path / "tokens"))
    model = toys.encoder(vocab_size=V2_TOKENS, vocabulary="geneformer-v2", vocabulary_fingerprint=None)
    result = embed(adata, model, dictionary=shared_dir / "data" / "dicts", copy=True).obsm["X_geneformer"]
    np.testing.assert_allclose(result, embed(tmp_path / "tokens", model), atol=1e-6, rtol=0)


def by_hand(model: Encoder, adata, words, pool: str, n_blocks: int) -> np.ndarray:
    """One cell at a time, without batches."""
    from geneformer_fast import Ragged

    tokens, bounds, _, rows = tokenize_anndata(adata, words)
    special = sorted(words.special.values())
    result = np.full((adata.n_obs, model.config.width), np.nan, dtype=np.float32)
    for i, row in enumerate(rows):
        cell = tokens[bounds[i] : bounds[i + 1]].astype(np.int64)
        with torch.no_grad():
            hidden = model.hidden_states(Ragged.from_cells([torch.from_numpy(cell)]))[n_blocks].values.numpy()
        result[row] = hidden[0] if pool == "cls" else hidden[~np.isin(cell, special)].mean(0)
    return result


@pytest.mark.parametrize("token_budget", [1, 50, 200, None])
@pytest.mark.parametrize("window", [1, 5, 8192])
def test_order_is_restored_whatever_the_batches(
    token_budget: int | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "WINDOW_CELLS", window)
    words, adata = toys.vocabulary(), toys.cells(17, empty=(0, 6, 16))
    model = toys.encoder(words)
    result = embed(adata, model, dictionary=words, pool="mean", token_budget=token_budget, copy=True)
    expected = by_hand(model, adata, words, "mean", 2)
    np.testing.assert_allclose(result.obsm["X_geneformer"], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("layer", "n_blocks"), [("last", 3), ("penultimate", 2), ("embeddings", 0), (0, 1), (2, 3)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_every_layer(layer: str | int, n_blocks: int, pool: str) -> None:
    words, adata = toys.vocabulary(), toys.cells(6)
    model = toys.encoder(words)
    result = embed(adata, model, dictionary=words, pool=pool, layer=layer, copy=True).obsm["X_geneformer"]
    np.testing.assert_allclose(result, by_hand(model, adata, words, pool, n_blocks), atol=2e-6, rtol=0)


def test_blocks_beyond_the_layer_are_not_computed() -> None:
    words, adata = toys.vocabulary(), toys.cells(4)
    model = toys.encoder(words)
    expected = embed(adata, model, dictionary=words, copy=True).obsm["X_geneformer"]
    with torch.no_grad():
        model.blocks[2].qkv.weight.fill_(float("nan"))
    np.testing.assert_array_equal(embed(adata, model, dictionary=words, copy=True).obsm["X_geneformer"], expected)
    assert np.isnan(embed(adata, model, dictionary=words, layer="last", copy=True).obsm["X_geneformer"]).all()


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), max_size=60), token_budget=st.integers(1, 700))
def test_batches_hold_every_cell_once_within_the_budget(lengths: list[int], token_budget: int) -> None:
    sizes = np.array(lengths, dtype=np.int64)
    batches = list(token_batches(sizes, token_budget))
    order = np.concatenate(batches) if batches else np.zeros(0, np.int64)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert (np.diff(sizes[order]) <= 0).all(), "longest first"
    for batch in batches:
        assert len(batch) == 1 or sizes[batch].sum() <= token_budget
    # No batch could have taken the first cell of the next one.
    for batch, following in itertools.pairwise(batches):
        assert sizes[batch].sum() + sizes[following[0]] > token_budget
