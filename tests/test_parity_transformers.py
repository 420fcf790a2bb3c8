"""Our encoder against transformers on the same checkpoint folders: hidden states, logits, precision, round trips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerance import Witness, assert_as_good_as, cosine, max_error

from geneformer_fast import load, save
from geneformer_fast.ragged import Ragged

transformers = pytest.importorskip("transformers")

V1_10M = dict(
    vocab_size=25426, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
    max_position_embeddings=2048,
)  # fmt: skip
V2_104M = dict(
    vocab_size=20275, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    max_position_embeddings=4096,
)  # fmt: skip
TINY = dict(
    vocab_size=101, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
    max_position_embeddings=64,
)  # fmt: skip
ODD = dict(
    vocab_size=37, hidden_size=21, num_hidden_layers=2, num_attention_heads=3, intermediate_size=13,
    max_position_embeddings=33,
)  # fmt: skip
GELU = dict(TINY, hidden_act="gelu", num_attention_heads=1)
GELU_NEW = dict(TINY, hidden_act="gelu_new", num_hidden_layers=1)

# Whole models at their full lengths take a minute each, and are marked slow; these are as wide, of as many heads.
CASES = {
    "like v1": (dict(V1_10M, vocab_size=2542), [700, 1, 333]),
    "like v2": (dict(V2_104M, num_hidden_layers=2, vocab_size=2027), [300, 1, 64]),
    "tiny": (TINY, [64, 1, 2, 17]),
    "odd": (ODD, [33, 1, 5]),
    "gelu": (GELU, [64, 1, 30]),
    "gelu_new": (GELU_NEW, [64, 1, 30]),
}


def stock_config(**changes: object) -> transformers.BertConfig:
    return transformers.BertConfig(**{"hidden_act": "relu", "layer_norm_eps": 1e-12, "pad_token_id": 0, **changes})


def stock_model(architecture: str = "BertForMaskedLM", **changes: object) -> torch.nn.Module:
    """A stock model whose biases and norms are not at their trivial initial values."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(stock_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.1 if "LayerNorm" in name else 0.02))
    return model


def batch(vocab_size: int, lengths: list[int]) -> tuple[Ragged, torch.Tensor, torch.Tensor]:
    """The same cells packed and padded."""
    generator = torch.Generator().manual_seed(1)
    tokens = Ragged.from_cells([torch.randint(1, vocab_size, (n,), generator=generator) for n in lengths])
    return tokens, tokens.to_padded(0), tokens.mask()


