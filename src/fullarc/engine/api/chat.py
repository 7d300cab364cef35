"""POST /v1/chat/completions: messages to ids through chat/, sampled, and back into reasoning, content and tool calls.

Streamed, reasoning and content are sent as they grow and tool calls whole at the end. Invariant: the deltas of a choice
add up to the message that the same request gets without streaming.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat import Message, render
from fullarc.chat.forced import CallGuide
from fullarc.chat.grammar import Grammar
from fullarc.chat.openai import (
    BadRequest,
    dump,
    flag,
    message_json,
    read_messages,
    read_tool_choice,
    read_tools,
)
from fullarc.chat.special import END_THINK
from fullarc.chat.turns import GrowingTurn, Turn, read_turn, stopped
from fullarc.engine.api.choices import ExpertsBody, collector, vllm_choices
from fullarc.engine.api.fields import Count, Ids, OpenAISampling, build, fits
from fullarc.engine.api.grammars import guiding
from fullarc.engine.api.guard import Endpoint, aside, built, read_body
from fullarc.engine.api.openai import chat_logprobs, head, own_stop, usage
from fullarc.engine.api.service import DONE, EventStream, Service, Watch, event, framed
from fullarc.engine.api.text import trimmed
from fullarc.engine.api.whose import WhoseBody, assign
from fullarc.engine.request import Request
from fullarc.engine.trace import Choices


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ChatBody(OpenAISampling, ExpertsBody, WhoseBody):
    """POST /v1/chat/completions, with SGLang's and vLLM's extensions."""

    messages: list[Any] | None = None
    input_ids: Ids | None = Field(None, description="the prompt as ids, instead of rendering the messages")
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(None, strict=True, ge=0)
    logprobs: bool | Annotated[int, Field(ge=0)] | None = None
    top_logprobs: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    return_prompt_token_ids: bool = False
    return_tokens_as_token_ids: bool | None = None
    return_meta_info: bool = False
    # refused unless neutral
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    continue_final_message: Literal[False, None] = None
    add_generation_prompt: Literal[True, None] = None
    echo: Literal[False, None] = None
    chat_template: None = None
    documents: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None


class TokensBody(ChatBody):
    """POST /v1/chat/completions/tokens, verifiers' and prime-rl's: the ids of the prompt, beside the messages."""

    tokens: Ids


class Conversation:
    """One request for the next turn: its prompt, its samples, and how they are read. All chat dialects use it."""

    def __init__(
        self, service: Service, messages: list[Message], tools: list[dict[str, Any]] | None, thinking: bool,
        clear_thinking: bool, sampling: OpenAISampling, max_tokens: int | None, top: int = 0,
        ids: list[int] | None = None, choices: Callable[[], Choices | None] = lambda: None,
        forced: Sequence[str] | None = None, several: bool = True, grammar: Grammar | None = None,
    ) -> None:  # fmt: skip
        if grammar and forced:
            raise BadRequest(f"{grammar.name} and a forced tool_choice contradict each other.", grammar.name)
        if grammar and grammar.kind == "structural_tag" and tools and not several:
            raise BadRequest(f"{grammar.name} cannot bar parallel tool calls.", grammar.name)
        self.service, self.tok = service, service.text
        self.tools, self.thinking = tools, thinking
        if ids is None:
            service.check_length(sum(len(message.content) + len(message.reasoning) for message in messages))
            ids = render(
                self.tok,
                messages,
                tools,
                add_generation_prompt=True,
                thinking=thinking,
                clear_thinking=clear_thinking,
            ).ids
        self.wire = sampling.native(max_tokens)
        self.name = service.next_id("chatcmpl")
        fits(service, self.wire.n)
        names = [f"{self.name}-{index}" for index in range(self.wire.n)]
        self.requests = build(
            service,
            ids,
            self.wire,
            names,
            top=top,
            choices=choices,
            guide=guiding(service, grammar, ids, self._instead(several))
            if grammar
            else lambda: self._guide(forced, several),
        )

    def _instead(self, several: bool) -> Callable[[], CallGuide | None]:
        """Makes what holds a reply that calls tools instead of following a form."""
        return lambda: CallGuide(self.tok, self.tools, None, False, several) if self.tools else None

    def _guide(self, forced: Sequence[str] | None, several: bool) -> CallGuide | None:
        """What holds the reply to a call of one of the `forced` functions, or to one call if not `several`."""
        if forced is None and (several or not self.tools):
            return None
        return CallGuide(self.tok, self.tools or (), forced, self.thinking, several)

    async def reply(
        self, http: HttpRequest, whose: WhoseBody, stream: bool | None,
        events: Callable[[Watch], AsyncIterator[bytes]], whole: Callable[[], dict[str, Any]],
    ) -> Response:  # fmt: skip
        """The samples as the dialect writes them: as events while they grow, or as a whole."""
        assign(self.service, http, whose, self.requests)
        if stream:
            watch = await self.service.submit(self.requests, each_token=True)
            return EventStream(watch, events(watch))
        await self.service.answer(http, self.requests)
        return await built(self.requests, whole)

    def usage(self) -> dict[str, Any]:
        """Token counts, those of thoughts told apart."""
        end, thought = self.tok.id(END_THINK), 0
        for request in self.requests if self.thinking else ():
            output = request.output
            thought += output.index(end) if end in output else len(output)
        return usage(self.requests, 1) | {"completion_tokens_details": {"reasoning_tokens": thought}}

    def read(self, index: int) -> Turn:
        """What a finished sample says."""
        request = self.requests[index]
        call_prefix = f"call_{self.name.rsplit('-', 1)[-1]}_{index}"
        ids = request.output if self.wire.no_stop_trim else trimmed(self.tok, request)
        turn = read_turn(self.tok, ids, self.thinking, self.tools, call_prefix)
        if request.finish == "stop":
            return stopped(turn)
        return replace(turn, finish="abort") if request.finish == "abort" else turn


class Growing:
    """One sample while it is streamed: new text is what is certain by now."""

    def __init__(self, conversation: Conversation, index: int) -> None:
        self.request = conversation.requests[index]
        self.turn = GrowingTurn(conversation.tok, conversation.thinking)
        self._bytes_of = conversation.tok.token_bytes
        self._ends = frozenset[int]() if conversation.wire.no_stop_trim else self.request.params.stop_ids
        self._fed = self._length = 0
        self.tokens = 0

    async def turns(self, watch: Watch) -> AsyncIterator[GrowingTurn]:
        """The turn, each time that it may have grown, until the sample has ended."""
        while True:
            await watch.changed()
            done = bool(self.request.finish)  # read first: when it is set, all tokens are there
            self.news()
            if done:
                return
            yield self.turn

    def news(self) -> tuple[str, str]:
        """What reasoning and content have gained."""
        request, stops = self.request, self.request.stops
        self.tokens = min(request.told, len(stops.certain)) if stops else request.told
        start, new = len(request.prompt), []
        end = start + self.tokens
        if self.tokens and request.ids[end - 1] in self._ends:
            end -= 1
        for token in request.ids[start + self._fed : end]:
            length = self._length + len(self._bytes_of(token))
            if stops and length > stops.certain[self.tokens - 1]:
                break
            self._length = length
            new.append(token)
        self._fed += len(new)
        return self.turn.feed(new)


class Chat:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/v1/chat/completions", self.chat, body=ChatBody),
            Endpoint("/v1/chat/completions/tokens", self.tokens, body=TokensBody),
        ]

    async def chat(self, http: HttpRequest) -> Response:
        """The next turn of a conversation."""
        return await self._reply(http, await read_body(http, ChatBody))

    async def tokens(self, http: HttpRequest) -> Response:
        """The next turn of a conversation that is given as ids."""
        body = await read_body(http, TokensBody)
        return await self._reply(http, body.model_copy(update={"input_ids": body.tokens}))

    async def _reply(self, http: HttpRequest, body: ChatBody) -> Response:
        conversation = await aside(http, lambda: self._conversation(body), body.formed)
        return await conversation.reply(
            http,
            body,
            body.stream,
            partial(self._events, body, conversation),
            lambda: self._whole(body, conversation),
        )

    def _conversation(self, body: ChatBody) -> Conversation:
        kwargs = body.chat_template_kwargs or {}
        messages = [] if body.input_ids is not None and not body.messages else read_messages(body.messages)
        tools = None if body.tool_choice == "none" else read_tools(body.tools)
        forced = read_tool_choice(body.tool_choice, tools)
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("'top_logprobs' needs 'logprobs'.", "top_logprobs")
        thinking = flag(kwargs, "enable_thinking", body.reasoning_effort != "none")
        return Conversation(
            self.service, messages, tools, thinking, flag(kwargs, "clear_thinking", False),
            body.model_copy(update={"max_tokens": limit}), None, body.top_logprobs or 0, body.input_ids,
            collector(body.routed_experts_prompt_start, body.form(self.service.experts) is not None),
            forced, several=body.parallel_tool_calls is not False and not isinstance(body.tool_choice, dict),
            grammar=body.grammar(),
        )  # fmt: skip

    def _whole(self, body: ChatBody, conversation: Conversation) -> dict[str, Any]:
        requests = conversation.requests
        choices = []
        for index, request in enumerate(requests):
            turn = conversation.read(index)
            message = turn.message
            if not body.separate_reasoning and message.reasoning:
                message = Message("assistant", _joined(message), "", message.tool_calls)
            choice = {"index": index, "message": message_json(message), "finish_reason": turn.finish}
            choices.append(choice | self._told(body, request, turn, 0, request.told))
        reply = head(self.service, conversation.name, "chat.completion", requests)
        if body.return_token_ids or body.return_prompt_token_ids:
            reply["prompt_token_ids"] = requests[0].prompt
        return reply | {"choices": choices, "usage": conversation.usage()}

    def _told(
        self, body: ChatBody, request: Request, turn: Turn | None, first: int, last: int
    ) -> dict[str, Any]:
        """A choice's extras about the output tokens [first, last), and about its end if `turn` is given."""
        told: dict[str, Any] = {"logprobs": None}
        if body.logprobs:
            told["logprobs"] = chat_logprobs(
                self.service, request, first, last, bool(body.return_tokens_as_token_ids)
            )
        if body.return_token_ids:
            start = len(request.prompt)
            told["token_ids"] = request.ids[start + first : start + last]
        if turn:
            told |= {
                "matched_stop": request.matched,
                "stop_reason": own_stop(self.service, request),
                "format_errors": turn.format_errors,
            }
            told |= vllm_choices(request, body.form(self.service.experts))
            if body.return_meta_info:
                told["meta_info"] = {
                    "id": request.rid,
                    "weight_version": request.weight_version,
                    "weight_versions": [list(span) for span in request.versions],
                    "cached_tokens": request.cached_tokens,
                    "completion_tokens": len(request.logprobs),
                    "prompt_tokens": len(request.prompt),
                }
        return told

    async def _events(self, body: ChatBody, conversation: Conversation, watch: Watch) -> AsyncIterator[bytes]:
        requests = conversation.requests
        streams = [_Choice(body, conversation, index) for index in range(len(requests))]
        first = head(self.service, conversation.name, "chat.completion.chunk", requests)
        opening = {"choices": [_chunk(s.index, {"role": "assistant", "content": ""}) for s in streams]}
        if body.return_token_ids or body.return_prompt_token_ids:
            opening["prompt_token_ids"] = requests[0].prompt  # type: ignore[assignment]
        yield event(first | opening)
        open_ones = list(streams)
        version, before, behind = "", b"", b""
        while open_ones:
            await watch.changed()
            if requests[0].weight_version != version:
                version = first["metadata"]["weight_version"] = requests[0].weight_version
                before, behind = framed(first)
            for stream in list(open_ones):
                request = stream.growing.request
                done = bool(request.finish)
                turn = conversation.read(stream.index) if done else None
                if delta := stream.delta(turn):
                    told = self._told(body, request, None, *stream.untold())
                    yield before + dump(_chunk(stream.index, delta) | told) + behind
                if turn:
                    open_ones.remove(stream)
                    last = self._told(body, request, turn, *stream.untold()) | {"finish_reason": turn.finish}
                    yield before + dump(_chunk(stream.index, {}) | last) + behind
        if body.stream_options and body.stream_options.include_usage:
            yield event(first | {"choices": [], "usage": conversation.usage()})
        yield DONE


