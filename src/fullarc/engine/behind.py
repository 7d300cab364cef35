"""What a step leaves to be done, done in a second thread while the next forward pass runs.

Stop strings, prefixes to publish, callbacks into the server: the next forward pass needs none of it, and the pass holds
no lock of Python's while it computes. Without `overlap` everything is done at once.

Invariants: tasks run one at a time and in order, never beside anything but a forward pass; whoever looks at what they
change calls `settle` first; all of them run, and what the first failing one raises is raised where they are waited for.
"""

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
Task = Callable[[], object]
Tasks = list[Task]


class Behind:
    """Tasks of the present step. Used by one thread."""

    def __init__(self, overlap: bool) -> None:
        self.overlap, self._tasks = overlap, Tasks()
        self._todo: SimpleQueue[Tasks | None] = SimpleQueue()
        self._done: SimpleQueue[Exception | None] = SimpleQueue()
        if overlap:
            threading.Thread(target=_work, args=(self._todo, self._done), name="behind", daemon=True).start()
            weakref.finalize(self, self._todo.put, None)

    def later(self, task: Task) -> None:
        """Do `task`, now or soon."""
        if self.overlap:
            self._tasks.append(task)
        else:
            task()

    def settle(self) -> None:
        """Do what is still to be done."""
        tasks, self._tasks = self._tasks, []
        _raise(_run(tasks))

    def during(self, forward: Callable[[], T]) -> T:
        """The result of `forward`, beside which the tasks are done."""
        if not self._tasks:
            return forward()
        self._todo.put(self._tasks)
        self._tasks = []
        try:
            return forward()
        finally:
            _raise(self._done.get())


def _work(todo: "SimpleQueue[Tasks | None]", done: "SimpleQueue[Exception | None]") -> None:
    while (tasks := todo.get()) is not None:
        done.put(_run(tasks))


def _run(tasks: Tasks) -> Exception | None:
    """What the first one that failed has raised."""
    failed: Exception | None = None
    for task in tasks:
        try:
            task()
        except Exception as error:  # noqa: BLE001  (raised by those who wait)
            failed = failed or error
    tasks.clear()  # a thread that waits for the next ones keeps nothing alive
    return failed


def _raise(error: Exception | None) -> None:
    if error:
        raise error
