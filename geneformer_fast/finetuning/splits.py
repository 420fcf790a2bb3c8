"""Training, evaluation and test cells: stratified, and by donor if asked, so that nothing is in two of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geneformer_fast.errors import InputError, UnsupportedError
from geneformer_fast.finetuning.groups import deal, nearest_set

#: Names of the parts, as people say them.
PARTS = {"train": "training", "eval": "evaluation", "test": "test"}
# A share that whole donors miss by more than this much of it is worth a word.
_FAR = 0.5
_MOST_SHOWN = 20  # classes in a report


@dataclass(frozen=True)
class Split:
    """Positions of cells (or genes) to learn from, to choose the best epoch by, and to report on; int64, ascending."""

    train: np.ndarray
    eval: np.ndarray
    test: np.ndarray


def folds(
    codes: np.ndarray,
    names: Sequence[str],
    n_folds: int,
    *,
    groups: np.ndarray | None = None,
    eval_share: float = 0.1,
    seed: int = 0,
    of: str = "cells",
) -> list[Split]:
    """Every cell is in the test set of one fold; what is left of a fold is divided into training and evaluation.

    Parameters
    ----------
    codes
        [n] classes, 0 to K - 1.
    names
        [K] names of the classes, for messages.
    n_folds
        At least 2.
    groups
        [n] donors, or whatever must stay together; None lets cells go alone.
    eval_share
        Share of the cells outside the test set that choose the best epoch; 0 for none.
    seed
        Of the shuffling, and of the choice among about equally good ways to deal groups.
    of
        What is split, for messages: ``"cells"`` or ``"genes"``.

    Returns
    -------
    list of Split
        By scikit-learn's ``StratifiedKFold``, or by :func:`~geneformer_fast.finetuning.groups.deal`.

    Raises
    ------
    InputError
        One class only; a class with fewer cells than folds, or in one donor only; fewer donors than folds.
    UnsupportedError
        No such number of folds, or share.
    """
    if n_folds < 2:
        raise UnsupportedError(f"{n_folds} folds are no cross-validation; take 2 or more")
    _check_shares(eval_share, 0)
    check_classes(codes, names, least=n_folds, groups=groups, of=of, why=f"{n_folds} folds")
    if groups is None:
        from sklearn.model_selection import StratifiedKFold

        splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
        outer = list(splitter.split(np.zeros(len(codes)), codes))
    else:
        counts, of_cell = _table(codes, groups)
        places = deal(counts, n_folds, np.random.default_rng((seed, 2)))
        if places is None:
            raise InputError(_no_way(counts, codes, names, groups, n_folds))
        outer = [
            (np.flatnonzero(places[of_cell] != fold), np.flatnonzero(places[of_cell] == fold))
            for fold in range(n_folds)
        ]
    made = []
    for rest, test in outer:
        train, evaluation = _share(codes, groups, rest, eval_share * len(rest), seed)
        made.append(Split(train, evaluation, np.sort(test)))
    _warn_of(made, eval_share=eval_share, test_share=0, groups=groups, of=of)
    return made


def hold_out(
    codes: np.ndarray,
    names: Sequence[str],
    *,
    groups: np.ndarray | None = None,
    eval_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    of: str = "cells",
) -> Split:
    """One division into training, evaluation and test cells; shares of all cells, 0 for none.

    With groups the shares are met as nearly as whole donors allow: the seed takes one of the sets of donors that are
    about as near (see :func:`~geneformer_fast.finetuning.groups.nearest_set`).

    Raises
    ------
    InputError
        One class only; a class with fewer cells than there are parts, or in one donor only; fewer donors than parts.
    UnsupportedError
        The shares are no shares.
    """
    _check_shares(eval_share, test_share)
    n_parts = 1 + (eval_share > 0) + (test_share > 0)
    asked = [name for name, share in (("evaluation", eval_share), ("test", test_share)) if share > 0]
    why = " and ".join(["training", *asked]) if len(asked) < 2 else "training, evaluation and test"
    check_classes(codes, names, least=n_parts, groups=groups, of=of, why=why)
    everything = np.arange(len(codes))
    n = len(codes)
    rest, test = _share(codes, groups, everything, test_share * n, seed, leaves_one=eval_share > 0)
    train, evaluation = _share(codes, groups, rest, eval_share * n, seed)
    split = Split(train, evaluation, test)
    _warn_of([split], eval_share=eval_share, test_share=test_share, groups=groups, of=of)
    return split


def share_for_testing(asked: float | None, n_folds: int, otherwise: float) -> float:
    """The share of a single test set, which there is without folds only.

    Raises
    ------
    UnsupportedError
        It is asked for beside folds.
    """
    if asked is not None and n_folds:
        raise UnsupportedError(
            f"with {n_folds} folds everything is tested once, so that there is no test_share (--test-share) to choose; "
            "leave it out, or take 0 folds"
        )
    return otherwise if asked is None else asked


def numbers_of(
    split: Split, codes: np.ndarray, names: Sequence[str], groups: np.ndarray | None = None, of: str = "cells"
) -> dict[str, dict[str, Any]]:
    """What is in every part of a split, for the record.

    Returns
    -------
    dict
        Part (``"train"``, ``"eval"``, ``"test"``) to ``cells`` (or ``genes``), their ``share`` of all, ``groups`` (how
        many; None where cells go alone) and ``classes``, name to number.
    """
    total = sum(len(part) for part in vars(split).values())
    found = {}
    for name, part in vars(split).items():
        counts = np.bincount(codes[part], minlength=len(names))
        found[name] = {
            of: len(part),
            "share": round(len(part) / max(1, total), 6),
            "groups": None if groups is None else len(np.unique(groups[part])),
            "classes": {str(label): int(count) for label, count in zip(names, counts, strict=True) if count},
        }
    return found


def told(name: str, numbers: Mapping[str, Mapping[str, Any]], of: str = "cells") -> str:
    """What is in every part of a split, to be read: two lines."""
    parts = []
    for key, part in numbers.items():
        donors = "" if part["groups"] is None else f" of {part['groups']} group{'s' if part['groups'] != 1 else ''}"
        parts.append(f"{PARTS[key]} {part[of]:,} {of} ({part['share']:.1%}){donors if part[of] else ''}")
    labels = list(dict.fromkeys(label for part in numbers.values() for label in part["classes"]))
    counts = [
        f"{label} " + "/".join(f"{part['classes'].get(label, 0):,}" for part in numbers.values())
        for label in labels[:_MOST_SHOWN]
    ]
    more = f", and {len(labels) - _MOST_SHOWN} more classes" if len(labels) > _MOST_SHOWN else ""
    return f"{name}: {'; '.join(parts)}\n  {', '.join(counts)}{more}"


def check_classes(
    codes: np.ndarray, names: Sequence[str], *, least: int, groups: np.ndarray | None, of: str, why: str
) -> None:
    """Refuse what cannot be split so that every class is on every side.

    Raises
    ------
    InputError
        Names the class and its count, or its donor.
    """
    present = np.unique(codes)
    if len(present) < 2:
        named = f" ({names[int(present[0])]!r})" if len(present) else ""
        raise InputError(f"{len(codes):,} {of} of one class only{named}: there is nothing to tell apart")
    counts = {str(names[int(code)]): int((codes == code).sum()) for code in present}
    few = {name: count for name, count in counts.items() if count < least}
    fewer = ", or take fewer folds" if "folds" in why else ""
    if few:
        shown = _some([f"{name} ({count})" for name, count in sorted(few.items())])
        leave = "min_cells" if of == "cells" else "the classes file"
        raise InputError(
            f"{why} need {least} {of} of every class, but there are fewer of {shown}; leave these classes out "
            f"({leave}){fewer}"
        )
    if groups is None or least < 2:
        return
    there = np.unique(groups)
    if len(there) < least:
        number = f"is one ({there[0]})" if len(there) == 1 else f"are {len(there)}"
        advice = ["take no group column"]
        if fewer and len(there) > 1:
            advice.insert(0, "take fewer folds")
        elif not fewer and len(there) > 1:
            advice.insert(0, "leave the evaluation out (an eval_share of 0)")
        raise InputError(
            f"{why} need {least} groups, but there {number}, and {of} of one group are never on two sides; "
            f"{', or '.join(advice)}"
        )
    alone = {str(names[int(code)]): found[0] for code in present if len(found := np.unique(groups[codes == code])) < 2}
    if alone:
        shown = _some([f"{name} ({group})" for name, group in alone.items()])
        raise InputError(
            f"all {of} of {_some(list(alone))} come from one group, which cannot be in training and test at once: "
            f"{shown}; leave these classes out, or take no group column"
        )


def _some(shown: Sequence[str]) -> str:
    """The first of many, for a message that can be read."""
    more = f" and {len(shown) - _MOST_SHOWN:,} more" if len(shown) > _MOST_SHOWN else ""
    return ", ".join(shown[:_MOST_SHOWN]) + more


def _check_shares(eval_share: float, test_share: float) -> None:
    for name, share in (("eval_share", eval_share), ("test_share", test_share)):
        if not 0 <= share < 1:  # also what is no number
            raise UnsupportedError(f"{name} must be from 0 (none) to below 1, not {share}")
    if eval_share + test_share >= 1:
        raise UnsupportedError(f"shares of {eval_share} and {test_share} leave nothing to learn from")


def _table(codes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([G, K] members of every class in every group, [n] the group of each)."""
    there, of_cell = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(there), int(codes.max()) + 1), dtype=np.int64)
    np.add.at(counts, (of_cell, codes), 1)
    return counts, of_cell


