"""Logits on demand: never computed unless somebody reads them, and then what stock computes, however they are read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from small_berts import bert, inputs, labels_for
from torch.utils import _pytree as pytree

import geneformer_fast as gf
from geneformer_fast.drop_in.outputs import LogitsOnDemand
from geneformer_fast.errors import UnsupportedError


class Watched:
    """A model, its stock output, and the number of times its head has seen all positions since it was accelerated."""

    def __init__(self, *, is_training: bool, **options: Any) -> None:
        self.model = bert("BertForMaskedLM").train(is_training)
        self.given = inputs()
        self.labels = labels_for(self.model, self.given)
        self.keep = self.given["attention_mask"].bool()
        with torch.no_grad():
            self.stock = self.model(**self.given, **self.labels)
        self.sizes: list[int] = []
        gf.accelerate(self.model, **options)
        transform = self.model.cls.predictions.transform
        transform.register_forward_hook(lambda _, args, out: self.sizes.append(out.shape[:-1].numel()))

    def call(self, **more: Any) -> Any:
        return self.model(**self.given, **self.labels, **more)

    @property
    def n_full(self) -> int:
        return self.sizes.count(self.keep.numel())


READERS = {
    "attribute": lambda output: output.logits,
    "key": lambda output: output["logits"],
    "index": lambda output: output[1],
    "last index": lambda output: output[-1],
    "slice": lambda output: output[1:][0],
    "tuple": lambda output: output.to_tuple()[1],
    "get": lambda output: output.get("logits"),
    "dict": lambda output: dict(output)["logits"],
    "double star": lambda output: {**output}["logits"],
    "pickle": lambda output: pickle.loads(pickle.dumps(output)).logits,
    "deepcopy": lambda output: copy.deepcopy(output).logits,
}
WALKERS = {
    "items": lambda output: dict(output.items())["logits"],
    "values": lambda output: list(output.values())[1],
    "pytree": lambda output: pytree.tree_leaves(output)[1],
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("is_training", [False, True])
def test_every_way_to_read_logits_gives_them(reader: str, is_training: bool) -> None:
    watched = Watched(is_training=is_training)
    with torch.no_grad():
        output = watched.call()
    assert watched.n_full == 0
    logits = READERS[reader](output)
    assert isinstance(logits, torch.Tensor)
    torch.testing.assert_close(logits[watched.keep], watched.stock.logits[watched.keep], atol=1e-5, rtol=1e-5)
    assert output.logits is output["logits"]
    assert watched.n_full == 1


@pytest.mark.parametrize("is_training", [False, True])
def test_reading_the_loss_computes_masked_rows_only(is_training: bool) -> None:
    watched = Watched(is_training=is_training)
    output = watched.call(output_hidden_states=True)
    assert isinstance(output, type(watched.stock))
    for loss in (output.loss, output["loss"], output[0], output.get("loss"), output[:1][0]):
        torch.testing.assert_close(loss.detach(), watched.stock.loss, atol=1e-5, rtol=1e-5)
    assert list(output.keys()) == ["loss", "logits", "hidden_states"]
    assert len(output) == 3
    assert "logits" in output
    assert len(output.hidden_states) == 3
    assert output.get("nothing", 5) == 5
    with pytest.raises(KeyError):
        output["nothing"]
    assert watched.sizes == [int((watched.labels["labels"] != -100).sum())]


@pytest.mark.parametrize("walker", WALKERS)
def test_walking_through_an_output_computes_logits_in_evaluation_only(walker: str) -> None:
    """A training step's outputs are walked through by whatever wraps a model, in evaluation by who wants them."""
    watched = Watched(is_training=True)
    assert isinstance(WALKERS[walker](watched.call()), LogitsOnDemand)
    assert watched.n_full == 0
    watched.model.eval()
    assert isinstance(WALKERS[walker](watched.call()), torch.Tensor)
    assert watched.n_full == 1


def test_a_walk_that_rebuilds_the_output_keeps_the_promise() -> None:
    watched = Watched(is_training=True)
    output = watched.call()
    leaves, tree = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, tree)
    assert watched.n_full == 0
    torch.testing.assert_close(again.logits[watched.keep], watched.stock.logits[watched.keep], atol=1e-5, rtol=1e-5)


