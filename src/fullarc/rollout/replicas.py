"""Several engines with the same weights, used as one (data parallelism of the rollouts).

Which engine answers changes nothing but the time: what a request gets depends on its tokens, its seed and the weights.
A session stays with one engine, where its prefix is cached; other requests go to the engine with the fewest in flight.
Invariant: what changes an engine (weights, pause) is sent to all of them and has happened to all when it returns.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fullarc.rollout.engine_client import Completion, EngineClient, Sampling


class Replicas(EngineClient):
    """A client of all engines at `urls`; the arguments are those of `EngineClient`."""

    def __init__(self, urls: Sequence[str], timeout_s: float = 600.0, retries: int = 5) -> None:
        self.engines = [EngineClient(url, timeout_s, retries) for url in urls]
        self._in_flight = [0] * len(urls)

    async def close(self) -> None:
        """Close the connections to all."""
        await asyncio.gather(*(engine.close() for engine in self.engines))

    async def stream(
        self, ids: Sequence[int], sampling: Sampling, session: str | None = None
    ) -> AsyncIterator[Completion]:
        """See `EngineClient.stream`."""
        with self._one(session) as engine:
            async for completion in engine.stream(ids, sampling, session):
                yield completion

    async def health(self) -> bool:
        """True when all are healthy."""
        return all(await asyncio.gather(*(engine.health() for engine in self.engines)))

    async def _send(self, method: str, path: str, body: dict[str, Any] | None, session: str | None) -> Any:
        if path == "/generate":
            with self._one(session) as engine:
                return await engine._send(method, path, body, session)
        replies = await asyncio.gather(*(e._send(method, path, body, session) for e in self.engines))
        refused = (r for r in replies if isinstance(r, dict) and r.get("success") is False)
        return next(refused, replies[0])

    @contextmanager
    def _one(self, session: str | None) -> Iterator[EngineClient]:
        count = len(self.engines)
        if session is None:
            chosen = min(range(count), key=self._in_flight.__getitem__)
        else:
            chosen = zlib.crc32(session.encode()) % count
        self._in_flight[chosen] += 1
        try:
            yield self.engines[chosen]
        finally:
            self._in_flight[chosen] -= 1
