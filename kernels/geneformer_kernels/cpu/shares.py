"""Cells handed to threads on the CPU, each of which computes whole cells by itself.

Torch's own way, every product on all threads, leaves each of them little to do between two points where all have to
meet, and what is no product (compiled loops, copies) on one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")


def in_shares(task: Callable[[list[Item]], None], items: Sequence[Item], cost: Callable[[Item], float]) -> None:
    """Call ``task`` on a share of the items per torch thread, all at once; largest items first within a share.

    The task computes on one thread, without gradients and autocast, and must not depend on how items are shared.
    """
    n_shares = max(1, min(torch.get_num_threads(), len(items)))
    shares: list[list[Item]] = [[] for _ in range(n_shares)]
    costs = [0.0] * n_shares
    for item in sorted(items, key=cost, reverse=True):
        i_share = costs.index(min(costs))
        shares[i_share].append(item)
        costs[i_share] += cost(item)

    def compute(share: list[Item]) -> None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            task(share)

    if n_shares == 1:
        compute(shares[0])
    else:
        list(_pool(torch.get_num_threads(), os.getpid()).map(compute, shares))


def in_pieces(task: Callable[[int, int], None], n_rows: int, *, whole: int = 32) -> None:
    """``task(start, stop)`` for all rows, a piece per torch thread, all at once; pieces are whole times ``whole`` rows.

    As in :func:`in_shares`, of tasks that are none of torch's: one piece alone is computed here, as things are set.
    """
    n_wholes = -(-n_rows // whole)
    step = max(1, -(-n_wholes // torch.get_num_threads())) * whole
    pieces = [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]

    def compute(share: list[tuple[int, int]]) -> None:
        for piece in share:
            task(*piece)

    if len(pieces) == 1:
        # What in_shares sets and sets back takes as long as the product of some hundred rows of width 256.
        task(0, n_rows)
    elif pieces:
        in_shares(compute, pieces, lambda piece: piece[1] - piece[0])


@functools.cache
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:
    """Threads in which torch computes on one thread only; here it goes on with as many as before.

    A forked process has none of its parent's threads, so that it gets a pool of its own.
    """
    all_begun = Barrier(n_threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first question to torch sets its number to the process's; now it is over
        torch.set_num_threads(1)
        all_begun.wait()

    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="geneformer_kernels", initializer=begin)
    # An initializer runs when a thread gets its first work.
    for _ in range(n_threads):
        pool.submit(int)
    all_begun.wait()
    torch.set_num_threads(n_threads)
    return pool
