"""scBERT: numbers of the original, files as its tools write them, and what is mended."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from scbert_files import as_stored, classified, performer, shapes_of, state_of, written

import geneformer_fast as gf
from geneformer_fast import families
from geneformer_fast.checkpoints.mapping import to_ours
from geneformer_fast.checkpoints.native import save_native
from geneformer_fast.checkpoints.skeleton import skeleton
from geneformer_fast.config import EncoderConfig
from geneformer_fast.encoder import Encoder
from geneformer_fast.errors import CheckpointError, InputError, OutputError, UnsupportedError
from geneformer_fast.families import scbert
from geneformer_fast.ragged import Ragged

ROUNDED = 1e-9
TOKENS = [[0, 3, 1, 0, 5, 2, 0, 4, 0], [1, 0, 0, 2, 6, 0, 3, 0, 0]]


@pytest.fixture(scope="module")
def fixture(shared_dir: Path) -> dict:
    return json.loads((shared_dir / "fixtures" / "scbert_tiny.json").read_text())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small published checkpoint."""
    path = tmp_path / "model" / "panglao_pretrain.pth"
    path.parent.mkdir()
    torch.save(written(as_stored(state_of()), "simple"), path)
    return path


def cells(rows: list[list[int]] = TOKENS) -> Ragged:
    return Ragged.from_cells([torch.tensor(row) for row in rows])


def in_float64(file: Path, stabiliser: str = "cell") -> Encoder:
    """With the fixture's weights, which are not rounded to float32."""
    encoder = gf.load(file, dtype="float64")
    table = families.family("scbert").entries(encoder.config, "mlm")
    shapes = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    encoder.load_state_dict(to_ours(state_of(), table, shapes, source="formula"))
    return scbert.use_stabiliser(encoder, stabiliser)


def test_the_fixture_has_these_tensors(fixture: dict) -> None:
    assert {name: list(shape) for name, shape in shapes_of().items()} == fixture["shapes"]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_numbers_of_the_original(fixture: dict, file: Path, impl: str) -> None:
    """With its stabiliser of the whole batch; and a cell alone, for which there is no difference."""
    from geneformer_kernels.dispatch import use_impl

    tokens = cells(fixture["tokens"])
    with use_impl(impl, "favor_attention"):
        encoder = in_float64(file, "batch")
        hidden = encoder(tokens)
        logits, alone = encoder.logits(hidden), in_float64(file)(cells(fixture["tokens"][:1]))
    for found, name in ((hidden.values, "encodings"), (logits, "logits"), (alone.values, "encodings_row0_alone")):
        expected = torch.tensor(fixture[name], dtype=torch.float64).flatten(0, 1)
        torch.testing.assert_close(found, expected, atol=ROUNDED, rtol=0)


def test_a_cell_does_not_depend_on_its_batch(fixture: dict, file: Path) -> None:
    """The original's encodings do, by 3e-3 here; ours are those of the cell alone, but for the rounding of products.

    In what order a library adds them up may depend on how many rows there are.
    """
    encoder = in_float64(file)
    both, first, second = (encoder(cells(rows)).values for rows in (TOKENS, TOKENS[:1], TOKENS[1:]))
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-12, rtol=1e-12)
    batch = in_float64(file, "batch")(cells()).values
    assert abs((batch[:9] - first).abs().max().item() - fixture["batch_dependence_max_abs"]) < ROUNDED


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("form", ["plain", "simple", "whole"])
def test_files_come_back_as_they_were(tmp_path: Path, form: str, prefix: str) -> None:
    """Names, order, dtypes and bits, gene2vec in float64 and the random features among them."""
    state = as_stored(state_of(), prefix)
    path = tmp_path / "of_theirs" / "panglao_pretrain.pth"
    path.parent.mkdir()
    torch.save(written(state, form), path)
    for place in (path, path.parent):
        encoder = gf.load(place)
        assert encoder.dtype == torch.float32
        hidden = encoder(cells(TOKENS[:1])).values
        expected = performer(as_stored(state_of()), torch.tensor(TOKENS[:1]))[0]
        torch.testing.assert_close(hidden, expected, atol=2e-4, rtol=1e-4)
        out = gf.save(encoder, tmp_path / f"ours_{place.suffix}")
        again = torch.load(out / path.name, weights_only=True)
        again = again if form == "plain" else again["model_state_dict"]
        assert list(again) == list(state)
        for name, tensor in state.items():
            assert again[name].dtype == tensor.dtype, name
            assert torch.equal(again[name], tensor), name
        assert torch.equal(gf.load(out)(cells(TOKENS[:1])).values, hidden)


def test_old_files_load(tmp_path: Path) -> None:
    """Of torch before 1.6: no archive."""
    path = tmp_path / "panglao_pretrain.pth"
    torch.save(written(as_stored(state_of()), "simple"), path, _use_new_zipfile_serialization=False)
    assert gf.load(path).config.family == "scbert"


