"""Work done ahead of its use by several threads, in a bounded amount, and used in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")


def in_order(pool: Executor, tasks: Iterable[Callable[[], T]], ahead: int) -> Generator[T, None, None]:
    """The results of the tasks in their order. At most ``ahead`` are under way or waiting to be used.

    What a task raises is raised when its turn comes. Left early, it gives up the tasks that have not begun.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(task))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
