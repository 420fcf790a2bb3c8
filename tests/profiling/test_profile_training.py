"""Training loops write the report of what they did, by the definitions that their logs have."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import nn

from geneformer_fast import Encoder, EncoderConfig
from geneformer_fast.data.identity import identity_of
from geneformer_fast.data.kinds import TokenKinds
from geneformer_fast.data.masking import MaskedBatch
from geneformer_fast.errors import OutputError, ProfileError, UnsupportedError
from geneformer_fast.finetuning.cells import finetune_cells
from geneformer_fast.finetuning.genes import finetune_genes
from geneformer_fast.finetuning.objectives import LabelledCells
from geneformer_fast.profiling.flops.work import encoder_flops, head_flops
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.run import profile
from geneformer_fast.ragged import Ragged
from geneformer_fast.tokenization.arrow import TokenFolder, open_tokens
from geneformer_fast.training.history import History
from geneformer_fast.training.loop import fit
from geneformer_fast.training.masked_genes import MaskedGenes
from geneformer_fast.training.pretrain import pretrain
from geneformer_fast.training.profiled import FOLDER, rows_of_head
from geneformer_fast.training.recipe import Recipe
from geneformer_fast.training.utilisation import Utilisation

RECIPE = Recipe(steps=8, batch_cells=6, token_budget=120, warmup_share=0.1, eval_every=3, save_every=4, log_every=1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import geneformer_fast as gf

    place = tmp_path_factory.mktemp("cells")
    cells, words = place / "cells.h5ad", toys.vocabulary()
    toys.cells(40).write_h5ad(cells)
    gf.tokenize(cells, place / "tokens", dictionary=words)
    with open_tokens(place / "tokens") as folder:
        yield folder


def model_of(tokens: TokenFolder) -> Encoder:
    words = toys.vocabulary()
    torch.manual_seed(0)
    return Encoder(
        EncoderConfig(
            n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=words.n_tokens, max_len=words.max_len,
            vocabulary=words.name, vocabulary_fingerprint=words.fingerprint,
        ),
        "mlm",
    )  # fmt: skip


def trained(model: Encoder, tokens: TokenFolder, recipe: Recipe = RECIPE, **options: Any) -> History:
    objective = MaskedGenes(TokenKinds.of(identity_of(tokens, model.config), model.config), recipe.masking)
    return fit(
        model, tokens, objective, recipe, train_cells=np.arange(30), eval_cells=np.arange(30, 40), **options
    )  # fmt: skip


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def test_a_training_writes_the_report_of_its_steps(tokens: TokenFolder, tmp_path: Path) -> None:
    model = model_of(tokens)
    history = trained(model, tokens, out=tmp_path / "run", profile=True)
    report = Report.load(tmp_path / "run" / FOLDER / "report.json")
    assert (tmp_path / "run" / FOLDER / "report.html").exists()
    # Three steps of warm-up and five of the window, over which two evaluations and a checkpoint lie.
    window = history.steps[3:8]
    assert (report.time.n_steps, report.cells.n) == (5, sum(step.n_cells for step in window))
    assert report.tokens.n_real == report.tokens.n_positions == sum(step.n_tokens for step in window)
    assert report.subject.mode == "train"
    assert report.subject.model == "Encoder"
    assert report.subject.cells == f"30 cells of {tokens.path}"
    assert report.subject.settings["token_budget"] == 120
    assert report.flops.basis == "formula"
    rows = sum(step.weight for step in window)
    assert report.flops.model == 3 * (
        encoder_flops(model.config, report.tokens.n_real, report.tokens.n_real_squares)
        + head_flops(model.config, rows)
    )  # fmt: skip
    assert model.training is False
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("is_recomputing", [False, True])
def test_logs_and_reports_share_their_definitions(is_recomputing: bool, tokens: TokenFolder, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=9, is_recomputing=is_recomputing, save_every=100, eval_every=100)
    trained(model_of(tokens), tokens, recipe, out=tmp_path / "run", profile=tmp_path / "report.json")
    report = Report.load(tmp_path / "report.json")
    lines = lines_of(tmp_path / "run")[3:8]
    ratio = report.flops.hardware / report.flops.model  # type: ignore[operator]
    assert (ratio > 1.1) is is_recomputing
    seconds = sum(line["seconds"] for line in lines)
    for name in ("mfu", "hfu"):
        assert sum(line[name] * line["seconds"] for line in lines) / seconds == pytest.approx(
            getattr(report.flops, name), rel=0.25
        )


def test_utilisation_is_work_over_time_and_ceiling() -> None:
    config = EncoderConfig(n_layers=2, width=32, n_heads=2, ff_width=48, vocab_size=97, max_len=64)
    model, lengths = Encoder(config, "mlm"), np.array([7, 20])
    shares = Utilisation(model, torch.device("cpu"), torch.float32, is_recomputing=True)
    found = shares.of(lengths, 5, 2.0)
    from geneformer_fast.profiling.ceilings import product_ceiling

    per_s = product_ceiling("cpu", "float32") * 1e12 * 2.0  # type: ignore[operator]
    blocks = encoder_flops(config, 27, 449)
    assert found["mfu"] == pytest.approx(3 * (blocks + head_flops(config, 5)) / per_s)
    assert found["hfu"] == pytest.approx((3 * (blocks + head_flops(config, 5)) + blocks) / per_s)
    unknown = Utilisation(nn.Linear(2, 2), torch.device("cpu"), torch.float32, is_recomputing=False)
    assert unknown.of(lengths, 5, 2.0) == {"mfu": None, "hfu": None}


def test_an_open_run_is_told_of_every_step(tokens: TokenFolder) -> None:
    model = model_of(tokens)
    with profile(model, mode="train", n_warmup=1, n_steps=3, n_active=1, energy=False, ceilings=False) as run:
        history = trained(model, tokens, profile=run)
        assert run.is_complete
    assert run.report.cells.n == sum(step.n_cells for step in history.steps[1:4])
    assert run.report.flops.basis == "formula"
    with pytest.raises(ProfileError, match="is not open"):
        trained(model, tokens, profile=run)


class _Slow(MaskedGenes):
    """A loss that takes its time."""

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Any:
        time.sleep(0.02)
        return super().loss(model, batch)


def test_the_loss_is_part_of_the_forward_pass(tokens: TokenFolder) -> None:
    model = model_of(tokens)
    objective = _Slow(TokenKinds.of(identity_of(tokens, model.config), model.config), RECIPE.masking)
    with profile(model, mode="train", n_active=0, energy=False, ceilings=False) as run:
        fit(model, tokens, objective, RECIPE, train_cells=np.arange(30), profile=run)
    parts, n_steps = run.report.time.parts, run.report.time.n_steps
    assert parts["forward"] > 0.02 * n_steps
    with pytest.raises(ProfileError, match="within the with-block"):
        run.follow(model)


def test_a_training_that_is_too_short_ends_with_a_warning(tokens: TokenFolder, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no report of the training: all 2 steps were warm-up"):
        trained(model_of(tokens), tokens, dataclasses.replace(RECIPE, steps=2), out=tmp_path / "run", profile=True)
    assert not (tmp_path / "run" / FOLDER).exists()


def test_a_training_that_fails_says_its_own_error(tokens: TokenFolder) -> None:
    def fail(record: Any) -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        trained(model_of(tokens), tokens, profile="report.json", on_step=fail)


def test_without_a_folder_a_place_has_to_be_named(tokens: TokenFolder) -> None:
    with pytest.raises(UnsupportedError, match="name a place"):
        trained(model_of(tokens), tokens, profile=True)


def bad_places(folder: Path) -> dict[str, Path]:
    """Where no report can go, and why."""
    (folder / "file").write_text("")
    (folder / "old.json").write_text("{}")
    (folder / "folder.json").mkdir()
    return {
        "a part of its path is a file": folder / "file" / "report.json", "is a folder": folder / "folder.json",
        "is a file": folder / "file", "exists already": folder / "old.json",
    }  # fmt: skip


def test_bad_places_are_refused_before_anything_is_written(tokens: TokenFolder, tmp_path: Path) -> None:
    """By every training, the folder of the run included; nothing that was there is touched."""
    model, places = model_of(tokens), bad_places(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for why, place in places.items():
        for train in (
            lambda place=place: trained(model, tokens, out=tmp_path / "run", profile=place),
            lambda place=place: trained(model, tokens, profile=place),
            lambda place=place: pretrain(
                tokens, tmp_path / "run", config=model.config, recipe=RECIPE, profile=place, device="cpu"
            ),
            lambda place=place: finetune_cells(
                tokens.path, model, "cell_type", tmp_path / "run", profile=place, device="cpu"
            ),
            lambda place=place: finetune_genes(
                tokens.path, model, {"a": ["b"]}, tmp_path / "run", profile=place, device="cpu"
            ),
        ):  # fmt: skip
            with pytest.raises(OutputError, match=why):
                train()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_run_that_goes_on_keeps_the_report_that_is_there(
    tokens: TokenFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, options = model_of(tokens).config, {"recipe": RECIPE, "device": "cpu"}
    with caplog.at_level(logging.INFO, "geneformer_fast"):
        pretrain(tokens, tmp_path / "run", config=config, profile=True, **options)
    assert f"how fast it trains is told in {tmp_path / 'run' / FOLDER / 'report.html'}" in caplog.messages
    path = tmp_path / "run" / FOLDER / "report.json"
    before = path.read_bytes()
    with pytest.warns(UserWarning, match=r"report\.json is there already, of an earlier part of this run, and stays"):
        pretrain(tokens, tmp_path / "run", config=config, profile=True, resume=True, **options)
    assert path.read_bytes() == before


def test_profiling_changes_nothing_that_is_learned(tokens: TokenFolder, tmp_path: Path) -> None:
    plain, watched = model_of(tokens), model_of(tokens)
    losses = trained(plain, tokens).losses
    assert trained(watched, tokens, profile=tmp_path / "report.json").losses == losses
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name


def test_pretraining_takes_a_place(tokens: TokenFolder, tmp_path: Path) -> None:
    config = model_of(tokens).config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pretrain(
            tokens, tmp_path / "run", config=config, recipe=RECIPE, profile=tmp_path / "fast.json", device="cpu"
        )  # fmt: skip
    assert Report.load(tmp_path / "fast.json").time.n_steps == 5


def test_rows_of_a_head_are_those_of_its_batch() -> None:
    tokens = Ragged.from_cells([[1, 2, 3], [4, 5]])
    of_genes = LabelledCells(tokens, torch.tensor([-100, 2, -100, 0, 1]))
    of_cells = LabelledCells(tokens, torch.tensor([[0], [1]]))
    masked = MaskedBatch(tokens, torch.tensor([0, 4]), torch.tensor([1, 5]))
    assert [rows_of_head(each) for each in (masked, of_genes, of_cells, tokens)] == [2, 3, None, None]
