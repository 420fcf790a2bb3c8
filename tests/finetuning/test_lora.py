"""Fine-tuning by adapters of low rank: what learns, what comes out, what PEFT makes of it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import toys
from typed_cells import SHORT, SHORT_GENES, gene_classes, write_model, write_tokens

import geneformer_fast as gf
from geneformer_fast.cli import main
from geneformer_fast.errors import OutputError, UnsupportedError
from geneformer_fast.finetuning.lora import add_adapters, merge_adapters
from geneformer_fast.finetuning.models import with_head

peft = pytest.importorskip("peft")
ONE_EPOCH = dataclasses.replace(SHORT, epochs=1)
LAYERS = ("qkv", "out", "up", "down")


def batch():
    return gf.Ragged.from_cells([[2, 5, 9, 7, 44, 3], [2, 8, 11, 3], [2, 61, 3]])


@pytest.fixture
def adapted():
    encoder = with_head(toys.encoder(), "cells", 3, seed=0).eval()
    add_adapters(encoder, 2, 1, seed=0)
    return encoder


def moved(encoder):
    """As after some training: B is no longer 0."""
    torch.manual_seed(7)
    for name, parameter in encoder.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.3)
    return encoder


def test_at_the_start_nothing_changes_and_only_adapters_and_the_head_learn(adapted):
    plain = with_head(toys.encoder(), "cells", 3, seed=0).eval()
    with torch.inference_mode():
        assert torch.equal(adapted(batch()).values, plain(batch()).values)
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    expected = {f"blocks.{i}.{layer}.lora_{part}.default.weight" for i in (1, 2) for layer in LAYERS for part in "AB"}
    assert learning == expected | {name for name, _ in adapted.named_parameters() if name.startswith("head.")}


@pytest.mark.parametrize("is_training", [False, True])
def test_every_adapter_has_its_say_and_a_gradient(adapted, is_training):
    """Also in the feed-forward half, whose fused kernels read weights alone."""
    encoder, seen = moved(adapted), {}
    encoder.train(is_training)
    loss = encoder(batch()).values.square().sum()
    loss.backward()
    for name, parameter in encoder.named_parameters():
        if ".lora_" in name:
            seen[name] = float(parameter.grad.abs().max())
    assert len(seen) == 16
    assert min(seen.values()) > 0


def test_merged_it_is_a_plain_encoder_that_computes_the_same(adapted):
    encoder = moved(adapted)
    with torch.inference_mode():
        before = encoder(batch()).values
        adapter = merge_adapters(encoder)
        after = encoder(batch()).values
    plain = toys.encoder()
    assert (before - plain(batch()).values).abs().max() > 0.1
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-5)
    assert {name for name, _ in encoder.named_modules()} >= {"blocks.1.qkv"}
    assert encoder.state_dict().keys() == with_head(plain, "cells", 3, seed=0).state_dict().keys()
    assert set(adapter.weights) == {f"blocks.{i}.{layer}" for i in (1, 2) for layer in LAYERS}
    for name, (first, second) in adapter.weights.items():
        assert (first.shape[0], second.shape[1]) == (2, 2)
        step = encoder.get_submodule(name).weight - plain.get_submodule(name).weight
        torch.testing.assert_close(step, adapter.alpha / adapter.rank * second @ first, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def done(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "out"
    return gf.finetune_cells(home / "tokens", home / "model", "kind", out, lora=4, test_share=0.3, recipe=SHORT)


def test_what_was_learned_has_the_rank_that_was_asked_for(home, done):
    base, final = gf.load(home / "model", dtype="float32"), gf.load(done.model, dtype="float32")
    for index in range(2):
        for layer in LAYERS:
            step = final.blocks[index].get_submodule(layer).weight - base.blocks[index].get_submodule(layer).weight
            assert int(torch.linalg.matrix_rank(step.detach(), rtol=1e-4)) == 4
        assert torch.equal(final.blocks[index].ff_norm.weight, base.blocks[index].ff_norm.weight)
    assert torch.equal(final.token_table, base.token_table)
    assert done.scores["tasks"]["kind"]["over_folds"]["accuracy"]["mean"] > 0.8
    card = json.loads((done.model / "finetuned.json").read_text())
    assert card["lora"] == {"rank": 4, "alpha": 8}
    table = gf.predict(home / "tokens", done.model, progress=False)
    assert set(table["kind_predicted"]) <= {"B", "NK", "T"}


@pytest.mark.parametrize("kind", ["cells", "genes"])
def test_peft_makes_the_same_model_of_the_adapter(home, done, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    if kind == "genes":
        recipe = dataclasses.replace(SHORT_GENES, epochs=1)
        done = gf.finetune_genes(
            home / "tokens", home / "model", gene_classes(), tmp_path / "genes", folds=0, lora=3, freeze_layers=1,
            recipe=recipe,
        )  # fmt: skip
    of = {"cells": "BertForSequenceClassification", "genes": "BertForTokenClassification"}[kind]
    n_labels = 3 if kind == "cells" else 2
    architecture = getattr(transformers, of)
    base = architecture.from_pretrained(home / "model", num_labels=n_labels)
    found = peft.PeftModel.from_pretrained(base, done.folder / "adapter").eval()
    final = architecture.from_pretrained(done.model).eval()
    ids = torch.tensor([[2, 5, 9, 7, 44, 3], [2, 8, 11, 60, 31, 3]])
    with torch.inference_mode():
        expected = final(input_ids=ids).logits
        torch.testing.assert_close(found(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == ((4, 8) if kind == "cells" else (3, 6))
    blocks = {name.split(".")[3] for name in config["target_modules"]}
    assert blocks == ({"0", "1"} if kind == "cells" else {"1"})


def test_an_encoder_that_bert_cannot_express(tmp_path):
    tokens = write_tokens(tmp_path)
    model = write_model(tmp_path, norm="pre", final_norm=True, embedding_norm=False, activation="swiglu")
    done = gf.finetune_cells(tokens, model, "kind", tmp_path / "out", lora=2, recipe=ONE_EPOCH)
    fresh = with_head(gf.load(model, dtype="float32"), "cells", 3, seed=0)
    found = peft.PeftModel.from_pretrained(fresh, done.folder / "adapter").eval()
    final = gf.load(done.model, dtype="float32")
    with torch.inference_mode():
        expected = final.logits(final(batch()))
        torch.testing.assert_close(found.base_model.model.logits(found(batch())), expected, atol=1e-5, rtol=1e-4)


def test_frozen_blocks_have_no_adapters(home, tmp_path):
    done = gf.finetune_cells(
        home / "tokens", home / "model", "kind", tmp_path / "out", lora=2, freeze_layers=1, recipe=ONE_EPOCH
    )
    base, final = gf.load(home / "model", dtype="float32"), gf.load(done.model, dtype="float32")
    assert torch.equal(final.blocks[0].up.weight, base.blocks[0].up.weight)
    assert not torch.equal(final.blocks[1].up.weight, base.blocks[1].up.weight)


def test_a_killed_run_goes_on_bit_for_bit(home, tmp_path, monkeypatch):
    from geneformer_fast.training import loop

    recipe = dataclasses.replace(SHORT, epochs=2, save_every=3, is_best_restored=False)

    def run(out, **options):
        return gf.finetune_cells(
            home / "tokens", home / "model", "kind", out, lora=2, test_share=0, recipe=recipe, **options
        )

    whole = run(tmp_path / "whole")
    update, steps = loop.Engine.update, []

    def killed(self, learning_rate):
        steps.append(learning_rate)
        if len(steps) == 8:
            raise KeyboardInterrupt
        update(self, learning_rate)

    monkeypatch.setattr(loop.Engine, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "adapter").exists()
    again = run(tmp_path / "killed", resume=True)
    for name, tensor in gf.load(whole.model, dtype="float32").state_dict().items():
        assert torch.equal(tensor, gf.load(again.model, dtype="float32").state_dict()[name]), name
    with pytest.raises(OutputError, match="a fine-tuning with lora 2, not 3"):
        gf.finetune_cells(
            home / "tokens", home / "model", "kind", tmp_path / "killed", lora=3, test_share=0, recipe=recipe,
            resume=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": 0}, "must be a rank from 1 to 32, the width of the layers, not 0"),
        ({"lora": 33}, "from 1 to 32"),
        ({"lora": 2, "freeze_layers": 2}, "lora .* teaches blocks, and all 2 are frozen"),
    ],
)
def test_adapters_that_cannot_be(home, tmp_path, options, said):
    with pytest.raises(UnsupportedError, match=said):
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", recipe=ONE_EPOCH, **options)
    assert not (tmp_path / "out").exists()


def test_quantized_models_and_a_missing_library_are_refused(home, tmp_path, monkeypatch):
    small = gf.quantize(home / "model", tmp_path / "int8")
    with pytest.raises(UnsupportedError, match=r"those of a quantized model \(int8\) do not change"):
        gf.finetune_cells(home / "tokens", small, "kind", tmp_path / "out", lora=2, recipe=ONE_EPOCH)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'geneformer-fast\[lora\]'"):
        gf.finetune_cells(home / "tokens", home / "model", "kind", tmp_path / "out", lora=2, recipe=ONE_EPOCH)


def test_the_command(home, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--label", "kind", "--lora", "2", "--epochs", "1", "--learning-rate", "0.01", "--out", str(out)]
    assert main(["finetune", "cells", str(home / "tokens"), "--model", str(home / "model"), *arguments]) == 0
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    assert np.isfinite(gf.load(out / "final", dtype="float32").token_table.detach().numpy()).all()
    assert "accuracy" in capsys.readouterr().out
