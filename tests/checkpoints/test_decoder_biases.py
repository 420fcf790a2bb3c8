"""The bias of a decoder as transformers writes it: which of two is added to logits, and that both come back."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from geneformer_fast import Encoder, EncoderConfig, Ragged, load, quantize, save

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()  # that biases differ is what is wanted

#: Before, the two are one parameter.
has_two = int(transformers.__version__.partition(".")[0]) >= 5
BIASES = "cls.predictions.bias", "cls.predictions.decoder.bias"
GEOMETRY = dict(n_layers=1, width=32, n_heads=2, ff_width=48, vocab_size=50, max_len=20)
IDS = torch.randint(4, 50, (1, 12), generator=torch.Generator().manual_seed(0))


def bert(*, is_tied: bool) -> Any:
    """A BertForMaskedLM whose biases are large beside its logits, and its decoder's own as far as it may have one."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=20, hidden_act="relu", tie_word_embeddings=is_tied,
    )  # fmt: skip
    torch.manual_seed(2)
    model = transformers.BertForMaskedLM(config).eval()
    head = model.cls.predictions
    with torch.no_grad():
        head.bias.normal_()
        if has_two:
            head.decoder.bias = torch.nn.Parameter(torch.randn(50))
    return model


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, Encoder):
            tokens = Ragged.from_cells([IDS[0]])
            return model.logits(model(tokens))
        return model(input_ids=IDS).logits[0]


def saved(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    save(model, folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_are_those_of_transformers_and_every_tensor_comes_back(is_tied: bool, tmp_path: Path) -> None:
    if is_tied and not has_two:
        pytest.skip("biases are one parameter before transformers 5")
    bert(is_tied=is_tied).save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert not has_two or not torch.equal(*(theirs[name] for name in BIASES))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours = load(tmp_path / "theirs")
    assert ["config.json ties them" in str(each.message) for each in said] == [True] * is_tied
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "theirs").eval()
    torch.testing.assert_close(logits_of(ours), logits_of(again), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(ours), logits_of(bert(is_tied=is_tied)), rtol=1e-4, atol=1e-4)
    found = saved(ours, tmp_path / "ours")
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())


def test_a_decoder_of_ours_that_is_not_tied_has_its_bias_in_transformers(tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(**GEOMETRY, tied_decoder=False), "mlm").eval()
    with torch.no_grad():
        encoder.head.bias.normal_()
    save(encoder, tmp_path / "ours")
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(encoder), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(load(tmp_path / "ours")), logits_of(encoder))


@pytest.mark.parametrize("is_tied", [False, pytest.param(True, marks=pytest.mark.filterwarnings("ignore:.*ties them"))])
def test_weights_of_eight_bits_keep_the_bias(is_tied: bool, tmp_path: Path) -> None:
    """Of a folder, of a model in memory, and of the folder that is made of it."""
    model = bert(is_tied=is_tied)
    model.save_pretrained(tmp_path / "theirs")
    expected = logits_of(model)
    folders = [
        quantize(tmp_path / "theirs", tmp_path / "of_folder", scheme="int8-weights"),
        quantize(model, tmp_path / "of_model", scheme="int8-weights"),
    ]
    made = quantize(model, scheme="int8-weights")
    for each in (*map(load, folders), made):
        assert (logits_of(each) - expected).abs().max() < 0.1 < expected.abs().max() / 10
