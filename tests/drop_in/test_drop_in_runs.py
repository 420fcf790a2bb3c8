"""Whole training runs of the stock and of the accelerated model, in float64 with SGD, equal to 1e-9.

AdamW divides by gradients that are nothing but rounding (those of a key's bias are zero), and would blur what is equal.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from process_groups import group_of_one
from small_berts import N_LABELS, N_TOKENS, bert

import geneformer_fast as gf
from geneformer_fast.drop_in import reasons

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

KINDS = ("BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification")
LENGTHS = [40, 1, 17, 33, 9, 25, 38, 4]
KNOWN = inspect.signature(transformers.TrainingArguments).parameters


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Any:
    from accelerate.state import AcceleratorState

    reasons._told.clear()
    with mock.patch.dict(os.environ):
        AcceleratorState._reset_state(True)
        yield
    AcceleratorState._reset_state(True)


def cells(architecture: str) -> list[dict[str, Any]]:
    """Cells of different lengths, with labels."""
    generator = torch.Generator().manual_seed(6)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, N_TOKENS, (length,), generator=generator)
        is_chosen = torch.rand(length, generator=generator) < 0.3
        is_chosen[0] = True
        labels: Any = torch.where(is_chosen, ids, -100).tolist()
        if architecture == "BertForTokenClassification":
            labels = torch.where(is_chosen, ids % N_LABELS, -100).tolist()
        if architecture == "BertForSequenceClassification":
            labels = number % N_LABELS
        found.append(dict(input_ids=ids.tolist(), labels=labels))
    return found


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    longest = max(len(cell["input_ids"]) for cell in batch)

    def padded(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    labels = [cell["labels"] for cell in batch]
    return dict(
        input_ids=torch.tensor([padded(cell["input_ids"], 0) for cell in batch]),
        attention_mask=torch.tensor([padded([1] * len(cell["input_ids"]), 0) for cell in batch]),
        labels=torch.tensor([padded(each, -100) if isinstance(each, list) else each for each in labels]),
    )


def known(**alternatives: Any) -> dict[str, Any]:
    """The first option that this release's TrainingArguments have."""
    return next({name: value} for name, value in alternatives.items() if name in KNOWN)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "accumulation": lambda: dict(gradient_accumulation_steps=2),
    "label smoothing": lambda: dict(label_smoothing_factor=0.1),
    "length grouping": lambda: known(train_sampling_strategy="group_by_length", group_by_length=True),
    "recomputing": lambda: known(activation_checkpointing=True, gradient_checkpointing=True),
    "clipping": lambda: dict(max_grad_norm=0.5),
}


def trainer(model: Any, folder: Path, options: dict[str, Any], **more: Any) -> Any:
    arguments = transformers.TrainingArguments(
        **{
            **dict(output_dir=str(folder), per_device_train_batch_size=3, per_device_eval_batch_size=3, optim="sgd"),
            **dict(num_train_epochs=1, learning_rate=0.05, lr_scheduler_type="constant", max_grad_norm=0.0),
            **dict(save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, seed=4),
            **options,
        }
    )
    data = cells(type(model).__name__)
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=collate, **more
    )


def result(loop: Any) -> dict[str, Any]:
    """Weights, predictions where there are labels, losses and the number of steps, at the end of a run."""
    found = loop.predict(loop.eval_dataset)
    weights = {name: value.numpy() for name, value in loop.model.state_dict().items()}
    # The trainer pads the logits of batches of different lengths; only labelled places are anybody's.
    return {
        **weights,
        "predictions": found.predictions[found.label_ids != -100],
        "loss": found.metrics["test_loss"],
        "steps": loop.state.global_step,
    }


def assert_same_result(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-9, atol=1e-9, err_msg=name)


