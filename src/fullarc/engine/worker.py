"""The thread that steps the scheduler, and the only way to talk to it.

Invariant: the scheduler is touched by this thread alone. Others hand in functions with `call`, which run between two
steps in order of arrival; a failure of a step ends all requests ("abort") and makes the worker unhealthy, so nobody
waits for ever.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TypeVar

from fullarc.engine.scheduler import Scheduler

T = TypeVar("T")


class Worker:
    """Runs `scheduler` in a daemon thread until `stop`; `after` is called behind every step and every call.

    What a step leaves to be done later is done before a call, so a function finds all as that step has left it.

    Attributes:
        sleep_s: how long to wait between two steps, for tests of what is before the engine; calls do not wait.
        stepped: when the last step ended (monotonic); after `error`, if it failed.
    """

    def __init__(self, scheduler: Scheduler, after: Callable[[], None] = lambda: None) -> None:
        self.scheduler, self.after = scheduler, after
        self.error: BaseException | None = None
        self.busy_s = self.sleep_s = 0.0
        self.stepped = 0.0
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step."""
        self._calls.put(None)
        self._thread.join()

    @property
    def healthy(self) -> bool:
        """Whether the thread lives and no step has failed."""
        return self._thread.is_alive() and self.error is None

    def call(self, function: Callable[[Scheduler], T]) -> "Future[T]":
        """Run `function(scheduler)` between two steps; its result or exception arrives in the future."""
        future: Future[T] = Future()
        self._calls.put(partial(_answer, future, partial(function, self.scheduler)))
        return future

    def _run(self) -> None:
        while True:
            while self.scheduler.idle or not self._calls.empty() or self._early_s() > 0:
                with suppress(queue.Empty):
                    call = self._calls.get(timeout=None if self.scheduler.idle else self._early_s())
                    if call is None:
                        return
                    self._step(self.scheduler.settle)
                    call()
                    self.after()
            begin = time.monotonic()
            self._step(self.scheduler.step)
            self.stepped = time.monotonic()
            self.busy_s += self.stepped - begin
            self.scheduler.behind.later(self.after)
            if self.scheduler.idle:
                self._step(self.scheduler.settle)

    def _early_s(self) -> float:
        """How long it is until the next step may begin."""
        return max(self.stepped + self.sleep_s - time.monotonic(), 0.0) if self.sleep_s else 0.0

    def _step(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  (reported by /health; every request still gets its end)
            self.error = error
            self.scheduler.fail()


def _answer(future: "Future[T]", function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # noqa: BLE001  (handed to the caller, not swallowed)
        future.set_exception(error)
        del future  # the error knows this frame, and would keep itself
