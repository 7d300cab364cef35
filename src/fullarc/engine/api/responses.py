"""OpenAI's POST /v1/responses, whole or streamed.

Nothing is stored: every answer says `store: false` whatever was asked, and a request that refers to an earlier response
is refused; the client sends the items of the conversation instead.
"""

import itertools
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat import responses as dialect
from fullarc.chat.grammar import read_format
from fullarc.chat.openai import read_tool_choice
from fullarc.chat.turns import Turn
from fullarc.engine.api.chat import Conversation, Growing
from fullarc.engine.api.fields import OpenAISampling
from fullarc.engine.api.guard import Endpoint, aside, read_body
from fullarc.engine.api.openai import weights_used
from fullarc.engine.api.service import Service, Watch, event
from fullarc.engine.api.whose import WhoseBody


class ReasoningBody(BaseModel):
    """`reasoning`."""

    model_config = ConfigDict(extra="ignore")
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class ResponsesBody(WhoseBody):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="ignore")

    input: str | list[Any]
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningBody | None = None
    max_output_tokens: int | None = Field(None, strict=True, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = Field(None, strict=True, description="not OpenAI's: a random stream of one's own")
    stream: bool | None = None
    store: bool | None = Field(None, description="nothing is stored")
    metadata: dict[str, str] | None = None
    text: dict[str, Any] | None = None
    # refused unless neutral
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    background: Literal[False, None] = None
    truncation: Literal["disabled", None] = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None

    @property
    def format(self) -> Any:
        """The form of the text, as it was asked for."""
        return (self.text or {}).get("format")


class Responses:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The route."""
        return [Endpoint("/v1/responses", self.respond, body=ResponsesBody)]

    async def respond(self, http: HttpRequest) -> Response:
        """The next turn of a conversation, as items."""
        body = await read_body(http, ResponsesBody)
        conversation = await aside(http, lambda: self._conversation(body), body.format is not None)
        return await conversation.reply(
            http, body, body.stream, partial(self._events, body, conversation),
            lambda: self._told(body, conversation, conversation.read(0)),
        )  # fmt: skip

    def _conversation(self, body: ResponsesBody) -> Conversation:
        messages = dialect.read_input(body.instructions, body.input)
        tools = None if body.tool_choice == "none" else dialect.read_functions(body.tools)
        choice = dialect.read_choice(body.tool_choice)
        sampling = OpenAISampling.model_construct(
            max_tokens=body.max_output_tokens, temperature=body.temperature, top_p=body.top_p, seed=body.seed
        )
        return Conversation(
            self.service, messages, tools, body.reasoning is None or body.reasoning.effort != "none", False,
            sampling, None, forced=read_tool_choice(choice, tools),
            several=body.parallel_tool_calls is not False and not isinstance(choice, dict),
            grammar=read_format(body.format, "text.format"),
        )  # fmt: skip

    def _told(self, body: ResponsesBody, conversation: Conversation, turn: Turn | None) -> dict[str, Any]:
        """The response; without `turn` it has only begun."""
        name = conversation.name
        status = _status(turn) if turn else "in_progress"
        reason = "max_output_tokens" if turn and turn.finish == "length" else "abort"
        used = conversation.usage()
        usage = {
            "input_tokens": used["prompt_tokens"], "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"], "output_tokens_details": used["completion_tokens_details"],
            "total_tokens": used["total_tokens"],
        }  # fmt: skip
        return {
            "id": f"resp_{name}", "object": "response", "created_at": int(time.time()), "status": status,
            "error": None, "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "model": self.service.name, "output": dialect.output_items(turn.message, name, status) if turn else [],
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None}, "store": False,
            "temperature": conversation.wire.temperature, "text": {"format": body.format or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto", "tools": body.tools or [], "top_p": conversation.wire.top_p,
            "truncation": "disabled", "usage": usage if turn else None,
            "metadata": (body.metadata or {}) | weights_used(self.service, conversation.requests),
        }  # fmt: skip

    async def _events(
        self, body: ResponsesBody, conversation: Conversation, watch: Watch
    ) -> AsyncIterator[bytes]:
        numbers = itertools.count()

        def made(data: dict[str, Any]) -> bytes:
            return event(data | {"sequence_number": next(numbers)}, data["type"])

        begun = self._told(body, conversation, None)
        yield made({"type": "response.created", "response": begun})
        yield made({"type": "response.in_progress", "response": begun})
        items = dialect.ItemEvents(conversation.name)
        async for grown in Growing(conversation, 0).turns(watch):
            for data in items.grow(grown.reasoning, grown.content):
                yield made(data)
        turn = conversation.read(0)
        for data in items.end(turn.message, _status(turn)):
            yield made(data)
        told = self._told(body, conversation, turn) | {"created_at": begun["created_at"]}
        yield made({"type": f"response.{told['status']}", "response": told})


def _status(turn: Turn) -> str:
    return "completed" if turn.finish in ("stop", "tool_calls") else "incomplete"
