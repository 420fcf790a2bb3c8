"""Logits on demand: never computed unless somebody reads them, and then what stock computes, however they are read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from small_berts import bert, inputs, labels_for
from torch import nn
from torch.utils import _pytree as pytree
from watched import Watched

import geneformer_fast as gf
from geneformer_fast.drop_in.outputs import LogitsOnDemand
from geneformer_fast.errors import UnsupportedError

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


HEAD_PARTS = ["cls", "predictions", "transform", "dense", "transform_act_fn", "LayerNorm", "decoder"]


@pytest.mark.parametrize("when", ["pre", "post", "backward", "global"])
@pytest.mark.parametrize("what", HEAD_PARTS)
def test_a_hooked_head_is_called_as_in_the_stock_model(what: str, when: str) -> None:
    """Read or not, and with hooks that are gone when somebody reads."""
    model = bert("BertForMaskedLM").train()
    given = inputs()
    labels = labels_for(model, given)
    with torch.no_grad():
        expected = model(**given, **labels)
    gf.accelerate(model)
    calls: list[int] = []
    module = next(module for name, module in model.named_modules() if name.split(".")[-1] == what and "cls" in name)

    def note(hooked: Any, *_: Any) -> None:
        if hooked is module:
            calls.append(1)

    register = {
        "pre": module.register_forward_pre_hook,
        "post": module.register_forward_hook,
        "backward": module.register_full_backward_hook,
        "global": nn.modules.module.register_module_forward_hook,
    }[when]
    hook = register(note)
    try:
        output = model(**given, **labels)
        output.loss.backward()
    finally:
        hook.remove()
    assert calls == [1]
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits[keep], expected.logits[keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["transform", "decoder"])
def test_a_hook_that_changes_the_head_changes_logits_and_loss(what: str) -> None:
    model = bert("BertForMaskedLM").train()
    given = inputs()
    labels = labels_for(model, given)
    hook = getattr(model.cls.predictions, what).register_forward_hook(lambda m, args, out: out * 0.5 + 0.1)
    expected = model(**given, **labels)
    gf.accelerate(model)
    output = model(**given, **labels)
    hook.remove()
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits[keep], expected.logits[keep], atol=1e-5, rtol=1e-5)


def test_a_hooked_head_sees_masked_rows_only_where_nobody_can_ask_for_logits() -> None:
    watched = Watched(is_training=True, training_logits=False)
    sizes: list[int] = []
    watched.model.cls.predictions.decoder.register_forward_hook(lambda m, a, out: sizes.append(out.shape[:-1].numel()))
    output = watched.call()
    torch.testing.assert_close(output.loss.detach(), watched.stock.loss, atol=1e-5, rtol=1e-5)
    assert output.logits is None
    assert sizes == [int((watched.labels["labels"] != -100).sum())]
