"""Trainer is measured as it trains, stock or accelerated, and not by its evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geneformer_fast.errors import OutputError, ProfileError
from geneformer_fast.profiling.report import Report
from geneformer_fast.profiling.run import Run

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from geneformer_fast import ProfilerCallback, accelerate  # noqa: E402

VOCAB, LONGEST = 60, 24
QUICK: dict[str, Any] = {"energy": False, "ceilings": False}


def model() -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=LONGEST,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


class Cells(torch.utils.data.Dataset):
    """Cells of seeded lengths, padded to the longest there may be: badly."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.lengths = np.random.default_rng(seed).integers(2, 13, n)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        length = int(self.lengths[index])
        mask = (torch.arange(LONGEST) < length).long()
        ids = (torch.arange(LONGEST) * 7 + index) % (VOCAB - 5) + 5
        labels = torch.where((torch.arange(LONGEST) % 4 == 1) & mask.bool(), ids, -100)
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def trained(network: Any, callback: ProfilerCallback, out: Path, n: int = 48, **options: Any) -> Cells:
    cells = Cells(n)
    arguments = transformers.TrainingArguments(
        str(out), per_device_train_batch_size=4, num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", save_strategy=options.pop("save_strategy", "no"), **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        network, arguments, train_dataset=cells, eval_dataset=Cells(8, 1), callbacks=[callback]
    )
    trainer.train()
    return cells


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["stock", "accelerated"])
def test_a_training_is_measured_by_its_masks(is_accelerated: bool, tmp_path: Path) -> None:
    network = model()
    if is_accelerated:
        accelerate(network)
    callback = ProfilerCallback(tmp_path / "profile", n_warmup=1, n_steps=4, n_active=1, **QUICK)
    cells = trained(network, callback, tmp_path / "run")
    report = callback.report
    assert Report.load(tmp_path / "profile" / "report.json") == report
    assert (report.subject.mode, report.subject.engine) == (
        "train", "geneformer_fast" if is_accelerated else "transformers",
    )  # fmt: skip
    assert report.subject.settings["batch_size"] == 4
    assert (report.cells.n, report.time.n_steps) == (16, 4)
    # The order is the sampler's: of the batches it is only known what they add up to per cell.
    assert report.tokens.n_positions == (report.tokens.n_real if is_accelerated else 16 * LONGEST)
    assert 16 * 2 <= report.tokens.n_real <= 16 * 12
    assert report.flops.basis == "formula"
    assert len(cells) == 48
    for part in ("data", "forward", "backward", "optimizer"):
        assert report.time.parts[part] > 0  # type: ignore[operator]
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_badly_padded_loop_of_a_stock_bert_is_found_out() -> None:
    """By its mask, to the last position, with what sorting or packing would gain."""
    from geneformer_fast import profile

    network, cells = model().eval(), Cells(40)
    with profile(network, n_warmup=1, n_steps=9, n_active=0, **QUICK) as run, torch.no_grad():
        for start in range(0, 40, 4):
            items = [cells[index] for index in range(start, start + 4)]
            network(**{name: torch.stack([item[name] for item in items]) for name in ("input_ids", "attention_mask")})
            run.step()
    real = int(cells.lengths[4:].sum())
    assert (run.report.tokens.n_real, run.report.tokens.n_positions) == (real, 36 * LONGEST)
    (padding,) = [each for each in run.report.findings if each.name == "padding"]
    share = 1 - real / (36 * LONGEST)
    assert padding.numbers["padding_share"] == pytest.approx(share)
    assert padding.text.startswith(f"{100 * share:.0f} % of computed positions were padding")
    assert "accelerate(model)" in padding.text
    assert padding.gain is not None
    assert padding.gain > 1.5


def test_evaluations_and_checkpoints_are_left_out(tmp_path: Path) -> None:
    callback = ProfilerCallback(n_warmup=1, n_steps=6, n_active=0, **QUICK)
    trained(
        model(), callback, tmp_path / "run", eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4,
        eval_on_start=True, per_device_eval_batch_size=8,
    )  # fmt: skip
    report = callback.report
    assert report.cells.n == 6 * 4
    assert report.tokens.n_positions == 6 * 4 * LONGEST
    assert [batch[0] for batch in report.tokens.batches] == [4] * 6


def test_accumulated_pieces_are_one_step(tmp_path: Path) -> None:
    callback = ProfilerCallback(n_warmup=1, n_steps=3, n_active=0, **QUICK)
    trained(model(), callback, tmp_path / "run", gradient_accumulation_steps=2)
    assert (callback.report.time.n_steps, callback.report.cells.n) == (3, 3 * 2 * 4)


def test_a_training_that_is_too_short_ends_with_a_warning(tmp_path: Path) -> None:
    callback = ProfilerCallback(tmp_path / "profile", **QUICK)
    with pytest.warns(UserWarning, match="all 2 steps were warm-up"):
        trained(model(), callback, tmp_path / "run", n=8)
    with pytest.raises(ProfileError, match="warm-up"):
        callback.report  # noqa: B018
    assert not (tmp_path / "profile").exists()


def test_a_training_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise RuntimeError("out of luck")

    callback, network = ProfilerCallback(**QUICK), model()
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    with pytest.raises(RuntimeError, match="out of luck"):
        transformers.Trainer(network, arguments, train_dataset=Cells(40), callbacks=[callback, Failing()]).train()
    # The next one begins although nobody told this one that it is over.
    callback = ProfilerCallback(n_warmup=0, n_steps=1, n_active=0, **QUICK)
    trained(network, callback, tmp_path / "next", n=8)
    assert callback.report.time.n_steps == 1
    assert Run._current is None


def test_before_the_training_there_is_nothing() -> None:
    with pytest.raises(ProfileError, match="has not begun"):
        ProfilerCallback().report  # noqa: B018


def test_a_report_that_is_there_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        ProfilerCallback(tmp_path / "profile.json")
    callback = ProfilerCallback(tmp_path / "profile.json", n_warmup=0, n_steps=1, n_active=0, overwrite=True, **QUICK)
    trained(model(), callback, tmp_path / "run", n=8)
    assert Report.load(tmp_path / "profile.json") == callback.report


def test_arguments_of_another_kind_are_named() -> None:
    with pytest.raises(TypeError, match="n_warmup must be int"):
        ProfilerCallback(n_warmup="3")  # type: ignore[arg-type]