def on_both(run: Callable[[Any], dict[str, Any]], architecture: str) -> None:
    """A run on both models, which changes weights and ends at the same ones."""
    before = {name: value.clone().numpy() for name, value in bert(architecture).double().state_dict().items()}
    stock = run(bert(architecture).double())
    model = bert(architecture).double()
    gf.accelerate(model)
    assert_same_result(run(model), stock)
    moved = [np.abs(stock[name] - value).max() for name, value in before.items() if "query.weight" in name]
    assert min(moved) > 1e-6


# Every option with one architecture or two, in turn; all of them are slow. "plain" and those that read logits late or
# compute once more are among those with the head that predicts tokens.
@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        pytest.param(kind, what, marks=() if (i + 2 * j) % 3 == 0 or (i == 0 and j in (2, 4)) else pytest.mark.slow)
        for i, kind in enumerate(KINDS)
        for j, what in enumerate(OPTIONS)
    ],
)
def test_trainer(architecture: str, what: str, tmp_path: Path) -> None:
    if what == "label smoothing" and architecture == "BertForSequenceClassification":
        # One architecture without padding among its labels is enough.
        pytest.skip("smoothed labels of cells are those of torch")

    def run(model: Any) -> dict[str, Any]:
        loop = trainer(model, tmp_path, OPTIONS[what]())
        loop.train()
        return result(loop)

    on_both(run, architecture)


# A checkpoint holds whatever the model has: two of the heads are slow tests.
@pytest.mark.parametrize("architecture", [pytest.param(k, marks=[pytest.mark.slow] * (k != KINDS[0])) for k in KINDS])
def test_trainer_goes_on_from_a_checkpoint(architecture: str, tmp_path: Path) -> None:
    """Runs of six steps, broken off and resumed after three: the same, and the same as the unbroken stock run."""
    options = dict(save_strategy="steps", save_steps=3, num_train_epochs=2)

    def run(model: Any) -> dict[str, Any]:
        folder = tmp_path / str(id(model))
        whole = trainer(model, folder, options)
        whole.train()
        unbroken = result(whole)
        fresh = bert(architecture, seed=9).double()
        if "forward" in vars(model.bert):
            gf.accelerate(fresh)
        loop = trainer(fresh, folder, options)
        try:
            loop.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        except pickle.UnpicklingError:
            pytest.skip("this transformers cannot read its own checkpoints with this torch")
        assert_same_result(result(loop), unbroken)
        return unbroken

    on_both(run, architecture)


def test_trainer_stops_early_at_the_same_step(tmp_path: Path) -> None:
    def run(model: Any) -> dict[str, Any]:
        options = dict(
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
            metric_for_best_model="eval_loss", greater_is_better=False, num_train_epochs=6, learning_rate=0.5,
        )  # fmt: skip
        stopping = transformers.EarlyStoppingCallback(early_stopping_patience=2)
        loop = trainer(model, tmp_path / str(id(model)), options, callbacks=[stopping])
        loop.train()
        assert 2 < loop.state.global_step < 18
        return {**result(loop), "best": loop.state.best_metric}

    on_both(run, "BertForMaskedLM")


def batches(architecture: str) -> list[dict[str, torch.Tensor]]:
    data = cells(architecture)
    return [collate(data[first : first + 3]) for first in (0, 3, 5)]


def three_steps(model: Any, given: list[dict[str, torch.Tensor]], wrap: Callable[[Any], Any]) -> dict[str, Any]:
    """Weights after three steps of SGD; the second loss is one of a user's own, made of the logits."""
    wrapped = wrap(model.train())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    for number, batch in enumerate(given):
        optimizer.zero_grad()
        output = wrapped(**batch)
        loss = output.loss
        if number == 1:
            logits, labels = output.logits, batch["labels"]
            loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): as_array(value)
        for name, value in wrapped.state_dict().items()
    }


def as_array(value: torch.Tensor) -> np.ndarray:
    return getattr(value, "full_tensor", lambda: value)().detach().numpy()


