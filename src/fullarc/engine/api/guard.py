"""The border of the HTTP server: routes, bodies in, errors out, keys checked.

Invariant: whatever a client sends ends in a 4xx with one sentence in OpenAI's error object (Anthropic's on its routes),
never in a traceback.
"""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fullarc.chat.errors import OPEN_PATHS, error_object, refusal
from fullarc.chat.openai import BadRequest, dump, dump_in_parts
from fullarc.config.errors import FullarcError
from fullarc.engine.api.service import in_thread, version_header
from fullarc.engine.request import QueueFullError, Request

R = TypeVar("R")
T = TypeVar("T", bound=BaseModel)
MAX_BODY, LARGE, MANY = 64 * 2**20, 2**14, 4096
_PLACES = re.compile(r"\{(\w+)(?::\w+)?\}")
_RESPONSES = {
    "200": {"description": "the answer"},
    "4XX": {"description": "what is wrong, in one sentence"},
    "503": {"description": "the engine does not generate"},
}


@dataclass(frozen=True)
class Endpoint:
    """One route. `body`: the schema of its JSON body; `query`: those of its query parameters; for /openapi.json."""

    path: str
    handler: Callable[[HttpRequest], Awaitable[Response]]
    methods: tuple[str, ...] = ("POST",)
    body: type[BaseModel] | None = None
    query: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def route(self) -> Route:
        """The Starlette route, with errors answered."""
        return Route(self.path, _answering(self.handler), methods=list(self.methods))


class TooLarge(FullarcError):
    """The body is larger than the server takes (HTTP 413)."""


def answer(value: Any, status: int = 200) -> Response:
    """JSON that survives any text."""
    return Response(dump(value), status, media_type="application/json")


async def written(requests: Sequence[Request], json: Callable[[], bytes]) -> Response:
    """What `json` writes of ended requests; in a thread where they hold many numbers, which takes its time."""
    many = sum(request.numbers for request in requests) > MANY
    return Response(await asyncio.to_thread(json) if many else json(), media_type="application/json")


async def built(requests: Sequence[Request], make: Callable[[], Any]) -> Response:
    """JSON of what `make` makes of ended requests, likewise."""
    return await written(requests, lambda: dump_in_parts(make()))


async def read_body(http: HttpRequest, schema: type[T], limit: int = MAX_BODY) -> T:
    """The validated JSON body; an empty one counts as {}."""
    parts, size = [], 0
    async for part in http.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"The body is larger than {limit} bytes.", "Send less at a time.")
        parts.append(part)
    http.state.body_bytes = size
    try:
        return await aside(http, lambda: schema.model_validate_json(b"".join(parts) or b"{}"))
    except ValidationError as error:
        raise refusal(error) from None


async def aside(http: HttpRequest, function: Callable[[], R], slow: bool = False) -> R:
    """What `function` returns; from a thread where it is `slow` (it compiles a grammar) or the body was LARGE (long
    texts, many stop strings), so that others are answered meanwhile.

    The JSON parser itself lets no other thread run (some 10 ms a megabyte); tokenising does.
    """
    if slow:
        return await in_thread(function)
    if http.state.body_bytes <= LARGE:
        return function()
    return await asyncio.to_thread(function)


def _answering(
    endpoint: Callable[[HttpRequest], Awaitable[Response]],
) -> Callable[[HttpRequest], Awaitable[Response]]:
    """Turn the errors that a client can act on into statuses, and say which weights were used."""

    async def answered(http: HttpRequest) -> Response:
        try:
            reply = await endpoint(http)
            if version := getattr(http.state, "weight_version", ""):
                reply.headers.update(version_header(version))
            return reply
        except BadRequest as error:
            return error_answer(http.url.path, error.status, str(error), error.body["error"]["param"])
        except QueueFullError as error:
            return error_answer(http.url.path, 429, str(error))
        except TooLarge as error:
            return error_answer(http.url.path, 413, str(error))
        except FullarcError as error:
            return error_answer(http.url.path, 400, str(error))

    return answered


def error_answer(path: str, status: int, message: str, param: str | None = None) -> Response:
    """An error in the form that the clients of `path` read."""
    return answer(error_object(path, status, message, param), status)


async def http_error(http: HttpRequest, error: Exception) -> Response:
    """404 and 405 in the same form as all other errors."""
    assert isinstance(error, HTTPException)
    reply = error_answer(http.url.path, error.status_code, f"{http.method} {http.url.path}: {error.detail}.")
    reply.headers.update(error.headers or {})
    return reply


class KeyCheck:
    """Lets requests pass that have `Authorization: Bearer KEY` or `x-api-key: KEY`, and those to OPEN_PATHS."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.expected = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = dict(scope["headers"])
            given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not secrets.compare_digest(given, self.expected):
                refusal = error_answer(scope["path"], 401, "A valid API key is needed.")
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def openapi(endpoints: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """OpenAPI 3.1 of the routes: paths and the schemas of their bodies."""
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {}
    for endpoint in endpoints:
        for method in endpoint.methods:
            summary = (endpoint.handler.__doc__ or "").strip().split("\n")[0]
            entry: dict[str, Any] = {"summary": summary, "responses": dict(_RESPONSES)}
            places = [("path", name, {"type": "string"}) for name in _PLACES.findall(endpoint.path)]
            places += [("query", name, schema) for name, schema in endpoint.query.items()]
            if places:
                entry["parameters"] = [
                    {"in": place, "name": name, "schema": schema, "required": place == "path"}
                    for place, name, schema in places
                ]
            if endpoint.body and method != "GET":
                schema = endpoint.body.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= schema.pop("$defs", {})
                schemas[endpoint.body.__name__] = schema
                ref = {"$ref": f"#/components/schemas/{endpoint.body.__name__}"}
                entry["requestBody"] = {"content": {"application/json": {"schema": ref}}}
            paths.setdefault(_PLACES.sub(r"{\1}", endpoint.path), {})[method.lower()] = entry
    info = {"title": "fullarc engine", "version": version}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": schemas}}
