"""Pretraining from a folder to a folder, as a function and as a command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from ground import SHORT, Ground

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import (
    CheckpointError,
    InputError,
    OutputError,
    UnsupportedError,
    VocabularyError,
)
from geneformer_fast.training.cells import split_cells
from geneformer_fast.training.pretrain import config_of

QUICK = dict(recipe=dataclasses.replace(SHORT, epochs=1, progress=False), device="cpu")


def test_final_is_a_hugging_face_folder(ground: Ground, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    final = gf.pretrain(ground.tokens.path, tmp_path / "run", config=ground.config(), eval_share=0.2, **QUICK)
    assert final == tmp_path / "run" / "final"
    stock, info = transformers.BertForMaskedLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = gf.load(final)
    assert ours.config == ground.config()
    cells = gf.Ragged.from_cells([torch.from_numpy(ground.tokens.read([i])[0].astype(np.int64)) for i in (0, 5)])
    with torch.no_grad():
        logits = ours.logits(ours(cells))
        theirs = stock.eval()(cells.to_padded(0), attention_mask=cells.mask().long()).logits
    torch.testing.assert_close(logits, theirs[cells.mask()], atol=1e-5, rtol=1e-5)
    # And it says what the log says: the loss of the last evaluation, on the same fixed mask.
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "evaluation"
    train, held_out = split_cells(ground.tokens, SHORT.seed, 0.2)
    hardly = dataclasses.replace(SHORT, steps=1, learning_rate=1e-30)
    again = ground.fit(ours, hardly, train_cells=train[:1], eval_cells=held_out)
    assert again.evaluations[0]["loss"] == pytest.approx(last["loss"], rel=1e-5)


PRE_NORM = dict(norm="pre", activation="gelu_tanh", head_activation="gelu", embedding_norm=False, final_norm=True)


def test_what_bert_cannot_express_is_loaded_by_us(ground: Ground, tmp_path: Path) -> None:
    """BioNeMo's encoders are pre-norm and without token types."""
    config = ground.config(**PRE_NORM, n_token_types=0)
    final = gf.pretrain(ground.tokens, tmp_path / "run", config=config, **QUICK)
    model = gf.load(final)
    assert model.config == config
    assert config_of(final) == config
    for name, tensor in model.state_dict().items():
        stored = ground.model(**PRE_NORM, n_token_types=0).state_dict()[name]
        assert tensor.shape == stored.shape
    assert gf.embed(ground.tokens.path, model, pool="mean", progress=False).shape == (80, 32)
    (final / "config.json").write_text('{"model_type": "geneformer_fast", "encoder": {"width": 3}, "head": "mlm"}')
    with pytest.raises(CheckpointError, match=r"config\.json: encoder has no n_layers, n_heads"):
        gf.load(final)


def test_it_goes_on_from_a_checkpoint(ground: Ground, tmp_path: Path) -> None:
    first = gf.pretrain(ground.tokens, tmp_path / "first", config=ground.config(), **QUICK)
    records: list = []
    gf.pretrain(ground.tokens, tmp_path / "second", init=first, on_step=records.append, **QUICK)
    fresh = json.loads((tmp_path / "first" / "log.jsonl").read_text().splitlines()[0])
    assert records[0].loss < fresh["loss"] - 0.02
    with pytest.raises(UnsupportedError, match="vocabulary cannot be changed"):
        gf.pretrain(ground.tokens, tmp_path / "third", init=first, adapt_vocabulary=True, **QUICK)
    headless = gf.save(gf.Encoder(ground.config()), tmp_path / "headless")
    with pytest.raises(UnsupportedError, match="no head for masked genes"):
        gf.pretrain(ground.tokens, tmp_path / "third", init=headless, **QUICK)
    assert not (tmp_path / "third").exists()


def test_another_vocabulary_is_refused_or_taken_over(ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="these tokens were made with toy, but the model reads geneformer-v1"):
        gf.pretrain(ground.tokens, tmp_path / "run", config="geneformer-v1-10m", **QUICK)
    assert not (tmp_path / "run").exists()
    small = gf.EncoderConfig.preset("geneformer-v1-10m", n_layers=1, width=64, n_heads=1, ff_width=64)
    final = gf.pretrain(ground.tokens, tmp_path / "run", config=small, adapt_vocabulary=True, **QUICK)
    words = toys.vocabulary()
    config = gf.load(final).config
    assert (config.vocabulary, config.vocabulary_fingerprint) == ("toy", words.fingerprint)
    assert config.vocab_size == words.n_tokens


