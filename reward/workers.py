"""Worker processes that end with their parent, and their results in the order of the calls."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def workers(processes: int | None = None) -> Iterator[Executor]:
    """A pool of processes, one a core unless told otherwise, that is gone after an error or Ctrl-C."""
    # Not forked: the parent may hold threads and locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes or cores(), context, initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # when interrupted, waits only for what runs


def in_order(
    pool: Executor, function: Callable[..., _Result], calls: Iterable[tuple[Any, ...]]
) -> Iterator[_Result]:
    """The results, with few calls under way: neither calls nor results pile up in memory."""
    waiting: deque[Future[_Result]] = deque()
    for arguments in calls:
        waiting.append(pool.submit(function, *arguments))
        if len(waiting) > 2 * cores():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker() -> None:
    """Makes a worker end with its parent, however that ends, and quietly."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # rensa would start a thread a core in each worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent shuts down
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    from multiprocessing import connection, parent_process

    if parent := parent_process():
        connection.wait([parent.sentinel])
        os._exit(1)
