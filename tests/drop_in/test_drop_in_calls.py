"""Every way of calling an accelerated model that transformers allows: packed with the same result, or stock, loudly."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, LENGTHS, N_TOKENS, assert_same_step, bert, inputs, labels_for, step
from torch import nn

import geneformer_fast as gf
from geneformer_fast.drop_in import reasons
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError

B, L = len(LENGTHS), max(LENGTHS)


@pytest.fixture(autouse=True)
def nothing_told() -> None:
    """Warnings come once in a process; each test starts a new one."""
    reasons._told.clear()


def both(model: Any, **given: Any) -> tuple[Any, Any]:
    """(ours, stock) outputs of one call in evaluation, ours without any fallback."""
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        stock = model(**given)
        handle = gf.accelerate(model)
        ours = model(**given)
        handle.undo()
    return ours, stock


def assert_same(ours: torch.Tensor, stock: torch.Tensor, mask: torch.Tensor) -> None:
    """Equal where there are tokens, zero where there are none."""
    assert ours.shape == stock.shape
    assert ours.dtype == stock.dtype
    keep = mask.bool()
    torch.testing.assert_close(ours[keep], stock[keep], atol=1e-5, rtol=1e-5)
    assert not ours[~keep].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side(side: str) -> None:
    """Positions are columns, as in transformers: a cell padded on the left has other ones."""
    model, given = bert("BertForTokenClassification"), inputs(side=side)
    ours, stock = both(model.bert, **given)
    assert_same(ours.last_hidden_state, stock.last_hidden_state, given["attention_mask"])


def test_holes_in_the_mask() -> None:
    model, given = bert("BertForTokenClassification"), inputs()
    given["attention_mask"][:, 3:30:4] = 0
    ours, stock = both(model.bert, **given)
    assert_same(ours.last_hidden_state, stock.last_hidden_state, given["attention_mask"])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    model, given = bert("BertModel"), inputs()
    mask = given.pop("attention_mask").to(dtype)
    ours, stock = both(model, **given, attention_mask=mask)
    assert_same(ours.last_hidden_state, stock.last_hidden_state, mask)
    torch.testing.assert_close(ours.pooler_output, stock.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_mask(architecture: str) -> None:
    model, ids = bert(architecture), inputs()["input_ids"]
    ours, stock = both(model, input_ids=ids)
    for name in stock:
        torch.testing.assert_close(ours[name], stock[name], atol=1e-5, rtol=1e-5)
    positional, _ = both(model, input_ids=ids, attention_mask=None, token_type_ids=None)
    assert torch.equal(positional[0], ours[0])


def test_arguments_by_position() -> None:
    model, given = bert("BertForMaskedLM").eval(), inputs()
    gf.accelerate(model)
    with torch.no_grad():
        assert torch.equal(model(*given.values()).logits, model(**given).logits)


@pytest.mark.parametrize("what", ["token_type_ids", "position_ids", "position_ids of one row", "inputs_embeds"])
def test_other_inputs(what: str) -> None:
    model, given = bert("BertModel"), inputs()
    generator = torch.Generator().manual_seed(4)
    if what == "token_type_ids":
        given[what] = torch.randint(0, 2, (B, L), generator=generator)
    elif what == "position_ids":
        given[what] = torch.randint(0, 48, (B, L), generator=generator)
    elif what == "inputs_embeds":
        del given["input_ids"]
        given[what] = torch.randn(B, L, 32, generator=generator)
    else:
        given["position_ids"] = torch.arange(L).flip(0)[None]
    ours, stock = both(model, **given)
    assert_same(ours.last_hidden_state, stock.last_hidden_state, given["attention_mask"])
    plain, _ = both(model, **inputs())
    assert (plain.last_hidden_state - ours.last_hidden_state).abs().max() > 0.1


@pytest.mark.parametrize("is_in_config", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states(architecture: str, is_in_config: bool) -> None:
    model, given = bert(architecture), inputs()
    model.config.output_hidden_states = is_in_config
    ours, stock = both(model, **given, **({} if is_in_config else dict(output_hidden_states=True)))
    assert list(ours.keys()) == list(stock.keys())
    assert len(ours.hidden_states) == 3
    for state, expected in zip(ours.hidden_states, stock.hidden_states, strict=True):
        assert_same(state, expected, given["attention_mask"])
    if architecture == "BertModel":
        assert ours.hidden_states[-1] is ours.last_hidden_state


@pytest.mark.parametrize("side", ["right", "left"])
def test_attention_weights(side: str) -> None:
    model, given = bert("BertForMaskedLM", attn_implementation="eager"), inputs(side=side)
    ours, stock = both(model, **given, output_attentions=True)
    keep = given["attention_mask"].bool()
    pairs = (keep[:, :, None] & keep[:, None, :])[:, None].expand(B, 2, L, L)
    assert len(ours.attentions) == len(stock.attentions) == 2
    for weights, expected in zip(ours.attentions, stock.attentions, strict=True):
        torch.testing.assert_close(weights[pairs], expected[pairs], atol=1e-6, rtol=1e-5)
        assert not weights[~pairs].any()
    torch.testing.assert_close(ours.logits[keep], stock.logits[keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("has_states", [False, True])
def test_tuples(architecture: str, has_labels: bool, has_states: bool) -> None:
    model, given = bert(architecture), inputs()
    labels = labels_for(model, given) if has_labels else {}
    ours, stock = both(model, **given, **labels, output_hidden_states=has_states, return_dict=False)
    assert type(ours) is type(stock) is tuple
    assert [type(each) for each in ours] == [type(each) for each in stock]
    keep = given["attention_mask"].bool()
    for value, expected in zip(ours, stock, strict=True):
        if isinstance(value, torch.Tensor):
            keep_all = value.shape[:2] == keep.shape
            value, expected = (value[keep], expected[keep]) if keep_all else (value, expected)
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_one_cell_one_token_and_an_empty_cell() -> None:
    model = bert("BertForTokenClassification")
    ours, stock = both(model, **inputs([1]))
    torch.testing.assert_close(ours.logits, stock.logits, atol=1e-5, rtol=1e-5)
    given = inputs([5, 3])
    given["attention_mask"][1] = 0
    ours, stock = both(model.bert, **given)
    assert_same(ours[0], stock[0], given["attention_mask"])
    given["attention_mask"][:] = 0
    ours, _ = both(model.bert, **given)
    assert not ours[0].any()


FALLBACKS: dict[str, Any] = {
    "3 axes": lambda: dict(attention_mask=torch.ones(B, L, L, dtype=torch.int64).tril()),
    "4 axes": lambda: dict(attention_mask=torch.zeros(B, 1, L, L)),
    "selects layers": lambda: dict(output_hidden_states=[0]),
    "first column": lambda: inputs(side="left"),
    "cross attention": lambda: dict(encoder_hidden_states=torch.randn(B, 3, 32)),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_what_cannot_be_packed_runs_as_stock_and_says_so_once(reason: str) -> None:
    model, given = bert("BertModel").eval(), {**inputs(), **FALLBACKS[reason]()}
    with torch.no_grad():
        try:
            stock, refusal = model(**given), None
        except Exception as error:
            stock, refusal = None, type(error)
        gf.accelerate(model)
        if refusal is not None:
            with pytest.raises(refusal), pytest.warns(UserWarning, match=reason):
                model(**given)
            return
        with pytest.warns(UserWarning, match=f"BertModel.*stock forward pass.*{reason}"):
            ours = model(**given)
        assert torch.equal(ours.last_hidden_state, stock.last_hidden_state)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model(**given)


def test_attention_weights_of_a_training_step_with_dropout_are_stock() -> None:
    model = bert("BertForMaskedLM", attention_probs_dropout_prob=0.3, attn_implementation="eager").train()
    given = inputs()
    torch.manual_seed(1)
    stock = model(**given, output_attentions=True)
    gf.accelerate(model)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="after dropout"):
        ours = model(**given, output_attentions=True)
    assert torch.equal(ours.attentions[0], stock.attentions[0])
    assert torch.equal(ours.logits, stock.logits)


def test_wrong_calls_fail_as_they_did() -> None:
    model, given = bert("BertModel"), inputs()
    gf.accelerate(model)
    with pytest.raises(ValueError, match="input_ids"), pytest.warns(UserWarning, match="exactly one"):
        model(attention_mask=given["attention_mask"])
    with pytest.raises(TypeError):
        model(*[given["input_ids"]] * 30)


def test_tokens_of_another_vocabulary_and_cells_too_long_are_named() -> None:
    model, given = bert("BertForMaskedLM"), inputs()
    gf.accelerate(model)
    given["input_ids"][0, 3] = N_TOKENS
    with pytest.raises(VocabularyError, match=f"token id {N_TOKENS} is outside the model's {N_TOKENS} tokens"):
        model(**given)
    with pytest.raises(InputError, match="49 columns does not fit the model's 48 positions"):
        model(input_ids=torch.ones(2, 49, dtype=torch.int64))


def other_model() -> Any:
    return nn.Linear(3, 3)


def decoder() -> Any:
    return bert("BertModel", is_decoder=True)


def pretraining() -> Any:
    return bert("BertForPreTraining")


def subclass() -> Any:
    import transformers

    class Mine(transformers.BertModel):
        pass

    return Mine(bert("BertModel").config)


def replaced_layer() -> Any:
    model = bert("BertModel")
    model.encoder.layer[1].attention.self = nn.Identity()
    return model


def patched_forward() -> Any:
    model = bert("BertForTokenClassification")
    model.bert.forward = model.bert.forward
    return model


def relative_positions() -> Any:
    model = bert("BertModel")
    model.config.position_embedding_type = "relative_key"
    return model


def compiled() -> Any:
    return torch.compile(bert("BertModel"))


REFUSED = {
    other_model: "serves transformers' BertModel, .* not torch.nn.modules.linear.Linear",
    decoder: "is_decoder=True is a decoder",
    pretraining: r"its encoder alone can be accelerated: accelerate\(model.bert\)",
    subclass: "not test_drop_in_calls.subclass",
    replaced_layer: "bert.encoder.layer.1.attention.self of BertModel is a Identity",
    patched_forward: "bert BertForTokenClassification has a forward of its own already",
    relative_positions: "position_embedding_type='relative_key'",
    compiled: "accelerate the model inside first, then compile or wrap it",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_other_models_are_refused_by_name_and_left_alone(make: Any) -> None:
    model = make()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(UnsupportedError, match=REFUSED[make]):
        gf.accelerate(model)
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()


def test_the_encoder_of_another_model_can_be_accelerated() -> None:
    model, given = bert("BertForPreTraining").eval(), inputs()
    with torch.no_grad():
        stock = model(**given)
        gf.accelerate(model.bert)
        ours = model(**given)
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(ours.prediction_logits[keep], stock.prediction_logits[keep], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.seq_relationship_logits, stock.seq_relationship_logits, atol=1e-5, rtol=1e-5)


def test_exchanged_modules_run_as_stock_and_say_so() -> None:
    model, given = bert("BertModel").eval(), inputs()
    other = bert("BertModel", seed=1).eval()
    with torch.no_grad():
        gf.accelerate(model)
        model.encoder.layer[1] = other.encoder.layer[1]
        with pytest.warns(UserWarning, match="exchanged since"):
            ours = model(**given).last_hidden_state
        gf.accelerate(model).undo()
        assert torch.equal(ours, model(**given).last_hidden_state)


def test_left_padded_training_step() -> None:
    model = bert("BertForMaskedLM").train()
    given = inputs(side="left")
    labels = labels_for(model, given)
    stock = step(model, given, labels)
    gf.accelerate(model)
    assert_same_step(step(model, given, labels), stock)
