"""BioNeMo's Geneformer out of every format its tools write, against one numeric reference in float64."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bionemo_files as files
import pytest
import torch
import two_ranks
from bionemo_files import State
from safetensors.torch import save_file

from geneformer_fast import Encoder, Ragged, families, load, save
from geneformer_fast.checkpoints import nemo
from geneformer_fast.checkpoints.mapping import to_theirs
from geneformer_fast.errors import CheckpointError

ROUNDED = 2e-9  # the reference is rounded to 1e-10; sums of rounded numbers may differ by a little more


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    path = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "bionemo_geneformer_tiny_DERIVED.json"
    if not path.is_file():
        pytest.skip("numeric references are not here")
    return json.loads(path.read_text())


@pytest.fixture
def state(reference: dict[str, Any]) -> State:
    return files.tiny_state(reference)


def quietly(path: Path, **options: Any) -> Encoder:
    """What is loaded, without what is said meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(path, device="cpu", **options)


def check(encoder: Encoder, reference: dict[str, Any]) -> None:
    """Hidden states and logits of every token that is one."""
    mask = torch.tensor(reference["attention_mask"])
    tokens = Ragged.from_padded(torch.tensor(reference["input_ids"]), mask)
    hidden = encoder(tokens)
    for found, name in ((hidden.values, "hidden"), (encoder.logits(hidden), "logits")):
        expected = torch.tensor(reference[name], dtype=torch.float64)[mask.bool()]
        torch.testing.assert_close(found, expected, atol=ROUNDED, rtol=0)


def _nemo1(path: Path, state: State) -> Path:
    return files.nemo1_archive(path / "geneformer-10M-240530.nemo", state)


def _nemo1_packed(path: Path, state: State) -> Path:
    return files.nemo1_archive(path / "packed.nemo", state, mode="w:gz")


def _nemo1_in_folder(path: Path, state: State) -> Path:
    files.nemo1_archive(path / "model.nemo", state)
    return path


def _nemo1_unpacked(path: Path, state: State) -> Path:
    (path / "model_config.yaml").write_text(files.NEMO1_CONFIG.format(activation="gelu"))
    torch.save(files.nemo1_names(state), path / "model_weights.ckpt")
    return path


def _nemo1_of_ranks(path: Path, state: State) -> Path:
    content = {"model_config.yaml": files.NEMO1_CONFIG.format(activation="gelu").encode()}
    for rank in range(2):
        part = files.nemo1_names(files.rank_of(state, rank, 2))
        content[f"mp_rank_0{rank}/model_weights.ckpt"] = files.saved(part)
    return files.write_nemo(path / "ranks.nemo", content)


def _nemo1_sharded(path: Path, state: State) -> Path:
    folder = files.write_sharded(path / "made", {f"model.{n}": t for n, t in state.items()})
    content = {f"model_weights/{each.name}": each.read_bytes() for each in folder.iterdir()}
    content["model_config.yaml"] = files.NEMO1_CONFIG.format(activation="gelu").encode()
    return files.write_nemo(path / "sharded.nemo", content)


def _nemo2(path: Path, state: State) -> Path:
    # States of an optimizer, and what Transformer Engine keeps of float8, lie beside the model.
    others: dict[str, Any] = {
        "optimizer.state.exp_avg.module.embedding.word_embeddings.weight": torch.ones(3, 2, dtype=torch.int32),
        "module.encoder.layers.self_attention.linear_qkv._extra_state/shard_0_2": io.BytesIO(b"\x80\x04N."),
        "rng_state/shard_0_1": io.BytesIO(b"\x80\x04N."),
    }
    return files.nemo2_folder(path / "nemo2", lambda at: files.write_sharded(at, {**files.stacked(state), **others}))


def _nemo2_layer_by_layer(path: Path, state: State) -> Path:
    content = files.local_names(state)
    return files.nemo2_folder(path / "nemo2", lambda at: files.write_sharded(at, content))


def _nemo2_in_pieces(path: Path, state: State) -> Path:
    return files.nemo2_folder(path / "nemo2", lambda at: files.write_by_hand(at, *files.pieces_of(state)))


def _nemo2_with_yaml(path: Path, state: State) -> Path:
    folder = _nemo2(path, state)
    (folder / "context" / "io.json").unlink()
    files.write_model_yaml(folder / "context")
    return folder


def _nemo2_weights_alone(path: Path, state: State) -> Path:
    return _nemo2(path, state) / "weights"


