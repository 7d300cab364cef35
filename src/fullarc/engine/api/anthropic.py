"""Anthropic's Messages: POST /v1/messages, streamed or whole, with tools and thinking, and /v1/messages/count_tokens.

Thinking blocks of earlier turns go back into the conversation as reasoning; their signature is a constant, since
nothing is hidden in them. `thinking: {"type": "disabled"}` samples a turn that does not think.
"""

from collections.abc import AsyncIterator
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat import Message, ToolCall, render
from fullarc.chat.messages import dumps
from fullarc.chat.openai import BadRequest, read_tools
from fullarc.chat.turns import Turn
from fullarc.engine.api.chat import Conversation, Growing
from fullarc.engine.api.fields import OpenAISampling
from fullarc.engine.api.guard import Endpoint, answer, read_body
from fullarc.engine.api.service import EventStream, Service, Watch, event
from fullarc.engine.request import Request

SIGNATURE = "none"
_STOPS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "abort": "end_turn"}


class CountBody(BaseModel):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: int = Field(strict=True, ge=1)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = Field(None, max_length=4096)
    stream: bool = False
    seed: int | None = Field(None, description="not Anthropic's: a random stream of one's own")


class Anthropic:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/v1/messages", self.messages, body=MessagesBody),
            Endpoint("/v1/messages/count_tokens", self.count, body=CountBody),
        ]

    async def count(self, http: HttpRequest) -> Response:
        """How many tokens a conversation has."""
        body = await read_body(http, CountBody)
        ids = render(
            self.service.text,
            read_conversation(body),
            _tools(body),
            add_generation_prompt=True,
            thinking=_thinks(body),
        ).ids
        return answer({"input_tokens": len(ids)})

    async def messages(self, http: HttpRequest) -> Response:
        """The next turn of a conversation."""
        body = await read_body(http, MessagesBody)
        sampling = OpenAISampling.model_construct(
            max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k,
            stop=body.stop_sequences, seed=body.seed,
        )  # fmt: skip
        conversation = Conversation(
            self.service,
            read_conversation(body),
            _tools(body),
            _thinks(body),
            False,
            sampling,
            body.max_tokens,
        )
        if body.stream:
            watch = await self.service.submit(conversation.requests, each_token=True)
            return EventStream(watch, self._events(conversation, watch))
        await self.service.answer(http, conversation.requests)
        return answer(self._message(conversation))

    def _head(self, conversation: Conversation) -> dict[str, Any]:
        return {"id": f"msg_{conversation.name}", "type": "message", "role": "assistant", "model": self.service.name,
                "content": [], "stop_reason": None, "stop_sequence": None,
                "usage": _usage(conversation.requests[0])}  # fmt: skip

    def _message(self, conversation: Conversation) -> dict[str, Any]:
        turn, request = conversation.read(0), conversation.requests[0]
        return self._head(conversation) | {"content": _blocks(turn.message)} | _end(turn, request)

    async def _events(self, conversation: Conversation, watch: Watch) -> AsyncIterator[bytes]:
        request, growing = conversation.requests[0], Growing(conversation, 0)
        yield event({"type": "message_start", "message": self._head(conversation)}, "message_start")
        blocks = _BlockStream()
        while True:
            await watch.changed()
            done = bool(request.finish)
            growing.news()
            if done:
                break
            for data in blocks.grow(growing.turn.reasoning, growing.turn.content):
                yield data
        turn = conversation.read(0)
        for data in (*blocks.grow(turn.message.reasoning, turn.message.content), *blocks.close()):
            yield data
        for call in turn.message.tool_calls:
            for data in blocks.tool(call):
                yield data
        end = _end(turn, request)
        delta = {"stop_reason": end["stop_reason"], "stop_sequence": end["stop_sequence"]}
        yield event({"type": "message_delta", "delta": delta, "usage": _usage(request)}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")


class _BlockStream:
    """Content blocks in the order in which they open; one is open at a time."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""
        self._sent = {"thinking": "", "text": ""}

    def grow(self, thinking: str, text: str) -> list[bytes]:
        """Events for what the two texts have gained."""
        return [*self._more("thinking", thinking), *self._more("text", text)]

    def _more(self, kind: str, text: str) -> list[bytes]:
        new = text[len(self._sent[kind]) :]
        if not new:
            return []
        self._sent[kind] = text
        opening = []
        if self._kind != kind:
            empty = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            opening = [*self.close(), self._open(kind, empty)]
        return [*opening, self._delta({"type": f"{kind}_delta", kind: new})]

    def tool(self, call: ToolCall) -> list[bytes]:
        """A whole tool call."""
        opened = self._open("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        delta = self._delta({"type": "input_json_delta", "partial_json": dumps(call.arguments)})
        return [opened, delta, *self.close()]

    def _open(self, kind: str, block: dict[str, Any]) -> bytes:
        self._index, self._kind = self._index + 1, kind
        name = "content_block_start"
        return event({"type": name, "index": self._index, "content_block": block}, name)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        name = "content_block_delta"
        return event({"type": name, "index": self._index, "delta": delta}, name)

    def close(self) -> list[bytes]:
        """The end of the open block, if there is one."""
        if not self._kind:
            return []
        signed = (
            [self._delta({"type": "signature_delta", "signature": SIGNATURE})]
            if self._kind == "thinking"
            else []
        )
        self._kind = ""
        return [*signed, event({"type": "content_block_stop", "index": self._index}, "content_block_stop")]


def _blocks(message: Message) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if message.reasoning:
        blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": SIGNATURE})
    if message.content:
        blocks.append({"type": "text", "text": message.content})
    for call in message.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments})
    return blocks


def _end(turn: Turn, request: Request) -> dict[str, Any]:
    own = request.matched if isinstance(request.matched, str) else None
    reason = "stop_sequence" if own is not None else _STOPS[turn.finish]
    return {"stop_reason": reason, "stop_sequence": own, "usage": _usage(request)}


def _usage(request: Request) -> dict[str, int]:
    return {"input_tokens": len(request.prompt) - request.cached_tokens, "output_tokens": len(request.logprobs),
            "cache_read_input_tokens": request.cached_tokens, "cache_creation_input_tokens": 0}  # fmt: skip


def _thinks(body: CountBody) -> bool:
    kind = (body.thinking or {}).get("type", "enabled")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise BadRequest("thinking.type must be enabled, adaptive or disabled.", "thinking")
    return bool(kind != "disabled")


def _tools(body: CountBody) -> list[dict[str, Any]] | None:
    """Anthropic's tool definitions as OpenAI's."""
    choice = (body.tool_choice or {}).get("type", "auto")
    if choice not in ("auto", "none"):
        raise BadRequest("tool_choice: only auto and none are supported.", "tool_choice")
    if choice == "none" or not body.tools:
        return None
    found = []
    for number, tool in enumerate(body.tools):
        if not isinstance(tool, dict) or "input_schema" not in tool:
            raise BadRequest(f"tools.{number} has no input_schema.", f"tools.{number}")
        function = {"name": tool.get("name"), "description": tool.get("description") or "",
                    "parameters": tool["input_schema"]}  # fmt: skip
        found.append({"type": "function", "function": function})
    return read_tools(found)


def read_conversation(body: CountBody) -> list[Message]:
    """Anthropic's messages as ours. Raises BadRequest naming the first that is not one."""
    messages = [Message("system", _text(body.system, "system"))] if body.system else []
    if not body.messages:
        raise BadRequest("messages is empty.", "messages")
    for number, data in enumerate(body.messages):
        where = f"messages.{number}"
        if not isinstance(data, dict) or data.get("role") not in ("user", "assistant"):
            raise BadRequest(f"{where}: role must be user or assistant.", where)
        content = data.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
            raise BadRequest(f"{where}: content must be a string or a list of blocks.", where)
        messages += (_assistant if data["role"] == "assistant" else _user)(blocks, where)
    if messages[-1].role == "assistant":
        raise BadRequest("The last message must come from the user.", "messages")
    return messages


def _user(blocks: list[dict[str, Any]], where: str) -> list[Message]:
    """Tool results first, each a message of its own, then what the user says."""
    results = [block for block in blocks if block.get("type") == "tool_result"]
    said = [block for block in blocks if block.get("type") != "tool_result"]
    found = [
        Message(
            "tool", _text(block.get("content") or "", where), tool_call_id=str(block.get("tool_use_id") or "")
        )
        for block in results
    ]
    return found + ([Message("user", _text(said, where))] if said or not results else [])


def _assistant(blocks: list[dict[str, Any]], where: str) -> list[Message]:
    reasoning, content, calls = "", "", list[ToolCall]()
    for block in blocks:
        kind = block.get("type")
        if kind == "thinking":
            reasoning += _string(block.get("thinking"), where)
        elif kind == "tool_use":
            arguments = block.get("input") or {}
            if not isinstance(arguments, dict) or not isinstance(block.get("name"), str):
                raise BadRequest(f"{where}: a tool_use block needs a name and an input object.", where)
            calls.append(ToolCall(block["name"], arguments, str(block.get("id") or "")))
        elif kind != "redacted_thinking":
            content += _text([block], where)
    return [Message("assistant", content, reasoning, calls)]


def _text(content: Any, where: str) -> str:
    """Text blocks, or a string, as one string."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRequest(f"{where}: content must be a string or a list of blocks.", where)
    parts = []
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text":
            raise BadRequest(f"{where}: only text blocks are supported here.", where)
        parts.append(_string(block.get("text"), where))
    return "".join(parts)


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{where}: a block's text must be a string.", where)
    return value
