"""Stock transformers beside ours: the same cells, weights, masks and results, and what it pads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import cells as toy_counts
from toys import encoder as toy_encoder
from toys import vocabulary

from geneformer_fast import Encoder, EncoderConfig, quantize, save, tokenize
from geneformer_fast.errors import ProfileError, UnsupportedError
from geneformer_fast.profiling import compare
from geneformer_fast.profiling.compare import check_comparable, compared, in_turns, stock_of
from geneformer_fast.profiling.scenarios import Request, opened

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    words = vocabulary()
    tokenize(toy_counts(30), folder / "tokens", dictionary=words, progress=False)
    model = toy_encoder(words)
    save(model, folder / "model")
    torch.manual_seed(0)
    learning = Encoder(model.config, head="mlm")
    save(learning, folder / "learning")
    return folder


def request(place, **options):
    return Request(
        **{"model": str(place / "model"), "tokens": str(place / "tokens"), "dtype": "float32", "steps": 2, **options}
    )


@pytest.mark.parametrize("layer", ["penultimate", "last", "0"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_embeddings_are_ours(place, layer, pool):
    with opened(request(place, layer=layer, token_budget=150)) as ours:
        ours.pool = pool
        with stock_of(ours) as stock:
            chosen = np.arange(30)
            assert np.allclose(stock.embeddings(chosen), ours.embeddings(chosen), atol=2e-5)
            stock.check_agreement(ours)


def test_other_results_are_not_timed(place):
    with opened(request(place)) as ours, stock_of(ours) as stock:
        with torch.no_grad():
            for parameter in stock.model.parameters():
                parameter.add_(torch.randn_like(parameter))
        with pytest.raises(ProfileError, match="not the same"):
            stock.check_agreement(ours)


def test_batches_have_no_more_positions_than_ours_have_tokens_and_every_cell_once(place):
    with opened(request(place, token_budget=120)) as ours, stock_of(ours) as stock:
        lengths = ours.cells.lengths()
        batches = list(stock._batches(np.arange(30)))
        assert sorted(np.concatenate(batches)) == list(range(30))
        assert all(len(each) == 1 or len(each) * lengths[each].max() <= 120 for each in batches)
        assert stock.n_steps(np.arange(30)) == len(batches)


def test_the_same_genes_are_masked_and_the_loss_is_ours(place):
    asked = request(place, model=str(place / "learning"), mode="train", token_budget=200)
    with opened(asked) as ours, stock_of(ours) as stock:
        ours.encoder.eval()
        stock.model.eval()
        seen = []
        stock._step = lambda batches: seen.extend(batches)
        told = next(iter(stock.steps(1)))
        assert sum(told["lengths"]) == sum(batch.n_tokens for batch in seen)
        assert told["head_rows"] == sum(len(batch.rows) for batch in seen)
        for batch in seen:
            loss, n_masked = ours.objective.loss(ours.encoder, batch)
            theirs = 0.0
            for ids, mask, labels in stock._padded(batch):
                assert ids.numel() <= stock.recipe.token_budget or len(ids) == 1
                logits = stock.model(input_ids=ids, attention_mask=mask).logits
                theirs += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
                )
            assert float(theirs) == pytest.approx(float(loss), rel=1e-4)
            assert int(n_masked) == len(batch.rows)


def test_the_report_holds_both_and_says_which_is_faster(place, monkeypatch):
    monkeypatch.setattr(compare, "N_TURNS", 1)
    with opened(request(place, token_budget=150)) as ours:
        report = compared(ours, ours.report())
    (stock,) = report.compared
    assert (report.subject.engine, stock.subject.engine) == ("geneformer_fast", "transformers")
    assert stock.tokens.n_positions >= stock.tokens.n_real
    assert stock.subject.dtype == report.subject.dtype == "float32"
    assert report.findings[0].name == "stock"
    numbers = report.findings[0].numbers
    assert numbers["ratio"] == pytest.approx(numbers["ours_per_s"] / numbers["stock_per_s"])


def test_training_is_compared_too(place, monkeypatch):
    monkeypatch.setattr(compare, "N_TURNS", 1)
    with opened(request(place, model=str(place / "learning"), mode="train", token_budget=200)) as ours:
        report = compared(ours, ours.report())
    (stock,) = report.compared
    assert stock.time.n_steps == report.time.n_steps == 2
    assert stock.subject.mode == "train"


def test_both_take_turns(monkeypatch):
    order = []
    found = in_turns(lambda: order.append("ours") or 4.0, lambda: order.append("stock") or 2.0)
    assert order == ["ours", "stock"] * compare.N_TURNS
    assert found == [(4.0, 2.0)] * compare.N_TURNS


def test_what_bert_cannot_express_or_is_quantized_is_refused():
    words = vocabulary()
    with pytest.raises(UnsupportedError, match="quantized"):
        check_comparable(quantize(toy_encoder(words), scheme="int8"))
    with pytest.raises(UnsupportedError, match="cannot express this encoder"):
        check_comparable(Encoder(EncoderConfig(1, 16, 2, 16, 90, 64, norm="pre")))


def test_without_transformers_it_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match="needs transformers"):
        check_comparable(toy_encoder(vocabulary()))
