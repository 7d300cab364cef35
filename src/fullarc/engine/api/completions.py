"""POST /v1/completions: plain continuation of texts or token ids, OpenAI's older form, with vLLM's extensions.

`echo` with `logprobs` and `max_tokens: 0` scores the prompt, as evaluation harnesses do.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.openai import dump
from fullarc.engine.api.chat import StreamOptions
from fullarc.engine.api.choices import ExpertsBody, collector, vllm_choices
from fullarc.engine.api.fields import Ids, OpenAISampling, SamplingBody, build, fits
from fullarc.engine.api.grammars import guiding
from fullarc.engine.api.guard import Endpoint, aside, built, read_body
from fullarc.engine.api.openai import ended, head, own_stop, spans, token_name, usage
from fullarc.engine.api.service import DONE, EventStream, Service, Watch, event, framed
from fullarc.engine.api.text import GrowingText
from fullarc.engine.api.whose import WhoseBody, assign
from fullarc.engine.request import Request, RequestError
from fullarc.engine.sampling import MAX_TOP_LOGPROBS


class CompletionBody(OpenAISampling, ExpertsBody, WhoseBody):
    """POST /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids]
    max_tokens: int | None = Field(16, strict=True, ge=0)
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: int | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None


class Completions:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The route."""
        return [Endpoint("/v1/completions", self.complete, body=CompletionBody)]

    async def complete(self, http: HttpRequest) -> Response:
        """Continue one or many prompts."""
        body = await read_body(http, CompletionBody)
        wire = body.native(16)
        if body.best_of not in (None, wire.n):
            raise RequestError("best_of: only the value of n is supported.")
        prompts = await aside(http, lambda: self._prompts(body.prompt))
        fits(self.service, len(prompts) * wire.n)
        name = self.service.next_id("cmpl")
        score_from = 0 if body.echo and body.logprobs is not None else -1
        collect = collector(body.routed_experts_prompt_start, body.form(self.service.experts) is not None)

        def made() -> list[Request]:
            grammar = body.grammar()
            return [
                request
                for number, prompt in enumerate(prompts)
                for request in build(
                    self.service, prompt, wire, [f"{name}-{number}-{index}" for index in range(wire.n)],
                    top=body.logprobs or 0, score_from=score_from, choices=collect,
                    guide=guiding(self.service, grammar, prompt),
                )
            ]  # fmt: skip

        requests = await aside(http, made, body.formed)
        assign(self.service, http, body, requests)
        if body.stream:
            watch = await self.service.submit(requests, each_token=True)
            return EventStream(watch, self._events(body, wire, name, requests, watch, len(prompts)))
        await self.service.answer(http, requests)

        def whole() -> dict[str, Any]:
            tellers = [_Teller(self.service, body, wire, request) for request in requests]
            choices = [teller.choice(index) for index, teller in enumerate(tellers)]
            reply = head(self.service, name, "text_completion", requests)
            return reply | {"choices": choices, "usage": usage(requests, len(prompts))}

        return await built(requests, whole)

    def _prompts(self, prompt: Any) -> list[list[int]]:
        if isinstance(prompt, str):
            return [self.service.encode(prompt)]
        if not prompt:
            raise RequestError("prompt is empty.", "Send at least one token.")
        if isinstance(prompt[0], str):
            return [self.service.encode(text) for text in prompt]
        return prompt if isinstance(prompt[0], list) else [prompt]

    async def _events(
        self,
        body: CompletionBody,
        wire: SamplingBody,
        name: str,
        requests: list[Request],
        watch: Watch,
        prompts: int,
    ) -> AsyncIterator[bytes]:
        tellers = {
            index: _Teller(self.service, body, wire, request) for index, request in enumerate(requests)
        }
        version, before, behind = "", b"", b""
        while tellers:
            await watch.changed()
            if requests[0].weight_version != version:
                version = requests[0].weight_version
                before, behind = framed(head(self.service, name, "text_completion", requests))
            for index, teller in list(tellers.items()):
                if not teller.news():
                    continue
                choice = teller.choice(index)
                yield before + dump(choice) + behind
                if choice["finish_reason"]:
                    del tellers[index]
        if body.stream_options and body.stream_options.include_usage:
            last = head(self.service, name, "text_completion", requests)
            yield event(last | {"choices": [], "usage": usage(requests, prompts)})
        yield DONE


class _Teller:
    """Writes one sequence's choices: all of it, or what is new since the last one."""

    def __init__(self, service: Service, body: CompletionBody, wire: SamplingBody, request: Request) -> None:
        self.service, self.body, self.request = service, body, request
        self.text = GrowingText(service.tok, request, wire) if service.tok else None
        self._told, self._first = 0, True
        self._offset = 0  # in the text, of the token that is told next

    def news(self) -> bool:
        """Whether there is something to tell."""
        return bool(self.request.finish) or self.request.told > self._told

    def choice(self, index: int) -> dict[str, Any]:
        """OpenAI's choice."""
        request, body, first = self.request, self.body, self._first
        done = bool(request.finish)  # read first: when it is set, all tokens are there
        begin, end, self._first = self._told, request.told, False
        self._told = end
        start, text = len(request.prompt), self.text.read() if self.text else ""
        echo = bool(body.echo) and first
        if echo and self.service.tok:
            text = self.service.tok.decode(request.prompt) + text
        choice: dict[str, Any] = {
            "index": index, "text": text, "logprobs": None, "finish_reason": ended(request) if done else None,
            "stop_reason": own_stop(self.service, request) if done else None,
        }  # fmt: skip
        if body.logprobs is not None:
            choice["logprobs"] = self._logprobs(begin, end, echo)
        if body.return_token_ids:
            choice["token_ids"] = request.ids[start + begin : start + end]
            if first:
                choice["prompt_token_ids"] = request.prompt
        if done:
            choice["weight_versions"] = spans(request, end)
            choice |= vllm_choices(request, body.form(self.service.experts))
        return choice

    def _logprobs(self, begin: int, end: int, echo: bool) -> dict[str, Any]:
        request, as_id = self.request, bool(self.body.return_tokens_as_token_ids)
        start = len(request.prompt)
        tokens, values = (
            request.ids[start + begin : start + end],
            list[float | None](request.logprobs[begin:end]),
        )
        best: list[Any] = (
            request.top_logprobs[begin:end] if request.params.top_logprobs else [[]] * len(tokens)
        )
        if echo:
            tokens, values = request.prompt + tokens, [None, *request.input_logprobs, *values]
            best = [None, *(request.input_top_logprobs or [[]] * len(request.input_logprobs)), *best]
        names = [token_name(self.service, token, as_id) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(self._offset)
            self._offset += len(name)
        tops = [
            None if row is None else {token_name(self.service, token, as_id): value for value, token in row}
            for row in best
        ]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
