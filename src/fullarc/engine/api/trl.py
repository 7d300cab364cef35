"""The routes of TRL's `trl vllm-serve`, with a slash at their ends; weights come by `communicator`.

Prompts and conversations go in, ids and log-probs come out, of each token the likeliest and its own, best first. TRL
compares these log-probs with its own at its temperature, so they are those that a token was drawn with: behind
temperature, penalties and truncation (vLLM's "processed"). Those of given sequences are at temperature 1.
"""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat import render
from fullarc.chat.errors import refusal
from fullarc.chat.forms import Text
from fullarc.chat.openai import BadRequest, flag, read_messages, read_tools
from fullarc.engine.api.communicator import Communicator
from fullarc.engine.api.fields import Count, Ids, SamplingBody, build, fits
from fullarc.engine.api.grammars import guiding
from fullarc.engine.api.guard import Endpoint, answer, aside, built, read_body
from fullarc.engine.api.tito import TitoSampling
from fullarc.engine.api.transfer import Transfer
from fullarc.engine.api.whose import WhoseBody, assign
from fullarc.engine.request import Request, RequestError

Pairs = list[tuple[float, int]]


class SamplingFields(BaseModel):
    """What /generate/ and /chat/ share."""

    model_config = ConfigDict(extra="ignore")

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = 0
    structured_outputs_regex: Text | None = None
    generation_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="more of vLLM's SamplingParams"
    )

    def sampling(self) -> TitoSampling:
        """All of it as vLLM's SamplingParams. Raises BadRequest for what those have not."""
        names = (
            "n",
            "repetition_penalty",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "max_tokens",
            "logprobs",
        )
        for name in self.generation_kwargs:
            if name not in TitoSampling.model_fields or name == "prompt_logprobs":
                raise BadRequest(f"generation_kwargs: {name[:100]!r} is not known here.", "generation_kwargs")
        form: dict[str, Any] = {}
        if self.structured_outputs_regex is not None:
            form = {"structured_outputs": {"regex": self.structured_outputs_regex}}
        try:
            return TitoSampling.model_validate(
                self.model_dump(include={*names}) | form | self.generation_kwargs
            )
        except ValidationError as error:
            raise refusal(error) from None


class PromptsBody(SamplingFields):
    """POST /generate/."""

    prompts: list[str] | list[Ids] = Field(min_length=1)
    images: list[None] | None = None


class ChatsBody(SamplingFields):
    """POST /chat/."""

    messages: list[list[Any]] = Field(min_length=1)
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class SequencesBody(BaseModel):
    """POST /get_sequence_logprobs/."""

    model_config = ConfigDict(extra="ignore")

    sequences: list[Ids]
    prompt_lengths: list[Annotated[int, Field(strict=True, ge=0)]]
    top_logprobs: Count = 100
    temperature: float = Field(1.0, ge=1, le=1)
    response_format: Literal["json", "binary"] = "json"