class _Choice:
    """Which deltas of one choice were sent."""

    def __init__(self, body: ChatBody, conversation: Conversation, index: int) -> None:
        self.body, self.index = body, index
        self.growing = Growing(conversation, index)
        self._sent = {"reasoning": "", "content": ""}
        self._told = 0

    def untold(self) -> tuple[int, int]:
        """The tokens that no chunk has told of; from now on they are told."""
        first, self._told = self._told, self.growing.tokens
        return first, self._told

    def delta(self, turn: Turn | None) -> dict[str, Any]:
        """What is to be sent now; with `turn`, all that is left of it."""
        self.growing.news()
        reasoning, content = self.growing.turn.reasoning, self.growing.turn.content
        calls: list[dict[str, Any]] = []
        if turn:
            reasoning, content = turn.message.reasoning, turn.message.content
            calls = turn.message.to_openai().get("tool_calls", [])
        elif not self.body.stream_reasoning and not content:
            reasoning = ""
        delta: dict[str, Any] = {}
        if self.body.separate_reasoning:
            delta |= self._rest("reasoning", reasoning, "reasoning_content")
            delta |= self._rest("content", content, "content")
        elif reasoning:
            closed = content or turn
            joined = f"<think>{reasoning}</think>{content}" if closed else f"<think>{reasoning}"
            delta |= self._rest("content", joined, "content")
        else:
            delta |= self._rest("content", content, "content")
        if calls:
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(calls)]
        return delta

    def _rest(self, part: str, text: str, name: str) -> dict[str, str]:
        sent = self._sent[part]
        if len(text) <= len(sent):
            return {}
        self._sent[part] = text
        return {name: text[len(sent) :]}


def _joined(message: Message) -> str:
    return f"<think>{message.reasoning}</think>{message.content}"


def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "finish_reason": None}
