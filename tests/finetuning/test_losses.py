"""Every loss against loops of plain Python in double precision, on hand-made cases; gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geneformer_fast.errors import UnsupportedError
from geneformer_fast.finetuning.losses import (
    LOSSES,
    balanced_weights,
    binary_cross_entropy,
    cross_entropy,
    dice,
    effective_number_weights,
    focal,
    make_loss,
)

COUNTS = [50, 8, 2]
# Rows that are right, wrong, undecided, very sure, and left out; means are away from zero.
LOGITS = [[3.0, 1.0, 0.5], [0.2, 2.2, 1.1], [1.0, 1.0, 1.0], [12.0, -8.0, 1.0], [9.0, 9.0, 9.0], [0.3, 0.1, 2.5]]
TARGETS = [0, 2, 1, 1, -100, 2]


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def asked() -> list[tuple[list[float], int]]:
    return [(row, target) for row, target in zip(LOGITS, TARGETS, strict=True) if target != -100]


def by_hand(name: str) -> float:
    """The mean loss of the cases, written once more from the papers."""
    n, total = len(asked()), sum(COUNTS)
    if name == "cross-entropy":
        return sum(-math.log(softmax(row)[y]) for row, y in asked()) / n
    if name == "weighted":
        weights = [total / (3 * count) for count in COUNTS]
        return sum(-weights[y] * math.log(softmax(row)[y]) for row, y in asked()) / sum(weights[y] for _, y in asked())
    if name.startswith("class-balanced"):
        beta = 0.99 if name.endswith("0.99") else 0.9999
        raw = [(1 - beta) / (1 - beta**count) for count in COUNTS]
        weights = [3 * weight / sum(raw) for weight in raw]
        return sum(-weights[y] * math.log(softmax(row)[y]) for row, y in asked()) / sum(weights[y] for _, y in asked())
    if name.startswith("focal"):
        gamma, alpha = (1.5, [0.25, 0.5, 2.0]) if ":" in name else (2.0, [1.0, 1.0, 1.0])
        terms = [alpha[y] * (1 - softmax(row)[y]) ** gamma * -math.log(softmax(row)[y]) for row, y in asked()]
        return sum(terms) / n
    if name == "bce":
        terms = [
            -math.log(1 / (1 + math.exp(-value))) if c == y else -math.log(1 - 1 / (1 + math.exp(-value)))
            for row, y in asked()
            for c, value in enumerate(row)
        ]
        return sum(terms) / len(terms)
    if name == "dice":
        overlaps = []
        for c in range(3):
            p = [softmax(row)[c] for row, _ in asked()]
            truth = [float(y == c) for _, y in asked()]
            both = sum(a * b for a, b in zip(p, truth, strict=True))
            overlaps.append((2 * both + 1) / (sum(p) + sum(truth) + 1))
        return 1 - sum(overlaps) / 3
    if name.startswith("ldam"):
        max_m, s = (0.3, 10.0) if ":" in name else (0.5, 30.0)
        margins = [count**-0.25 for count in COUNTS]
        margins = [margin * max_m / max(margins) for margin in margins]
        moved = [([s * (v - margins[y] * (c == y)) for c, v in enumerate(row)], y) for row, y in asked()]
        return sum(max(row) + math.log(sum(math.exp(v - max(row)) for v in row)) - row[y] for row, y in moved) / n
    tau = 0.5 if ":" in name else 1.0
    moved = [([v + tau * math.log(COUNTS[c] / total) for c, v in enumerate(row)], y) for row, y in asked()]
    return sum(-math.log(softmax(row)[y]) for row, y in moved) / n


NAMES = [
    *LOSSES,
    "class-balanced:beta=0.99",
    "focal:gamma=1.5,alpha=0.25+0.5+2",
    "ldam:max_m=0.3,s=10",
    "logit-adjusted:tau=0.5",
]


def mean_of(name: str, logits: torch.Tensor, targets: list[int] = TARGETS) -> torch.Tensor:
    total, weight = make_loss(name, COUNTS)(logits, torch.tensor(targets))
    return total / weight


@pytest.mark.parametrize("name", NAMES)
def test_value_by_hand(name):
    exact = mean_of(name, torch.tensor(LOGITS, dtype=torch.float64))
    assert exact.item() == pytest.approx(by_hand(name), rel=1e-12)
    # float32 may lose the digits that float32 has not: BCE of the very sure row needs 1 - sigmoid(12).
    assert mean_of(name, torch.tensor(LOGITS)).item() == pytest.approx(by_hand(name), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_against_differences(name):
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_of(name, x), (logits,))


@pytest.mark.parametrize("name", NAMES)
def test_float32_gradient_is_that_of_float64(name):
    grads = []
    for dtype in (torch.float64, torch.float32):
        logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
        mean_of(name, logits).backward()
        grads.append(logits.grad.double())
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_positions_enter_nothing(name):
    """Not the value, not the divisor, not the gradient, whatever stands there (the mistake of a published notebook)."""
    logits = torch.tensor(LOGITS, dtype=torch.float64)
    kept = [i for i, target in enumerate(TARGETS) if target != -100]
    alone = make_loss(name, COUNTS)(logits[kept], torch.tensor([TARGETS[i] for i in kept]))
    for filler in (0.0, 1e4, float("nan"), float("inf")):
        filled = logits.clone()
        filled[4] = filler
        filled.requires_grad_()
        total, weight = make_loss(name, COUNTS)(filled, torch.tensor(TARGETS))
        assert (total.item(), weight.item()) == (alone[0].item(), alone[1].item())
        total.backward()
        assert (filled.grad[4] == 0).all()
        assert filled.grad[kept].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_asked_is_zero_of_zero_and_still_has_a_gradient(name):
    logits = torch.tensor(LOGITS, requires_grad=True)
    total, weight = make_loss(name, COUNTS)(logits, torch.full((6,), -100))
    total.backward()
    assert (total.item(), weight.item()) == (0.0, 0.0)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dice"])
@given(st.lists(st.integers(0, 5), min_size=0, max_size=6, unique=True))
@settings(max_examples=20, deadline=None)
def test_batches_add_up(name, first):
    """However rows are dealt into batches, sum over sum is the loss of all rows."""
    logits, targets = torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(TARGETS)
    loss = make_loss(name, COUNTS)
    second = [i for i in range(6) if i not in first]
    parts = [loss(logits[rows], targets[rows]) for rows in (first, second)]
    mean = sum(total for total, _ in parts) / sum(weight for _, weight in parts)
    assert mean.item() == pytest.approx(mean_of(name, logits).item(), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_computed_in_float32(name):
    half = torch.tensor(LOGITS).bfloat16()
    assert mean_of(name, half).dtype == torch.float32
    assert mean_of(name, half).item() == pytest.approx(mean_of(name, half.double()).item(), rel=1e-6)


def test_cross_entropy_is_torch_with_weights():
    logits, targets = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, -100, 1, 1, 0, 2])
    weight = torch.tensor([0.5, 1.0, 4.0, 2.0], dtype=torch.float64)
    total, divisor = cross_entropy(logits, targets, weight=weight)
    torch.testing.assert_close(total / divisor, torch.nn.functional.cross_entropy(logits, targets, weight))


def test_focal_with_gamma_zero_is_cross_entropy_and_is_smooth_where_p_is_one():
    logits = torch.tensor([[2.0, 1.0], [60.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 0])
    torch.testing.assert_close(focal(logits, targets, gamma=0.0), cross_entropy(logits, targets))
    for gamma in (0.5, 1.0, 2.0):
        (grad,) = torch.autograd.grad(focal(logits, targets, gamma=gamma)[0], logits)
        assert grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_where_float32_rounds_p_to_one(gamma):
    logits = torch.tensor([[300.0, 0.0], [0.0, 300.0]], requires_grad=True)
    focal(logits, torch.tensor([0, 0]), gamma=gamma)[0].backward()
    assert logits.grad.isfinite().all()


def test_bce_of_several_labels_leaves_single_answers_out():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.3, 0.4, -2.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, 1, 0], [-100, 0, 1]])
    total, weight = binary_cross_entropy(logits, targets)
    signs = [(2.0, 1), (-1.0, 1), (0.5, 0), (0.4, 0), (-2.0, 1)]
    assert weight.item() == 5
    assert total.item() == pytest.approx(sum(math.log1p(math.exp(-v if yes else v)) for v, yes in signs), rel=1e-12)
    total.backward()
    assert logits.grad[1, 0] == 0


def test_dice_of_a_perfect_answer_is_zero_and_classes_that_are_absent_do_not_count():
    sure = torch.eye(4, dtype=torch.float64)[[0, 0, 2]] * 100
    total, weight = dice(sure, torch.tensor([0, 0, 2]))
    assert (total / weight).item() == pytest.approx(0, abs=1e-12)


def test_weights_of_classes():
    counts = torch.tensor(COUNTS)
    assert balanced_weights(counts).tolist() == pytest.approx([0.4, 2.5, 10.0])
    even = effective_number_weights(counts, 1e-9)  # no memory at all: every class is one example
    assert even.tolist() == pytest.approx([1, 1, 1])
    # beta towards 1: inverse frequency, scaled to the sum K.
    inverse = [1 / count for count in COUNTS]
    expected = [3 * value / sum(inverse) for value in inverse]
    assert effective_number_weights(counts, 1 - 1e-9).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "counts", "said"),
    [
        ("hinge", COUNTS, "no loss named 'hinge'; there are cross-entropy, weighted"),
        ("focal:delta=1", COUNTS, "no option 'delta'; focal has gamma, alpha"),
        ("weighted:beta=1", COUNTS, "weighted has no options"),
        ("focal:gamma=much", COUNTS, "gamma needs a number, not 'much'"),
        ("focal:gamma=1+2", COUNTS, "gamma takes one number"),
        ("focal:alpha=1+2", COUNTS, "alpha has 2 values for 3 classes"),
        ("class-balanced:beta=1", COUNTS, "beta must lie between 0 and 1"),
        ("weighted", [3, 0], "every class needs a row"),
    ],
)
def test_refusals(name, counts, said):
    with pytest.raises(UnsupportedError, match=said.replace("(", r"\(")):
        make_loss(name, counts)