class Trl:
    """The handlers."""

    def __init__(self, transfer: Transfer) -> None:
        self.service, self.communicator = transfer.service, Communicator(transfer)

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/health/", self.health, ("GET",)),
            Endpoint("/get_world_size/", self.world_size, ("GET",)),
            Endpoint("/generate/", self.generate, body=PromptsBody),
            Endpoint("/chat/", self.chat, body=ChatsBody),
            Endpoint("/get_sequence_logprobs/", self.score, body=SequencesBody),
            Endpoint("/reset_prefix_cache/", self.reset),
            *self.communicator.endpoints(),
        ]

    async def health(self, _http: HttpRequest) -> Response:
        """Whether the engine's thread lives."""
        healthy = self.service.worker.healthy
        return answer({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    async def world_size(self, _http: HttpRequest) -> Response:
        """One process."""
        return answer({"world_size": 1})

    async def reset(self, _http: HttpRequest) -> Response:
        """The end of an update; forget all cached prefixes."""
        await self.communicator.settle()
        await self.service.on_engine(lambda s: s.prefix.clear())
        return answer({"message": "Request received, resetting prefix cache status: True"})

    async def generate(self, http: HttpRequest) -> Response:
        """Samples of many prompts."""
        body = await read_body(http, PromptsBody)
        encode = self.service.encode
        return await self._sample(
            http,
            body,
            await aside(http, lambda: [encode(p) if isinstance(p, str) else p for p in body.prompts]),
        )

    async def chat(self, http: HttpRequest) -> Response:
        """Samples of the next turns of many conversations."""
        body = await read_body(http, ChatsBody)
        return await self._sample(http, body, await aside(http, lambda: self._rendered(body)))

    def _rendered(self, body: ChatsBody) -> list[list[int]]:
        tok, tools, kwargs = self.service.text, read_tools(body.tools), body.chat_template_kwargs
        how = flag(kwargs, "enable_thinking", True), flag(kwargs, "clear_thinking", False)
        prompts = []
        for messages in map(read_messages, body.messages):
            self.service.check_length(sum(len(message.content) for message in messages))
            rendered = render(
                tok, messages, tools, add_generation_prompt=True, thinking=how[0], clear_thinking=how[1]
            )
            prompts.append(rendered.ids)
        return prompts

    async def _sample(
        self, http: HttpRequest, body: SamplingFields, prompts: Sequence[list[int]]
    ) -> Response:
        sampling = body.sampling()
        wire, top = sampling.native(None), sampling.logprobs or 0
        fits(self.service, len(prompts) * wire.n)
        name = self.service.next_id("trl")
        support = sampling.logprobs is not None and (_steers(wire) or sampling.formed)

        def made() -> list[Request]:
            return [
                request
                for number, prompt in enumerate(prompts)
                for request in build(
                    self.service, prompt, wire, [f"{name}-{number}-{index}" for index in range(wire.n)], top=top,
                    support=support, guide=guiding(self.service, sampling.grammar(), prompt),
                )
            ]  # fmt: skip

        requests = await aside(http, made, sampling.formed)
        assign(self.service, http, WhoseBody(), requests)
        await self.service.answer(http, requests)

        def whole() -> dict[str, Any]:
            told = {"prompt_ids": prompts, "completion_ids": [request.output for request in requests]}
            rows = None if sampling.logprobs is None else [_sampled(request, top) for request in requests]
            return told | _columns(rows)

        return await built(requests, whole)

    async def score(self, http: HttpRequest) -> Response:
        """The likeliest tokens at each place behind the prompts of given sequences, and the tokens there."""
        body = await read_body(http, SequencesBody)
        lengths, top = body.prompt_lengths, body.top_logprobs
        if len(lengths) != len(body.sequences) or any(
            length > len(ids) for length, ids in zip(lengths, body.sequences, strict=False)
        ):
            raise RequestError("prompt_lengths needs a length for each of sequences, none of them too long.")
        fits(self.service, len(lengths))
        name, wire = self.service.next_id("trl"), SamplingBody(max_new_tokens=0)
        requests = [
            build(self.service, ids, wire, [f"{name}-{number}"], score_from=length, top=top)[0]
            for number, (ids, length) in enumerate(zip(body.sequences, lengths, strict=True))
        ]
        assign(self.service, http, WhoseBody(), requests)
        if requests:
            await self.service.answer(http, requests)
        if any(request.finish == "abort" for request in requests):
            raise RequestError("The scoring was aborted.", "Send it again.")

        def whole() -> dict[str, Any]:
            if body.response_format == "binary":
                return _packed(requests, top)
            scored = ((request, _scored(request)) for request in requests)
            return _columns([[[], *rows] if request.score_from == 0 else rows for request, rows in scored])

        return await built(requests, whole)


def _steers(wire: SamplingBody) -> bool:
    """Whether tokens are drawn from something else than the model's distribution at the temperature."""
    cut = wire.top_p < 1 or wire.top_k > 0 or wire.min_p > 0 or wire.repetition_penalty != 1
    return wire.temperature > 0 and bool(
        cut or wire.frequency_penalty or wire.presence_penalty or wire.logit_bias
    )


def _with(best: Pairs, own: tuple[float, int]) -> Pairs:
    """The best, and the token itself where it is none of them."""
    return best if any(token == own[1] for _, token in best) else [*best, own]


def _sampled(request: Request, top: int) -> list[Pairs]:
    """What each sampled token was drawn with."""
    rows = []
    for at, token in enumerate(request.output[: request.told]):
        if request.params.support:
            drawable = sorted(request.supports[at], key=lambda pair: (-pair[0], pair[1]))
            value = next(value for value, other in drawable if other == token)
            rows.append(_with(drawable[:top], (value, token)))
        else:
            rows.append(_with(request.top_logprobs[at] if top else [], (request.logprobs[at], token)))
    return rows


def _scored(request: Request) -> list[Pairs]:
    """The same of the scored tokens of a prompt; the first token of a sequence is none."""
    ids = request.prompt[max(request.score_from, 1) :]
    tops = request.input_top_logprobs or [[]] * len(ids)
    own = zip(request.input_logprobs, ids, strict=True)
    return [_with(top, pair) for top, pair in zip(tops, own, strict=True)]


def _columns(rows: list[list[Pairs]] | None) -> dict[str, Any]:
    """Log-probs and ids apart: [sequence, token, rank]."""
    if rows is None:
        return {"logprobs": None, "logprob_token_ids": None}
    return {
        "logprobs": [[[value for value, _ in row] for row in sequence] for sequence in rows],
        "logprob_token_ids": [[[token for _, token in row] for row in sequence] for sequence in rows],
    }


def _packed(requests: Sequence[Request], top: int) -> dict[str, Any]:
    """The same as arrays [sequence, token, rank], -inf where there is nothing; the tokens themselves apart."""
    lengths = [len(request.prompt) - request.score_from for request in requests]
    shape = (len(requests), max(lengths, default=0))
    best, best_ids = np.full((*shape, top), -np.inf, np.float32), np.zeros((*shape, top), np.int32)
    own, own_ids = np.full((*shape, 1), -np.inf, np.float32), np.zeros((*shape, 1), np.int32)
    for number, request in enumerate(requests):
        first = max(1 - request.score_from, 0)
        for at, value in enumerate(request.input_logprobs):
            place = number, first + at
            own[place], own_ids[place] = value, request.prompt[request.score_from + first + at]
            if top:
                best[place], best_ids[place] = zip(*request.input_top_logprobs[at], strict=True)
    return {
        "logprobs_b64": _base64(best), "token_ids_b64": _base64(best_ids),
        "actual_logprobs_b64": _base64(own), "actual_token_ids_b64": _base64(own_ids),
        "shape": [*best.shape], "completion_lengths": lengths,
    }  # fmt: skip


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()