@pytest.mark.parametrize("case", CASES)
def test_float32_parity_on_every_layer(case: str, tmp_path: Path) -> None:
    changes, lengths = CASES[case]
    model = stock_model(**changes)
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    tokens, ids, mask = batch(changes["vocab_size"], lengths)
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        states = encoder.hidden_states(tokens)
        for state, expected in zip(states, stock.hidden_states, strict=True):
            assert max_error(state.values, expected[mask]) <= 1e-5
        logits = encoder.logits(states[-1])
        assert max_error(logits, stock.logits[mask]) <= 1e-5
        rows = torch.tensor([0, tokens.n_tokens - 1, tokens.n_tokens // 2])
        torch.testing.assert_close(encoder.logits(states[-1], rows), logits[rows], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", ["tiny", "odd"])
def test_attention_weights_of_every_layer(case: str, tmp_path: Path) -> None:
    changes, lengths = CASES[case]
    model = stock_model(**changes, attn_implementation="eager")  # the only one that gives weights
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    tokens, ids, mask = batch(changes["vocab_size"], lengths)
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask.long(), output_attentions=True).attentions
        for layer, expected in enumerate(stock):
            for weights, padded, length in zip(
                encoder.attention_weights(tokens, layer=layer), expected, lengths, strict=True
            ):
                assert weights.shape == (changes["num_attention_heads"], length, length)
                assert max_error(weights, padded[:, :length, :length]) <= 1e-5
        assert torch.equal(encoder.attention_weights(tokens)[-1], weights)
    with pytest.raises(ValueError, match="no attention"):
        encoder.attention_weights(tokens, layer="embeddings")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "lengths"), [(V1_10M, [2048, 1, 700, 333]), (V2_104M, [4096, 1])], ids=["v1-10m", "v2-104m"]
)
def test_float32_parity_at_maximal_length(changes: dict, lengths: list[int], tmp_path: Path) -> None:
    model = stock_model(**changes)
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path)
    tokens, ids, mask = batch(changes["vocab_size"], lengths)
    with torch.no_grad():
        stock = model.bert(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        for state, expected in zip(encoder.hidden_states(tokens), stock.hidden_states, strict=True):
            assert max_error(state.values, expected[mask]) <= 1e-5


@pytest.mark.parametrize(
    "case", ["like v1", "like v2", pytest.param("v2-104m", marks=pytest.mark.slow), "tiny", "odd", "gelu"]
)
def test_bfloat16_is_no_worse_than_twice_stock_bfloat16(case: str, tmp_path: Path) -> None:
    changes, lengths = CASES.get(case, (V2_104M, [300, 1, 64]))
    lengths = [min(n, 200) for n in lengths]
    model = stock_model(**changes)
    model.save_pretrained(tmp_path)
    tokens, ids, mask = batch(changes["vocab_size"], lengths)
    with torch.no_grad():
        encoder = load(tmp_path, dtype="bfloat16")
        states = encoder.hidden_states(tokens)
        truth = model.double()(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    low = transformers.BertForMaskedLM.from_pretrained(tmp_path).bfloat16().eval()

    @torch.no_grad()
    def by_stock() -> tuple[list[torch.Tensor], torch.Tensor]:
        stock = low(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        return [state[mask] for state in stock.hidden_states], stock.logits[mask]

    witness = Witness(by_stock)
    assert states[-1].values.dtype == torch.float32
    for state, witnessed, exact in zip(states, witness[0], truth.hidden_states, strict=True):
        assert cosine(state.values, exact[mask]) >= 0.9999
        assert_as_good_as(state.values, witnessed, exact[mask])
    assert_as_good_as(encoder.logits(states[-1]).detach(), witness[1], truth.logits[mask])


def test_large_scores_survive_bfloat16(tmp_path: Path) -> None:
    """Trained attention is peaked: projections ten times wider still stay within twice stock bfloat16's error."""
    model = stock_model(**dict(TINY, max_position_embeddings=600, num_attention_heads=1))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key):
                projection.weight.mul_(12)
                projection.bias.add_(1.0)  # an offset that all keys share
    model.save_pretrained(tmp_path)
    tokens, ids, mask = batch(101, [600, 100])
    with torch.no_grad():
        ours = load(tmp_path, dtype="bfloat16")(tokens)
        truth = model.double().bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
    low = transformers.BertModel.from_pretrained(tmp_path).bfloat16().eval()

    @torch.no_grad()
    def by_stock() -> torch.Tensor:
        return low(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]

    assert_as_good_as(ours.values, Witness(by_stock), truth)


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("BertModel", {}),
        ("BertForMaskedLM", {}),
        ("BertForSequenceClassification", {"num_labels": 3}),
        ("BertForTokenClassification", {"num_labels": 4}),
    ],
)
def test_outputs_and_bytes_of_every_architecture(architecture: str, extra: dict, tmp_path: Path) -> None:
    model = stock_model(architecture, **TINY, **extra)
    model.save_pretrained(tmp_path / "stock")
    encoder = load(tmp_path / "stock")
    tokens, ids, mask = batch(101, [64, 1, 9])
    with torch.no_grad():
        stock = model(input_ids=ids, attention_mask=mask.long())
        hidden = encoder(tokens)
        if architecture == "BertModel":
            torch.testing.assert_close(hidden.values, stock.last_hidden_state[mask], atol=1e-5, rtol=0)
            torch.testing.assert_close(encoder.logits(hidden), stock.pooler_output, atol=1e-5, rtol=0)
        elif architecture == "BertForSequenceClassification":
            torch.testing.assert_close(encoder.logits(hidden), stock.logits, atol=1e-5, rtol=0)
        else:
            torch.testing.assert_close(encoder.logits(hidden), stock.logits[mask], atol=1e-5, rtol=0)
    save(encoder, tmp_path / "ours")
    same = (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "stock" / "model.safetensors"
    ).read_bytes()
    assert same, "a checkpoint that was only loaded must be saved as the same bytes"
    again = getattr(transformers, architecture).from_pretrained(tmp_path / "ours").eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_fresh_encoder_is_read_by_transformers(tmp_path: Path) -> None:
    from geneformer_fast import Encoder, EncoderConfig

    config = EncoderConfig(2, 64, 2, 96, 50, 32, vocabulary="my-corpus", vocabulary_fingerprint="ab" * 32)
    encoder = Encoder(config, "mlm").eval()
    save(encoder, tmp_path)
    tokens, ids, mask = batch(50, [32, 3])
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits[mask]
        torch.testing.assert_close(encoder.logits(encoder(tokens)), expected, atol=1e-5, rtol=0)
    assert load(tmp_path).config == config
