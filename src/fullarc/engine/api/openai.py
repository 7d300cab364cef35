"""What OpenAI's two generation routes share: log-prob objects, usage, errors, and GET /v1/models."""

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.engine.api.guard import Endpoint, answer, error_answer
from fullarc.engine.api.service import Service
from fullarc.engine.lora import Adapter
from fullarc.engine.request import Request


def token_name(service: Service, token: int, as_id: bool) -> str:
    """How a token is written: its text, or vLLM's `token_id:N`."""
    return f"token_id:{token}" if as_id or service.tok is None else service.tok.decode([token])


def chat_logprobs(service: Service, request: Request, first: int, last: int, as_id: bool) -> dict[str, Any]:
    """OpenAI's logprobs object for the output tokens [first, last)."""

    def entry(value: float, token: int) -> dict[str, Any]:
        name = token_name(service, token, as_id)
        data = service.tok.token_bytes(token) if service.tok else name.encode()
        return {"token": name, "logprob": value, "bytes": list(data)}

    start, content = len(request.prompt), []
    for at in range(first, last):
        best = request.top_logprobs[at] if request.params.top_logprobs else []
        told = entry(request.logprobs[at], request.ids[start + at]) | {"token_id": request.ids[start + at]}
        content.append(told | {"top_logprobs": [entry(*pair) for pair in best]})
    return {"content": content, "refusal": None}


def usage(requests: Sequence[Request], prompts: int) -> dict[str, Any]:
    """Token counts; the samples of one prompt count it once. `cached_tokens` is what the prefix cache saved."""
    per_prompt = max(len(requests) // max(prompts, 1), 1)
    prompt = sum(len(request.prompt) for request in requests[::per_prompt])
    sampled = sum(len(request.logprobs) for request in requests)
    cached = sum(request.cached_tokens for request in requests[::per_prompt])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def head(service: Service, name: str, kind: str, requests: Sequence[Request]) -> dict[str, Any]:
    """The fields that every answer and chunk begins with."""
    return {"id": name, "object": kind, "created": int(time.time()), "model": service.name,
            "metadata": weights_used(service, requests)}  # fmt: skip


def weights_used(service: Service, requests: Sequence[Request]) -> dict[str, str]:
    """What `metadata` tells: the weights of the last token, or of the next one before there is any."""
    return {"weight_version": requests[0].weight_version or service.scheduler.version}


def spans(request: Request, end: int) -> list[dict[str, Any]]:
    """Which weights sampled which of the first `end` output tokens."""
    return [{"version": version, "start": a, "end": min(b, end)} for version, a, b in request.versions]


def ended(request: Request) -> str:
    """OpenAI's finish reason of plain text."""
    return {"stop": "stop", "length": "length"}.get(request.finish, "abort")


def own_stop(service: Service, request: Request) -> int | str | None:
    """vLLM's stop_reason: the string or id that the client named; None for the model's own end."""
    own = service.scheduler.weights.config.eos_token_id
    return None if request.matched in own else request.matched


class Models:
    """GET /v1/models."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/v1/models", self.models, ("GET",)),
            Endpoint("/v1/models/{name:path}", self.model, ("GET",)),
        ]

    async def models(self, _http: HttpRequest) -> Response:
        """The model that is served, and its adapters."""
        adapters = self.service.scheduler.adapters.values()
        cards = [self._card(), *(self._adapter(adapter) for adapter in list(adapters))]
        return answer({"object": "list", "data": cards})

    async def model(self, http: HttpRequest) -> Response:
        """One model by its name."""
        name = http.path_params["name"]
        if adapter := self.service.scheduler.adapters.get(name):
            return answer(self._adapter(adapter))
        if name != self.service.name:
            return error_answer(http.url.path, 404, f"There is no model {name[:200]!r} here.", "model")
        return answer(self._card())

    def _adapter(self, adapter: Adapter) -> dict[str, Any]:
        return self._card() | {"id": adapter.name, "root": adapter.folder, "parent": self.service.name}

    def _card(self) -> dict[str, Any]:
        s = self.service
        return {"id": s.name, "object": "model", "created": int(s.started), "owned_by": "fullarc",
                "root": s.model_path, "parent": None, "max_model_len": s.scheduler.max_len}  # fmt: skip
