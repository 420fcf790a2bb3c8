"""Where a quantized model goes, and that whatever can be refused is refused before anything is written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from small_encoders import encoder_of

from geneformer_fast import cli, load, quantize, save, tokenize
from geneformer_fast.errors import CheckpointError, OutputError, UnsupportedError
from geneformer_fast.quantization import quantize as quantizing
from geneformer_fast.tokenization.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_tokens(tmp_path_factory.mktemp("cells"), 6, toys.vocabulary())


def made_tokens(place: Path, n_cells: int, vocabulary: Vocabulary) -> Path:
    toys.cells(n_cells).write_h5ad(place / "cells.h5ad")
    tokenize(place / "cells.h5ad", place / "tokens", dictionary=vocabulary, obs=["kind"])
    return place / "tokens"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(toys.encoder(), tmp_path_factory.mktemp("models") / "model")


@pytest.mark.parametrize("name", ["", ".", "..", "within/.."])
def test_the_folder_one_is_in_is_not_replaced(
    tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder is replaced by another one of its name: a shell would go on in the old one."""
    (tmp_path / "here" / "within").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["quantize", str(model), "--out", name]) == 2
    assert "is or holds the folder that you are in" in capsys.readouterr().err
    with pytest.raises(OutputError, match="the folder that you are in"):
        quantize(load(model), name)
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "within"]


def test_a_link_is_followed(tmp_path: Path, model: Path) -> None:
    """What is meant for another disk gets there."""
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / f"to-{place}").symlink_to(tmp_path / place)
    (tmp_path / "to-c").symlink_to(tmp_path / "c")
    for place, given in (("a", model), ("b", load(model)), ("c", model)):
        quantize(given, tmp_path / f"to-{place}")
        quantize(given, tmp_path / f"to-{place}", overwrite=True)
        assert (tmp_path / f"to-{place}").is_symlink()
        assert load(tmp_path / place).quantization is not None
        with pytest.raises(OutputError, match="holds a model already"):
            quantize(given, tmp_path / f"to-{place}")


def test_what_is_no_part_of_a_model_is_not_lost(tmp_path: Path, model: Path) -> None:
    """The folder is replaced whole, and with it what somebody put there."""
    place = quantize(model, tmp_path / "out")
    for name in ("labels.json", "README.md", "pytorch_model.bin"):
        (place / name).write_text("of the model before")
    quantize(model, place, overwrite=True)
    assert not (place / "labels.json").exists()
    (place / "notes.txt").write_text("mine")
    for given in (model, load(model)):
        with pytest.raises(OutputError, match=r"notes.txt, which is no part of a model and would be lost; move it"):
            quantize(given, place, overwrite=True)
    (place / "notes.txt").rename(tmp_path / "notes.txt")
    (place / "runs.json").mkdir()
    with pytest.raises(OutputError, match=r"runs\.json, which is no part"):
        quantize(model, place, overwrite=True)
    assert load(place).quantization is not None


def test_what_the_model_brings_is_replaced(tmp_path: Path) -> None:
    source = save(toys.encoder(), tmp_path / "model")
    (source / "merges.tsv").write_text("of the model")
    place = quantize(source, tmp_path / "out")
    assert (place / "merges.tsv").exists()
    quantize(source, place, overwrite=True)
    assert (place / "merges.tsv").read_text() == "of the model"


def test_a_model_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring takes minutes; what somebody else has written in the meantime stays."""
    place, real = tmp_path / "out", quantizing.quantized

    def slow(*given: object) -> object:
        save(toys.encoder(seed=9), place)
        return real(*given)

    monkeypatch.setattr(quantizing, "quantized", slow)
    with pytest.raises(OutputError, match="holds a model already"):
        quantize(load(model), place)
    assert load(place).quantization is None


def test_a_check_that_cannot_be_made_is_refused_before(
    tmp_path: Path, model: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one = made_tokens(tmp_path / "one", 1, toys.vocabulary())
    other = made_tokens(tmp_path / "other", 4, toys.vocabulary("v1", "other"))
    for options, said in (
        ([str(tmp_path / "none")], "no such token folder"),
        ([str(one)], "has 1 cell, and two at least are needed"),
        ([str(other)], "were made with other"),
        ([str(tokens), "--label", "kind"], "is for a classifier of cells"),
        ([str(tokens), "--device", "tpu"], "no device is called"),
    ):
        assert cli.main(["quantize", str(model), "--out", str(tmp_path / "out"), "--check", *options]) == 2
        error = capsys.readouterr()
        assert said in error.err
        assert not error.out
        assert not (tmp_path / "out").exists()


def test_a_label_that_is_not_there_is_refused_before(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = toys.vocabulary()
    encoder = encoder_of(
        "geneformer", "cells", vocab_size=words.n_tokens, max_len=words.max_len, vocabulary=words.name,
        vocabulary_fingerprint=words.fingerprint,
    )  # fmt: skip
    command = ["quantize", str(save(encoder, tmp_path / "model")), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--check", str(tokens), "--label", "nothing"]) == 2
    assert "no column 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_of_values_are_not_measured_on_tokens(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(encoder_of("aido.cell"), tmp_path / "model")
    command = ["quantize", str(folder), "--out", str(tmp_path / "out")]
    for option in ("--calibrate", "--check"):
        assert cli.main([*command, option, str(tokens)]) == 2
        assert "are ranks of toy, but the model reads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(command) == 0


def test_options_are_called_as_on_the_command_line(
    tmp_path: Path, model: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(model), "--out", str(tmp_path / "out")]
    for option, value, wrong in (("--max-cells", "3", "0"), ("--bar", "20", "nan"), ("--least-cosine", "0.9", "2")):
        assert cli.main([*command, option, value]) == 2
        assert re.search(rf"\({option}\) is about measuring .* \(--calibrate TOKENS\)", capsys.readouterr().err)
        assert cli.main([*command, "--calibrate", str(tokens), option, wrong]) == 2
        assert f"({option}) must be" in capsys.readouterr().err


def test_float64_is_refused_with_a_way_out(tmp_path: Path, tokens: Path) -> None:
    folder = save(toys.encoder().double(), tmp_path / "wide")
    for options in ({}, {"calibrate": tokens}):
        with pytest.raises(UnsupportedError, match=r"wide holds float64; save it in float32 .*save\(.*load\(MODEL"):
            quantize(folder, tmp_path / "out", **options)
    narrow = save(load(folder, dtype="float32"), tmp_path / "narrow")
    assert load(quantize(narrow, tmp_path / "out")).quantization is not None


@pytest.mark.parametrize("name", ["blocks.0.up.bias", "blocks.1.ff_norm.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_nan_anywhere_is_refused(tmp_path: Path, name: str, value: float) -> None:
    """Not only in what is rounded: every embedding would be NaN."""
    encoder = toys.encoder()
    with torch.no_grad():
        encoder.get_parameter(name)[1] = value
    for given, out in ((save(encoder, tmp_path / "model"), tmp_path / "out"), (encoder, None)):
        with pytest.raises(CheckpointError, match="holds NaN or infinity"):
            quantize(given, out)
    assert not (tmp_path / "out").exists()
