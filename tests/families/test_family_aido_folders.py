"""Folders of AIDO.Cell as its library writes them: loaded, held to its numbers, saved back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formula_weights import formula_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from geneformer_fast import Encoder, EncoderConfig, Ragged, load, save
from geneformer_fast.checkpoints.hf import Source
from geneformer_fast.errors import CheckpointError
from geneformer_fast.families import recognise

DECODER_BIAS, BIAS = "cls.predictions.decoder.bias", "cls.predictions.bias"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny(shared_dir: Path) -> dict:
    return json.loads((shared_dir / "fixtures" / "aido_cell_tiny.json").read_text())


@pytest.fixture(scope="module")
def tensors(tiny: dict) -> Tensors:
    return formula_weights(tiny["keys_sorted"], tiny["shapes"], set(tiny["norm_weight_keys"]).__contains__)


def settings_of(tiny: dict, architecture: str = "CellFoundationForMaskedLM") -> dict:
    """A config.json as transformers writes it of the class: all of its own fields, and what every class has."""
    return {
        **tiny["config"],
        "architectures": [architecture],
        "initializer_range": 0.02,
        "model_type": "cellfoundation",
        "rotary_percent": 1.0,
        "self_attn_type": "core",
        "seq_len_interpolation_factor": None,
        "torch_dtype": "float32",
        "transformers_version": "4.48.3",
        "type_vocab_size": 2,
        "use_cache": True,
        "use_flash_attention": True,
    }


def written(folder: Path, settings: dict, tensors: Tensors, kind: str = "safetensors") -> Path:
    """A folder as ``save_pretrained`` writes it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    elif kind == "bin":  # which spells out the parameter that has two names
        torch.save({**tensors, DECODER_BIAS: tensors[BIAS].clone()}, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        half = len(names) // 2
        shards = {
            f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate((names[:half], names[half:]))
        }
        for shard, part in shards.items():
            save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        places = {name: shard for shard, part in shards.items() for name in part}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    return folder


def input_of(tiny: dict, *, is_masked: bool = False) -> Ragged:
    """What the model reads, computed anew from counts: the file's numbers are rounded."""
    counts = torch.tensor(tiny["counts"], dtype=torch.float64)
    totals = counts.sum(1, keepdim=True)
    depth = totals.log10().clamp(min=5).expand(-1, 2)
    values = torch.cat([(counts / totals * 1e4).log1p(), depth], 1).clamp(max=20)
    given = torch.tensor(tiny["masked_input" if is_masked else "model_input"], dtype=torch.float64)
    values = torch.where(given < 0, given, values)  # masked, or padded
    torch.testing.assert_close(values, given, atol=1e-9, rtol=0)
    return Ragged.from_padded(values, torch.ones_like(values))


def close(found: torch.Tensor, expected: list) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, wanted.reshape(found.shape), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
def test_a_folder_computes_what_the_original_does(tiny: dict, tensors: Tensors, kind: str, tmp_path: Path) -> None:
    encoder = load(written(tmp_path / "in", settings_of(tiny), tensors, kind), dtype="float64")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == tiny["n_params"]
    tokens = input_of(tiny)
    states = encoder.hidden_states(tokens)
    for state, expected in zip(states, tiny["hidden_states"], strict=True):
        close(state.values, expected)
    close(encoder.logits(states[-1]), tiny["logits"])
    masked = encoder(input_of(tiny, is_masked=True))
    close(masked.values, tiny["masked_hidden_last"])
    close(encoder.logits(masked), tiny["masked_logits"])


@pytest.mark.parametrize("is_masked", [False, True])
def test_soft_bins_alone(tiny: dict, tensors: Tensors, is_masked: bool, tmp_path: Path) -> None:
    encoder = load(written(tmp_path / "in", settings_of(tiny), tensors), dtype="float64")
    tokens = input_of(tiny, is_masked=is_masked)
    expected = tiny["gene_embedding_masked" if is_masked else "gene_embedding"]
    with torch.inference_mode():
        close(encoder(tokens, layer="embeddings").values - encoder.embeddings.position(tokens.positions()), expected)
    close(encoder(tokens, layer="embeddings").values - encoder.embeddings.position(tokens.positions()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
def test_saved_as_it_was_and_loaded_again(
    tiny: dict, tensors: Tensors, dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    settings = settings_of(tiny)
    encoder = load(written(tmp_path / "in", settings, stored, kind))
    assert encoder.dtype == dtype
    folder = save(encoder, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()) == settings
    expected = {**stored, DECODER_BIAS: stored[BIAS]} if kind == "bin" else stored
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = load(folder)
    assert again.config == encoder.config
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name


def test_the_bare_model_has_no_prefix(tiny: dict, tensors: Tensors, tmp_path: Path) -> None:
    bare = {name.removeprefix("bert."): t.float() for name, t in tensors.items() if name.startswith("bert.")}
    settings = settings_of(tiny, "CellFoundationModel")
    encoder = load(written(tmp_path / "in", settings, bare))
    assert encoder.head is None
    folder = save(encoder, tmp_path / "out")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == bare.keys()
    assert all(torch.equal(found[name], bare[name]) for name in bare)
    assert json.loads((folder / "config.json").read_text()) == settings


def test_a_fresh_model_becomes_a_folder_of_theirs(tiny: dict, tensors: Tensors, tmp_path: Path) -> None:
    config = EncoderConfig.preset("aido-cell-3m", n_layers=2, width=16, n_heads=4, ff_width=24, max_len=14, n_bins=10)
    torch.manual_seed(0)
    encoder = Encoder(config, "mlm")
    folder = save(encoder, tmp_path / "out")
    assert load_file(folder / "model.safetensors").keys() == tensors.keys()
    said = json.loads((folder / "config.json").read_text())
    assert {name: said[name] for name in tiny["config"]} == tiny["config"]
    assert said["architectures"] == ["CellFoundationForMaskedLM"]
    again = load(folder)
    assert again.config == config
    assert isinstance(again.source, Source)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())


def test_a_vocabulary_of_ones_own_is_kept(tmp_path: Path) -> None:
    config = EncoderConfig.preset(
        "aido-cell-3m", n_layers=1, width=16, n_heads=2, ff_width=8, max_len=9, vocabulary="mine"
    )
    assert load(save(Encoder(config), tmp_path / "out")).config == config


@pytest.mark.parametrize("head", ["cells", "genes", "pooler"])
def test_other_heads_are_ours_and_are_saved_so(tiny: dict, tensors: Tensors, head: str, tmp_path: Path) -> None:
    loaded = load(written(tmp_path / "in", settings_of(tiny), tensors), dtype="float32")
    encoder = Encoder(loaded.config, head, n_classes=3)
    folder = save(encoder, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "geneformer_fast"
    again = load(folder)
    assert again.config == encoder.config
    assert type(again.head) is type(encoder.head)


CHANGED: dict[str, tuple[dict, str]] = {
    "RMSNorm": ({"normalization_type": "RMSNorm"}, r"normalization_type is 'RMSNorm' but has to be 'LayerNorm'"),
    "rotary": ({"position_embedding_type": "rope"}, r"position_embedding_type is 'rope' but has to be 'absolute'"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act is 'gelu' but has to be 'swiglu'"),
    "biases": ({"add_linear_bias": False}, r"add_linear_bias is False but has to be True"),
    "mask": ({"mask_token_id": -3}, r"mask_token_id is -3"),
    "decoder": ({"is_decoder": True}, r"is_decoder is True"),
    "heads": ({"num_attention_heads": 5}, r"width 16 is not divisible by 5 heads"),
    "kind": ({"bin_num": "ten"}, r"bin_num is \"ten\""),
    "nothing": ({"hidden_size": 0}, r"hidden_size is 0"),
    "positions": ({"max_position_embeddings": 13}, r"position_embedding.weight' has shape \[14, 16\].*asks for \[15"),
    "layers": ({"num_hidden_layers": 3}, r"3 layers, but the weights have 2"),
    "head": ({"architectures": ["CellFoundationForPreTraining"]}, r"'CellFoundationForPreTraining' is not one of"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_not_served_is_said_by_name(tiny: dict, tensors: Tensors, name: str, tmp_path: Path) -> None:
    changes, sentence = CHANGED[name]
    folder = written(tmp_path / "in", {**settings_of(tiny), **changes}, tensors)
    with pytest.raises(CheckpointError, match=sentence):
        load(folder)


def test_what_the_class_takes_where_nothing_is_said_is_rms_norm(tiny: dict, tensors: Tensors, tmp_path: Path) -> None:
    settings = settings_of(tiny)
    del settings["normalization_type"]
    with pytest.raises(CheckpointError, match="'RMSNorm', which the class takes where nothing is said,"):
        load(written(tmp_path / "in", settings, tensors))


def _without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (_without("bert.encoder.ln.bias"), r"'bert.encoder.ln.bias' of shape \[16\] is missing"),
    "more": (lambda t: {**t, "bert.pooler.dense.bias": torch.zeros(16)}, r"'bert.pooler.dense.bias'.*has no place"),
    "shape": (lambda t: {**t, BIAS: torch.zeros(2)}, r"'cls.predictions.bias' has shape \[2\].*asks for \[1\]"),
    "two biases": (lambda t: {**t, DECODER_BIAS: torch.ones(1)}, r"decoder.bias' differs from"),
    "integers": (lambda t: {**t, BIAS: torch.zeros(1, dtype=torch.int8)}, r"holds int8"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_tensors_that_do_not_fit(tiny: dict, tensors: Tensors, name: str, tmp_path: Path) -> None:
    change, sentence = DAMAGED[name]
    with pytest.raises(CheckpointError, match=sentence):
        load(written(tmp_path / "in", settings_of(tiny), change(tensors)))


def test_the_decoders_name_of_the_bias_serves(tiny: dict, tensors: Tensors, tmp_path: Path) -> None:
    renamed = {DECODER_BIAS if name == BIAS else name: tensor.float() for name, tensor in tensors.items()}
    encoder = load(written(tmp_path / "in", settings_of(tiny), renamed))
    assert torch.equal(encoder.head.bias, renamed[DECODER_BIAS])
    assert load_file(save(encoder, tmp_path / "out") / "model.safetensors").keys() == renamed.keys()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_truncated_weights(tiny: dict, tensors: Tensors, kind: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "in", settings_of(tiny), tensors, kind)
    path = folder / ("model.safetensors" if kind == "safetensors" else "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=path.name):
        load(folder)


class _Malicious:
    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('executed')",)


def test_code_in_a_pickle_is_not_executed(tiny: dict, tensors: Tensors, tmp_path: Path) -> None:
    folder = written(tmp_path / "in", settings_of(tiny), tensors, "bin")
    torch.save({**tensors, "more": _Malicious()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than weights, and was not loaded"):
        load(folder)


def test_a_folder_is_known_by_what_it_says(tiny: dict, tensors: Tensors, tmp_path: Path) -> None:
    folder = written(tmp_path / "in", settings_of(tiny), tensors)
    found = recognise(folder)
    assert found is not None
    assert found.name == "aido-cell"
    del (settings := settings_of(tiny))["model_type"]
    found = recognise(written(tmp_path / "older", settings, tensors))
    assert found is not None
    assert found.name == "aido-cell"
