"""The engines behind the gateway, as the router of SGLang lists its workers.

    GET /workers   GET /workers/{id}   GET /list_workers

An id is the place in the list. Engines are started with the server and stay: another set would move every session away
from its cached prefix, so POST and DELETE are refused in one sentence.
"""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fullarc.chat.openai import BadRequest
from fullarc.rollout.engine_client import EngineClient, EngineError


class Workers:
    """The handlers for the engines of `engine`, which is one or several (`replicas`)."""

    def __init__(self, engine: EngineClient, model: str) -> None:
        self._engines, self._model = engine.engines, model

    def routes(self) -> list[Route]:
        """The routes."""
        return [
            Route("/workers", self._list),
            Route("/workers", self._refuse, methods=["POST"]),
            Route("/workers/{id}", self._get),
            Route("/workers/{id}", self._refuse, methods=["PUT", "DELETE"]),
            Route("/list_workers", self._urls),
            Route("/add_worker", self._refuse, methods=["POST"]),
            Route("/remove_worker", self._refuse, methods=["POST"]),
        ]

    async def _list(self, _http: Request) -> Response:
        told = await asyncio.gather(*map(self._worker, range(len(self._engines))))
        return JSONResponse({"workers": told, "total": len(told)})

    async def _get(self, http: Request) -> Response:
        given = http.path_params["id"]
        if given not in map(str, range(len(self._engines))):
            raise BadRequest(f"There is no worker {given[:100]!r}: GET /workers.", "id", status=404)
        return JSONResponse(await self._worker(int(given)))

    async def _urls(self, _http: Request) -> Response:
        return JSONResponse({"urls": [engine.url for engine in self._engines]})

    async def _refuse(self, http: Request) -> Response:
        raise BadRequest("Engines do not come and go while the server runs: start it with --engines N.")

    async def _worker(self, number: int) -> dict[str, Any]:
        engine, load = self._engines[number], 0
        if healthy := await engine.health():
            try:
                load = await engine.load()
            except EngineError:
                healthy = False
        return {"id": str(number), "url": engine.url, "model_id": self._model, "worker_type": "regular",
                "is_healthy": healthy, "load": load}  # fmt: skip