def test_the_published_model_has_its_parameters() -> None:
    encoder = skeleton(EncoderConfig.preset("scbert"), "mlm")
    positions = encoder.embeddings.position.weight.numel()
    n_parameters = sum(p.numel() for p in encoder.parameters())
    assert (n_parameters, n_parameters - positions) == (8_388_607, 5_007_207)
    assert encoder.blocks[0].projection.shape == (266, 64)
    assert encoder.blocks[0].qkv.bias is None
    sizes = dict(dim=200, depth=6, heads=10, dim_head=64, n_features=266, length=16_907)
    table = families.family("scbert").entries(encoder.config, "mlm")
    state = encoder.state_dict()
    found = {name: entry.their_shape(state[entry.ours].shape) for entry in table for name in entry.theirs}
    expected = shapes_of(**sizes)
    del expected["performer.calls_since_last_redraw"]
    assert found == expected


def test_a_changed_gene2vec_is_saved_as_it_is_now(file: Path, tmp_path: Path) -> None:
    encoder = gf.load(file)
    with torch.no_grad():
        encoder.embeddings.position.weight[3, 1] += 1
    out = gf.save(encoder, tmp_path / "changed")
    saved = torch.load(out / file.name, weights_only=True)["model_state_dict"]["pos_emb.emb.weight"]
    assert saved.dtype == torch.float64
    assert torch.equal(saved.float(), encoder.embeddings.position.weight)


def test_the_classifier_of_a_fine_tuned_model(tmp_path: Path) -> None:
    state = state_of(n_classes=4)
    path = tmp_path / "finetune_best.pth"
    torch.save(written(as_stored(state), "whole"), path)
    encoder = gf.load(path, dtype="float64")
    logits = encoder.logits(encoder(cells()))
    stored = doubles(as_stored(state))
    expected = torch.cat([classified(stored, performer(stored, torch.tensor(TOKENS[i : i + 1]))) for i in range(2)])
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-10)
    assert logits.shape == (2, 4)
    out = gf.save(encoder.cast("float32"), tmp_path / "again")
    again = torch.load(out / path.name, weights_only=True)["model_state_dict"]
    for name, tensor in as_stored(state).items():
        assert torch.equal(again[name], tensor), name


def doubles(state):
    return type(state)((name, tensor.double()) for name, tensor in state.items())


def test_the_classifier_refuses_cells_of_other_lists(tmp_path: Path) -> None:
    path = tmp_path / "finetune_best.pth"
    torch.save(written(as_stored(state_of(n_classes=4)), "simple"), path)
    encoder = gf.load(path)
    for rows in ([TOKENS[0][:8]], [TOKENS[0][:8], TOKENS[0][:8], [1, 2]]):
        with pytest.raises(InputError, match="cells of 9 values"):
            encoder.logits(encoder(cells(rows)))
    with pytest.raises(ValueError, match="whole cells; rows cannot be chosen"):
        encoder.logits(encoder(cells()), torch.tensor([0]))