def _plain_pt(path: Path, state: State) -> Path:
    files.write_context(path)
    torch.save({f"module.{n}": t for n, t in state.items()} | {"module.encoder._extra_state": None}, path / "model.pt")
    return path / "model.pt"


def _plain_lightning(path: Path, state: State) -> Path:
    extra = {"module.encoder.layers.0.mlp.linear_fc1._extra_state": io.BytesIO(b"abc")}
    content = {"state_dict": {f"module.module.{n}": t for n, t in state.items()} | extra, "epoch": 3}
    torch.save(content, path / "last.ckpt")
    (path / "model_config.yaml").write_text(files.NEMO1_CONFIG.format(activation="gelu"))
    return path / "last.ckpt"


def _plain_safetensors(path: Path, state: State) -> Path:
    save_file(state, path / "weights.safetensors")
    said = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32}
    (path / "config.json").write_text(json.dumps(said))
    return path


def _plain_folder(path: Path, state: State) -> Path:
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    return path


FORMATS = (
    _nemo1, _nemo1_packed, _nemo1_in_folder, _nemo1_unpacked, _nemo1_of_ranks, _nemo1_sharded, _nemo2,
    _nemo2_layer_by_layer, _nemo2_in_pieces, _nemo2_with_yaml, _nemo2_weights_alone, _plain_pt, _plain_lightning,
    _plain_safetensors, _plain_folder,
)  # fmt: skip


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__.strip("_"))
@pytest.mark.parametrize("verify", [True, False])
def test_every_format_gives_the_numbers_of_the_reference(
    tmp_path: Path, state: State, reference: dict[str, Any], write: Callable[[Path, State], Path], verify: bool
) -> None:
    place = write(tmp_path, state)
    assert families.recognise(place) is families.family("bionemo")
    encoder = quietly(place, dtype="float64", verify=verify)
    check(encoder, reference)
    config = encoder.config
    assert (config.n_layers, config.width, config.n_heads, config.ff_width) == (2, 16, 4, 32)
    assert (config.vocab_size, config.max_len, config.eps) == (32, 24, 1e-12)
    assert (config.family, config.activation, config.head_activation) == ("bionemo", "gelu_tanh", "gelu")
    assert (config.dropout, config.attention_dropout) == (0.02, 0.1)
    assert quietly(place, verify=verify).dtype == torch.float64  # what the files hold
    # Saved under our own names, and back, without a word about activations.
    save(encoder, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(tmp_path / "ours", device="cpu")
    check(again, reference)
    assert again.config == config


def test_no_tensor_shares_its_memory_with_another_layer(tmp_path: Path, state: State) -> None:
    encoder = quietly(_nemo2(tmp_path, state))
    seen: dict[int, str] = {}
    for name, parameter in encoder.named_parameters():
        storage = parameter.untyped_storage()
        assert storage.nbytes() == parameter.numel() * parameter.itemsize, name
        assert seen.setdefault(storage.data_ptr(), name) == name


def test_rows_of_projections_are_interleaved_by_head_and_come_back(state: State) -> None:
    # [heads, 3, head dim] in the file, [3, heads, head dim] here: row r of head h's keys is 12 h + 4 + r there.
    entries = families.family("bionemo").entries
    assert entries is not None
    config = quietly_config()
    table = {entry.ours: entry for entry in entries(config, "mlm")}
    theirs = torch.arange(48.0)[:, None].expand(48, 16).contiguous()
    name = "encoder.layers.0.self_attention.linear_qkv.weight"
    ours = table["blocks.0.qkv.weight"].read({name: theirs})
    for part in range(3):
        for head in range(4):
            for row in range(4):
                assert ours[16 * part + 4 * head + row, 0] == 12 * head + 4 * part + row
    assert torch.equal(table["blocks.0.qkv.weight"].write(ours)[name], theirs)
    encoder = Encoder(config, "mlm").double()
    shapes = {n: p.shape for n, p in encoder.state_dict().items()}
    from geneformer_fast.checkpoints.mapping import to_ours

    back = to_theirs(to_ours(state, list(table.values()), shapes, source="made"), list(table.values()))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], state[n]) for n in state)


def quietly_config() -> Any:
    from geneformer_fast import EncoderConfig

    return EncoderConfig.preset(
        "bionemo-10m", n_layers=2, width=16, n_heads=4, ff_width=32, vocab_size=32, max_len=24, vocabulary=None
    )


