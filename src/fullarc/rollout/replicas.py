"""Several engines with the same weights, used as one (data parallelism of rollouts and of `fullarc serve`).

Which engine answers changes nothing but the time: what a request gets depends on its tokens, its seed and the weights.
A session stays with one engine, where its prefix is cached; other requests go to the engine with the fewest in flight.
Information is the first engine's. Groups that broadcast weights have a rank per engine, so each must join by itself.

Invariant: what changes an engine (weights, pause) is sent to all of them and has happened to all when it returns; the
answer is that of one that refused, if any did.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx

from fullarc.chat.openai import BadRequest
from fullarc.rollout.engine_client import ROUTING_HEADER, SESSION_HEADER, Completion, EngineClient, Sampling

# answered by one engine, all else that is not GET by all
ONE = frozenset(
    ("/generate", "/inference/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages",
     "/v1/messages/count_tokens", "/v1/score", "/v1/embeddings", "/encode", "/tokenize", "/v1/tokenize", "/detokenize",
     "/v1/detokenize", "/parse_function_call", "/separate_reasoning", "/get_weights_by_name")
)  # fmt: skip
ALL = frozenset(("/flush_cache", "/health_generate", "/ready", "/ping", "/liveness"))  # by all, even as GET
JOINS = frozenset(
    ("/init_weights_update_group", "/areal_init_weights_update_group", "/init_weight_transfer_engine",
     "/init_broadcaster")
)  # fmt: skip


class Replicas(EngineClient):
    """A client of all engines at `urls`; the arguments are those of `EngineClient`."""

    def __init__(self, urls: Sequence[str], timeout_s: float = 600.0, retries: int = 5) -> None:
        self.url = ", ".join(urls)
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

    @asynccontextmanager
    async def open(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], content: AsyncIterator[bytes] | None
    ) -> AsyncIterator[httpx.Response]:
        """See `EngineClient.open`; a body that all get is held in memory."""
        bare = path.partition("?")[0]
        if bare in JOINS:
            raise BadRequest(f"{bare} is for one engine, and these are {len(self.engines)}: GET /workers.")
        if bare in ONE:
            said = httpx.Headers(headers)
            session = said.get(ROUTING_HEADER) or said.get(SESSION_HEADER)
            with self._one(session) as engine:
                async with engine.open(method, path, headers, content) as response:
                    yield response
        elif method in ("GET", "HEAD") and bare not in ALL:
            async with self.engines[0].open(method, path, headers, content) as response:
                yield response
        else:
            body = None if content is None else [part async for part in content]
            asked = [_whole(engine, method, path, headers, body) for engine in self.engines]
            replies = await asyncio.gather(*asked)
            yield next((reply for reply in replies if not reply.is_success), replies[0])

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


async def _whole(
    engine: EngineClient,
    method: str,
    path: str,
    headers: list[tuple[bytes, bytes]],
    body: list[bytes] | None,
) -> httpx.Response:
    """One engine's answer, complete, as if it still came."""
    async with engine.open(method, path, headers, None if body is None else _parts(body)) as response:
        data = [part async for part in response.aiter_raw()]
    return httpx.Response(response.status_code, headers=response.headers, content=_parts(data))


async def _parts(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
