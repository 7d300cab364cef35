"""Several engines with the same weights, used as one (data parallelism of rollouts and of `fullarc serve`).

Which engine answers changes nothing but the time: what a request gets depends on its tokens, its seed and the weights.
A session stays with one engine, where its prefix is cached, also when others come and go; other requests go to the
engine with the fewest in flight. Information is put together (`merged`) or is the first engine's. Groups that broadcast
weights have a rank per engine, so each must join by itself.

Invariants: what changes an engine (weights, pause) is sent to all of them and has happened to all when it returns; the
answer is that of one that refused, if any did. Engines in use have the same weights: where an update that comes over
HTTP succeeds with some and fails with others, those others are taken out, and the answer says so. What is done to
weights, over HTTP or by a method, is done `_in_turn`: one thing after the other, each to its end also when its client
hangs up, and with no engine that has died. An engine is added only if nothing has changed the others since before it
was looked at; no change ever waits for that.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from fullarc.chat.openai import BadRequest, dump
from fullarc.config.seeds import derive
from fullarc.rollout.engine_client import (
    ROUTING_HEADER,
    SESSION_HEADER,
    Completion,
    EngineClient,
    EngineError,
    Sampling,
)
from fullarc.rollout.merged import MERGES, merged, metrics, read_object

T = TypeVar("T")
# answered by one engine, all else that is not GET by all
ONE = frozenset(
    ("/generate", "/inference/v1/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages",
     "/v1/messages/count_tokens", "/v1/score", "/v1/embeddings", "/encode", "/tokenize", "/v1/tokenize", "/detokenize",
     "/v1/detokenize", "/parse_function_call", "/separate_reasoning", "/get_weights_by_name", "/open_session",
     "/close_session", "/v1/chat/completions/tokens", "/generate/", "/chat/", "/get_sequence_logprobs/", "/classify")
)  # fmt: skip
KEYED = frozenset(("/open_session", "/close_session"))  # by one, and the same one for all of the session
ALL = frozenset(
    ("/flush_cache", "/health_generate", "/ready", "/ping", "/liveness", "/health/")
)  # even as GET
METRICS = ("/metrics", "/engine_metrics")
READS = ("GET", "HEAD")
PROBE_S, MAX_ENGINES, TRIES = 10.0, 64, 100
# an engine that is not healthy LOOKS times, LOOK_S apart, will not answer anything else either
LOOK_S, LOOKS = 10.0, 6
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Headers = list[tuple[bytes, bytes]]
UPDATES = frozenset(
    ("/update_weights_from_disk", "/update_weights_from_tensor", "/update_weights_from_ipc", "/end_weight_update",
     "/update_weight_version", "/update_weights", "/finish_weight_update", "/areal_update_weights", "/collective_rpc",
     "/update_weights_from_distributed", "/areal_update_weights_xccl", "/areal_update_weights_lora",
     "/load_lora_adapter", "/v1/load_lora_adapter", "/update_named_param/", "/reset_prefix_cache/")
)  # fmt: skip
# weights too, but who refuses has the weights of the others still
IN_TURN = UPDATES | {
    "/pull_weights",
    "/unload_lora_adapter",
    "/v1/unload_lora_adapter",
    "/weights_checker",
    "/weight_checker",
}
JOINS = frozenset(
    ("/init_weights_update_group", "/areal_init_weights_update_group", "/init_weight_transfer_engine",
     "/init_broadcaster", "/init_communicator/")
)  # fmt: skip


class Replicas(EngineClient):
    """A client of all engines at `urls`; the arguments are those of `EngineClient`."""

    def __init__(self, urls: Sequence[str], timeout_s: float = 600.0, retries: int = 5) -> None:
        self._timeout_s, self.retries = timeout_s, retries
        self._numbers, self._turn, self._joining = itertools.count(), asyncio.Lock(), asyncio.Lock()
        self._changes = self._changing = 0  # begun, and not ended
        self._still = asyncio.Event()  # there is none of these
        self._still.set()
        self.engines: list[EngineClient] = []
        self._in_flight: Counter[EngineClient] = Counter()
        for url in urls:
            self.add(url)

    def add(self, url: str) -> EngineClient:
        """Use the engine at `url` from now on. Its weights must be those of the others."""
        engine = EngineClient(url, self._timeout_s, self.retries)
        engine.name = str(next(self._numbers))
        self._in_flight[engine] = 0
        self.engines.append(engine)
        self.url = ", ".join(engine.url for engine in self.engines)
        return engine

    async def join(self, url: str) -> EngineClient:
        """Use one more engine. Raises BadRequest unless it is one, is new and has the weights of the others."""
        async with self._joining:
            for _ in range(TRIES):
                await self._still.wait()
                before = self._changes
                await self._check_new(url)
                if self._changes == before:
                    return self.add(url)
        raise BadRequest(f"{url} is not added: the others are being changed all the time.", "url", status=503)

    async def _check_new(self, url: str) -> None:
        if _place(url) in (_place(engine.url) for engine in self.engines):
            raise BadRequest(f"{url} is a worker already.", "url")
        if len(self.engines) >= MAX_ENGINES:
            raise BadRequest(f"There are {MAX_ENGINES} workers already.", "url")
        async with EngineClient(url, PROBE_S, retries=0) as probe, self.use(self.engines[:1]) as (other,):
            try:
                theirs = await probe.info()
                ours = await asyncio.wait_for(other.info(), PROBE_S)
                routes = await probe.routes_to_others()
            except EngineError as error:
                raise BadRequest(f"{url} is not added: {error}", "url") from None
            except TimeoutError:
                raise BadRequest(f"{url} is not added: {other.url} does not answer.", "url") from None
        if routes:  # it could be this gateway, or have this one behind it
            raise BadRequest(f"{url} is a gateway: add the engines behind it (GET /list_workers).", "url")
        for told, who in ((theirs, url), (ours, "the others")):
            if told.get("weight_update_open"):
                raise BadRequest(
                    f"{url} is not added: a weight update is open at {who}, end it first.", "url"
                )
        for name in ("weight_version", "vocab_size", "max_model_len", "loaded_adapters"):
            if theirs.get(name) != ours.get(name):
                raise BadRequest(
                    f"{url} has {name} {theirs.get(name)}, the others {ours.get(name)}: make them equal.",
                    "url",
                )

    async def remove(self, engine: EngineClient) -> None:
        """Send it nothing more; what it is doing it ends."""
        self._take_out([engine])
        await self._close_unused([engine])

    def _take_out(self, engines: Sequence[EngineClient]) -> None:
        self.engines[:] = [engine for engine in self.engines if engine not in engines]
        self.url = ", ".join(engine.url for engine in self.engines)

    async def close(self) -> None:
        """Close the connections to all, also to those that were removed."""
        await asyncio.gather(*(engine.close() for engine in self._in_flight))

    async def stream(
        self, ids: Sequence[int], sampling: Sampling, session: str | None = None
    ) -> AsyncIterator[Completion]:
        """See `EngineClient.stream`."""
        async with self.use([self._one(session)]) as (engine,):
            async for completion in engine.stream(ids, sampling, session):
                yield completion

    async def health(self) -> bool:
        """True when all are healthy."""
        async with self.use(self.engines) as engines:
            return all(await asyncio.gather(*(engine.health() for engine in engines)))

    @asynccontextmanager
    async def open(
        self, method: str, path: str, headers: Headers, content: AsyncIterator[bytes] | None
    ) -> AsyncIterator[httpx.Response]:
        """See `EngineClient.open`; a body that all get is held in memory."""
        bare = path.partition("?")[0]
        said = httpx.Headers(headers)
        session = said.get(ROUTING_HEADER) or said.get(SESSION_HEADER)
        if len(self.engines) > 1:
            self._check(bare, session)
        alone, reads = len(self.engines) == 1, method in READS
        some = reads and bare not in ALL and bare not in MERGES
        if bare in METRICS and not (alone and bare == "/metrics"):  # an engine's own page has no labels
            yield await self._metrics(headers)
        elif bare in IN_TURN:
            body = None if content is None else [part async for part in content]
            yield await self._in_turn(self._all(method, path, headers, body))
        elif bare in ONE or alone or some:
            with nullcontext() if bare in ONE or reads else self._change():
                chosen = self._one(session) if bare in ONE else self.engines[0]
                async with self.use([chosen]), chosen.open(method, path, headers, content) as response:
                    yield response
        else:
            body = None if content is None else [part async for part in content]
            with nullcontext() if reads else self._change():
                yield await self._all(method, path, headers, body)

    def _check(self, bare: str, session: str | None) -> None:
        """Raise BadRequest for what only one engine can do."""
        count = len(self.engines)
        if bare in JOINS:
            raise BadRequest(f"{bare} is for one engine, and these are {count}: GET /workers.")
        if bare in KEYED and not session:
            raise BadRequest(
                f"{bare}: a session is one engine's, and these are {count}. "
                f"Name it in {ROUTING_HEADER}, in all requests of the session."
            )

    @contextmanager
    def _change(self) -> Iterator[None]:
        """Inside, engines are being changed."""
        self._changes += 1
        self._changing += 1
        self._still.clear()
        try:
            yield
        finally:
            self._changing -= 1
            if not self._changing:
                self._still.set()

    async def _in_turn(self, change: Coroutine[Any, Any, T]) -> T:
        """A change of weights, behind those that came before it; it ends, also when nobody waits for it any more."""

        async def run() -> T:
            with self._change():
                async with self._turn:
                    return await change

        return await asyncio.shield(asyncio.create_task(run()))

    async def _all(
        self, method: str, path: str, headers: Headers, body: list[bytes] | None
    ) -> httpx.Response:
        """The answer of all engines."""
        bare = path.partition("?")[0]
        async with self.use(self.engines) as engines:
            asked = (_whole(engine, method, path, headers, body) for engine in engines)
            replies = dict(zip(engines, await asyncio.gather(*asked, return_exceptions=True), strict=True))
        good = [r for r in replies.values() if isinstance(r, _Whole) and r.status < 400]
        refusals = {e: r for e, r in replies.items() if not (isinstance(r, _Whole) and r.status < 400)}
        # others may have been removed meanwhile, and one must stay
        stays = any(engine in self.engines for engine in replies.keys() - refusals)
        if refusals and stays and bare in UPDATES:
            return await self._without(refusals, good[0])
        for refusal in refusals.values():
            if isinstance(refusal, BaseException):
                raise refusal
            return refusal.sent()
        if bare in MERGES:
            return replace(good[0], body=merged(bare, [reply.body for reply in good])).sent()
        return good[0].sent()

    async def _without(
        self, refusals: "dict[EngineClient, _Whole | BaseException]", good: "_Whole"
    ) -> httpx.Response:
        """Take engines out that have not the weights of the others, and say so in the answer of one of those."""
        gone = []
        for engine, why in refusals.items():
            said = why.body.decode(errors="replace") if isinstance(why, _Whole) else type(why).__name__
            gone.append({"id": engine.name, "url": engine.url, "said": said[:1000]})
        self._take_out([*refusals])
        await self._close_unused([*refusals])
        told = read_object(good.body) or {"message": good.body.decode(errors="replace")}
        names = ", ".join(one["url"] for one in gone)
        message = f"{told.get('message', '')} Taken out, because the update failed there: {names}.".strip()
        headers = httpx.Headers(good.headers)
        headers["content-type"] = "application/json"
        body = dump(told | {"message": message, "taken_out": gone})
        return replace(good, headers=headers, body=body).sent()

    async def _metrics(self, headers: Headers) -> httpx.Response:
        """The samples of all engines that answer, which engine's they are in a label."""
        async with self.use(self.engines) as engines:
            asked = (_whole(engine, "GET", "/metrics", headers, None) for engine in engines)
            replies = await asyncio.gather(*asked, return_exceptions=True)
        found = {e.url: r for e, r in zip(engines, replies, strict=True) if isinstance(r, _Whole)}
        if not found:
            raise httpx.ConnectError("no engine answers")
        text = metrics({url: reply.body.decode() for url, reply in found.items() if reply.status == 200})
        return replace(next(iter(found.values())), status=200, body=text.encode()).sent()

    async def _send(self, method: str, path: str, body: dict[str, Any] | None, session: str | None) -> Any:
        if path == "/generate":
            async with self.use([self._one(session)]) as (engine,):
                return await engine._send(method, path, body, session)
        sending = self._send_all(method, path, body, session)
        if path in IN_TURN:
            return await self._in_turn(sending)
        with nullcontext() if method in READS else self._change():
            return await sending

    async def _send_all(
        self, method: str, path: str, body: dict[str, Any] | None, session: str | None
    ) -> Any:
        async with self.use(self.engines) as engines:
            asked = (engine._send(method, path, body, session) for engine in engines)
            replies = await asyncio.gather(*asked, return_exceptions=True)
        if failure := next((reply for reply in replies if isinstance(reply, BaseException)), None):
            raise failure
        refused = (r for r in replies if isinstance(r, dict) and r.get("success") is False)
        return next(refused, replies[0])

    def _one(self, session: str | None) -> EngineClient:
        if session is None:
            return min(self.engines, key=self._in_flight.__getitem__)
        # of each session's own order of the engines the first: others that go or come change nothing
        return max(self.engines, key=lambda engine: derive(0, session, engine.name))

    @asynccontextmanager
    async def use(self, engines: Sequence[EngineClient]) -> AsyncIterator[list[EngineClient]]:
        """See `EngineClient.use`: a removed engine's connections stay open until all that asked it have done so."""
        used = list(engines)
        self._in_flight.update(used)
        try:
            yield used
        finally:
            self._in_flight.subtract(used)
            await self._close_unused(used)

    async def _close_unused(self, engines: Sequence[EngineClient]) -> None:
        gone = [engine for engine in engines if not self._in_flight[engine] and engine not in self.engines]
        for engine in gone:
            del self._in_flight[engine]
        await asyncio.gather(*(engine.close() for engine in gone))