def said_while_loading(path: Path) -> tuple[Encoder, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder = load(path, device="cpu")
    return encoder, [str(each.message) for each in caught]


def test_cards_that_name_relu_are_not_followed_and_nemo_2_is(tmp_path: Path, state: State) -> None:
    encoder, said = said_while_loading(files.nemo1_archive(tmp_path / "relu.nemo", state, activation="relu"))
    assert encoder.config.activation == "gelu_tanh"
    assert len(said) == 1
    assert "model_config.yaml names 'relu': NeMo 1 did not follow that field" in said[0]
    encoder, said = said_while_loading(files.nemo1_archive(tmp_path / "gelu.nemo", state))
    assert encoder.config.activation == "gelu_tanh"
    assert "cards that name ReLU are wrong" in said[0]
    folder = _nemo2(tmp_path, state)
    files.write_context(folder / "context", activation=files.RELU)
    encoder, said = said_while_loading(folder)
    assert (encoder.config.activation, encoder.config.head_activation) == ("relu", "gelu")
    assert "its blocks compute ReLU, as" in said[0]
    files.write_context(folder / "context", {**files.NEMO2_FIELDS, "bias_activation_fusion": False})
    encoder, said = said_while_loading(folder)
    assert encoder.config.activation == "gelu"


def test_heads_of_other_tasks_are_left_out_by_name(tmp_path: Path, state: State) -> None:
    head = {"regression_head.linear_fc1.weight": torch.ones(32, 16, dtype=torch.float64)}
    encoder, said = said_while_loading(files.nemo1_archive(tmp_path / "regressor.nemo", {**state, **head}))
    assert encoder.head is not None
    assert any("predicts a cell's length from its CLS token" in each for each in said)
    encoder, _ = said_while_loading(
        files.nemo1_archive(tmp_path / "b.nemo", {n: t for n, t in state.items() if n.split(".")[0] != "lm_head"})
    )
    assert encoder.head is None


def test_a_decoder_of_its_own_stays_one(tmp_path: Path, state: State) -> None:
    own = state["embedding.word_embeddings.weight"] * 2
    encoder = quietly(files.nemo1_archive(tmp_path / "own.nemo", {**state, "output_layer.weight": own}))
    assert not encoder.config.tied_decoder
    assert torch.equal(encoder.head.decoder.weight, own)
    save(encoder, tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours", device="cpu").head.decoder.weight, own)
    tied = {**state, "output_layer.weight": state["embedding.word_embeddings.weight"].clone()}
    assert quietly(files.nemo1_archive(tmp_path / "tied.nemo", tied)).config.tied_decoder


def test_heads_of_published_sizes_are_known_without_a_configuration(tmp_path: Path) -> None:
    preset = families.presets()["bionemo-10m"]
    with torch.device("meta"):
        made = Encoder(preset, "mlm").state_dict()
    entries = families.family("bionemo").entries
    assert entries is not None
    described = to_theirs(
        {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in made.items()}, entries(preset, "mlm")
    )
    torch.save(described, tmp_path / "geneformer.pt")
    encoder = quietly(tmp_path / "geneformer.pt")
    assert encoder.config == preset
    assert encoder.dtype == torch.bfloat16
    assert encoder.token_table.dtype == torch.float32


def test_pieces_in_the_files_of_two_ranks_are_put_together(tmp_path: Path, state: State) -> None:
    pieces, sizes = files.pieces_of(state)
    folder = files.write_by_hand(tmp_path / "made" / "weights", pieces, sizes)
    assert {each.name for each in folder.iterdir()} == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    found = nemo.read_distributed(folder)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.slow
def test_what_two_processes_of_torch_save_is_put_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(two_ranks.__file__)
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "weights")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, expected = nemo.read_distributed(tmp_path / "weights", verify=True), two_ranks.tensors()
    layers = expected.pop("module.encoder.layers.mlp.linear_fc2.weight")
    expected |= {f"module.encoder.layers.{i}.mlp.linear_fc2.weight": layer for i, layer in enumerate(layers)}
    assert found.keys() == {name.removeprefix("module.") for name in expected}
    assert all(torch.equal(found[name.removeprefix("module.")], tensor) for name, tensor in expected.items())


def test_what_reads_yaml_is_named_where_it_is_missing(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = files.nemo1_archive(tmp_path / "model.nemo", state)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(CheckpointError, match=r"model_config.yaml is YAML, which needs PyYAML: pip install pyyaml"):
        load(place, device="cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
