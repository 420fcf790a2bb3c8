"""Presets, layer names, vocabulary refusal, the precision policy."""

from __future__ import annotations

import pytest
import torch
from geneformer_kernels.target import CARDS, Target

from geneformer_fast import Encoder, EncoderConfig, Ragged
from geneformer_fast.config import PRESETS, matmul_dtype
from geneformer_fast.errors import InputError, UnsupportedError, VocabularyError

# Parameters of the published models with their MLM or regression head.
N_PARAMETERS = {
    "geneformer-v1-10m": 10_288_722,
    "geneformer-v1-12l": 39_591_250,
    "geneformer-12l-95m": 37_997_363,
    "geneformer-12l-95m-clcancer": 37_997_363,
    "geneformer-20l-95m": 151_313_459,
    "geneformer-v2-104m": 104_386_867,
    "geneformer-v2-104m-clcancer": 104_386_867,
    "geneformer-v2-316m": 316_354_867,
    "bionemo-10m": 10_300_032,
    "bionemo-106m": 106_808_960,
    "aido-cell-3m": 3_630_908 + 16_897,
    "aido-cell-10m": 11_027_004 + 66_561,
    "aido-cell-100m": 99_569_724 + 412_161,
    "aido-cell-650m": 651_913_788 + 1_643_521,
    "scgpt-whole-human": 51_856_898 - 527_873,  # without the annotation head
    "scbert": 8_388_607,
}
HEADS = {"scgpt-whole-human": "expression-mvc"}


def test_presets_have_the_published_number_of_parameters() -> None:
    assert N_PARAMETERS.keys() == PRESETS.keys()
    for name, expected in N_PARAMETERS.items():
        with torch.device("meta"):
            encoder = Encoder(EncoderConfig.preset(name), HEADS.get(name, "mlm"))
        assert sum(parameter.numel() for parameter in encoder.parameters()) == expected, name
        assert encoder.config.head_dim in (32, 64)


def test_layers_are_named() -> None:
    config = EncoderConfig.preset("geneformer-v1-10m")
    assert [config.layer_index(layer) for layer in ("embeddings", 0, "0", "penultimate", 5, "last")] == [
        0,
        1,
        1,
        5,
        6,
        6,
    ]
    for wrong in (-1, 6, "second", "-1"):
        with pytest.raises(UnsupportedError, match="last"):
            config.layer_index(wrong)


def test_computing_stops_at_the_layer_asked_for() -> None:
    encoder = Encoder(EncoderConfig(3, 16, 2, 16, 20, 10)).eval()
    calls = []
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    tokens = Ragged.from_cells([[1, 2, 3], [4]])
    states = encoder.hidden_states(tokens)
    for layer, n_blocks in (("embeddings", 0), (0, 1), ("penultimate", 2), ("last", 3)):
        calls.clear()
        hidden = encoder(tokens, layer=layer)
        assert calls == list(range(n_blocks))
        assert torch.equal(hidden.values, states[n_blocks].values)


def test_tokens_of_another_vocabulary_are_refused_by_name() -> None:
    config = EncoderConfig.preset("geneformer-v2-104m")
    config.check_vocabulary({"name": "geneformer-v2", "n_tokens": 20_275, "fingerprint": "a"})
    with pytest.raises(VocabularyError, match=r"geneformer-v1.*geneformer-v2"):
        config.check_vocabulary({"name": "geneformer-v1", "n_tokens": 25_426, "fingerprint": "a"})
    own = EncoderConfig(1, 16, 2, 16, 20, 10, vocabulary="mine", vocabulary_fingerprint="aaaa")
    with pytest.raises(VocabularyError, match="dictionaries differ"):
        own.check_vocabulary({"name": "mine", "n_tokens": 20, "fingerprint": "bbbb"})
    unnamed = EncoderConfig(1, 16, 2, 16, 20, 10)
    with pytest.raises(VocabularyError, match="20 "):
        unnamed.check_vocabulary({"name": "geneformer-v1", "n_tokens": 25_426, "fingerprint": "a"})


