"""Logits that are asked for when the forward pass is over are those that it had, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_berts import N_TOKENS, bert, inputs, labels_for
from torch import nn
from torch.utils import _pytree as pytree
from watched import Watched

import geneformer_fast as gf
from geneformer_fast.drop_in.head import Head
from geneformer_fast.drop_in.outputs import LogitsOnDemand
from geneformer_fast.errors import UnsupportedError


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
