"""What learns on top of weights of eight bits: adapters of PEFT, and heads; and compiling, in accelerated models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_groups import group_of_one
from small_berts import bert, inputs, labels_for

from geneformer_fast import accelerate, quantize
from geneformer_fast.errors import UnsupportedError
from geneformer_fast.layers import EightBits
from geneformer_fast.quantization.hugging_face import TheirEmbedding

pytestmark = [pytest.mark.filterwarnings("error:.*stock forward pass"), pytest.mark.filterwarnings("ignore:::peft")]


@pytest.fixture
def multiplying(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``multiplying("dynamic")`` or ``("weight_only")``: what scheme int8 does, whatever is fastest here."""
    return lambda mode: monkeypatch.setattr("geneformer_fast.layers.int8_mode", lambda *_: mode)


def widened(model: Any) -> Any:
    """A copy with layers in floating point, of the very weights."""
    plain = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, EightBits):
            weight = torch.nn.Parameter(layer.widened(torch.float32), requires_grad=False)
            if isinstance(layer, TheirEmbedding):
                made: Any = torch.nn.Embedding(*weight.shape, _weight=weight, _freeze=True)
            else:
                made = torch.nn.Linear(*weight.shape[::-1])
                made.weight, made.bias = weight, layer.bias
            plain.set_submodule(name, made)
    return plain


def with_adapters(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0)
    return peft.get_peft_model(model, config).train()


def steps(model: Any, given: dict[str, torch.Tensor], n: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(n):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def learnt(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def classifier(**options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model = quantize(bert("BertForSequenceClassification"), **options)
    return model, inputs() | labels_for(model, inputs())


# The gradient of rounding is that of not rounding, so that integers learn nearly, and not quite, as numbers do.
@pytest.mark.parametrize(("mode", "rtol"), [("weight_only", 1e-4), ("dynamic", 0.02)])
def test_adapters_learn_as_on_the_wide_model(multiplying: Callable[[str], None], mode: str, rtol: float) -> None:
    multiplying(mode)
    model, given = classifier()
    losses = []
    plain = with_adapters(widened(model))
    accelerate(model)
    tuned = with_adapters(model)
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    assert learnt(tuned).keys() == learnt(plain).keys()
    for each in (tuned, plain):
        losses.append(steps(each, given))
    assert losses[0] == pytest.approx(losses[1], rel=rtol)
    assert losses[0][-1] < losses[0][0] - 0.1
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == learnt(tuned).keys()
    assert all("lora_" in name or "classifier" in name for name in changed)


def test_adapters_are_saved_and_put_on_again(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, given = classifier()
    fresh = copy.deepcopy(model)
    accelerate(model)
    tuned = with_adapters(model)
    steps(tuned, given, 2)
    tuned.eval().save_pretrained(tmp_path)
    accelerate(fresh)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, tuned(**given).logits)
    # Eight bits cannot hold them.
    with pytest.raises(RuntimeError, match="Char"):
        tuned.merge_adapter()
    if "safe_merge" in inspect.signature(tuned.merge_adapter).parameters:  # PEFT before 0.15 has none here
        with pytest.raises(UnsupportedError, match="merging an adapter"):
            tuned.merge_adapter(safe_merge=True)


def test_a_folder_that_transformers_loads_takes_adapters(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors loads the folder")
    model, given = classifier(scheme="int8-weights")
    quantize(bert("BertForSequenceClassification"), tmp_path / "out", scheme="int8-weights")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    losses = []
    for each in (loaded, model):
        accelerate(each)
        losses.append(steps(with_adapters(each), given))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_a_head_learns_in_a_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, given = classifier()
    model.classifier.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerate(model)
    rows = [{name: tensor[i] for name, tensor in given.items()} for i in range(len(given["labels"]))]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=3, learning_rate=0.05, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    first = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < first
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_in_processes_that_share_gradients(tmp_path: Path) -> None:
    """DDP as it is; FSDP where it is told to leave alone what does not learn, and otherwise not at all."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, given = classifier()
    model.classifier.requires_grad_(True)
    accelerate(model)
    model(**given).loss.backward()
    expected, model.classifier.weight.grad = model.classifier.weight.grad, None
    with group_of_one(tmp_path):
        torch.nn.parallel.DistributedDataParallel(model)(**given).loss.backward()
        assert torch.equal(model.classifier.weight.grad, expected)
        model.classifier.weight.grad = None
        mesh = init_device_mesh("cpu", (1,))
        fixed = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        fully_shard(model, mesh=mesh, ignored_params=fixed)
        model(**given).loss.backward()
        torch.testing.assert_close(model.classifier.weight.grad.full_tensor(), expected)
        for kinds in ((), (torch.int8,)):  # nothing is left alone, or the integers are but not their scales
            fresh, _ = classifier()
            accelerate(fresh)
            ignored = {parameter for parameter in fresh.parameters() if parameter.dtype in kinds}
            with pytest.raises(UnsupportedError, match=r"fully_shard\(\.\.\., ignored_params=\{p for p in model"):
                fully_shard(fresh, mesh=mesh, ignored_params=ignored)


@pytest.mark.parametrize("mode", ["dynamic", pytest.param("weight_only", marks=pytest.mark.slow)])
def test_compiled_the_graph_breaks_where_padding_goes_and_nowhere_else(
    multiplying: Callable[[str], None], mode: str
) -> None:
    """As in floating point."""
    multiplying(mode)
    model, given = quantize(bert("BertForTokenClassification", num_hidden_layers=1).eval()), inputs()
    accelerate(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**given).logits
        torch.testing.assert_close(found, model(**given).logits, atol=1e-5, rtol=1e-5)
    reasons = torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    assert reasons
    assert all("_looked_at" in reason for reason in reasons)