def test_held_out_cells(ground: Ground, tmp_path: Path) -> None:
    tokens = ground.tokens
    train, held_out = split_cells(tokens, 1, 0.25)
    assert (len(train), len(held_out)) == (60, 20)
    assert sorted([*train, *held_out]) == list(range(80))
    again, other = split_cells(tokens, 1, 0.25)[1], split_cells(tokens, 2, 0.25)[1]
    assert (held_out == again).all()
    assert (held_out != other).any()
    assert len(split_cells(tokens, 1)[1]) == 1
    assert len(split_cells(tokens, 1, 0.0)[1]) == 0
    kinds = np.array(tokens.column("kind").to_pylist())
    train, held_out = split_cells(tokens, 1, eval_column=("kind", ["b"]))
    assert set(kinds[held_out]) == {"b"}
    assert set(kinds[train]) == {"a", "c"}
    assert split_cells(tokens, 1, eval_tokens=tokens)[1] is None
    for options, error, message in (
        (dict(eval_column=("kind", ["d"])), InputError, "no cell has kind 'd'"),
        (dict(eval_column=("kind", ["a", "b", "c"])), InputError, "none is left to train on"),
        (dict(eval_column=("type", ["a"])), OutputError, "no column 'type'"),
        (dict(eval_share=1.0), UnsupportedError, "from 0 to below 1"),
        (dict(eval_share=0.1, eval_column=("kind", ["a"])), UnsupportedError, "choose one"),
    ):
        with pytest.raises(error, match=message):
            split_cells(tokens, 1, **options)
    final = gf.pretrain(tokens, tmp_path / "run", config=ground.config(), eval_tokens=tokens.path, **QUICK)
    identity = json.loads((final.parent / "run.json").read_text())
    assert (identity["train_cells"]["n"], identity["eval_cells"]["n"]) == (80, 80)


def test_configurations(ground: Ground, tmp_path: Path) -> None:
    assert config_of("bionemo-10m") == gf.EncoderConfig.preset("bionemo-10m")
    (tmp_path / "c.json").write_text(json.dumps(ground.config().to_dict()))
    assert config_of(tmp_path / "c.json") == ground.config()
    gf.save(ground.model(), tmp_path / "model")
    assert config_of(tmp_path / "model") == config_of(tmp_path / "model" / "config.json") == ground.config()
    with pytest.raises(UnsupportedError, match="neither a file or folder nor one of geneformer-v1-10m"):
        config_of("geneformer-v9")
    with pytest.raises(UnsupportedError, match=r"AIDO\.Cell learns to tell counts .* not here"):
        gf.pretrain(ground.tokens, tmp_path / "run", config="aido-cell-3m", **QUICK)


def test_the_command(ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    gf.save(ground.model(), tmp_path / "model")
    toys.vocabulary().save(tmp_path / "model")
    command = [
        *("pretrain", str(ground.tokens.path), "--config", str(tmp_path / "model"), "--out", str(tmp_path / "run")),
        *("--epochs", "1", "--batch-cells", "20", "--token-budget", "300", "--learning-rate", "0.01"),
        *("--eval-column", "kind=a,b", "--precision", "float32", "--recompute", "--set", "weight_decay=0.2"),
        *("--set", 'masking={"random": 0.02}', "--tensorboard", "--device", "cpu", "--seed", "3"),
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "1.00 epochs, training loss" in said.out
    assert f"the model is in {tmp_path / 'run' / 'final'}" in said.out
    first, *others = said.err.splitlines()
    assert first.startswith("training ")
    assert all(line.startswith("evaluation after step ") for line in others)
    recipe = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (recipe["weight_decay"], recipe["batch_cells"], recipe["seed"]) == (0.2, 20, 3)
    assert (recipe["masking"]["random"], recipe["masking"]["share"]) == (0.02, 0.15)
    assert recipe["is_recomputing"]
    assert (tmp_path / "run" / "final" / "vocabulary.json").exists()
    assert events(tmp_path / "run" / "tensorboard") >= {"train/loss", "train/mfu", "evaluation/loss"}

    assert main(command) == 2
    assert "holds a run already; continue it with --resume (resume=True)" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "final")
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "run" / "final" / "config.json").exists()
    for bad, message in (
        (["--set", "lr=1"], "no field lr"),
        (["--set", "nonsense"], "write FIELD=VALUE"),
        (["--eval-column", "kind"], "write COLUMN=VALUE"),
        (["--recipe", "mine"], "no recipe named 'mine'"),
        (["--precision", "int4"], "precision must be one of"),
    ):
        options = [*command[:2], "--config", str(tmp_path / "model"), "--out", str(tmp_path / "new"), *bad]
        assert main(options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def events(folder: Path) -> set[str]:
    """Names of the scalars in TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return set(accumulator.Tags()["scalars"])


def test_unfinished_tokens_are_refused(ground: Ground, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ground.tokens.path, tmp_path / "tokens")
    (tmp_path / "tokens" / "state.json").rename(tmp_path / "tokens" / "UNFINISHED.json")
    assert main(["pretrain", str(tmp_path / "tokens"), "--out", str(tmp_path / "run")]) == 2
    assert "unfinished" in capsys.readouterr().err
    assert main(["pretrain", str(tmp_path / "nothing"), "--out", str(tmp_path / "run")]) == 2
    assert "no such token folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_eight_bits_do_not_learn(ground: Ground, tmp_path: Path) -> None:
    """Neither on from their folder, nor where nothing on top of them does."""
    torch.manual_seed(0)
    small = gf.quantize(gf.Encoder(ground.config(), "mlm"))
    with pytest.raises(UnsupportedError, match=r"small is quantized \(int8\).*the model before it was quantized"):
        gf.pretrain(ground.tokens, tmp_path / "run", init=gf.save(small, tmp_path / "small"), **QUICK)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UnsupportedError, match="nothing of this model learns"):
        ground.fit(small, SHORT)