def test_accelerate_turns_logits_into_float32_without_computing_them() -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    watched = Watched(is_training=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = watched.call()
        assert output.logits.dtype == torch.bfloat16
        before = watched.n_full
        output = watched.call()
    output = operations.convert_to_fp32(output)
    assert watched.n_full == before
    assert output.loss.dtype == torch.float32
    assert output.logits.dtype == torch.float32
    # Computed in bfloat16, as they would have been inside of autocast, then widened.
    assert torch.equal(output.logits, output.logits.bfloat16().float())


def test_late_logits_are_computed_as_the_forward_pass_ran() -> None:
    watched = Watched(is_training=True)
    with torch.no_grad():
        output = watched.call()
    assert not output.logits.requires_grad
    output = watched.call()
    with torch.no_grad():
        logits = output.logits
    logits.square().mean().backward()
    ours = {name: p.grad.clone() for name, p in watched.model.named_parameters() if p.grad is not None}
    watched.model.zero_grad()
    gf.accelerate(watched.model).undo()
    watched.model(**watched.given).logits[watched.keep].square().sum().div(logits.numel()).backward()
    # The head alone also sees padding, where hidden states are zero and no stock value is to be had.
    for name, p in watched.model.named_parameters():
        if "encoder" in name:
            torch.testing.assert_close(ours[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_logits_of_weights_that_are_gone_are_refused() -> None:
    watched = Watched(is_training=True)
    optimizer = torch.optim.SGD(watched.model.parameters(), lr=0.1)
    output = watched.call()
    output.loss.backward()
    optimizer.step()
    with pytest.raises(UnsupportedError, match=r"read outputs\.logits before the optimizer's step"):
        _ = output.logits


def test_inference_mode() -> None:
    watched = Watched(is_training=False)
    with torch.inference_mode():
        output = watched.call()
    torch.testing.assert_close(
        output.logits[watched.keep].clone(), watched.stock.logits[watched.keep], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("returns_dict", [False, True])
def test_training_without_logits(returns_dict: bool) -> None:
    watched = Watched(is_training=True, training_logits=False)
    output = watched.call(return_dict=returns_dict)
    assert len(output) == 1
    torch.testing.assert_close(output[0].detach(), watched.stock.loss, atol=1e-5, rtol=1e-5)
    if returns_dict:
        assert output.logits is None
    assert watched.n_full == 0
    assert watched.model(**watched.given).logits is not None
    assert watched.model.eval()(**watched.given, **watched.labels).logits is not None
    gf.accelerate(watched.model)
    assert watched.model.train()(**watched.given, **watched.labels).logits is not None


def test_a_batch_without_labels_is_no_loss_and_no_nan() -> None:
    watched = Watched(is_training=True)
    nothing = torch.full_like(watched.labels["labels"], -100)
    output = watched.model(**watched.given, labels=nothing)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(not p.grad.any() for p in watched.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("what", ["decoder", "cls", "predictions"])
def test_a_wrapped_head_is_called_and_still_for_masked_rows_only(what: str) -> None:
    watched = Watched(is_training=True)
    head, sizes = watched.model.cls, []
    module = {"decoder": head.predictions.decoder, "cls": head, "predictions": head.predictions}[what]
    module.register_forward_hook(lambda _, args, out: sizes.append(out.shape[:-1].numel()))
    output = watched.call()
    torch.testing.assert_close(output.loss.detach(), watched.stock.loss, atol=1e-5, rtol=1e-5)
    assert sizes == [int((watched.labels["labels"] != -100).sum())]


def test_the_loss_never_holds_full_logits() -> None:
    """Largest tensor saved for the backward pass, and largest result of any operator, of a step with many tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = bert("BertForMaskedLM", vocab_size=5000, max_position_embeddings=256).train()
    given = {"input_ids": torch.randint(1, 5000, (4, 256)), "attention_mask": torch.ones(4, 256, dtype=torch.int64)}
    labels = torch.full((4, 256), -100)
    labels[:, ::8] = given["input_ids"][:, ::8]
    largest: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            largest.extend(leaf.numel() for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor))
            return out

    def most() -> int:
        largest.clear()
        with Watch():
            model(**given, labels=labels).loss.backward()
        return max(largest)

    assert most() >= 4 * 256 * 5000
    gf.accelerate(model)
    # A row in eight has a label, and the largest thing left is the token table's gradient.
    assert most() <= 5000 * 32 * 4
