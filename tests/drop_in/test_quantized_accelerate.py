"""BERTs with weights of eight bits, accelerated: those that quantize() makes, and those that transformers loads."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_berts import ARCHITECTURES, bert, inputs, labels_for

from geneformer_fast import Ragged, accelerate, load, quantize
from geneformer_fast.drop_in.plain import packed_forward_of
from geneformer_fast.errors import CheckpointError, UnsupportedError
from geneformer_fast.layers import EightBits
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.hugging_face import TheirLinear, encoder_of

# Any warning says that a call was not packed, or that a layer was widened.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")
PACKAGE = "compressed_tensors"
#: Where rows are rounded, a number that lies between two integers may go either way after another order of adding: seen
#: with transformers 4.46 and 4.51, in one row of 91 after the first block, and in its cell's others after the next.
CLOSE = {"dynamic": 2e-3, "weight_only": 1e-5}


@pytest.fixture(params=["dynamic", "weight_only"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which scheme int8 multiplies, whatever is fastest here."""
    monkeypatch.setattr("geneformer_fast.layers.int8_mode", lambda *_: request.param)
    return request.param


@torch.no_grad()
def answers(model: Any, given: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """All that a model says of real tokens."""
    out, mask = model(**given, output_hidden_states=True, **options), given["attention_mask"].bool()
    found = {"last": out.hidden_states[-1][mask], "first": out.hidden_states[1][mask]}
    if "logits" in out:
        found["logits"] = out.logits[mask] if out.logits.ndim == 3 else out.logits
    if getattr(out, "pooler_output", None) is not None:
        found["pooled"] = out.pooler_output
    return found if out.get("loss") is None else {**found, "loss": out.loss}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= rtol * tensor.norm(), name
    if rtol == CLOSE["dynamic"]:
        apart = (found["first"] - expected["first"]).norm(dim=-1) / expected["first"].norm(dim=-1)
        assert (apart > 1e-5).float().mean() < 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_the_stock_forward_of_the_same_model(architecture: str, mode: str) -> None:
    model = quantize(bert(architecture).eval())
    given = inputs()
    given |= labels_for(model, given)
    expected = answers(model, given)
    handle = accelerate(model)
    assert_close(answers(model, given), expected, CLOSE[mode])
    assert_close(answers(model, given, output_attentions=True), expected, CLOSE[mode])
    assert not model(**given, output_hidden_states=True).hidden_states[-1][1, 1:].any()  # padding: it was packed
    handle.undo()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in answers(model, given).items())


