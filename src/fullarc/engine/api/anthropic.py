"""Anthropic's Messages: POST /v1/messages, streamed or whole, with tools and thinking, and /v1/messages/count_tokens.

`thinking: {"type": "disabled"}` samples a turn that does not think.
"""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat import anthropic as dialect
from fullarc.chat import render
from fullarc.chat.grammar import read_format
from fullarc.chat.turns import Turn
from fullarc.engine.api.chat import Conversation, Growing
from fullarc.engine.api.fields import OpenAISampling
from fullarc.engine.api.guard import Endpoint, answer, aside, read_body
from fullarc.engine.api.openai import spans
from fullarc.engine.api.service import Service, Watch, event
from fullarc.engine.api.whose import WhoseBody
from fullarc.engine.request import Request


class CountBody(BaseModel):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None


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
        return answer({"input_tokens": await aside(http, lambda: self._length(body))})

    def _length(self, body: CountBody) -> int:
        rendered = render(
            self.service.text,
            dialect.read_conversation(body.system, body.messages),
            dialect.read_tool_use(body.tools, body.tool_choice).tools,
            add_generation_prompt=True,
            thinking=dialect.read_thinking(body.thinking),
        )
        return len(rendered.ids)

    async def messages(self, http: HttpRequest) -> Response:
        """The next turn of a conversation."""
        body = await read_body(http, MessagesBody)
        formed = dialect.output_format(body.output_config) is not None
        conversation = await aside(http, lambda: self._conversation(body), formed)
        return await conversation.reply(
            http, WhoseBody(model=body.model), body.stream,
            partial(self._events, conversation), lambda: self._whole(conversation),
        )  # fmt: skip

    def _conversation(self, body: MessagesBody) -> Conversation:
        sampling = OpenAISampling.model_construct(
            max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p, top_k=body.top_k,
            stop=body.stop_sequences, seed=body.seed,
        )  # fmt: skip
        use = dialect.read_tool_use(body.tools, body.tool_choice)
        return Conversation(
            self.service,
            dialect.read_conversation(body.system, body.messages),
            use.tools,
            dialect.read_thinking(body.thinking),
            False,
            sampling,
            body.max_tokens,
            forced=use.forced,
            several=use.several,
            grammar=read_format(dialect.output_format(body.output_config), "output_config.format"),
        )

    def _whole(self, conversation: Conversation) -> dict[str, Any]:
        turn = conversation.read(0)
        content = {"content": dialect.content_blocks(turn.message)}
        request = conversation.requests[0]
        return self._head(conversation) | content | _end(turn, request) | _weights(request)

    def _head(self, conversation: Conversation) -> dict[str, Any]:
        usage = _usage(conversation.requests[0])
        return dialect.message_head(f"msg_{conversation.name}", self.service.name, usage)

    async def _events(self, conversation: Conversation, watch: Watch) -> AsyncIterator[bytes]:
        yield _event({"type": "message_start", "message": self._head(conversation)})
        blocks = dialect.BlockEvents()
        async for grown in Growing(conversation, 0).turns(watch):
            for data in blocks.grow(grown.reasoning, grown.content):
                yield _event(data)
        turn, request = conversation.read(0), conversation.requests[0]
        for data in blocks.end(turn.message):
            yield _event(data)
        end = _end(turn, request)
        delta = {"stop_reason": end["stop_reason"], "stop_sequence": end["stop_sequence"]}
        yield _event({"type": "message_delta", "delta": delta, "usage": _usage(request)} | _weights(request))
        yield _event({"type": "message_stop"})


def _event(data: dict[str, Any]) -> bytes:
    return event(data, data["type"])


def _end(turn: Turn, request: Request) -> dict[str, Any]:
    own = request.matched if isinstance(request.matched, str) else None
    reason = "stop_sequence" if own is not None else dialect.STOP_REASONS[turn.finish]
    return {"stop_reason": reason, "stop_sequence": own, "usage": _usage(request)}


def _weights(request: Request) -> dict[str, Any]:
    """Not Anthropic's: which weights sampled which tokens."""
    return {"weight_versions": spans(request, request.told)}


def _usage(request: Request) -> dict[str, int]:
    return dialect.usage_json(len(request.prompt), request.cached_tokens, len(request.logprobs))
