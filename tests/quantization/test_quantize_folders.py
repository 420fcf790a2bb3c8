"""``quantize`` with a folder to write: of a folder, of an encoder, measured or not; the command, and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import toys
from safetensors.torch import load_file

from geneformer_fast import cli, embed, load, quantize, save, tokenize
from geneformer_fast.errors import CheckpointError, OutputError, UnsupportedError
from geneformer_fast.quantization.choices import Choice
from geneformer_fast.quantization.report import Report


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cells")
    toys.cells(12).write_h5ad(place / "cells.h5ad")
    tokenize(place / "cells.h5ad", place / "tokens", dictionary=toys.vocabulary())
    return place / "tokens"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(toys.encoder(), tmp_path_factory.mktemp("models") / "model")


def same_weights(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("model.safetensors", "config.json"))


def test_a_folder_an_encoder_and_the_command(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(model, tmp_path / "a") == tmp_path / "a"
    assert quantize(load(model), tmp_path / "b") == tmp_path / "b"
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.qkv" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "c")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "c")
    streamed, saved = Report.read(tmp_path / "a"), Report.read(tmp_path / "b")
    assert (streamed.bytes_before, streamed.bytes_after) == (saved.bytes_before, saved.bytes_after)
    # The weight's own noise, where nothing was measured: 127 steps leave about 40 dB.
    assert all(35 < layer.sqnr_db < 55 for layer in streamed.layers if layer.kind != "half")
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "c"), "--scheme", "fp8", "--keep-embeddings"]) == 2
    assert "holds a model already" in capsys.readouterr().err
    command = ["quantize", str(model), "--out", str(tmp_path / "c"), "--scheme", "fp8", "--keep-embeddings"]
    assert cli.main([*command, "--overwrite"]) == 0
    assert load(tmp_path / "c").quantization.scheme == "fp8"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_is_kept_is_said_to_be_in_the_dtype_that_is_stored(dtype: str, tmp_path: Path) -> None:
    save(toys.encoder().cast(dtype), tmp_path / "model")
    choices = {"blocks.1.up": Choice("half", reason="for a test")}
    for out in (
        quantize(tmp_path / "model", tmp_path / "of folder", choices=choices),
        quantize(load(tmp_path / "model"), tmp_path / "of encoder", choices=choices),
    ):
        said = {layer.name: layer.dtype for layer in Report.read(out).layers}
        assert {name: each for name, each in said.items() if each is not None} == {"blocks.1.up": dtype}
        stored = load_file(out / "model.safetensors")["encoder.layer.1.intermediate.dense.weight"]
        assert str(stored.dtype) == f"torch.{dtype}"


def test_measured_on_cells(tmp_path: Path, model: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Such small models are turned by more than real ones.
    options = {"least_cosine": 0.9, "bar": 20.0, "max_cells": 8}
    quantize(model, tmp_path / "a", calibrate=tokens, **options)
    quantize(load(model), tmp_path / "b", calibrate=tokens, **options)
    given = ["--least-cosine", "0.9", "--bar", "20", "--max-cells", "8", "--check", str(tokens), "--device", "cpu"]
    command = ["quantize", str(model), "--out", str(tmp_path / "c"), "--calibrate", str(tokens), *given]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "c")
    assert Report.read(tmp_path / "a") == Report.read(tmp_path / "b") == Report.read(tmp_path / "c")
    assert Report.read(tmp_path / "a").measured.n_cells == 8
    assert "measured on 8 cells" in printed
    assert "12 cells" in printed.splitlines()[-1]  # of the check
    everything_kept = quantize(model, tmp_path / "d", calibrate=tokens, bar=300.0)
    assert load(everything_kept).quantization is None


def test_what_would_do_nothing_is_refused(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for options, said in (
        (["--label", "kind"], "pass --check"),
        (["--device", "cpu"], "pass --calibrate"),
        (["--bar", "3"], "pass cells as calibrate"),
    ):
        assert cli.main(["quantize", str(model), "--out", out, *options]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UnsupportedError, match="overwrite is about a folder"):
        quantize(model, overwrite=True)
    with pytest.raises(UnsupportedError, match="move the model"):
        quantize(load(model), device="cpu")
    with pytest.raises(UnsupportedError, match="device is where a folder is measured"):
        quantize(model, out, device="cpu")
    assert not Path(out).exists()
    assert quantize(model, device="cpu").quantization is not None


def test_twice_is_once_too_often(tmp_path: Path, model: Path, tokens: Path) -> None:
    folder = quantize(model, tmp_path / "a")
    for options in ({}, {"calibrate": tokens}):
        with pytest.raises(CheckpointError, match="is quantized already"):
            quantize(folder, tmp_path / "b", **options)
    for again in (folder, load(folder)):
        with pytest.raises(UnsupportedError, match="is quantized already"):
            quantize(again)
    with pytest.raises(OutputError, match="is, holds or lies in"):
        quantize(model, model / "within")
    with pytest.raises(OutputError, match="holds a model already"):
        quantize(load(model), folder)
    assert not (tmp_path / "b").exists()


def test_embeddings_of_a_folder(tmp_path: Path, model: Path, tokens: Path) -> None:
    options = dict(dtype="float32", device="cpu", progress=False)
    exact = embed(tokens, model, **options)
    for scheme, least in (("int8", 0.99), ("int8-weights", 0.995), ("fp8", 0.98)):
        found = embed(tokens, quantize(model, tmp_path / scheme, scheme=scheme), **options)
        product = (found * exact).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(exact, axis=1)
        assert product.min() > least
        assert not np.array_equal(found, exact)
