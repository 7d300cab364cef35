"""Requests in, answers and streams out: the bridge between the event loop and the engine's thread.

The engine notes which answers have grown; behind each step one call wakes the event loop for all of them. More than
CROWD streams are told every TELL_S only, since writing an event costs the engine as much as sampling a token. A stream
that falls behind (a client that reads slowly) finds several tokens when it looks again: nothing queues up for it.

What was computed with weights says in `X-Weight-Version` which: those of the last token; streamed, those of the start.

Invariants: every request of a `Watch` ends; a client that hangs up, or reads nothing for STALL_S, frees its slots.
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fullarc.chat import Tokenizer
from fullarc.chat.grammar import Grammars
from fullarc.chat.openai import dump
from fullarc.engine.api.metrics import Latencies
from fullarc.engine.engine import Engine
from fullarc.engine.request import QueueFullError, Request, RequestError
from fullarc.engine.sampling import MAX_SEED
from fullarc.engine.scheduler import Scheduler
from fullarc.engine.worker import Worker

T = TypeVar("T")
End = Callable[[Request], None]
STALL_S = 120.0
CROWD, TELL_S = 16, 0.05


class SeedSource:
    """Seeds for requests that bring none: a counter, so a server's answers are a function of its history."""

    def __init__(self, start: int) -> None:
        self._numbers = itertools.count(start + 1)

    def __call__(self) -> int:
        return next(self._numbers) & MAX_SEED


class Service:
    """One engine behind all dialects.

    Attributes:
        tok: the folder's tokenizer; None if it has none, and then there is no text.
        grammars: the forms that outputs were asked to follow; None without a tokenizer.
        name: the model's name for clients.
        origin: where the engine's first weights came from.
        deterministic: whether that was insisted on.
        experts: in which form vLLM's routes tell routed experts when a request does not say; None = not at all.
        strict: whether other names are refused (see `whose`).
        collecting: who has parts of a weight update that is not installed yet.
    """

    def __init__(
        self,
        engine: Engine,
        model_path: str | Path,
        name: str = "",
        seed: int = 0,
        experts: Literal["npy", "compact"] | None = None,
    ) -> None:
        self.worker = Worker(engine.scheduler, self._after_step)
        self.model_path, self.origin, self.started = str(model_path), engine.origin, time.time()
        folder = Path(model_path)
        self.tok = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        self.grammars = Grammars(self.tok) if self.tok else None
        self.name = name or (folder.parent.name if folder.name == "checkpoint" else folder.name) or "fullarc"
        self.strict = False
        self.collecting: set[object] = set()
        self._longest = (
            max(map(len, map(self.tok.token_bytes, range(self.tok.vocab_size)))) if self.tok else 0
        )
        self.deterministic = engine.deterministic is not None
        self.latencies, self.seeds, self.experts = Latencies(), SeedSource(seed), experts
        self._numbers = itertools.count(1)
        self._noted: list[Watch] = []
        self._urgent, self._told_at = False, 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def scheduler(self) -> Scheduler:
        """For reading numbers; it is changed by `on_engine` only."""
        return self.worker.scheduler

    @property
    def text(self) -> Tokenizer:
        """The tokenizer. Raises RequestError where there is none."""
        if self.tok is None:
            raise RequestError(
                "This model's folder has no tokenizer.json, so there is no text.", "Send token ids."
            )
        return self.tok

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, in which names of special tokens mean the tokens. Raises RequestError if it cannot fit."""
        tok = self.text
        self.check_length(len(text))
        return tok.encode_raw(text)

    def check_length(self, characters: int) -> None:
        """Refuse a text that is too long whatever its tokens are, before time is spent on it."""
        bound = self.scheduler.max_len * self._longest
        if characters > bound:
            raise RequestError(
                f"The text has {characters} characters; the engine serves sequences of up to "
                f"{self.scheduler.max_len} tokens.",
                "Shorten it, or start the engine with a larger --max-len.",
            )

    def next_id(self, prefix: str) -> str:
        """A name for a request."""
        return f"{prefix}-{next(self._numbers)}"

    async def on_engine(self, function: Callable[[Scheduler], Any]) -> Any:
        """Run `function` between two steps."""
        self._loop = asyncio.get_running_loop()
        return await asyncio.wrap_future(self.worker.call(function))

    async def submit(self, requests: list[Request], each_token: bool = False) -> "Watch":
        """Queue requests, all or none. Raises RequestError, QueueFullError."""
        watch = Watch(self, requests, each_token)
        await self.on_engine(lambda s: self.take(s, watch))
        return watch

    def take(self, scheduler: Scheduler, watch: "Watch", instead_of: Request | None = None) -> None:
        """Engine thread: queue the requests of a watch, see `submit_all`."""
        submit_all(scheduler, watch.requests, instead_of)
        for request in watch.requests:
            request.on_finish = _in_turn(request.on_finish, watch.note_end)
            request.on_token = watch.note if watch.each_token else None

    async def answer(self, http: HttpRequest, requests: list[Request]) -> list[Request]:
        """Submit, and wait for the last end."""
        await self.finish(http, await self.submit(requests))
        return requests

    async def finish(self, http: HttpRequest, watch: "Watch") -> None:
        """Wait for the last end; a client that hangs up frees its slots."""
        gone = asyncio.ensure_future(disconnected(http.receive))
        try:
            done = asyncio.ensure_future(watch.changed())
            await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                watch.cancel()
                await done
        finally:
            gone.cancel()
            watch.cancel()
        http.state.weight_version = watch.requests[0].weight_version or self.scheduler.version

    # --- the way back from the engine's thread ----------------------------------------------------------------

    def note(self, watch: "Watch", urgent: bool = False) -> None:
        """Engine thread: this watch has something new; an end is urgent."""
        self._noted.append(watch)
        self._urgent = self._urgent or urgent

    def _after_step(self) -> None:
        """Engine thread: wake the event loop, for many streams not at every step."""
        if not self._noted:
            return
        now = time.monotonic()
        crowd = len(self._noted) > CROWD and not self.scheduler.idle
        if not crowd or self._urgent or now - self._told_at >= TELL_S:
            noted, self._noted = self._noted, []
            self._urgent, self._told_at = False, now
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                if self._loop:
                    self._loop.call_soon_threadsafe(self._wake, noted)

    def _wake(self, noted: "list[Watch]") -> None:
        for watch in set(noted):
            watch.news.set()


class Watch:
    """The requests of one HTTP call, seen from the event loop. They know it as long as they run."""

    def __init__(self, service: Service, requests: list[Request], each_token: bool) -> None:
        self.service, self.requests = service, requests
        self.news, self.each_token = asyncio.Event(), each_token
        self._open = len(requests)

    def note(self, _request: Request) -> None:
        """Engine thread: a token came."""
        self.service.note(self)

    def note_end(self, request: Request) -> None:
        """Engine thread: a request ended; without streaming only the last end is news."""
        self.service.latencies.observe(request)
        self._open -= 1
        if self.each_token or not self._open:
            self.service.note(self, urgent=True)

    @property
    def ended(self) -> bool:
        """Whether all requests have ended."""
        return all(request.finish for request in self.requests)

    async def changed(self) -> None:
        """Wait for news; what came while nobody waited counts once."""
        await self.news.wait()
        self.news.clear()

    def cancel(self) -> None:
        """End what still runs."""
        if not self.ended:
            self.service.worker.call(self._end_all)

    def _end_all(self, scheduler: Scheduler) -> None:
        for request in self.requests:
            scheduler.cancel(request)


class EventStream(Response):
    """Server-sent events of a watch: `events` gives pieces of the body, already framed."""

    media_type = "text/event-stream"

    def __init__(self, watch: Watch, events: AsyncIterator[bytes]) -> None:
        told = {"cache-control": "no-cache"} | version_header(watch.service.scheduler.version)
        super().__init__(media_type=self.media_type, headers=told)
        del self.headers["content-length"]
        self.watch, self.events = watch, events
        self._sending = 0.0  # since when a piece is being sent; 0 between two pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        gone = asyncio.ensure_future(disconnected(receive))
        gone.add_done_callback(lambda _: self.watch.cancel())
        watchdog = asyncio.ensure_future(self._end_when_stalled(asyncio.current_task()))
        try:
            async for data in self.events:
                if gone.done():
                    break
                self._sending = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sending = 0.0
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # the client is gone
        except asyncio.CancelledError:
            if not watchdog.done():
                raise
        finally:
            gone.cancel()
            watchdog.cancel()
            self.watch.cancel()

    async def _end_when_stalled(self, writer: "asyncio.Task[Any] | None") -> None:
        """A timer per stream and not per event, which would cost as much as the event."""
        while not (self._sending and time.monotonic() - self._sending > STALL_S):
            await asyncio.sleep(STALL_S / 4)
        if writer:
            writer.cancel()


async def in_thread(function: Callable[[], T]) -> T:
    """What `function` returns, from a thread of its own that nobody waits for when the server ends.

    For what waits on others: it must neither hold up the exit nor take a place in the loop's small pool.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def give(set_it: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_it(value)

    def run() -> None:
        try:
            told: tuple[Callable[[Any], None], Any] = future.set_result, function()
        except BaseException as error:  # noqa: BLE001  (handed to the caller, not swallowed)
            told = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(give, *told)

    threading.Thread(target=run, name="api", daemon=True).start()
    return await future


