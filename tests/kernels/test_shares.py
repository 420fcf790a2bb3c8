"""Work handed to threads."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from geneformer_kernels.cpu.shares import in_shares
from geneformer_kernels.target import target_of


@pytest.fixture(params=[1, 2, 3])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_is_someones_and_costs_are_shared(n_threads: int) -> None:
    shares: list[list[int]] = []
    in_shares(shares.append, range(1, 20), float)
    assert sorted(item for share in shares for item in share) == list(range(1, 20))
    assert len(shares) == n_threads
    totals = [sum(share) for share in shares]
    assert max(totals) - min(totals) <= 19
    assert all(share == sorted(share, reverse=True) for share in shares)


def test_each_share_computes_on_one_thread_and_the_caller_goes_on_with_all(n_threads: int) -> None:
    # All of them at once, or one thread could take every share.
    everybody = threading.Barrier(n_threads)
    seen: list[tuple[int, bool, bool]] = []

    def task(items: list[int]) -> None:
        everybody.wait(timeout=60)
        torch.ones(2**16).sum()  # parallel where there are threads
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.autocast("cpu"):
        for _ in range(2):
            in_shares(task, range(n_threads), lambda item: 1)
    assert seen == [(1, False, False)] * 2 * n_threads
    assert torch.get_num_threads() == n_threads


def test_no_more_shares_than_items(n_threads: int) -> None:
    shares: list[list[int]] = []
    in_shares(shares.append, [7], float)
    assert shares == [[7]]


def test_an_error_in_a_share_reaches_the_caller(n_threads: int) -> None:
    def task(items: list[int]) -> None:
        if 2 in items:
            raise ValueError("two")

    with pytest.raises(ValueError, match="two"):
        in_shares(task, range(5), float)


def _share_in_a_child(seen) -> None:
    in_shares(lambda items: seen.put(sorted(items)), [3, 4], float)


def test_a_forked_process_has_threads_of_its_own() -> None:
    """Those of its parent's pool are not there: to wait for them would take for ever."""
    before, forking = torch.get_num_threads(), multiprocessing.get_context("fork")
    torch.set_num_threads(2)
    try:
        in_shares(lambda items: None, [1, 2], float)
        seen = forking.Queue()
        child = forking.Process(target=_share_in_a_child, args=(seen,))
        child.start()
        try:
            assert sorted(seen.get(timeout=20) for _ in range(2)) == [[3], [4]]
        finally:
            child.kill()
            child.join()
    finally:
        torch.set_num_threads(before)


def test_the_target_has_the_threads_of_the_moment(n_threads: int) -> None:
    assert target_of("cpu").n_sms == n_threads
