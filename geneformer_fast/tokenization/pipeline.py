"""Reading, computing and writing at the same time, with bounded memory and results in order."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """The CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Generator[Result]:
    """``map(work, items)``, with the items made in a thread of their own and the work done in ``workers`` threads.

    At most ``workers + 2`` items exist at any time: one being made, one per worker, one being consumed. An exception in
    making an item or in its work surfaces where that item's result was due; leaving the iteration stops all threads.

    Parameters
    ----------
    work
        Called in worker threads; has to release the GIL to gain anything.
    items
        Iterated in the reader's thread.
    workers
        Number of worker threads.
    """
    slots = threading.Semaphore(workers + 2)
    is_stopped = threading.Event()
    results: queue.SimpleQueue[Future[Any] | None] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="rank")

    def read() -> None:
        iterator = iter(items)
        try:
            while True:
                slots.acquire()
                if is_stopped.is_set():
                    return
                try:
                    item = next(iterator)
                except StopIteration:
                    results.put(None)
                    return
                results.put(pool.submit(work, item))
                del item
        except BaseException as error:  # handed over, raised again by the consumer
            failed: Future[Any] = Future()
            failed.set_exception(error)
            results.put(failed)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    reader = threading.Thread(target=read, name="read", daemon=True)
    reader.start()
    try:
        while (future := results.get()) is not None:
            yield future.result()
            slots.release()
    finally:
        is_stopped.set()
        slots.release()
        pool.shutdown(wait=True, cancel_futures=True)
        reader.join()