def test_the_published_fine_tuning_trains_one_block_a_norm_and_the_head(tmp_path: Path) -> None:
    path = tmp_path / "finetune_best.pth"
    torch.save(written(as_stored(state_of(n_classes=2)), "simple"), path)
    encoder = scbert.freeze_as_published(gf.load(path)).train()
    learning = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in learning} == {"blocks", "final_norm", "head"}
    assert {name.split(".")[1] for name in learning if name.startswith("blocks")} == {"0"}  # of two
    assert not any(name.endswith("projection") for name in learning)
    optimizer = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], lr=1e-3)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(encoder.logits(encoder(cells())), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert changed <= learning


def test_options_that_there_are_not(file: Path) -> None:
    encoder = gf.load(file)
    with pytest.raises(UnsupportedError, match="cell, batch, not 'row'"):
        scbert.use_stabiliser(encoder, "row")
    bert = Encoder(EncoderConfig(2, 16, 2, 32, vocab_size=7, max_len=9))
    with pytest.raises(UnsupportedError, match="attention by softmax"):
        scbert.use_stabiliser(bert, "batch")
    with pytest.raises(UnsupportedError, match="attention_dropout must be 0"):
        Encoder(EncoderConfig.preset("scbert", attention_dropout=0.1, max_len=9))
    with pytest.raises(ValueError, match="never has the weights"):
        encoder.attention_weights(cells())


def _without(state, name):
    del state[name]


FAULTS = {
    "missing": (
        lambda s: _without(s, "performer.net.layers.1.0.fn.to_k.weight"),
        "to_k.weight' of shape .* is missing",
    ),
    "no positions": (lambda s: _without(s, "pos_emb.emb.weight"), "'pos_emb.emb.weight' is missing"),
    "too many": (lambda s: s.update({"performer.net.layers.0.0.fn.gate": torch.ones(2)}), "fn.gate' has no place"),
    "another shape": (lambda s: s.update({"norm.weight": torch.ones(3)}), r"'norm.weight' has shape \[3\]"),
    "whole numbers": (lambda s: s.update({"norm.bias": torch.ones(20, dtype=torch.int8)}), "'norm.bias' holds int8"),
    "of heads": (
        lambda s: s.update({f"performer.net.layers.0.0.fn.to_{x}.weight": torch.ones(15, 20) for x in "qkv"}),
        "15 rows of queries are no whole number of heads of 8",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    change, message = FAULTS[name]
    state = as_stored(state_of())
    change(state)
    path = tmp_path / "panglao_pretrain.pth"
    torch.save({"model_state_dict": state}, path)
    with pytest.raises(CheckpointError, match=message) as error:
        gf.load(path)
    assert str(path) in str(error.value)


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "panglao_pretrain.pth"
    torch.save({"model_state_dict": as_stored(state_of()), "epoch": Malicious()}, path)
    with pytest.raises(CheckpointError, match="holds more than weights"):
        gf.load(path)
    assert "executed" not in capsys.readouterr().out
    path.write_bytes(pickle.dumps({"performer.net.layers.0.0.fn.fast_attention.projection_matrix": Malicious()}))
    with pytest.raises(CheckpointError):
        gf.load(path)
    assert "executed" not in capsys.readouterr().out


def test_truncated_files_and_folders_of_several(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    shutil.copyfile(file, file.parent / "finetune_3.pth")
    with pytest.raises(CheckpointError, match=r"several models of scBERT \(finetune_3.pth, panglao_pretrain.pth\)"):
        gf.load(file.parent)
    cut = tmp_path / "cut.pth"
    for n_bytes in (len(whole) // 2, 3, 0):
        cut.write_bytes(whole[:n_bytes])
        with pytest.raises(CheckpointError):
            gf.load(cut)


def test_others_are_not_taken_for_it(tmp_path: Path) -> None:
    family = families.family("scbert")
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04 no archive")
    torch.save({"bert.embeddings.word_embeddings.weight": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert not family.recognise(tmp_path)
    assert not family.recognise(tmp_path / "nothing")
    torch.save(written(as_stored(state_of()), "simple"), tmp_path / "scbert.pth")
    assert family.recognise(tmp_path)
    assert families.recognise(tmp_path).name == "scbert"
    (tmp_path / "config.json").write_text("{}")
    assert not family.recognise(tmp_path)


def test_saving_does_not_hide_a_model(file: Path, tmp_path: Path) -> None:
    encoder = gf.load(file)
    with pytest.raises(OutputError, match="holds a model already"):
        gf.save(encoder, file.parent)
    gf.save(encoder, file.parent, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(file, other / "another.pth")
    with pytest.raises(OutputError, match="another model of scBERT"):
        gf.save(encoder, other, overwrite=True)
    save_native(encoder, tmp_path / "native")
    with pytest.raises(OutputError, match="another format"):
        gf.save(encoder, tmp_path / "native", overwrite=True)
    native = gf.load(tmp_path / "native")
    assert torch.equal(native(cells()).values, encoder(cells()).values)
    assert torch.equal(native.logits(native(cells())), encoder.logits(encoder(cells())))


def test_a_fresh_model_is_saved_in_its_form_and_one_without_head_in_ours(tmp_path: Path) -> None:
    config = EncoderConfig.preset(
        "scbert", n_layers=2, width=20, n_heads=2, attention_width=16, max_len=9, n_features=11
    )
    for head, there in (("cells", "scbert.pth"), ("mlm", "scbert.pth"), (None, "config.json")):
        encoder = Encoder(config, head, n_classes=3).eval()
        out = gf.save(encoder, tmp_path / str(head))
        assert (out / there).exists()
        again = gf.load(out)
        assert torch.equal(again(cells()).values, encoder(cells()).values)
        assert again.config.attention_width == 16


def test_random_features_are_drawn_orthogonal() -> None:
    config = EncoderConfig.preset("scbert", n_layers=1, max_len=9)
    torch.manual_seed(5)
    first = Encoder(config).blocks[0].projection
    torch.manual_seed(5)
    assert torch.equal(Encoder(config).blocks[0].projection, first)
    groups = first[:256].double().view(4, 64, 64)
    unit = groups / groups.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(unit @ unit.mT, torch.eye(64).double().expand(4, 64, 64), atol=1e-6, rtol=0)
    assert 60 < first.square().sum(1).mean() < 68  # as long as normal vectors of 64 numbers
    assert first.square().sum(1).std() > 5


def test_first_tokens_and_gradients(file: Path) -> None:
    encoder = gf.load(file)
    tokens = cells()
    hidden = encoder(tokens).values
    torch.testing.assert_close(encoder.first_tokens(tokens), hidden[tokens.starts.long()])
    encoder.train().requires_grad_(True)
    encoder(tokens).values.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.blocks.parameters())
    assert encoder.blocks[0].projection.grad is None


@pytest.mark.filterwarnings("ignore:this CPU has no")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_random_features_and_tables(file: Path, dtype: str) -> None:
    expected = gf.load(file)(cells()).values
    half = gf.load(file, dtype=dtype)
    assert half.blocks[0].projection.dtype == half.embeddings.position.weight.dtype == torch.float32
    assert half.dtype == getattr(torch, dtype)
    assert (half(cells()).values - expected).abs().max() < (0.3 if dtype == "bfloat16" else 0.05)
