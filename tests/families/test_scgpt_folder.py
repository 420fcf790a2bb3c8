"""Folders of scGPT: every spelling loads, gives the same numbers, and is given back; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from scgpt_folders import SPELLINGS, WIDTH, affine, shapes, vocabulary, weights, write

import geneformer_fast as gf
from geneformer_fast import families
from geneformer_fast.decoders import ExpressionDecoder, LayeredClassifier
from geneformer_fast.errors import CheckpointError, OutputError, UnsupportedError
from geneformer_fast.families import scgpt
from geneformer_fast.finetuning.models import with_head
from geneformer_fast.ragged import Ragged

#: Cells of a CLS (id 18 here) with its value, and some genes with theirs.
CELLS = Ragged.from_cells(
    [
        torch.tensor([[18, -2.0], [3, 50], [11, 1], [7, 23]]),
        torch.tensor([[18, -2.0], [5, 4]]),
        torch.tensor([[18, -2.0], [0, 600], [16, 51], [2, 1], [9, 1]]),
    ]
)


def stored_in(folder: Path, name: str = "best_model.pt") -> OrderedDict[str, torch.Tensor]:
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_alike_and_comes_back(tmp_path: Path, spelling: str, prefix: str) -> None:
    plain = gf.load(write(tmp_path / "plain", spelling="torch"), device="cpu")
    folder = write(tmp_path / "model", spelling=spelling, prefix=prefix)
    assert families.recognise(folder) is scgpt.FAMILY
    encoder = gf.load(folder, device="cpu")
    assert torch.equal(encoder(CELLS).values, plain(CELLS).values)
    assert encoder.config.family == "scgpt"
    assert (encoder.config.vocab_size, encoder.config.pad_id, encoder.config.n_bins) == (20, 17, 51)
    saved = gf.save(encoder, tmp_path / "saved")
    before, after = stored_in(folder), stored_in(saved)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("args.json", "vocab.json"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    again = gf.load(saved, device="cpu")
    assert torch.equal(again(CELLS).values, encoder(CELLS).values)
    assert torch.equal(again.logits(again(CELLS)), encoder.logits(encoder(CELLS)))


def test_what_only_trainings_compute_with_is_kept(tmp_path: Path) -> None:
    tensors = weights(shapes(n_cls=None))
    more = {
        "flag_encoder.weight": torch.randn(2, WIDTH),
        "dsbn.bns.0.weight": torch.randn(WIDTH), "dsbn.bns.0.bias": torch.randn(WIDTH),
        "dsbn.bns.0.running_mean": torch.randn(WIDTH), "dsbn.bns.0.running_var": torch.rand(WIDTH),
        "dsbn.bns.0.num_batches_tracked": torch.tensor(7),
        "grad_reverse_discriminator.out_layer.weight": torch.randn(4, WIDTH),
    }  # fmt: skip
    folder = write(tmp_path / "model", OrderedDict(**tensors, **more))
    with pytest.warns(UserWarning, match="dsbn of a training on several batches are kept and not computed with"):
        encoder = gf.load(folder, device="cpu")
    before, after = stored_in(folder), stored_in(gf.save(encoder, tmp_path / "saved"))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_heads_are_those_that_the_file_has(tmp_path: Path) -> None:
    bare = gf.load(write(tmp_path / "bare", weights(shapes(n_cls=None, mvc=False, decoder=False))), device="cpu")
    assert bare.head is None
    with pytest.raises(UnsupportedError, match="has no head 'expression'"):
        scgpt.use_head(bare, "expression")
    expression = gf.load(write(tmp_path / "expression", weights(shapes(n_cls=None))), device="cpu")
    assert isinstance(expression.head, ExpressionDecoder)
    assert expression.head.cells is not None
    with pytest.raises(ValueError, match="trained without explicit_zero_prob"):
        expression.head.expressed(expression(CELLS).values)
    # Upstream gave models that tell nothing apart a head of one output.
    one = gf.load(write(tmp_path / "one", weights(shapes(n_cls=1))), device="cpu")
    assert isinstance(one.head, ExpressionDecoder)
    assert "cls_decoder.out_layer.weight" in stored_in(gf.save(one, tmp_path / "one-saved"))
    classes = gf.load(write(tmp_path / "classes", weights(shapes(n_cls=5, n_cls_layers=2))), device="cpu")
    assert isinstance(classes.head, LayeredClassifier)
    assert (len(classes.head.hidden), classes.head.classifier.out_features) == (1, 5)
    saved = gf.save(classes, tmp_path / "classes-saved")
    assert torch.equal(gf.load(saved, device="cpu").head.classifier.weight, classes.head.classifier.weight)


def test_heads_that_read_labels_of_batches_are_kept_for_others(tmp_path: Path) -> None:
    sizes = shapes(n_cls=None, mvc=False)
    sizes |= affine("decoder.fc.0", [WIDTH, 2 * WIDTH]) | {"batch_encoder.embedding.weight": [4, WIDTH]}
    folder = write(tmp_path / "model", weights(sizes))
    with pytest.warns(UserWarning, match="batch_encoder of a training on several batches"):
        encoder = gf.load(folder, device="cpu")
    assert encoder.head is None
    assert list(stored_in(folder)) == list(stored_in(gf.save(encoder, tmp_path / "saved")))


def test_probabilities_of_zero(tmp_path: Path) -> None:
    tensors = weights(shapes(n_cls=None, zeros=True))
    encoder = gf.load(write(tmp_path / "model", tensors, explicit_zero_prob=True), device="cpu")
    hidden = encoder(CELLS)
    found = encoder.head.expressed(hidden.values)
    x = hidden.values
    for i in (0, 2, 4):
        x = torch.nn.functional.linear(
            x, *(tensors[f"decoder.zero_logit.{i}.{kind}"].float() for kind in ("weight", "bias"))
        )
        x = torch.nn.functional.leaky_relu(x) if i < 4 else x
    torch.testing.assert_close(found, torch.sigmoid(x.squeeze(1)), atol=1e-6, rtol=1e-5)
    assert encoder.head.cells.project_zeros is not None
    saved = gf.save(encoder, tmp_path / "saved")
    assert list(stored_in(saved)) == list(stored_in(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="explicit_zero_prob is true, but the weights tell no probability"):
        gf.load(write(tmp_path / "without", weights(shapes(n_cls=None)), explicit_zero_prob=True), device="cpu")


def test_values_as_categories(tmp_path: Path) -> None:
    """``input_emb_style="category"``: bins and two more rows, for masked and padded genes."""
    tensors = weights(shapes(n_cls=None, bins=53))
    encoder = gf.load(write(tmp_path / "model", tensors, input_emb_style="category"), device="cpu")
    assert (encoder.config.inputs, encoder.config.n_bins) == ("pairs-category", 53)
    values = torch.tensor([0.0, 1, 52])
    table, norm = tensors["value_encoder.embedding.weight"].float(), "value_encoder.enc_norm"
    wanted = torch.nn.functional.layer_norm(
        table[values.long()], [WIDTH], tensors[f"{norm}.weight"].float(), tensors[f"{norm}.bias"].float(), 1e-5
    )
    torch.testing.assert_close(encoder.embeddings.of_values(values), wanted, atol=1e-6, rtol=1e-5)
    saved = gf.save(encoder, tmp_path / "saved")
    assert list(stored_in(saved)) == list(stored_in(tmp_path / "model"))
    with pytest.raises(gf.errors.InputError, match="a value is outside the model's 53 bins"):
        encoder(Ragged.from_cells([torch.tensor([[18.0, -2]])]))


def test_a_classifier_put_on_top_is_saved_with_everything_else(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", weights(shapes(n_cls=1)), prefix="module.")
    tuned = with_head(gf.load(folder, device="cpu"), "cells", 4)
    saved = gf.save(tuned, tmp_path / "saved")
    before, after = stored_in(folder), stored_in(saved)
    assert set(before) == set(after)
    assert after["module.cls_decoder.out_layer.weight"].shape == (4, WIDTH)
    assert torch.equal(after["module.decoder.fc.0.weight"], before["module.decoder.fc.0.weight"])
    assert torch.equal(gf.load(saved, device="cpu").head.classifier.weight, tuned.head.classifier.weight)


def test_half_precision_stays(tmp_path: Path) -> None:
    tensors = OrderedDict((name, tensor.half()) for name, tensor in weights(shapes()).items())
    folder = write(tmp_path / "model", tensors)
    encoder = gf.load(folder, dtype="float32", device="cpu")
    after = stored_in(gf.save(encoder, tmp_path / "saved"))
    assert all(torch.equal(after[name], tensor) for name, tensor in stored_in(folder).items())


def test_special_tokens_that_the_vocabulary_lacks_come_last(tmp_path: Path) -> None:
    vocab = vocabulary(17, ())
    encoder = gf.load(write(tmp_path / "model", vocab=vocab), device="cpu")
    assert (encoder.config.vocab_size, encoder.config.pad_id) == (20, 17)


def test_the_tutorials_name_of_the_weights(tmp_path: Path) -> None:
    encoder = gf.load(write(tmp_path / "model", name="model.pt"), device="cpu")
    assert (gf.save(encoder, tmp_path / "saved") / "model.pt").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pre_norm": True}, "pre_norm is True, and only False is read"),
        ({"input_style": "log1p"}, "input_style is 'log1p', and only 'binned' is read"),
        ({"input_emb_style": "scaling"}, "input_emb_style is 'scaling'"),
        ({"cell_emb_style": "avg-pool"}, "cell_emb_style is 'avg-pool'"),
        ({"mvc_decoder_style": "concat query"}, "mvc_decoder_style is 'concat query'"),
        ({"fast_transformer_backend": "linear"}, "fast_transformer_backend is 'linear'"),
        ({"nlayers": 3}, "nlayers is 3, but the weights have 2 layers"),
        ({"embsize": "16"}, 'embsize is "16"; input should be a valid integer'),
        ({"nheads": 5}, "embsize 16 is not divisible by 5 heads"),
        ({"d_hid": 32}, "has shape .* but the configuration asks for .*; args.json and the weights"),
        ({"pad_token": "[PAD]"}, "pad_token is '\\[PAD\\]', which vocab.json does not have"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(tmp_path: Path, changes: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        gf.load(write(tmp_path / "model", **changes), device="cpu")


def test_settings_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    args = json.loads((folder / "args.json").read_text())
    del args["nheads"]
    (folder / "args.json").write_text(json.dumps(args))
    with pytest.raises(CheckpointError, match="nheads is missing"):
        gf.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("lost", "added", "said"),
    [
        ("value_encoder.linear2.weight", {}, "'value_encoder.linear2.weight' of shape .* is missing"),
        ("decoder.fc.2.bias", {}, "'decoder.fc.2.bias' of shape .* is missing"),
        (None, {"encoder.extra.weight": [3]}, "'encoder.extra.weight' has no place in scGPT"),
        (None, {"pert_encoder.weight": [3, 16]}, "is of a model of genetic perturbations"),
        (None, {"mod_encoder.embedding.weight": [3, 16]}, "is of a model of several modalities"),
        (None, {"transformer_encoder.layers.0.self_attn.Wqkv.weight": [48, 16]}, "are one tensor in two spellings"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, lost: str | None, added: dict, said: str) -> None:
    """The original would leave random numbers there, or pass over them."""
    sizes = {**shapes(n_cls=None), **added}
    if lost is not None:
        del sizes[lost]
    with pytest.raises(CheckpointError, match=said):
        gf.load(write(tmp_path / "model", weights(sizes), spelling="torch"), device="cpu")


def test_vocabularies_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the table of genes has 20 rows, but vocab\.json has 15 tokens"):
        gf.load(write(tmp_path / "few", vocab=vocabulary(12)), device="cpu")
    twice = {**vocabulary(), "GENE1": 0}
    with pytest.raises(CheckpointError, match="ids must run from 0"):
        gf.load(write(tmp_path / "twice", vocab=twice), device="cpu")
    with pytest.raises(CheckpointError, match=r"vocab\.json"):
        gf.load(write(tmp_path / "text", vocab={**vocabulary(), "GENE1": "1"}), device="cpu")


def test_files_that_are_damaged_missing_or_not_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    whole = (folder / "best_model.pt").read_bytes()
    (folder / "best_model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"best_model\.pt"):
        gf.load(folder, device="cpu")
    middle = len(whole) // 2
    (folder / "best_model.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(CheckpointError, match=r"best_model\.pt"):
        gf.load(folder, device="cpu")
    (folder / "best_model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"but no best_model\.pt or model\.pt; download the weights too"):
        gf.load(folder, device="cpu")

    class Malicious:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"encoder.embedding.weight": Malicious()}, folder / "best_model.pt")
    with pytest.raises(CheckpointError, match="holds more than weights, and was not loaded"):
        gf.load(folder, device="cpu")
    assert not (tmp_path / "executed").exists()
    torch.save(torch.zeros(3), folder / "best_model.pt")
    with pytest.raises(CheckpointError, match="is not a state dict"):
        gf.load(folder, device="cpu")


def test_a_byte_that_changed_after_saving_is_found(tmp_path: Path) -> None:
    saved = gf.save(gf.load(write(tmp_path / "model"), device="cpu"), tmp_path / "saved")
    content = bytearray((saved / "best_model.pt").read_bytes())
    content[-3] ^= 1
    (saved / "best_model.pt").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="is damaged or was changed"):
        gf.load(saved, device="cpu")


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    encoder = gf.load(write(tmp_path / "model"), device="cpu")
    with pytest.raises(OutputError, match="holds a model already"):
        gf.save(encoder, tmp_path / "model")
    gf.save(encoder, tmp_path / "model", overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="holds a model of another format"):
        gf.save(encoder, other, overwrite=True)


def test_folders_of_others_are_not_recognised(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "config.json").write_text("{}")
    assert families.recognise(folder) is not scgpt.FAMILY
    shutil.rmtree(folder)
    assert not scgpt.recognise(folder)


def test_an_encoder_without_a_vocabulary_is_saved_under_our_names(tmp_path: Path) -> None:
    """One that was made here: there is no vocab.json to give back."""
    config = gf.EncoderConfig.preset(
        "scgpt-whole-human", n_layers=1, width=16, n_heads=2, ff_width=16, vocab_size=20, pad_id=17
    )
    for head in (None, "cells", "expression", "expression-mvc-zeros"):
        encoder = gf.Encoder(config, head, n_classes=3).eval()
        saved = gf.save(encoder, tmp_path / str(head))
        again = gf.load(saved, device="cpu")
        assert type(again.head) is type(encoder.head)
        assert torch.equal(again(CELLS).values, encoder(CELLS).values)
        state = again.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())


def test_the_published_sizes() -> None:
    """MODELS.md 5.1: what each part of the whole-human model holds."""
    from geneformer_fast.checkpoints.skeleton import skeleton

    config = gf.EncoderConfig.preset("scgpt-whole-human")
    sizes = {name: tensor.numel() for name, tensor in skeleton(config, "expression-mvc").state_dict().items()}

    def held(*starts: str) -> int:
        return sum(size for name, size in sizes.items() if name.startswith(starts))

    assert held("embeddings.token") == 31_077_888
    assert held("embeddings.value") == 264_704
    assert held("blocks.") == 18_935_808
    assert held("head.layers.") == 525_825
    assert held("head.cells.") == 524_800
    classes = skeleton(config, "cells", n_classes=1).head
    assert sum(parameter.numel() for parameter in classes.parameters()) == 527_873