def _share(
    codes: np.ndarray,
    groups: np.ndarray | None,
    within: np.ndarray,
    target: float,
    seed: int,
    *,
    leaves_one: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(the rest, about so many) of some positions; the rest keeps every class."""
    nothing = np.zeros(0, dtype=np.int64)
    if target <= 0:
        return np.sort(within), nothing
    if groups is None:
        return _stratified_share(codes, within, target / len(within), seed)
    counts, of_cell = _table(codes[within], groups[within])
    chosen = nearest_set(counts, target, np.random.default_rng((seed, 3)), leaves_one=leaves_one)
    if chosen is None:  # no donor can be spared
        return np.sort(within), nothing
    return np.sort(within[~chosen[of_cell]]), np.sort(within[chosen[of_cell]])


def _warn_of(
    splits: Sequence[Split], *, eval_share: float, test_share: float, groups: np.ndarray | None, of: str
) -> None:
    """Say where whole groups did not allow what was asked for."""
    if groups is None:
        return
    if eval_share > 0 and (empty := sum(not len(split.eval) for split in splits)):
        where = f"in {empty} of {len(splits)} folds" if len(splits) > 1 else "here"
        warnings.warn(
            f"{where} no group can be spared for evaluation without a class missing from training; the last epoch's "
            "model is kept there, not the best one's",
            stacklevel=3,
        )
    share = len(splits[0].test) / max(1, len(groups))
    if test_share > 0 and abs(share - test_share) > _FAR * test_share:
        warnings.warn(
            f"{share:.1%} of the {of} are for testing, not {test_share:.1%}: no other set of whole groups is nearer "
            "that leaves every class to learn from",
            stacklevel=3,
        )


def _no_way(counts: np.ndarray, codes: np.ndarray, names: Sequence[str], groups: np.ndarray, n_folds: int) -> str:
    """Why groups cannot be dealt: the classes of the fewest groups, and where they are."""
    n_owners = (counts > 0).sum(0)
    rarest = [code for code in np.argsort(n_owners, kind="stable") if n_owners[code]][:3]
    shown = "; ".join(
        f"{names[int(code)]} is in {', '.join(map(str, np.unique(groups[codes == code])[:5]))} only" for code in rarest
    )
    return (
        f"no way was found to deal {len(counts)} groups into {n_folds} folds with every class in every training set "
        f"({shown}); take another number of folds, or leave rare classes out (min_cells)"
    )


def _stratified_share(codes: np.ndarray, within: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A share of every class, at least one of those that have two or more, never the last one.

    scikit-learn's ``StratifiedShuffleSplit`` leaves rare classes out of a small share, and fails when it is smaller
    than the number of classes.
    """
    rng = np.random.default_rng((seed, 1))
    taken = []
    for code in np.unique(codes[within]):
        members = within[codes[within] == code]
        size = min(max(1, round(share * len(members))), len(members) - 1)
        taken.append(rng.choice(members, size, replace=False))
    chosen = np.sort(np.concatenate(taken))
    return np.setdiff1d(within, chosen), chosen
