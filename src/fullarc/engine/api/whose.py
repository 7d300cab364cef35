"""On whose behalf a request is served, how soon, and with which adapter, in everybody's words.

    priority   lower ones first on vLLM's and OpenAI's routes; higher ones first on SGLang's /generate, as each has it
    session    SGLang's `routing_key` (/generate) or `session_id` (others), else a header: X-SMG-Routing-Key (slime,
               miles, our gateway) or X-Session-ID
    salt       `cache_salt`; SGLang's `cache_salt` and `extra_key` are one
    adapter    `lora_path` is its name; or `model`, alone or behind SGLang's "model:"

A server that has had an adapter knows its names: any other `model` is refused then, so that nobody who asks for an
adapter that is gone gets the base. Before, `model` may be anything.
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest

from fullarc.engine.api.service import Service
from fullarc.engine.request import Request, RequestError

SESSION_HEADERS = ("x-smg-routing-key", "x-session-id")


class WhoseBody(BaseModel):
    """Fields that the bodies of vLLM's and OpenAI's routes share."""

    model: str | None = None
    priority: int | None = Field(None, strict=True, description="lower ones first")
    session_id: str | None = Field(None, max_length=1000)
    cache_salt: str | None = Field(None, min_length=1, max_length=1000)
    lora_path: str | None = Field(None, max_length=1000, description="name of a loaded adapter")


def assign(service: Service, http: HttpRequest, body: WhoseBody, requests: Sequence[Request]) -> None:
    """Write it on the requests of one body. Raises RequestError for a name that is not known."""
    session, adapter = session_of(http, body.session_id), body.lora_path or adapter_of(service, body.model)
    for request in requests:
        request.priority, request.session = body.priority or 0, session
        request.salt, request.adapter = body.cache_salt or "", adapter


def session_of(http: HttpRequest, given: str | None = None) -> str:
    """Whose request it is; "" for all who do not say."""
    return (given or next(filter(None, map(http.headers.get, SESSION_HEADERS)), ""))[:1000]


def adapter_of(service: Service, model: str | None) -> str:
    """The adapter that a `model` names, "" for the base. Raises RequestError."""
    loaded = service.scheduler.adapters
    if not model or model == service.name:
        return ""
    base, _, named = model.rpartition(":")
    for name in (model, named if base == service.name else ""):
        if name in loaded:
            return name
    if service.strict:
        raise RequestError(
            f"There is no model or adapter {model[:200]!r} here.", "GET /v1/models lists them."
        )
    return ""
