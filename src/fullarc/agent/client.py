"""Chat completions as an agent needs them, over HTTP or in-process.

`ChatClient(app=gateway.app)` calls an ASGI application without a socket; `ChatClient(url=…)` calls any server that
speaks OpenAI's protocol. Both are the same code and give the same replies.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from starlette.types import ASGIApp

from fullarc.config.errors import FullarcError


class ChatError(FullarcError):
    """The server could not answer. `status` is its HTTP status, 0 if there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ContextFull(ChatError):
    """The conversation does not fit the model's context any more."""


@dataclass(frozen=True)
class ChatReply:
    """One reply. `message` is OpenAI's assistant message, to be put into the history as it is."""

    message: dict[str, Any]
    finish: str
    format_errors: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def reasoning(self) -> str:
        """What it thought."""
        return self.message.get("reasoning_content") or ""

    @property
    def content(self) -> str:
        """What it said."""
        return self.message.get("content") or ""

    @property
    def calls(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(id, name, arguments) of its tool calls."""
        calls = self.message.get("tool_calls") or []
        return [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]


class ChatClient:
    """A client of one server.

    Args:
        url: base URL without "/v1"; not needed with `app`.
        app: an ASGI application to call in-process.
        session: continue this session's token tree (header X-Session-ID).
        timeout_s: bound on one reply.
    """

    def __init__(
        self,
        url: str = "http://localhost",
        app: ASGIApp | None = None,
        session: str | None = None,
        api_key: str | None = None,
        model: str = "fullarc",
        timeout_s: float = 600.0,
    ) -> None:
        headers = {"X-Session-ID": session} if session else {}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self.session = session
        self.model = model
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            headers=headers,
            timeout=timeout_s,
            transport=httpx.ASGITransport(app) if app is not None else None,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def complete(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] = (), **sampling: Any
    ) -> ChatReply:
        """One reply. `sampling`: temperature, top_p, max_tokens, seed. Raises ContextFull, ChatError."""
        data = await self._request("POST", "/v1/chat/completions", self._body(messages, tools, sampling))
        try:
            choice, usage = data["choices"][0], data.get("usage") or {}
            return ChatReply(
                message=choice["message"],
                finish=choice["finish_reason"],
                format_errors=choice.get("format_errors") or [],
                prompt_tokens=usage.get("prompt_tokens", 0),
                completion_tokens=usage.get("completion_tokens", 0),
            )
        except (KeyError, IndexError, TypeError) as error:
            raise ChatError(f"The server's reply is not a chat completion: {error!r}.") from error

    async def stream(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[dict[str, Any]] = (), **sampling: Any
    ) -> AsyncIterator[tuple[str, str]]:
        """("reasoning" | "content" | "finish", text) as they come. Raises ContextFull, ChatError."""
        body = self._body(messages, tools, sampling) | {"stream": True}
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise ChatError(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        for name, kind in (("reasoning_content", "reasoning"), ("content", "content")):
                            if text := choice["delta"].get(name):
                                yield kind, text
                        if choice.get("finish_reason"):
                            yield "finish", choice["finish_reason"]
        except httpx.HTTPError as error:
            raise ChatError(f"The server went away ({type(error).__name__}).") from error

    async def trajectory(self) -> dict[str, Any]:
        """The session's record so far (ATIF)."""
        return await self._request("GET", f"/sessions/{self.session}/trajectory")

    async def forget(self) -> None:
        """Delete the session, if there is one."""
        try:
            await self._request("DELETE", f"/sessions/{self.session}")
        except ChatError as error:
            if error.status != 404:
                raise

    def _body(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[dict[str, Any]],
        sampling: Mapping[str, Any],
    ) -> dict[str, Any]:
        body = {"model": self.model, "messages": list(messages)} | {
            k: v for k, v in sampling.items() if v is not None
        }
        return body | ({"tools": list(tools)} if tools else {})

    async def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ChatError(
                f"No server answers at {self._http.base_url} ({type(error).__name__})."
            ) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, response.content)
        data: dict[str, Any] = response.json()
        return data


def _refusal(status: int, body: bytes) -> ChatError:
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = body.decode(errors="replace")[:200], None
    if code == "context_length_exceeded":
        return ContextFull(message, status)
    return ChatError(message, status)
