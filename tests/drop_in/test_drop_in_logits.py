"""Logits on demand: never computed unless somebody reads them, and then what stock computes, however they are read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_berts import N_TOKENS, bert, count_head_rows, inputs, labels_for
from torch import nn
from torch.utils import _pytree as pytree

import geneformer_fast as gf
from geneformer_fast.drop_in.head import Head
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
        gf.accelerate(self.model, **options)
        self.sizes = count_head_rows(self.model)

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


def late(change: Any) -> tuple[Any, Any, torch.Tensor]:
    """(stock logits, logits that were read after a change of the model, where there are tokens)."""
    model = bert("BertForMaskedLM").train()
    given = inputs()
    labels = labels_for(model, given)
    stock = model(**given, **labels).logits.detach()
    gf.accelerate(model)
    output = model(**given, **labels)
    change(model, output)
    return stock, output.logits, given["attention_mask"].bool()


def other_decoder(model: Any, output: Any) -> None:
    model.cls.predictions.decoder = nn.Linear(32, N_TOKENS)


def other_weights(model: Any, output: Any) -> None:
    for module in (model.cls.predictions.decoder, model.cls.predictions.transform.dense):
        module.weight = nn.Parameter(torch.randn_like(module.weight))


def later_hook(model: Any, output: Any) -> None:
    model.cls.predictions.transform.register_forward_hook(lambda m, args, out: out * 0)


@pytest.mark.parametrize("change", [other_decoder, other_weights, later_hook], ids=lambda change: change.__name__)
def test_late_logits_are_those_of_the_forward_pass_whatever_was_exchanged_since(change: Any) -> None:
    stock, logits, keep = late(change)
    torch.testing.assert_close(logits.detach()[keep], stock[keep], atol=1e-5, rtol=1e-5)


def in_place(model: Any, output: Any) -> None:
    with torch.no_grad():
        model.cls.predictions.decoder.bias.add_(1)


def through_data(model: Any, output: Any) -> None:
    model.cls.predictions.transform.LayerNorm.weight.data.mul_(1.5)


def through_numpy(model: Any, output: Any) -> None:
    model.cls.predictions.decoder.weight.detach().numpy()[3] += 1


def hidden_states(model: Any, output: Any) -> None:
    vars(output)["logits"]._hidden.data.mul_(2)


def freed(model: Any, output: Any) -> None:
    """As torch's sharding does after a forward pass."""
    model.cls.predictions.decoder.weight.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "change", [in_place, through_data, through_numpy, hidden_states, freed], ids=lambda change: change.__name__
)
def test_late_logits_of_what_has_been_overwritten_are_refused(change: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"read outputs\.logits before"):
        late(change)


def test_late_logits_of_a_model_that_was_called_with_other_weights() -> None:
    """``torch.func.functional_call`` puts weights into a model for one call: late logits are theirs, and so is the
    gradient."""
    model = bert("BertForMaskedLM").train()
    given = inputs()
    names = [name for name, _ in model.named_parameters()]

    def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(5)
        others = {
            name: (p.detach() + 0.1 * torch.randn_like(p)).requires_grad_() for name, p in model.named_parameters()
        }
        output = torch.func.functional_call(model, others, (), given)
        logits = output.logits
        found = torch.autograd.grad(logits[given["attention_mask"].bool()].square().mean(), others.values())
        return logits.detach(), dict(zip(names, found, strict=True))

    stock_logits, stock = gradients(model)
    gf.accelerate(model)
    logits, ours = gradients(model)
    keep = given["attention_mask"].bool()
    torch.testing.assert_close(logits[keep], stock_logits[keep], atol=1e-5, rtol=1e-5)
    for name in names:
        torch.testing.assert_close(ours[name], stock[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_logits_that_are_not_numbers_can_be_read_late() -> None:
    model = bert("BertForMaskedLM").eval()
    with torch.no_grad():
        model.cls.predictions.decoder.bias[3] = float("nan")
        gf.accelerate(model)
        output = model(**inputs())
    assert output.logits[..., 3].isnan().all()


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


def swap_rows(weight: torch.Tensor) -> None:
    values = weight.detach().numpy()
    values[[3, 4]] = values[[4, 3]]


def move_within_a_row(weight: torch.Tensor) -> None:
    weight.data[5, 3] += 0.5
    weight.data[5, 4] -= 0.5


UNSEEN: dict[str, Callable[[Any], None]] = {
    "rows changed places": lambda model: swap_rows(model.cls.predictions.decoder.weight),
    "columns changed places": lambda model: model.cls.predictions.decoder.weight.data.copy_(
        model.cls.predictions.decoder.weight.data.flip(1)
    ),
    "biases changed places": lambda model: swap_rows(model.cls.predictions.bias),
    "changes that cancel": lambda model: move_within_a_row(model.cls.predictions.decoder.weight),
    "other memory": lambda model: setattr(
        model.cls.predictions.decoder.weight, "data", model.cls.predictions.decoder.weight.data.flip(0)
    ),
    "signs": lambda model: model.cls.predictions.decoder.weight.data.neg_(),
    "one weight a little": lambda model: model.cls.predictions.transform.dense.weight.data[2, 3:4].add_(1e-4),
    "another dtype": lambda model: model.half(),
}


@pytest.mark.parametrize("what", UNSEEN)
def test_late_logits_notice_changes_that_no_sum_and_no_version_tells(what: str) -> None:
    watched = Watched(is_training=True)
    output = watched.call()
    UNSEEN[what](watched.model)
    with pytest.raises(UnsupportedError, match="have changed since this output was made"):
        _ = output.logits


def test_late_logits_are_those_of_the_activation_as_it_was() -> None:
    watched = Watched(is_training=True)
    activation = nn.ELU(alpha=0.3)
    transform = watched.model.cls.predictions.transform
    # A plain function stood there.
    del transform.transform_act_fn
    transform.transform_act_fn = activation
    expected = watched.call().logits
    output = watched.call()
    activation.alpha = 5.0
    torch.testing.assert_close(output.logits, expected)


def test_late_logits_read_in_inference_mode_keep_their_graph() -> None:
    watched = Watched(is_training=True)
    output = watched.call()
    with torch.inference_mode():
        _ = output.logits
    assert output.logits.requires_grad
    (output.loss + output.logits.square().mean()).backward()
    weight = watched.model.cls.predictions.decoder.weight
    ours = weight.grad.clone()
    watched.model.zero_grad()
    output = watched.call()
    (output.loss + output.logits.square().mean()).backward()
    torch.testing.assert_close(ours, weight.grad)


def test_late_logits_may_be_read_with_another_number_of_threads() -> None:
    """Sums come out otherwise then, by rounding."""
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        hidden = torch.randn(4, 40, 256)
        head = Head(
            (torch.randn(256, 256), None), torch.relu, (torch.ones(256), torch.zeros(256)), 1e-12,
            (torch.randn(5000, 256), torch.zeros(5000)),
        )  # fmt: skip
        late = LogitsOnDemand(head, hidden, is_quiet=False)
        expected = head.logits(hidden)
        torch.set_num_threads(3)
        torch.testing.assert_close(late.tensor(), expected, atol=1e-3, rtol=1e-4)
    finally:
        torch.set_num_threads(n_threads)
