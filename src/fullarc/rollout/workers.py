"""The engines behind the gateway, as the router of SGLang lists its workers, adds and removes them.

    GET, POST /workers   GET, DELETE /workers/{id}   GET /list_workers   POST /add_worker, /remove_worker ?url=

One that is added must be an engine, no gateway, and have the weights of the others. One that is removed ends what it
is doing and is not stopped, also if the server has started it. Without an API key only engines on this machine are
added.
"""

import asyncio
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fullarc.chat.openai import BadRequest
from fullarc.rollout.bodies import json_body
from fullarc.rollout.engine_client import EngineClient, EngineError
from fullarc.rollout.replicas import LOOPBACK, Replicas

MAX_BODY = 2**16


class Workers:
    """The handlers for the engines of `engine`. `remote`: whether engines on other machines may be added."""

    def __init__(self, engine: EngineClient, model: str, remote: bool) -> None:
        self._engine, self._model, self._remote = engine, model, remote

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/workers", self._list),
            Route("/workers", self._post, methods=["POST"]),
            Route("/workers/{id}", self._get),
            Route("/workers/{id}", self._delete, methods=["DELETE"]),
            Route("/workers/{id}", self._put, methods=["PUT"]),
            Route("/list_workers", self._urls),
            Route("/add_worker", self._add, methods=["POST"]),
            Route("/remove_worker", self._remove, methods=["POST"]),
        ]

    async def _list(self, _http: Request) -> Response:
        async with self._engine.use(self._engine.engines) as engines:
            told = await asyncio.gather(*map(self._worker, engines))
        return JSONResponse({"workers": told, "total": len(told)})

    async def _get(self, http: Request) -> Response:
        async with self._engine.use([self._find("name", http.path_params["id"])]) as (engine,):
            return JSONResponse(await self._worker(engine))

    async def _urls(self, _http: Request) -> Response:
        return JSONResponse({"urls": [engine.url for engine in self._engine.engines]})

    async def _post(self, http: Request) -> Response:
        body = await json_body(http, MAX_BODY)
        if not isinstance(body, dict):
            raise BadRequest("The body must be an object with a url.", "url")
        if body.get("worker_type", "regular") != "regular" or body.get("bootstrap_port") is not None:
            raise BadRequest("Workers prefill and decode: worker_type must be regular.", "worker_type")
        engine = await self._join(body.get("url"))
        return _accepted(engine, "Worker added.", {"location": f"/workers/{engine.name}"})

    async def _delete(self, http: Request) -> Response:
        engine = self._find("name", http.path_params["id"])
        await self._leave(engine)
        return _accepted(engine, "Worker removed.", {})

    async def _put(self, http: Request) -> Response:
        raise BadRequest("Nothing of a worker can be changed: remove it and add it again.")

    async def _add(self, http: Request) -> Response:
        engine = await self._join(http.query_params.get("url"))
        return PlainTextResponse(f"Successfully added worker: {engine.url}")

    async def _remove(self, http: Request) -> Response:
        engine = self._find("url", (http.query_params.get("url") or "").rstrip("/"))
        await self._leave(engine)
        return PlainTextResponse(f"Successfully removed worker: {engine.url}")

    async def _join(self, url: Any) -> EngineClient:
        parts = urlsplit(url) if isinstance(url, str) and len(url) < 1000 else urlsplit("")
        try:
            good = (
                parts.scheme in ("http", "https")
                and parts.port != 0
                and not (parts.path.strip("/") or parts.query)
            )
        except ValueError:
            good = False
        if not good or not parts.hostname or "@" in parts.netloc:
            raise BadRequest("url must be that of an engine, such as http://127.0.0.1:30000.", "url")
        if not self._remote and parts.hostname not in LOOPBACK:
            raise BadRequest("Without an API key only engines on this machine are added.", "url")
        return await self._replicas().join(url.rstrip("/"))

    async def _leave(self, engine: EngineClient) -> None:
        if len(self._engine.engines) == 1:
            raise BadRequest("The last worker stays: add another one first.", "id")
        await self._replicas().remove(engine)

    def _replicas(self) -> Replicas:
        if not isinstance(self._engine, Replicas):
            raise BadRequest("This gateway was made for one engine.")
        return self._engine

    def _find(self, what: str, value: str) -> EngineClient:
        for engine in self._engine.engines:
            if getattr(engine, what) == value:
                return engine
        raise BadRequest(f"There is no worker {value[:100]!r}: GET /workers.", "id", status=404)

    async def _worker(self, engine: EngineClient) -> dict[str, Any]:
        load = 0
        if healthy := await engine.health():
            try:
                load = await engine.load()
            except EngineError:
                healthy = False
        return {"id": engine.name, "url": engine.url, "model_id": self._model, "worker_type": "regular",
                "is_healthy": healthy, "load": load}  # fmt: skip


def _accepted(engine: EngineClient, message: str, more: dict[str, str]) -> Response:
    """As SGLang's router answers, which does it later; here it is done."""
    told = {"status": "accepted", "worker_id": engine.name, "url": engine.url, "message": message}
    return JSONResponse(told | more, 202, headers=more)
