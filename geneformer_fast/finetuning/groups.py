"""Whole groups (donors, say) dealt into parts, so that shares are met as nearly as they allow and no class is lost.

Of few groups every way is looked at, of many a good number of ways that a search from random beginnings comes to. Of
those that are about equally good the seed takes one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

#: Of so many groups every set is looked at: 65,536 of them.
MOST_SETS = 16
#: So many ways to deal groups into folds are looked at one by one, if no more than as many numbers come of them: that
#: also bounds the groups, and so how deep :func:`_partitions` goes.
MOST_DEALS, _MOST_NUMBERS = 20_000, 20_000_000
# A set may miss the share that was asked for by so much of it more than the nearest one does, where it then has a class
# that is absent from the nearest one; and by so much for the seed to have a choice.
_FOR_A_CLASS, _FOR_A_CHOICE = 0.5, 0.1
# Folds may be uneven by so much (the square of a relative deviation, for every fold) more than the most even ones.
_FOR_ANOTHER_DEAL = 0.01
_BEGINNINGS = 64
_MOST_NODES = 100_000  # of the search that shows that there is no way


def nearest_set(
    counts: np.ndarray, target: float, rng: np.random.Generator, *, leaves_one: bool = False
) -> np.ndarray | None:
    """The groups that hold about so many members and leave every class to the others.

    Parameters
    ----------
    counts
        [G, K] members of every class in every group.
    target
        How many members the set should have.
    rng
        Takes one of the sets that are about equally near.
    leaves_one
        Whether a further group should be left that the others can spare too, where that can be.

    Returns
    -------
    numpy.ndarray or None
        [G] bool, at least one group; None where every group holds the only members of some class.
    """
    counts = counts[:, counts.any(0)]
    if not len(counts):
        return None
    sets = _all_sets(counts) if len(counts) <= MOST_SETS else _good_sets(counts, target, rng)
    has = counts > 0
    n_left = has.sum(0) - sets @ has.astype(np.int64)
    sets, n_left = sets[(n_left > 0).all(1)], n_left[(n_left > 0).all(1)]
    if not len(sets):
        return None
    if leaves_one:
        is_sparing = _can_spare(sets, n_left, has)
        if is_sparing.any():
            sets, n_left = sets[is_sparing], n_left[is_sparing]
    distance = np.abs(sets @ counts.sum(1) - target)
    n_classes = (n_left < has.sum(0)).sum(1)
    is_good = distance <= distance.min() + _FOR_A_CLASS * target
    is_good &= n_classes == n_classes[is_good].max()
    is_good &= distance <= distance[is_good].min() + _FOR_A_CHOICE * target
    return sets[rng.choice(np.flatnonzero(is_good))]


def deal(counts: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray | None:
    """A fold for every group: folds of about equal size and mixture, and every class in two folds at least.

    Parameters
    ----------
    counts
        [G, K] members of every class in every group.
    n_folds
        2 or more.
    rng
        Takes one of the ways that are about equally even.

    Returns
    -------
    numpy.ndarray or None
        [G] int64 from 0; None where there is no way, or (of many groups) none was found.
    """
    counts = counts[:, counts.any(0)]
    if len(counts) < n_folds:
        return None
    if n_folds == len(counts):  # one group after another, of which there may be thousands
        found = np.arange(n_folds)[None]
    elif _n_numbers(counts, n_folds) <= _MOST_NUMBERS:
        found = np.array(list(_partitions(len(counts), n_folds)))
    else:
        found = _good_deals(counts, n_folds, rng)
    has = (counts > 0).astype(np.int64)
    is_in = found[:, None] == np.arange(n_folds)[:, None]  # [ways, folds, G]
    n_left = has.sum(0) - is_in @ has  # [ways, folds, K] groups of a class outside of a fold
    is_whole = (n_left > 0).all((1, 2)) & is_in.any(2).all(1)
    if not is_whole.any():
        return None
    found, is_in, n_left = found[is_whole], is_in[is_whole], n_left[is_whole]
    n_stuck = (~_can_spare(is_in, n_left, has)).sum(1)
    cost = _unevenness(is_in, counts)
    is_good = n_stuck == n_stuck.min()  # where training can spare a group for evaluation, it should
    is_good &= cost <= cost[is_good].min() + _FOR_ANOTHER_DEAL * n_folds
    return rng.permutation(n_folds)[found[rng.choice(np.flatnonzero(is_good))]]


def _can_spare(sets: np.ndarray, n_left: np.ndarray, has: np.ndarray) -> np.ndarray:
    """[...] whether among the groups outside of every set [..., G] there is one that holds no class alone."""
    is_needed = (n_left == 1).astype(np.int64) @ has.T.astype(np.int64) > 0
    return (~sets & ~is_needed).any(-1)


def _all_sets(counts: np.ndarray) -> np.ndarray:
    """[2^G - 2, G] every set but the empty one and that of all."""
    numbers = np.arange(1, 2 ** len(counts) - 1)
    return (numbers[:, None] >> np.arange(len(counts)) & 1).astype(bool)


def _good_sets(counts: np.ndarray, target: float, rng: np.random.Generator) -> np.ndarray:
    """[n, G] sets near a size: every group alone, and what beginnings in random order lead to."""
    n_groups = len(counts)
    n_beginnings = max(8, min(_BEGINNINGS, 20_000 // n_groups))
    found = [_grown(counts, target, rng, is_covering=bool(number % 2)) for number in range(n_beginnings)]
    alone = np.eye(n_groups, dtype=bool)[np.argsort(np.abs(counts.sum(1) - target))[:_BEGINNINGS]]
    return np.unique(np.concatenate([np.array(found), alone]), axis=0)


def _grown(counts: np.ndarray, target: float, rng: np.random.Generator, *, is_covering: bool) -> np.ndarray:
    """One set: groups in random order (those with a class that it lacks first, if asked), then exchanges."""
    has, sizes = counts > 0, counts.sum(1)
    chosen = np.zeros(len(counts), dtype=bool)
    n_left, total = has.sum(0), 0

    def take(group: int) -> None:
        nonlocal n_left, total
        chosen[group] = True
        n_left, total = n_left - has[group], total + sizes[group]

    if is_covering:
        n_all = has.sum(0)
        while True:
            gains = has[:, n_left == n_all].sum(1) * (total + sizes <= (1 + _FOR_A_CLASS) * target)
            gains[chosen | has[:, n_left == 1].any(1)] = 0
            if not gains.any():
                break
            take(int(rng.choice(np.flatnonzero(gains == gains.max()))))
    for group in rng.permutation(len(counts)).tolist():
        if (
            not chosen[group]
            and abs(total + sizes[group] - target) < abs(total - target)
            and n_left[has[group]].min() > 1
        ):
            take(group)
    for _ in range(20):
        exchange = _best_exchange(chosen, sizes, n_left, has, target - total)
        if exchange is None:
            break
        gone, new = exchange
        chosen[[gone, new]] = False, True
        n_left, total = n_left + has[gone].astype(int) - has[new], total - sizes[gone] + sizes[new]
    return chosen


def _best_exchange(
    chosen: np.ndarray, sizes: np.ndarray, n_left: np.ndarray, has: np.ndarray, missing: float
) -> tuple[int, int] | None:
    """A group of the set and one outside whose exchange brings it nearer; None where nothing much would change."""
    inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    # Of very many groups the sums are as good as exact already, and their pairs too many.
    if not len(inside) or not len(outside) or len(inside) * len(outside) > 1_000_000:
        return None
    distance = np.abs(missing - (sizes[outside] - sizes[inside][:, None]))
    for place in np.argsort(distance, axis=None)[:32]:
        row, column = np.unravel_index(place, distance.shape)
        if distance[row, column] >= abs(missing):
            return None
        gone, new = int(inside[row]), int(outside[column])
        if (n_left + has[gone] - has[new] > 0).all():
            return gone, new
    return None


def _n_numbers(counts: np.ndarray, n_folds: int) -> int:
    """How many numbers come of looking at every way to deal groups into folds; more than can be, of too many ways."""
    n_ways = _stirling(len(counts), n_folds)
    return n_ways * n_folds * max(counts.shape) if n_ways <= MOST_DEALS else _MOST_NUMBERS + 1


def _stirling(n: int, k: int) -> int:
    """In how many ways n groups go into k folds, none empty (Stirling numbers of the second kind); at most 10^18."""
    ways = [1] + [0] * k
    for _ in range(n):
        ways = [0, *(min(10**18, j * ways[j] + ways[j - 1]) for j in range(1, k + 1))]
    return ways[k]


def _partitions(n: int, k: int) -> Iterator[list[int]]:
    """Every way to put n groups into k folds, none empty; folds are numbered as they first occur."""
    places = [0] * n

    def put(position: int, n_used: int) -> Iterator[list[int]]:
        if n - position < k - n_used:
            return
        if position == n:
            yield places.copy()
            return
        for fold in range(min(n_used + 1, k)):
            places[position] = fold
            yield from put(position + 1, max(n_used, fold + 1))

    yield from put(0, 0)


def _unevenness(is_in: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[ways] squared relative deviations of the folds' sizes, plus those of their classes, of which the mean counts."""
    return (np.square(is_in @ _weighed(counts, is_in.shape[1]) - _mean_of(counts))).sum((1, 2))


