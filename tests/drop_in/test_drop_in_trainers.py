"""An accelerated model in other people's loops: transformers' Trainer, accelerate, DistributedDataParallel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from process_groups import group_of_one
from small_berts import N_TOKENS, bert, inputs, labels_for

import geneformer_fast as gf
from geneformer_fast.drop_in.outputs import LogitsOnDemand

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    """accelerate keeps the precision of its first user for the whole process, some releases in the environment."""
    from accelerate.state import AcceleratorState

    with mock.patch.dict(os.environ):
        AcceleratorState._reset_state(True)
        yield
    AcceleratorState._reset_state(True)


class Cells(torch.utils.data.Dataset):
    """Padded cells with labels, and a column that no model takes."""

    def __init__(self, model: Any) -> None:
        self.given = inputs([40, 1, 17, 33, 9, 25, 38, 4])
        self.given |= labels_for(model, self.given)

    def __len__(self) -> int:
        return len(self.given["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.given.items()} | {"n_counts": 7}


def accuracy(found: Any) -> dict[str, float]:
    """As people write it: predictions over all positions."""
    is_labelled = found.label_ids != -100
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids)[is_labelled].mean())}


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    data = Cells(model)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, compute_metrics=accuracy
    )


def history(loop: Any) -> list[float]:
    loop.train()
    return [entry["loss"] for entry in loop.state.log_history if "loss" in entry]


# Options without bfloat16 run in test_drop_in_runs.py too, where results are held to 1e-9: here they are slow tests.
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("BertForMaskedLM", {}),
        ("BertForMaskedLM", {"bf16": True}),
        pytest.param("BertForMaskedLM", {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param("BertForMaskedLM", {"label_smoothing_factor": 0.1}, marks=pytest.mark.slow),
        pytest.param("BertForMaskedLM", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("BertForSequenceClassification", {}, marks=pytest.mark.slow),
        ("BertForTokenClassification", {"bf16": True}),
    ],
)
def test_trainer(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    losses, metrics = [], []
    for is_accelerated in (False, True):
        model = bert(architecture)
        if is_accelerated:
            gf.accelerate(model)
        loop = trainer(model, tmp_path, **options)
        losses.append(history(loop))
        metrics.append(loop.evaluate())
    # Two bfloat16 runs differ by roundings that Adam's first steps make larger.
    band = 2e-2 if "bf16" in options else 1e-4
    np.testing.assert_allclose(losses[1], losses[0], rtol=band)
    np.testing.assert_allclose(metrics[1]["eval_loss"], metrics[0]["eval_loss"], rtol=band)
    assert losses[0][-1] < losses[0][0]
    if "bf16" not in options:
        assert metrics[1]["eval_accuracy"] == metrics[0]["eval_accuracy"]


def test_trainer_predicts_full_logits_and_reads_the_loss_alone(tmp_path: Path) -> None:
    model = bert("BertForMaskedLM").eval()
    stock = trainer(model, tmp_path).predict(Cells(model))
    gf.accelerate(model)
    ours = trainer(model, tmp_path).predict(Cells(model))
    keep = Cells(model).given["attention_mask"].bool().numpy()
    assert ours.predictions.shape == (8, 40, N_TOKENS)
    np.testing.assert_allclose(ours.predictions[keep], stock.predictions[keep], atol=1e-5)
    np.testing.assert_allclose(ours.metrics["test_loss"], stock.metrics["test_loss"], rtol=1e-5)


def test_logits_in_a_training_step_of_ones_own(tmp_path: Path) -> None:
    """A Trainer whose loss is made of the logits, under autocast: they come, in float32, with their gradient."""
    dtypes: list[torch.dtype] = []

    class Own(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(**inputs)
            dtypes.append(outputs.logits.dtype)
            loss = torch.nn.functional.cross_entropy(outputs.logits.transpose(1, 2), inputs["labels"])
            torch.testing.assert_close(loss, outputs.loss, atol=2e-2, rtol=2e-2)
            return (loss, outputs) if return_outputs else loss

    model = bert("BertForMaskedLM")
    gf.accelerate(model)
    arguments = trainer(model, tmp_path, bf16=True).args
    loop = Own(model=model, args=arguments, train_dataset=Cells(model))
    losses = history(loop)
    assert losses[-1] < losses[0]
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("keeps_wrapper", [False, True])
def test_prepared_by_accelerate_and_undone_inside(keeps_wrapper: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = bert("BertForMaskedLM").train()
    given = inputs()
    labels = labels_for(model, given)
    handle = gf.accelerate(model)
    prepared = accelerator.prepare(model)
    output = prepared(**given, **labels)
    assert isinstance(vars(output)["logits"], LogitsOnDemand)
    assert output.loss.dtype == output.logits.dtype == torch.float32
    # Accelerated or not, what accelerate wrapped stays wrapped and usable.
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keeps_wrapper)
    torch.testing.assert_close(unwrapped(**given, **labels).loss, output.loss, atol=1e-2, rtol=1e-2)
    handle.undo()
    stock = unwrapped(**given, **labels)
    assert not isinstance(vars(stock)["logits"], LogitsOnDemand)
    torch.testing.assert_close(stock.loss, output.loss, atol=1e-2, rtol=1e-2)
    gf.accelerate(unwrapped)
    assert isinstance(vars(unwrapped(**given, **labels))["logits"], LogitsOnDemand)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_data_parallel(options: dict[str, bool], tmp_path: Path) -> None:
    model = bert("BertForMaskedLM").train()
    given = inputs()
    labels = labels_for(model, given)
    model(**given, **labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    gf.accelerate(model)
    with group_of_one(tmp_path):
        wrapped = torch.nn.parallel.DistributedDataParallel(model, **options)
        output = wrapped(**given, **labels)
        output.loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_fully_sharded(tmp_path: Path) -> None:
    """FSDP2 shards each layer: parameters are there only while the layer's own hooks say so."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = bert("BertForMaskedLM").train()
    given = inputs()
    labels = labels_for(model, given)
    model(**given, **labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    gf.accelerate(model)
    with group_of_one(tmp_path):
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(**given, **labels).loss.backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), expected[name], atol=1e-5, rtol=1e-4, msg=name)