def _in_turn(first: End | None, then: End) -> End:
    """Both, or `then` where there is no `first`."""

    def both(request: Request) -> None:
        if first:
            first(request)
        then(request)

    return both


async def disconnected(receive: Receive) -> None:
    """Wait until the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


def submit_all(scheduler: Scheduler, requests: list[Request], instead_of: Request | None = None) -> None:
    """All or nothing: a batch with one bad prompt, or too large for the queue, is refused as a whole.

    What they come `instead_of` is ended, unless they are refused.
    """
    names = [request.rid for request in requests]
    known = {*scheduler.running, *(request.rid for request in scheduler.waiting)}
    if len(set(names)) < len(names) or known.intersection(names):
        raise RequestError("rid is in use already.", "Choose another one, or none.")
    for request in requests:
        scheduler.check(request)
    if len(scheduler.waiting) + len(requests) > scheduler.max_queue:
        raise QueueFullError(
            f"The queue holds {scheduler.max_queue} requests and is full.", "Try again later."
        )
    if instead_of:
        scheduler.cancel(instead_of)
    for request in requests:
        scheduler.submit(request)


def version_header(version: str) -> dict[str, str]:
    """Which weights; a name may have any characters, a header may not."""
    return {"X-Weight-Version": quote(version, errors="replace")}


def framed(fields: dict[str, Any]) -> tuple[bytes, bytes]:
    """What stands before and behind the choice in an event whose other fields stay the same."""
    return b"data: " + dump(fields)[:-1] + b',"choices":[', b"]}\n\n"


def event(value: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dump(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"
