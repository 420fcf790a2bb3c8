"""Packed attention by its name among transformers' attention implementations."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, assert_same_step, bert, inputs, labels_for, step

import geneformer_fast as gf
from geneformer_fast.drop_in import attention
from geneformer_fast.errors import UnsupportedError

transformers = pytest.importorskip("transformers")
if not hasattr(transformers.models.bert.modeling_bert, "ALL_ATTENTION_FUNCTIONS"):
    pytest.skip("BERT of this transformers chooses no attention by name", allow_module_level=True)


@pytest.fixture(scope="module")
def name() -> str:
    return gf.register_attention()


def using(name: str, architecture: str, folder: Path) -> Any:
    bert(architecture).save_pretrained(folder)
    return getattr(transformers, architecture).from_pretrained(folder, attn_implementation=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_a_training_step(architecture: str, side: str, name: str, tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[int] = []
    real = attention.varlen_attention

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(q))
        return real(q, *args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attention", counted)
    model = using(name, architecture, tmp_path).train()
    assert model.config._attn_implementation == "geneformer_fast"
    stock, given = bert(architecture).train(), inputs(side=side)
    labels = labels_for(stock, given)
    if architecture == "BertForSequenceClassification" and side == "left":
        # Here the first column, which the pooler reads, is padding: nobody computes it.
        with torch.no_grad():
            ours = model.bert(**given).last_hidden_state
            expected = stock.bert(**given).last_hidden_state
        keep = given["attention_mask"].bool()
        torch.testing.assert_close(ours[keep], expected[keep], atol=1e-5, rtol=1e-5)
    else:
        assert_same_step(step(model, given, labels), step(stock, given, labels))
    # One call in each layer, with the real tokens only.
    assert calls == [int(given["attention_mask"].sum())] * 2


def test_no_mask(name: str, tmp_path: Path) -> None:
    model, ids = using(name, "BertModel", tmp_path).eval(), inputs()["input_ids"]
    with torch.no_grad():
        ours, stock = model(ids), bert("BertModel").eval()(ids)
    torch.testing.assert_close(ours.last_hidden_state, stock.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_the_mask_is_looked_at_once_for_all_layers(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    found: list[int] = []
    real = attention.Padding.of
    monkeypatch.setattr(attention.Padding, "of", lambda *args: found.append(1) or real(*args))
    model, given = using(name, "BertModel", tmp_path).eval(), inputs()
    with torch.no_grad():
        first = model(**given).last_hidden_state
        assert len(found) == 1
        given["attention_mask"][0, 20:] = 0
        assert not torch.equal(model(**given).last_hidden_state, first)


def test_a_mask_changed_where_torch_does_not_count_is_looked_at_again(name: str, tmp_path: Path) -> None:
    """A mask of booleans is handed on as it is: what was known of it must not outlive the forward pass."""
    model, stock, given = using(name, "BertModel", tmp_path).eval(), bert("BertModel").eval(), inputs()
    given["attention_mask"] = given["attention_mask"].bool()
    with torch.no_grad():
        model(**given)
        given["attention_mask"].numpy()[0, 20:] = False
        keep = given["attention_mask"]
        ours, expected = model(**given).last_hidden_state, stock(**given).last_hidden_state
    torch.testing.assert_close(ours[keep], expected[keep], atol=1e-5, rtol=1e-5)


def test_masks_of_more_axes_go_to_torch_and_say_so(name: str, tmp_path: Path) -> None:
    attention._told.clear()
    model, stock, given = using(name, "BertModel", tmp_path).eval(), bert("BertModel").eval(), inputs()
    mask = torch.zeros(4, 1, 40, 40).masked_fill(~torch.ones(40, 40, dtype=torch.bool).tril(), -1e9)
    with torch.no_grad():
        expected = stock(given["input_ids"], attention_mask=mask)
        with pytest.warns(UserWarning, match="mask of 4 axes cannot be packed"):
            ours = model(given["input_ids"], attention_mask=mask)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model(given["input_ids"], attention_mask=mask)
    torch.testing.assert_close(ours.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_fewer_heads_of_keys_than_of_queries(name: str) -> None:
    q, k, v = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
    mask = torch.ones(2, 9)
    mask[1, 5:] = 0
    ours, weights = attention.packed_attention(torch.nn.Module(), q, k, v, mask, scaling=0.3)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = (q @ k.mT * 0.3).masked_fill(mask[:, None, None] == 0, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_dropout_and_autocast_reach_the_operation(name: str, tmp_path: Path) -> None:
    model, given = using(name, "BertModel", tmp_path).train(), inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**given).last_hidden_state
        for layer in model.encoder.layer:
            layer.attention.self.dropout.p = 0.5
        assert (model(**given).last_hidden_state - plain).abs().max() > 0.05


def test_decoders_and_cross_attention_are_refused(name: str) -> None:
    decoder = transformers.BertLMHeadModel(bert("BertModel", is_decoder=True).config)
    decoder.set_attn_implementation(name)
    with pytest.raises(UnsupportedError, match="causal"):
        decoder(inputs()["input_ids"])
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 6, 8)
    with pytest.raises(UnsupportedError, match="attends to other tokens"):
        attention.packed_attention(torch.nn.Module(), q, k, k, None)


def test_releases_without_the_interface_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(attention, "transformers", type("Old", (), dict(__version__="4.46.0")))
    with pytest.raises(UnsupportedError, match=r"transformers 4\.46\.0 chooses neither"):
        gf.register_attention()
