"""Losses for classes of unequal size. Each gives a sum and what to divide it by, so that batches add up exactly.

A mean of means weighs a small batch like a large one. Here every loss returns ``(total, weight)``: over any number of
batches the loss is ``sum(total) / sum(weight)``. Positions whose target is -100 enter neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from geneformer_fast.errors import UnsupportedError

IGNORED = -100  # target of a position that is not asked for

Terms = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], Terms]


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, weight: torch.Tensor | None = None) -> Terms:
    """Cross entropy, with a weight per class if given.

    Parameters
    ----------
    logits
        [N, K], any floating dtype; computed in float32 at least.
    targets
        [N] int64 classes; -100 leaves a row out.
    weight
        [K]; rows are divided by the sum of their weights, as ``torch.nn.functional.cross_entropy`` does.

    Returns
    -------
    total, weight
        Scalars: the sum over rows, and what to divide it by.
    """
    logits, targets = _asked(logits, targets)
    if weight is None:
        return F.cross_entropy(logits, targets, reduction="sum"), _count(targets, logits)
    weight = weight.to(logits)
    return F.cross_entropy(logits, targets, weight, reduction="sum"), weight[targets].sum()


def focal(
    logits: torch.Tensor, targets: torch.Tensor, *, gamma: float = 2.0, alpha: float | torch.Tensor = 1.0
) -> Terms:
    """Focal loss: ``alpha * (1 - p)**gamma * -log(p)`` of the right class, divided by the number of rows.

    Parameters
    ----------
    logits, targets
        As in :func:`cross_entropy`.
    gamma
        How far easy rows are turned down; 0 is cross entropy.
    alpha
        A factor for all classes, or [K] one for each.

    References
    ----------
    Lin et al., "Focal loss for dense object detection", arXiv:1708.02002.
    """
    logits, targets = _asked(logits, targets)
    log_p = F.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    # 1 - p through expm1: near p = 1 the difference would lose all digits, and with them the gradient.
    # Where p rounds to one, a power below 1 would have an infinite slope times zero: the true slope there is zero.
    missing = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    factor = alpha.to(logits)[targets] if isinstance(alpha, torch.Tensor) else alpha
    return (factor * missing**gamma * -log_p).sum(), _count(targets, logits)


def binary_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, weight: torch.Tensor | None = None) -> Terms:
    """A sigmoid per class, each against its own yes or no; divided by the number of answers.

    Parameters
    ----------
    logits
        [N, K].
    targets
        [N] int64 classes (the class is yes, all others no), or [N, K] zeros and ones of cells that may belong to
        several classes; -100 leaves a row, or one answer of a row, out.
    weight
        [K], a factor on the terms whose answer is yes.
    """
    if targets.ndim == 1:
        logits, targets = _asked(logits, targets)
        targets = F.one_hot(targets, logits.shape[1])
    logits = _wide(logits)
    is_asked = targets != IGNORED
    answers = targets.to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(
        logits, answers.clamp(min=0), pos_weight=None if weight is None else weight.to(logits), reduction="none"
    )
    return torch.where(is_asked, terms, 0.0).sum(), is_asked.sum().to(logits.dtype)


def dice(logits: torch.Tensor, targets: torch.Tensor, *, smooth: float = 1.0) -> Terms:
    """Soft Dice: one minus the overlap of softmax and truth, per class over the batch, averaged over its classes.

    ``1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth)`` for every class with a row in the batch. An overlap is no
    sum over rows: the mean over several batches is a mean of their overlaps, weighted by their rows.

    Parameters
    ----------
    logits, targets
        As in :func:`cross_entropy`.
    smooth
        Keeps classes with few rows from dominating.

    References
    ----------
    Milletari et al., "V-Net", arXiv:1606.04797.
    """
    logits, targets = _asked(logits, targets)
    p = logits.softmax(-1)
    truth = F.one_hot(targets, logits.shape[1]).to(p.dtype)
    overlap = (2 * (p * truth).sum(0) + smooth) / (p.sum(0) + truth.sum(0) + smooth)
    count = _count(targets, logits)
    present = truth.sum(0) > 0
    # No row asked for, no class present: zero, but still a function of the logits.
    mean = torch.where(present, 1 - overlap, 0.0).sum() / present.sum().clamp(min=1)
    return mean * count, count


def ldam(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    class_counts: torch.Tensor,
    max_m: float = 0.5,
    s: float = 30.0,
    weight: torch.Tensor | None = None,
) -> Terms:
    """Label-distribution-aware margins: the right class must win by more, the rarer it is.

    The margin of class c is ``max_m * (n_min / n_c)**(1/4)``; it is taken off the right logit, all are multiplied by
    ``s``, and cross entropy follows.

    Parameters
    ----------
    logits, targets, weight
        As in :func:`cross_entropy`.
    class_counts
        [K] rows of each class in the training set (counts of classes, not the labels of rows).
    max_m, s
        Margin of the rarest class, and scale.

    References
    ----------
    Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", arXiv:1906.07413.
    """
    logits, targets = _asked(logits, targets)
    counts = class_counts.to(logits)
    margins = max_m * (counts.min() / counts) ** 0.25
    is_right = F.one_hot(targets, logits.shape[1]).bool()
    return cross_entropy(s * torch.where(is_right, logits - margins, logits), targets, weight=weight)


def logit_adjusted(
    logits: torch.Tensor, targets: torch.Tensor, *, class_counts: torch.Tensor, tau: float = 1.0
) -> Terms:
    """Cross entropy of ``logits + tau * log(prior)``, which makes the bare logits right for classes of equal size.

    Parameters
    ----------
    logits, targets
        As in :func:`cross_entropy`.
    class_counts
        [K] rows of each class in the training set.
    tau
        Strength; 0 is cross entropy.

    References
    ----------
    Menon et al., "Long-tail learning via logit adjustment", arXiv:2007.07314.
    """
    counts = class_counts.to(_wide(logits))
    return cross_entropy(_wide(logits) + tau * (counts / counts.sum()).log(), targets)


def balanced_weights(class_counts: torch.Tensor) -> torch.Tensor:
    """[K] weights ``n / (K n_c)``: every class weighs the same, as scikit-learn's ``class_weight="balanced"``."""
    counts = class_counts.double()
    return counts.sum() / (len(counts) * counts)


