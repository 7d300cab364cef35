"""Token ids in, token ids out, as vLLM has it: POST /inference/v1/generate.

Streamed, each event tells what is new; the first one the prompt's log-probs too, where they are asked for.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.engine.api.choices import ExpertsBody, collector, vllm_choices
from fullarc.engine.api.fields import Ids, OpenAISampling, build, fits
from fullarc.engine.api.grammars import guiding
from fullarc.engine.api.guard import Endpoint, aside, built, read_body
from fullarc.engine.api.openai import ended, own_stop, spans, usage
from fullarc.engine.api.service import DONE, EventStream, Service, Watch, event
from fullarc.engine.api.text import whole_text
from fullarc.engine.api.whose import WhoseBody, assign
from fullarc.engine.request import Request
from fullarc.engine.sampling import MAX_TOP_LOGPROBS


class TitoSampling(OpenAISampling):
    """`sampling_params` of /inference/v1/generate: vLLM's SamplingParams."""

    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_tokens: int | None = Field(None, strict=True, ge=0)
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TitoBody(ExpertsBody, WhoseBody):
    """POST /inference/v1/generate."""

    model_config = ConfigDict(extra="ignore")

    request_id: str | None = Field(None, max_length=1000)
    token_ids: Ids
    sampling_params: TitoSampling = Field(default_factory=TitoSampling)
    stream: bool | None = False
    output_mode: Literal["tokens", "text"] | None = None
    return_sampling_mask: bool | None = None
    content_parts: None = None
    features: None = None
    kv_transfer_params: None = None


class Tito:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The route."""
        return [Endpoint("/inference/v1/generate", self.generate, body=TitoBody)]

    async def generate(self, http: HttpRequest) -> Response:
        """Sample from token ids."""
        body = await read_body(http, TitoBody)
        sampling = body.sampling_params
        wire = sampling.native(None)
        fits(self.service, wire.n)
        name = body.request_id or self.service.next_id("tito")
        top = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
        names = [name if wire.n == 1 else f"{name}_{index}" for index in range(wire.n)]
        score_from = -1 if sampling.prompt_logprobs is None else 0
        form = body.form(self.service.experts)
        choices = collector(sampling.routed_experts_prompt_start, form is not None)
        requests = await aside(
            http,
            lambda: build(
                self.service,
                body.token_ids,
                wire,
                names,
                top=top,
                score_from=score_from,
                choices=choices,
                support=bool(body.return_sampling_mask),
                guide=guiding(self.service, sampling.grammar(), body.token_ids),
            ),
            sampling.formed,
        )
        assign(self.service, http, body, requests)
        tellers = [_Teller(self.service, body, request) for request in requests]
        if body.stream:
            watch = await self.service.submit(requests, each_token=True)
            return EventStream(watch, _events(name, tellers, watch, sampling.prompt_logprobs))
        await self.service.answer(http, requests)

        def whole() -> dict[str, Any]:
            reply: dict[str, Any] = {
                "request_id": name,
                "choices": [teller.choice(number) for number, teller in enumerate(tellers)],
            }
            if body.output_mode == "text":
                for choice, request in zip(reply["choices"], requests, strict=True):
                    choice["text"] = whole_text(self.service.text, request, wire)
            reply["prompt_logprobs"] = _prompt_logprobs(requests[0], sampling.prompt_logprobs)
            return reply | {"usage": usage(requests, 1), "weight_version": requests[0].weight_version}

        return await built(requests, whole)


class _Teller:
    """Writes one sequence's choices: all of it, or what is new since the last one."""

    def __init__(self, service: Service, body: TitoBody, request: Request) -> None:
        self.service, self.request = service, request
        self.asked = body.sampling_params.logprobs
        self.form = body.form(service.experts)
        self.told = 0

    def choice(self, index: int) -> dict[str, Any]:
        """vLLM's choice with token ids."""
        request = self.request
        done = bool(request.finish)  # read first: when it is set, all tokens are there
        begin, end, start = self.told, request.told, len(request.prompt)
        self.told = end
        choice: dict[str, Any] = {
            "index": index,
            "token_ids": request.ids[start + begin : start + end],
            "finish_reason": ended(request) if done else None,
            "stop_reason": own_stop(self.service, request) if done else None,
            "logprobs": None,
            "weight_versions": spans(request, end),
        }
        if request.params.support:
            choice["sampling_mask"] = [[token for _, token in row] for row in request.supports[begin:end]]
        if self.asked is not None:
            content = []
            for at in range(begin, end):
                token, best = request.ids[start + at], []
                if self.asked:
                    best = [
                        _entry(*pair) | {"rank": n + 1} for n, pair in enumerate(request.top_logprobs[at])
                    ]
                rank = next((entry["rank"] for entry in best if entry["token_id"] == token), None)
                own = _entry(request.logprobs[at], token) | {"rank": rank}
                # the sampled token first, then the others in the order of their ranks
                others = [entry for entry in best[: self.asked] if entry["token_id"] != token]
                content.append(own | {"top_logprobs": [own, *others] if self.asked else []})
            choice["logprobs"] = {"content": content}
        if done:
            choice |= vllm_choices(request, self.form)
        return choice


def _entry(value: float, token: int) -> dict[str, Any]:
    return {"token": f"token_id:{token}", "token_id": token, "logprob": value}


def _prompt_logprobs(request: Request, asked: int | None) -> list[Any] | None:
    """One {token id: {logprob, rank}} per prompt token, the likeliest beside the token itself; the first is null."""
    if asked is None:
        return None
    rows: list[Any] = [None]
    for at, (token, value) in enumerate(zip(request.prompt[1:], request.input_logprobs, strict=False)):
        row = {str(token): {"logprob": value, "rank": None}}
        for rank, (best, other) in enumerate(request.input_top_logprobs[at][:asked] if asked else []):
            row[str(other)] = {"logprob": best, "rank": rank + 1}
        rows.append(row)
    return rows


async def _events(
    name: str, tellers: list[_Teller], watch: Watch, prompt_logprobs: int | None
) -> AsyncIterator[bytes]:
    open_ones, scores = dict(enumerate(tellers)), prompt_logprobs is not None
    while open_ones:
        await watch.changed()
        for index, teller in list(open_ones.items()):
            if not teller.request.finish and teller.request.told == teller.told:
                continue
            choice = teller.choice(index)
            told: dict[str, Any] = {"request_id": name, "choices": [choice]}
            if scores and not teller.request.unscored:
                told["prompt_logprobs"], scores = _prompt_logprobs(teller.request, prompt_logprobs), False
            yield event(told)
            if choice["finish_reason"]:
                del open_ones[index]
    yield DONE