def test_what_the_tables_cannot_hold_is_refused_before_any_index_error() -> None:
    encoder = Encoder(EncoderConfig(1, 16, 2, 16, 20, 10, vocabulary="mine"))
    with pytest.raises(VocabularyError, match=r"token id 20 .*20 tokens \(mine\)"):
        encoder(Ragged.from_cells([[1, 20]]))
    with pytest.raises(VocabularyError, match="-1"):
        encoder(Ragged.from_cells([[-1]]))
    with pytest.raises(VocabularyError, match=r"11 tokens.*10 positions"):
        encoder(Ragged.from_cells([[1] * 11]))
    with pytest.raises(InputError, match="token ids"):
        encoder(Ragged.from_cells([torch.rand(3)]))


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "sandwich"},
        {"activation": "mish"},
        {"n_heads": 3},
        {"n_layers": 0},
        {"inputs": "text"},
        {"vocab_size": 0},
    ],
)
def test_impossible_configurations(change: dict) -> None:
    with pytest.raises(UnsupportedError):
        EncoderConfig(**{**dict(n_layers=1, width=16, n_heads=2, ff_width=16, vocab_size=20, max_len=10), **change})


def test_unknown_preset() -> None:
    with pytest.raises(UnsupportedError, match="geneformer-v1-10m"):
        EncoderConfig.preset("geneformer-v3")


def test_precision_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(target: Target) -> None:
        monkeypatch.setattr("geneformer_kernels.target.target_of", lambda device: target)

    for target, expected in (
        (Target.cpu(), torch.float32),
        (Target.cpu({"avx512", "avx512_bf16"}), torch.bfloat16),
        (Target.cpu({"amx_bf16"}), torch.bfloat16),
        (CARDS["V100"], torch.float16),
        (CARDS["T4"], torch.float16),
        (CARDS["A100"], torch.bfloat16),
        (CARDS["H100"], torch.bfloat16),
    ):
        on(target)
        assert matmul_dtype("auto", "cpu") == expected, target.name
    on(CARDS["V100"])
    with pytest.raises(UnsupportedError, match="float16"):
        matmul_dtype("bf16", "cpu")
    assert matmul_dtype(None, "cpu") is None
    assert matmul_dtype(torch.float64, "cpu") == torch.float64
    with pytest.raises(UnsupportedError, match="int8"):
        matmul_dtype("int8", "cpu")


def test_cast_keeps_tables_norms_and_stream_wide() -> None:
    encoder = Encoder(EncoderConfig(1, 16, 2, 16, 20, 10), "mlm").eval()
    for dtype, wide in (
        ("bf16", torch.float32),
        ("fp16", torch.float32),
        ("fp64", torch.float64),
        ("fp32", torch.float32),
    ):
        encoder.cast(dtype)
        assert encoder.token_table.dtype == encoder.blocks[0].ff_norm.weight.dtype == wide
        assert encoder.dtype == matmul_dtype(dtype, "cpu") == encoder.head.dense.weight.dtype
        hidden = encoder(Ragged.from_cells([[1, 2]]))
        assert hidden.values.dtype == wide
        assert encoder.logits(hidden).dtype == encoder.dtype


def test_heads_ask_for_the_rows_they_read() -> None:
    tokens = Ragged.from_cells([[1, 2], [3]])
    encoder = Encoder(EncoderConfig(1, 16, 2, 16, 20, 10), "cells", n_classes=3)
    assert encoder.logits(encoder(tokens)).shape == (2, 3)
    with pytest.raises(ValueError, match="first token"):
        encoder.logits(encoder(tokens), torch.tensor([0]))
    bare = Encoder(EncoderConfig(1, 16, 2, 16, 20, 10))
    with pytest.raises(ValueError, match="no head"):
        bare.logits(bare(tokens))


def test_training_reaches_every_parameter_and_dropout_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(2, 16, 2, 16, 20, 10, dropout=0.5, attention_dropout=0.5), "mlm")
    tokens = Ragged.from_cells([[1, 2, 3], [4], list(range(1, 11))])
    assert not torch.equal(encoder(tokens).values, encoder(tokens).values)
    loss = encoder.logits(encoder(tokens)).logsumexp(-1).sum()
    loss.backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("qkv.bias"), name
    encoder.eval()
    assert torch.equal(encoder(tokens).values, encoder(tokens).values)


def test_autocast_decides_the_dtype_of_products() -> None:
    encoder = Encoder(EncoderConfig(1, 16, 2, 16, 20, 10), "mlm").eval()
    tokens = Ragged.from_cells([[1, 2, 3]])
    seen = []
    encoder.blocks[0].out.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(tokens)
    assert seen == [torch.bfloat16]
    assert hidden.values.dtype == torch.float32