def effective_number_weights(class_counts: torch.Tensor, beta: float = 0.9999) -> torch.Tensor:
    """[K] weights ``(1 - beta) / (1 - beta**n_c)``, scaled to the sum K.

    References
    ----------
    Cui et al., "Class-balanced loss based on effective number of samples", arXiv:1901.05555.
    """
    counts = class_counts.double()
    # 1 - beta**n by expm1, for beta near 1.
    inverse = (1 - beta) / -torch.expm1(counts * torch.log(torch.tensor(beta, dtype=torch.float64)))
    return inverse * len(counts) / inverse.sum()


def _weighted(class_counts: torch.Tensor) -> Loss:
    return partial(cross_entropy, weight=balanced_weights(class_counts))


def _class_balanced(class_counts: torch.Tensor, *, beta: float = 0.9999) -> Loss:
    if not 0 < beta < 1:
        raise UnsupportedError(f"class-balanced: beta must lie between 0 and 1, not {beta}")
    return partial(cross_entropy, weight=effective_number_weights(class_counts, beta))


def _focal(class_counts: torch.Tensor, *, gamma: float = 2.0, alpha: float | Sequence[float] = 1.0) -> Loss:
    if isinstance(alpha, Sequence):
        if len(alpha) != len(class_counts):
            raise UnsupportedError(f"focal: alpha has {len(alpha)} values for {len(class_counts)} classes")
        return partial(focal, gamma=gamma, alpha=torch.tensor(alpha))
    return partial(focal, gamma=gamma, alpha=alpha)


def _ldam(class_counts: torch.Tensor, *, max_m: float = 0.5, s: float = 30.0) -> Loss:
    return partial(ldam, class_counts=class_counts, max_m=max_m, s=s)


def _logit_adjusted(class_counts: torch.Tensor, *, tau: float = 1.0) -> Loss:
    return partial(logit_adjusted, class_counts=class_counts, tau=tau)


def _dice(class_counts: torch.Tensor, *, smooth: float = 1.0) -> Loss:
    return partial(dice, smooth=smooth)


#: Name -> what makes the loss from the class counts of the training set and options.
LOSSES: dict[str, Callable[..., Loss]] = {
    "cross-entropy": lambda class_counts: cross_entropy,
    "weighted": _weighted,
    "class-balanced": _class_balanced,
    "focal": _focal,
    "bce": lambda class_counts: binary_cross_entropy,
    "dice": _dice,
    "ldam": _ldam,
    "logit-adjusted": _logit_adjusted,
}


def make_loss(name: str, class_counts: torch.Tensor | np.ndarray | Sequence[int]) -> Loss:
    """A loss by name, with options behind a colon: ``"focal"``, ``"focal:gamma=1.5"``, ``"ldam:max_m=0.3,s=10"``.

    Parameters
    ----------
    name
        One of :data:`LOSSES`; ``"focal:alpha=0.2+0.8"`` gives one value per class.
    class_counts
        [K] rows of each class in the training set.

    Returns
    -------
    callable
        Takes logits [N, K] and targets [N], returns ``(total, weight)``.

    Raises
    ------
    UnsupportedError
        No such loss or option, or a class without any row.
    """
    kind, _, text = name.partition(":")
    if kind not in LOSSES:
        raise UnsupportedError(f"no loss named {kind!r}; there are {', '.join(LOSSES)}")
    known = [key for key in inspect.signature(LOSSES[kind]).parameters if key != "class_counts"]
    options: dict[str, float | list[float]] = {}
    for entry in filter(None, text.split(",")):
        key, _, value = entry.partition("=")
        if key not in known:
            there = f"has {', '.join(known)}" if known else "has no options"
            raise UnsupportedError(f"loss {name!r}: no option {key!r}; {kind} {there}")
        try:
            numbers = [float(number) for number in value.split("+")]
        except ValueError:
            raise UnsupportedError(f"loss {name!r}: {key} needs a number, not {value!r}") from None
        options[key] = numbers if len(numbers) > 1 else numbers[0]
        if len(numbers) > 1 and key != "alpha":
            raise UnsupportedError(f"loss {name!r}: {key} takes one number")
    counts = torch.as_tensor(class_counts)
    if counts.numel() == 0 or int(counts.min()) < 1:
        raise UnsupportedError(f"loss {name!r}: every class needs a row in the training set (counts {counts.tolist()})")
    return LOSSES[kind](counts, **options)


def logit_scale(loss: Loss) -> float:
    """By how much a model trained with a loss has to multiply its logits for their softmax to mean what was learned."""
    return float(loss.keywords["s"]) if isinstance(loss, partial) and loss.func is ldam else 1.0


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _asked(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows asked for: what stands in the others, NaN included, touches neither the loss nor its gradient."""
    rows = (targets != IGNORED).nonzero().squeeze(1)
    return _wide(logits[rows]), targets[rows]


def _count(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.full((), float(len(targets)), dtype=logits.dtype, device=logits.device)