@pytest.mark.parametrize("scheme", ["int8-weights", "fp8"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_other_schemes_and_activations(scheme: str, activation: str) -> None:
    model = quantize(bert(hidden_act=activation).eval(), scheme=scheme)
    expected = answers(model, inputs())
    accelerate(model)
    assert_close(answers(model, inputs()), expected)


def test_layers_of_any_mixture(mode: str) -> None:
    choices = {
        "blocks.0.qkv": Choice("int8", torch.rand(32) + 0.5),
        "blocks.0.up": Choice("half"),
        "blocks.0.down": Choice("int8", torch.rand(48) + 0.5),
        "blocks.1.out": Choice("int8", torch.rand(32) + 0.5),
        "blocks.1.down": Choice("int8-weights"),
        "head.dense": Choice("int8"),
    }
    plain = bert().eval()
    model = quantize(plain, choices=choices, keep_embeddings=True)
    assert_close(answers(model, inputs()), answers(plain, inputs()), 0.05)
    expected = answers(model, inputs())
    accelerate(model)
    assert_close(answers(model, inputs()), expected, CLOSE[mode])


def test_in_half_precision(mode: str) -> None:
    """Of the model, and by autocast."""
    model = quantize(bert().eval())
    expected = answers(model, inputs())
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(model, inputs())
    assert_close({name: tensor.float() for name, tensor in found.items()}, expected, 0.03)
    model.to(torch.bfloat16)
    assert model.bert.embeddings.word_embeddings.weight.dtype == torch.int8
    found = answers(model, inputs())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_close({name: tensor.float() for name, tensor in found.items()}, expected, 0.05)


def test_measured_on_cells_it_is_the_encoder_that_is_measured_on_them() -> None:
    """The same layers are kept and smoothed, and the numbers are the same."""
    plain, given = bert().eval(), inputs()
    cells = Ragged.from_padded(given["input_ids"], given["attention_mask"].bool())
    with torch.no_grad():
        plain.bert.encoder.layer[0].output.dense.weight[:, 3] *= 300  # a layer that loses too much
    encoder, _ = encoder_of(plain)
    ours = quantize(encoder, calibrate=[cells], bar=41.0)
    model = quantize(plain, calibrate=[cells], bar=41.0)
    smoothed = [name for name, module in ours.named_modules() if getattr(module, "smooth", None) is not None]
    assert smoothed or len(ours.quantization.layers) < 10
    assert sum(isinstance(module, EightBits) for module in model.modules()) == 1 + sum(
        3 if "qkv" in name else 1 for name in ours.quantization.layers
    )  # and the decoder, which is the table
    accelerate(model)
    with torch.no_grad():
        states = ours.hidden_states(cells)
        expected = {"last": states[-1].values, "first": states[1].values, "logits": ours.logits(states[-1])}
    assert_close(answers(model, given), expected, CLOSE["dynamic"])


def test_what_is_left_alone_by_quantize() -> None:
    plain = bert()
    before = copy.deepcopy(plain.state_dict())
    model = quantize(plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    places = {tensor.data_ptr() for tensor in plain.state_dict().values()}
    assert not any(tensor.data_ptr() in places for tensor in model.state_dict().values())
    assert model.training == plain.training
    decoder, table = model.cls.predictions.decoder, model.bert.embeddings.word_embeddings
    model.tie_weights()
    for each in (model, copy.deepcopy(model)):
        tied = each.cls.predictions.decoder, each.bert.embeddings.word_embeddings
        assert tied[0]._parameters["weight"] is tied[1]._parameters["weight"]
        assert tied[0].weight.dtype == torch.int8
    table.weight.requires_grad = False
    with pytest.raises(UnsupportedError, match="another weight"):
        table.weight = torch.nn.Parameter(torch.zeros(61, 32))
    for write in (lambda: setattr(table.weight, "data", table.weight.data), lambda: table.weight.zero_()):
        with pytest.raises(UnsupportedError, match="eight bits cannot be changed"):
            write()
    assert decoder.bias is model.cls.predictions.bias


def test_logits_are_those_of_the_forward_pass() -> None:
    """They are computed when they are read, and refused once the table is another."""
    model = quantize(bert().eval())
    accelerate(model)
    given = inputs()
    with torch.no_grad():
        out, expected = model(**given), model(**given).logits
    model.bert.embeddings.word_embeddings.weight.data[5] = 3
    with pytest.raises(Exception, match="weights or the hidden states have changed"):
        _ = out.logits
    assert (model(**given).logits - expected).abs().amax((0, 1))[5] > 0


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_saved_and_loaded_here(architecture: str, tmp_path: Path) -> None:
    model = quantize(bert(architecture).eval())
    model.save_pretrained(tmp_path / "theirs")
    quantize(bert(architecture).eval(), tmp_path / "ours")
    found, expected = (load(tmp_path / name).state_dict() for name in ("theirs", "ours"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_with_smoothing_saved_and_loaded_here(architecture: str, tmp_path: Path) -> None:
    smooth = {"blocks.0.qkv": Choice("int8", torch.rand(32) + 0.5)}
    model = quantize(bert(architecture).eval(), choices=smooth)
    model.save_pretrained(tmp_path / "theirs")
    found = load(tmp_path / "theirs")
    assert torch.equal(found.get_submodule("blocks.0.qkv").smooth, smooth["blocks.0.qkv"].smooth)


def theirs(folder: Path, architecture: str) -> Any:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, architecture).from_pretrained(folder).eval()


# Rows that are rounded go to 127.5 steps there and to 127 here, two roundings of the same numbers.
@pytest.mark.parametrize(("scheme", "rtol"), [("int8-weights", 1e-5), ("int8", 0.02), ("fp8", 0.06)])
@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertForTokenClassification"])
def test_a_folder_that_transformers_loads(tmp_path: Path, architecture: str, scheme: str, rtol: float) -> None:
    """Nothing is widened, state_dict stays, and undo() gives the package's model back."""
    pytest.importorskip(PACKAGE, reason="the package compressed-tensors loads the folder")
    quantize(bert(architecture).eval(), tmp_path / "out", scheme=scheme)
    model, given = theirs(tmp_path / "out", architecture), inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = answers(theirs(tmp_path / "out", architecture), given)
    handle = accelerate(model)
    found = answers(model, given)
    assert_close(found, expected, rtol)
    assert not model(**given, output_hidden_states=True).hidden_states[-1][1, 1:].any()
    query = model.bert.encoder.layer[0].attention.self.query
    assert (type(query), query.weight.dtype.itemsize, query.scheme) == (TheirLinear, 1, scheme)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
    assert all(torch.equal(tensor.float(), before[name].float()) for name, tensor in after.items())
    assert_close(answers(copy.deepcopy(model), given), found, 0)
    model.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").quantization == load(tmp_path / "out").quantization
    handle.undo()
    assert not any(packed_forward_of(module) for module in model.modules())
    assert type(query) is torch.nn.Linear
    assert_close(answers(model, given), expected, 0)
    assert query.weight.dtype == torch.float32  # as the package does it


def test_the_encoder_of_a_folder_alone(tmp_path: Path) -> None:
    """The package's hook stands on the model around it."""
    pytest.importorskip(PACKAGE, reason="the package compressed-tensors loads the folder")
    quantize(bert("BertForSequenceClassification").eval(), tmp_path / "out", scheme="int8-weights")
    model, given = theirs(tmp_path / "out", "BertForSequenceClassification"), inputs()
    expected = answers(theirs(tmp_path / "out", "BertForSequenceClassification"), given)
    with pytest.warns(UserWarning, match=r"hook on the model around it.*ct_decompress_hook.remove\(\)"):
        accelerate(model.bert)
    model.ct_decompress_hook.remove()
    assert_close(answers(model, given), expected)
    assert model.bert.encoder.layer[0].output.dense.weight.dtype == torch.int8


def test_a_model_that_the_package_has_widened(tmp_path: Path) -> None:
    pytest.importorskip(PACKAGE, reason="the package compressed-tensors loads the folder")
    quantize(bert().eval(), tmp_path / "out")
    model, given = theirs(tmp_path / "out", "BertForMaskedLM"), inputs()
    expected = answers(model, given)
    with pytest.warns(
        UserWarning, match=r"15 of its layers .* widened, because .* accelerate a model before it is cal"
    ):
        accelerate(model)
    with pytest.warns(UserWarning, match="stock forward pass"):
        assert_close(answers(model, given), expected)


def test_what_cannot_be_quantized() -> None:
    import transformers

    peft = pytest.importorskip("peft")
    plain, other = bert(), transformers.BertForPreTraining(bert().config)
    with pytest.raises(UnsupportedError, match="word_embeddings of this BertForMaskedLM is quantized already"):
        quantize(quantize(plain))
    with pytest.raises(UnsupportedError, match=r"serves Encoder and .*BertForMaskedLM.*quantize the BERT in it"):
        quantize(other)
    with pytest.raises(CheckpointError, match="hidden_act 'silu'"):
        quantize(bert(hidden_act="silu"))
    with pytest.raises(UnsupportedError, match="float64"):
        quantize(bert().double())
    with pytest.raises(UnsupportedError, match="is_decoder=True is a decoder"):
        quantize(bert(is_decoder=True))
    with pytest.raises(UnsupportedError, match="merge_and_unload"):
        quantize(peft.get_peft_model(plain, peft.LoraConfig(target_modules=["query"])))


def test_state_dicts_go_round(tmp_path: Path) -> None:
    model = quantize(bert().eval())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state, other = torch.load(tmp_path / "state.pt", weights_only=True), quantize(bert(seed=3).eval())
    for is_assigned in (False, True):
        other.load_state_dict(state, assign=is_assigned)
        assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    assert_close(answers(other, inputs()), answers(model, inputs()), 0)