def _weighed(counts: np.ndarray, n_folds: int) -> np.ndarray:
    """[G, 1 + K] size and classes of every group, in units of what one fold should have of them."""
    n_classes = counts.shape[1]
    sizes = counts.sum(1, keepdims=True) / counts.sum()
    return n_folds * np.concatenate([sizes, counts / counts.sum(0) / np.sqrt(n_classes)], axis=1)


def _mean_of(counts: np.ndarray) -> np.ndarray:
    return np.r_[1.0, np.full(counts.shape[1], counts.shape[1] ** -0.5)]


def _good_deals(counts: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """[n, G] folds that no move or exchange makes better; from one that is shown to exist where luck finds none."""
    n_beginnings = max(4, min(_BEGINNINGS, 4_000 // len(counts)))
    found = [_dealt(counts, n_folds, rng) for _ in range(n_beginnings)]
    has = (counts > 0).astype(np.int64)
    is_whole = [_n_lost(places, has, n_folds) == 0 for places in found]
    if not any(is_whole) and (places := _some_deal(has, n_folds)) is not None:
        found.append(_settled(places, counts, n_folds))
    return np.unique(np.array(found), axis=0)


def _dealt(counts: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Large groups first, each to where it does best; then moves and exchanges."""
    weighed, has = _weighed(counts, n_folds), (counts > 0).astype(np.int64)
    norms = (weighed**2).sum(1)
    order = np.argsort(-norms * rng.uniform(0.5, 1.5, len(counts)))
    sums, owners = np.zeros((n_folds, weighed.shape[1])), np.zeros((n_folds, has.shape[1]), dtype=np.int64)
    places, n_owners = np.zeros(len(counts), dtype=np.int64), has.sum(0)
    for position, group in enumerate(order.tolist()):
        cost = 2 * sums @ weighed[group] + rng.uniform(0, 1e-9, n_folds)
        cost += 1e3 * (owners + has[group] == n_owners)[:, has[group] > 0].sum(1)
        is_empty = ~owners.any(1)
        if is_empty.sum() >= len(order) - position:
            cost[~is_empty] = np.inf
        fold = int(cost.argmin())
        places[group] = fold
        sums[fold] += weighed[group]
        owners[fold] += has[group]
    return _settled(places, counts, n_folds)


def _settled(places: np.ndarray, counts: np.ndarray, n_folds: int) -> np.ndarray:
    """Folds after the best moves and exchanges, one after another, until none is left that helps."""
    weighed, has = _weighed(counts, n_folds), (counts > 0).astype(np.int64)
    places, groups = places.copy(), np.arange(len(places))
    gram = weighed @ weighed.T if len(places) <= 500 else None  # of more groups, moves alone are enough
    n_lost = _n_lost(places, has, n_folds)
    for _ in range(200):
        is_in = places == np.arange(n_folds)[:, None]
        near = weighed @ (is_in @ weighed).T  # [G, folds]
        own, norms = near[groups, places], (weighed**2).sum(1)
        moves = 2 * (near - own[:, None] + norms[:, None])
        moves[groups, places] = np.inf
        gains = [moves]
        if gram is not None:
            across = near[:, places]  # [g, h]: group g by the fold of group h
            exchanges = 2 * (across + across.T - own[:, None] - own + norms[:, None] + norms - 2 * gram)
            exchanges[places[:, None] == places] = np.inf
            gains.append(exchanges)
        made = next(_candidates(places, has, gains, n_folds, n_lost), None)
        if made is None:
            break
        places, n_lost = made
    return places


def _candidates(
    places: np.ndarray, has: np.ndarray, gains: list[np.ndarray], n_folds: int, n_lost: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Folds after a move or an exchange that lose fewer classes, or none more and are more even; the best first."""
    flat = np.concatenate([gain.ravel() for gain in gains])
    # Where classes are lost, whatever brings them back is welcome.
    limit = np.inf if n_lost else -1e-12
    order = np.argsort(flat)[: 64 if not n_lost else 512]
    for place in order[flat[order] < limit].tolist():
        changed = places.copy()
        if place < gains[0].size:
            group, fold = divmod(place, n_folds)
            changed[group] = fold
        else:
            one, other = divmod(place - gains[0].size, len(places))
            changed[[one, other]] = places[[other, one]]
        now = _n_lost(changed, has, n_folds)
        if now < n_lost or (now == n_lost and flat[place] < -1e-12):
            yield changed, now


def _n_lost(places: np.ndarray, has: np.ndarray, n_folds: int) -> int:
    """How many folds hold all of a class, or nothing."""
    is_in = (places == np.arange(n_folds)[:, None]).astype(np.int64)
    return int((is_in @ has == has.sum(0)).sum() + (~is_in.any(1)).sum())


def _some_deal(has: np.ndarray, n_folds: int) -> np.ndarray | None:
    """A way to deal groups with every class in two folds at least, by trying all; None if there is none, or too many.

    Groups of the rarest classes go first, and a fold that would get all of a class is left at once.
    """
    n_owners = has.sum(0)
    order = np.argsort([n_owners[row > 0].min() for row in has], kind="stable").tolist()
    owners = np.zeros((n_folds, has.shape[1]), dtype=np.int64)
    places, n_nodes = np.zeros(len(has), dtype=np.int64), 0

    def put(position: int, n_used: int) -> bool:
        nonlocal n_nodes
        n_nodes += 1
        if n_nodes > _MOST_NODES or len(order) - position < n_folds - n_used:
            return False
        if position == len(order):
            return True
        group = order[position]
        for fold in range(min(n_used + 1, n_folds)):
            owners[fold] += has[group]
            places[group] = fold
            if not (owners[fold] == n_owners).any() and put(position + 1, max(n_used, fold + 1)):
                return True
            owners[fold] -= has[group]
        return False

    return places if len(has) <= 500 and put(0, 0) else None