def _place(url: str) -> tuple[str, int]:
    """Where it is, however it is written."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return LOOPBACK[0] if host in LOOPBACK else host, parts.port or (443 if parts.scheme == "https" else 80)


@dataclass(frozen=True)
class _Whole:
    """One engine's answer, complete."""

    status: int
    headers: httpx.Headers
    body: bytes

    def sent(self) -> httpx.Response:
        """The same as if it still came."""
        headers = [(k, v) for k, v in self.headers.raw if k.lower() != b"content-length"]
        length = (b"content-length", str(len(self.body)).encode())
        return httpx.Response(self.status, headers=[*headers, length], content=_parts([self.body]))


async def _whole(
    engine: EngineClient, method: str, path: str, headers: Headers, body: list[bytes] | None
) -> _Whole:
    """Its answer, which may take long. Raises httpx.ReadTimeout where it does not even say that it is healthy."""
    answering, failed = asyncio.create_task(_read(engine, method, path, headers, body)), 0
    try:
        while not (await asyncio.wait([answering], timeout=LOOK_S))[0]:
            failed = 0 if await engine.health() else failed + 1
            if failed == LOOKS:
                raise httpx.ReadTimeout(f"{engine.url} answers nothing any more.")
        return answering.result()
    finally:
        answering.cancel()


async def _read(
    engine: EngineClient, method: str, path: str, headers: Headers, body: list[bytes] | None
) -> _Whole:
    async with engine.open(method, path, headers, None if body is None else _parts(body)) as response:
        data = [part async for part in response.aiter_raw()]
    return _Whole(response.status_code, response.headers, b"".join(data))


async def _parts(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
