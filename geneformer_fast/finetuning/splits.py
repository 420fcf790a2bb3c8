"""Training, evaluation and test cells: stratified, and by donor if asked, so that nothing is in two of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geneformer_fast.errors import InputError, UnsupportedError

# A donor goes into one part as a whole, so a class can go missing from the rest; other seeds deal donors differently.
_ATTEMPTS = 20


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
        Of the shuffling.
    of
        What is split, for messages: ``"cells"`` or ``"genes"``.

    Returns
    -------
    list of Split
        By scikit-learn's ``StratifiedKFold`` or ``StratifiedGroupKFold``.

    Raises
    ------
    InputError
        One class only; a class with fewer cells, or donors, than folds; fewer donors than folds.
    """
    if n_folds < 2:
        raise UnsupportedError(f"{n_folds} folds are no cross-validation; take 2 or more")
    check_classes(codes, names, least=n_folds, groups=groups, of=of, why=f"{n_folds} folds")
    for attempt in range(_ATTEMPTS):
        found = list(_outer(codes, n_folds, groups, seed + attempt))
        if all(len(test) and _has_all(codes, codes[train]) for train, test in found):
            return [_with_eval(codes, groups, train, test, eval_share, seed + attempt) for train, test in found]
    assert groups is not None  # without groups, enough cells of every class are enough
    raise InputError(
        f"no way was found to deal {len(np.unique(groups))} donors into {n_folds} folds with every class in every "
        "training set; take fewer folds, or leave rare classes out (min_cells)"
    )


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

    With groups the shares are met as nearly as whole donors allow.

    Raises
    ------
    InputError
        One class only; a class with fewer cells, or donors, than there are parts.
    """
    if min(eval_share, test_share) < 0 or eval_share + test_share >= 1:
        raise UnsupportedError(f"shares of {eval_share} and {test_share} leave nothing to learn from")
    n_parts = 1 + (eval_share > 0) + (test_share > 0)
    check_classes(codes, names, least=n_parts, groups=groups, of=of, why="training, evaluation and test")
    everything = np.arange(len(codes))
    rest, test = _share(codes, groups, everything, test_share, seed)
    train, evaluation = _share(codes, groups, rest, eval_share / (1 - test_share), seed)
    return Split(train, evaluation, test)


def check_classes(
    codes: np.ndarray, names: Sequence[str], *, least: int, groups: np.ndarray | None, of: str, why: str
) -> None:
    """Refuse what cannot be split so that every class is on every side.

    Raises
    ------
    InputError
        Names the class and its count.
    """
    present = np.unique(codes)
    if len(present) < 2:
        named = f" ({names[int(present[0])]!r})" if len(present) else ""
        raise InputError(f"{len(codes):,} {of} of one class only{named}: there is nothing to tell apart")
    counts = {str(names[int(code)]): int((codes == code).sum()) for code in present}
    few = {name: count for name, count in counts.items() if count < least}
    if few:
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(few.items()))
        leave = "min_cells" if of == "cells" else "the classes file"
        raise InputError(
            f"{why} need {least} {of} of every class, but there are fewer of {shown}; leave these classes out "
            f"({leave}), or take fewer folds"
        )
    if groups is None:
        return
    n_groups = len(np.unique(groups))
    if n_groups < least:
        raise InputError(f"{why} need {least} groups, but there are {n_groups}; take fewer folds or no group column")
    alone = [str(names[int(code)]) for code in present if len(np.unique(groups[codes == code])) < 2]
    if alone:
        raise InputError(
            f"all {of} of {', '.join(alone)} come from one group, which cannot be in training and test at once; leave "
            "these classes out, or take no group column"
        )


def _outer(
    codes: np.ndarray, n_folds: int, groups: np.ndarray | None, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    splitter: Any = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        # Of an evaluation share in which a rare class may be absent; what must have every class is checked here.
        warnings.filterwarnings("ignore", "The least populated class in y", UserWarning)
        yield from splitter(n_folds, shuffle=True, random_state=seed).split(np.zeros(len(codes)), codes, groups)


def _with_eval(
    codes: np.ndarray, groups: np.ndarray | None, rest: np.ndarray, test: np.ndarray, share: float, seed: int
) -> Split:
    train, evaluation = _share(codes, groups, rest, share, seed)
    return Split(train, evaluation, np.sort(test))


def _share(
    codes: np.ndarray, groups: np.ndarray | None, within: np.ndarray, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(the rest, a share) of some positions; the rest keeps every class."""
    if share <= 0:
        return np.sort(within), np.zeros(0, dtype=np.int64)
    if groups is None:
        return _stratified_share(codes, within, share, seed)
    # A share of whole donors is one fold of as many as fit, but of no more than there are donors, or cells of the
    # largest class, which scikit-learn refuses.
    most = min(len(np.unique(groups[within])), int(np.unique(codes[within], return_counts=True)[1].max()))
    for attempt in range(_ATTEMPTS):
        for n_parts in range(min(max(2, round(1 / share)), most), 1, -1):
            rest, taken = next(_outer(codes[within], n_parts, groups[within], seed + attempt))
            if len(taken) and _has_all(codes[within], codes[within][rest]):
                return np.sort(within[rest]), np.sort(within[taken])
    # Where no donor can be spared, none is.
    return np.sort(within), np.zeros(0, dtype=np.int64)


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


def _has_all(codes: np.ndarray, part: np.ndarray) -> bool:
    return len(np.unique(part)) == len(np.unique(codes))
