"""Requests that are the engine's business go through to it: what comes back is what it sent, streams included.

Invariants: nothing is buffered; a client that hangs up is gone for the engine too; an engine that cannot be reached
is a 503 in one sentence, one that breaks off in the middle breaks the client's connection off too.
"""

import asyncio
from collections.abc import AsyncIterator

import httpx
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from fullarc.chat.errors import error_object
from fullarc.chat.openai import dump
from fullarc.rollout.engine_client import EngineClient

# of one connection and not of the message; the last two are sent anew
_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"host",
     b"date", b"server")
)  # fmt: skip
_KEYS = (b"authorization", b"x-api-key", b"origin", b"sec-fetch-site")  # whom a key lets in


class Passing:
    """An ASGI application. `keyed`: the gateway has checked a key, which is not the engine's."""

    def __init__(self, engine: EngineClient, keyed: bool) -> None:
        self._engine = engine
        self._dropped = _HOP | (frozenset(_KEYS) if keyed else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = asyncio.Event()
        said = Headers(scope=scope)
        has_body = "content-length" in said or "transfer-encoding" in said
        if not has_body:
            sent.set()
        work = asyncio.ensure_future(self._pass(scope, _body(receive, sent) if has_body else None, send))
        gone = asyncio.ensure_future(_gone(receive, sent))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            work.cancel()  # does nothing if it is done
            await asyncio.gather(work, return_exceptions=True)
        finally:
            gone.cancel()
        if not work.cancelled() and (error := work.exception()):
            raise error

    async def _pass(self, scope: Scope, body: AsyncIterator[bytes] | None, send: Send) -> None:
        headers = [(k, v) for k, v in scope["headers"] if k.lower() not in self._dropped]
        query = scope["query_string"].decode("latin-1")
        path = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        started = False
        try:
            async with self._engine.open(scope["method"], path, headers, body) as response:
                kept = [(k, v) for k, v in response.headers.raw if k.lower() not in _HOP]
                await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
                started = True
                async for part in response.aiter_raw():
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except httpx.HTTPError as error:
            if started:
                return  # the server closes the connection: this answer is not whole
            text = f"The engine at {self._engine.url} does not answer ({type(error).__name__})."
            told = dump(error_object(scope["path"], 503, text, kind="engine_error"))
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode())]
            await send({"type": "http.response.start", "status": 503, "headers": head})
            await send({"type": "http.response.body", "body": told})
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _body(receive: Receive, sent: asyncio.Event) -> AsyncIterator[bytes]:
    """The request's body; `sent` is set behind it."""
    try:
        while (message := await receive())["type"] == "http.request":
            yield message.get("body", b"")
            if not message.get("more_body", False):
                return
        raise httpx.WriteError("the client has hung up")
    finally:
        sent.set()


async def _gone(receive: Receive, sent: asyncio.Event) -> None:
    """Ends when the client has hung up, which is asked only behind the body."""
    await sent.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
