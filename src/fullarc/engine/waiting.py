"""Requests that have no slot: by priority, then fairly between sessions (`fairness`), then in order of arrival.

A slot costs its request's claim the tokens that it may be needed for, those that are known and those that may still be
sampled; what the request leaves unused, by ending early or by being sent back, is given back.

Invariant: the heap has the present entry of every line. Others may lie in it too, and are passed over.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterator

from fullarc.engine.fairness import Claim, Shares
from fullarc.engine.request import Request

_Entry = tuple[tuple[int, int], int, Claim]
SLACK = 64


class _Line:
    """The requests of one claim. `began`: lines that began to wait earlier have lower numbers."""

    def __init__(self, began: int) -> None:
        self.requests: deque[Request] = deque()
        self.began = began


class Waiting:
    """`bound`: tokens of the longest sequence."""

    def __init__(self, bound: int) -> None:
        self.bound, self.shares = bound, Shares()
        self._lines: dict[Claim, _Line] = {}
        self._heap: list[_Entry] = []
        self._empty: set[Claim] = set()
        self._count, self._numbers = 0, itertools.count()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request]:
        """A snapshot: others may look while the engine's thread changes it."""
        for line in list(self._lines.values()):
            yield from list(line.requests)

    @property
    def priority(self) -> int:
        """Of the next one."""
        return self._next()[0]

    def add(self, request: Request) -> None:
        """At the end of its session's line."""
        self._line(request.claim).requests.append(request)
        self._grown(request.claim)

    def put_back(self, request: Request) -> None:
        """At the front of its session's line."""
        self._line(request.claim).requests.appendleft(request)
        self._grown(request.claim)

    def take(self) -> Request:
        """Remove the next one. Whoever takes some charges them or puts them back, and then calls `tidy`."""
        claim = self._next()
        request = self._lines[claim].requests.popleft()
        self._shrunk(claim)
        return request

    def remove(self, request: Request) -> None:
        """Remove one that waits."""
        self._lines[request.claim].requests.remove(request)
        self._shrunk(request.claim)
        self.tidy()

    def tidy(self) -> None:
        """Sessions with nothing left no longer wait."""
        for claim in self._empty:
            del self._lines[claim]
            self.shares.end(claim)
        self._empty.clear()
        if len(self._heap) > SLACK + 4 * len(self._lines) or not self._lines:
            self._heap = [self._entry(claim) for claim in self._lines]
            heapq.heapify(self._heap)

    def charge(self, request: Request) -> None:
        """A request that was taken gets a slot."""
        request.charged = self._lines[request.claim].began
        self.shares.charge(request.claim, self._cost(request))
        self._note(request.claim)

    def refund(self, request: Request, again: bool) -> None:
        """It has given the slot back, for ever or to wait for another one `again`.

        What was charged to a session that has not waited without a break since then is forgotten, and so is this.
        """
        line = self._lines.get(request.claim)
        if line is None or line.began != request.charged:
            return
        self.shares.refund(request.claim, self._cost(request) - (0 if again else len(request.ids)))
        self._note(request.claim)

    def _cost(self, request: Request) -> int:
        left = min(request.params.max_new_tokens - len(request.logprobs), self.bound - len(request.ids))
        return len(request.ids) + max(left, 0)

    def _line(self, claim: Claim) -> _Line:
        if claim not in self._lines:
            self._lines[claim] = _Line(next(self._numbers))
            self.shares.begin(claim)
        return self._lines[claim]

    def _grown(self, claim: Claim) -> None:
        self._count += 1
        self._empty.discard(claim)
        self._note(claim)

    def _shrunk(self, claim: Claim) -> None:
        self._count -= 1
        if not self._lines[claim].requests:
            self._empty.add(claim)
        self._note(claim)

    def _entry(self, claim: Claim) -> _Entry:
        line = self._lines[claim]
        return self.shares.order(claim, self._cost(line.requests[0])), line.began, claim

    def _note(self, claim: Claim) -> None:
        """Its entry may be another one now."""
        if claim in self._lines and claim not in self._empty:
            heapq.heappush(self._heap, self._entry(claim))

    def _next(self) -> Claim:
        while True:
            entry = self._heap[0]
            claim = entry[-1]
            if claim in self._lines and claim not in self._empty and entry == self._entry(claim):
                return claim
            heapq.heappop(self._heap)