def sharded(model: Any) -> Any:
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_head(model: Any) -> Any:
    """The head as a group of its own, which is there only while it is called."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.cls if hasattr(model, "cls") else model.classifier, mesh=init_device_mesh("cpu", (1,)))
    return sharded(model)


def first_sharding(model: Any) -> Any:
    """FSDP of the first kind, with each layer a unit: wrapped layers run as stock."""
    from functools import partial

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    kind = type(model.bert.encoder.layer[0])
    policy = partial(transformer_auto_wrap_policy, transformer_layer_cls={kind})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: model,
    "DDP": torch.nn.parallel.DistributedDataParallel,
    "FSDP2": sharded,
    "FSDP2 with a head": sharded_head,
    "compiled": lambda model: torch.compile(model, backend="aot_eager"),
}


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w == "compiled")) for w in WRAPPERS])
@pytest.mark.parametrize("architecture", KINDS)
def test_loops_under_wrappers_of_torch(architecture: str, what: str, tmp_path: Path) -> None:
    given = batches(architecture)
    if what == "FSDP2 with a head" and architecture == "BertForMaskedLM":
        # A tied decoder cannot be in another group than the table it is tied to.
        pytest.skip("torch cannot shard tied weights apart")
    torch._dynamo.reset()
    stock = three_steps(bert(architecture).double(), given, lambda model: model)
    model = bert(architecture).double()
    gf.accelerate(model)
    with group_of_one(tmp_path):
        ours = three_steps(model, given, WRAPPERS[what])
    assert_same_result(ours, stock)
    torch._dynamo.reset()


@pytest.mark.parametrize("steps_to_accumulate", [1, 2])
@pytest.mark.parametrize("architecture", KINDS)
def test_accelerator(architecture: str, steps_to_accumulate: int) -> None:
    from accelerate import Accelerator

    def run(model: Any) -> dict[str, Any]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps_to_accumulate)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loader = torch.utils.data.DataLoader(cells(architecture), batch_size=3, collate_fn=collate)
        prepared, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
        for _ in range(2):
            for batch in loader:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        return {name: value.numpy() for name, value in accelerator.unwrap_model(prepared).state_dict().items()}

    on_both(run, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", KINDS)
def test_first_kind_of_sharding(architecture: str, tmp_path: Path) -> None:
    given = batches(architecture)
    stock = three_steps(bert(architecture).double(), given, lambda model: model)
    model = bert(architecture).double()
    gf.accelerate(model)
    with group_of_one(tmp_path), pytest.warns(UserWarning, match="is a torch.distributed.fsdp"):
        ours = three_steps(model, given, first_sharding)
    assert_same_result({name.replace("_fsdp_wrapped_module.", ""): value for name, value in ours.items()}, stock)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("words")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"g{number}" for number in range(N_TOKENS - 5))]
    (folder / "vocab.txt").write_text("\n".join(words))
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


TASKS = {
    "fill-mask": "BertForMaskedLM",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "feature-extraction": "BertModel",
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(task: str, tokenizer: Any) -> None:
    """Batches with padding; a pipeline of features hands padding on, too."""
    texts = ["g1 g7 [MASK] g3 g4", "g9 [MASK]", "g2 [MASK] g8 g30 g31 g32 g33"]

    def run(model: Any) -> Any:
        made = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        return made(texts, batch_size=3)

    def numbers(found: Any) -> list[float]:
        if isinstance(found, list | tuple):
            return [number for each in found for number in numbers(each)]
        if isinstance(found, dict):
            return [number for each in found.values() for number in numbers(each)]
        return [float(found)] if isinstance(found, int | float | np.number) else []

    model = bert(TASKS[task]).eval()
    stock = numbers(run(model))
    gf.accelerate(model, padding="stock" if task == "feature-extraction" else "zeros")
    ours = numbers(run(model))
    assert len(ours) == len(stock) >= 3
    np.testing.assert_allclose(ours, stock, atol=1e-5)
