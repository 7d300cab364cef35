"""SGLang's POST /generate: sample from one or many prompts, or score them.

A batch (several prompts, or n > 1) is answered by a list; streamed, by events that carry their `index`. Streamed events
are cumulative. Text is decoded where the folder has a tokenizer, and is "" where it has none.
"""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.chat.forced import CallGuide
from fullarc.chat.openai import GrowingList, dump
from fullarc.chat.special import END_THINK, THINK
from fullarc.engine.api.choices import MaskMode, collector, sglang_choices, sglang_support, slime_support
from fullarc.engine.api.fields import AskedIds, Count, Ids, SamplingBody, build, fits
from fullarc.engine.api.grammars import guiding
from fullarc.engine.api.guard import Endpoint, aside, read_body, written
from fullarc.engine.api.service import DONE, EventStream, Service, Watch
from fullarc.engine.api.sessions import SessionParams, Sessions, Turn
from fullarc.engine.api.text import GrowingText
from fullarc.engine.api.whose import session_of
from fullarc.engine.request import Request, RequestError
from fullarc.engine.scheduler import Scheduler

BLOCK = 512  # entries of a list that are written at once

Name = Annotated[str, Field(max_length=1000)] | None


class GenerateBody(BaseModel):
    """POST /generate. Fields that are not here are ignored, as SGLang does; these would change the answer."""

    model_config = ConfigDict(extra="ignore")

    rid: str | list[str] | None = None
    text: str | list[str] | None = None
    input_ids: Ids | list[Ids] | None = None
    sampling_params: SamplingBody | list[SamplingBody] = Field(default_factory=SamplingBody)
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: Count | list[Count] = 0
    token_ids_logprob: AskedIds | list[AskedIds] | None = None
    return_text_in_logprobs: bool = False
    return_routed_experts: bool | None = None
    routed_experts_start_len: int = Field(0, strict=True)
    return_indexer_topk: bool | None = None
    return_sampling_mask: bool | list[bool] | None = None
    sampling_logprobs_mode: MaskMode | None = None
    stream: bool = False
    priority: int | None = Field(None, strict=True, description="higher ones first")
    routing_key: str | None = Field(None, max_length=1000)
    extra_key: Name | list[Name] = None
    cache_salt: Name | list[Name] = None
    lora_path: Name | list[Name] = Field(None, description="names of loaded adapters")
    session_params: SessionParams | None = None
    # not implemented: only their neutral values are accepted
    input_embeds: None = None
    image_data: Annotated[list[Any], Field(max_length=0)] | None = None
    audio_data: None = None
    video_data: None = None
    return_hidden_states: Literal[False, None] = None
    max_thinking_tokens: None = None
    watermark: None = None
    positional_embed_overrides: None = None
    custom_logit_processor: None = None


class Plan:
    """One body, spread over its sequences: requests and how each is told. `turn`: its place in a session."""

    def __init__(self, service: Service, body: GenerateBody, turn: Turn | None) -> None:
        self.service, self.body = service, body
        prompts, nested = _prompts(service, body)
        if turn:
            prompts = [turn.before + prompt for prompt in prompts]
        count, sampling = len(prompts), _spread(body.sampling_params, len(prompts), "sampling_params")
        self.batched = nested or any(wire.n > 1 for wire in sampling)
        total = sum(wire.n for wire in sampling)
        fits(service, total)
        wants = _spread(body.return_logprob, count, "return_logprob")
        starts = _spread(body.logprob_start_len, count, "logprob_start_len")
        tops = _spread(body.top_logprobs_num, count, "top_logprobs_num")
        asked = body.token_ids_logprob or []
        asked_of = (
            _spread(asked, count, "token_ids_logprob")
            if asked and isinstance(asked[0], list)
            else [asked] * count
        )
        mode = body.sampling_logprobs_mode or "selected"
        masks = _spread(body.return_sampling_mask, count, "return_sampling_mask")
        rids = _spread(body.rid, count, "rid")
        salts = _spread(body.cache_salt, count, "cache_salt")
        keys = _spread(body.extra_key, count, "extra_key")
        adapters = _spread(body.lora_path, count, "lora_path")
        prefix = service.next_id("fullarc")
        choices = collector(
            body.routed_experts_start_len, bool(body.return_routed_experts), bool(body.return_indexer_topk)
        )
        self.requests: list[Request] = []
        self.tellers: list[Teller] = []
        for number, prompt in enumerate(prompts):
            wire, rid = sampling[number], rids[number]
            shared = rid is not None and (wire.n > 1 or (count > 1 and isinstance(body.rid, str)))
            names = [
                f"{rid}_{number}_{index}"
                if shared
                else rid
                if rid is not None
                else f"{prefix}-{number}-{index}"
                for index in range(wire.n)
            ]
            told, mask = bool(wants[number]), mode if masks[number] else None
            new = build(
                service, prompt, wire, names, score_from=starts[number] if told else -1,
                top=tops[number] if told else 0, logprob_ids=asked_of[number] if told else (), choices=choices,
                support=bool(mask or wire.top_p_ids),
                guide=guiding(service, wire.grammar(), prompt, partial(_instead, service, wire)),
            )  # fmt: skip
            for request in new:
                request.priority = -(body.priority or 0)
                request.salt = (salts[number] or "") + (keys[number] or "")
                request.adapter = adapters[number] or ""
            self.requests += new
            self.tellers += [
                Teller(service, request, wire, told, body.return_text_in_logprobs, mask) for request in new
            ]
        if turn:
            if self.batched:
                raise RequestError(
                    "session_params is for one prompt and n = 1.", "Send one request for each."
                )
            turn.watch(self.requests[0])

    def json(self) -> bytes:
        """All answers."""
        answers = [tell() for tell in self.tellers]
        return b"[" + b",".join(answers) + b"]" if self.batched else answers[0]


def _instead(service: Service, wire: SamplingBody) -> CallGuide | None:
    """Lets a turn begin with a call."""
    return CallGuide(service.text, (), None, False, True) if wire.tool_call_instead else None


def _prompts(service: Service, body: GenerateBody) -> tuple[list[list[int]], bool]:
    """The prompts as ids, and whether there was a list of them."""
    if (body.text is None) == (body.input_ids is None):
        raise RequestError("Give either input_ids or text.")
    if body.text is not None:
        texts = [body.text] if isinstance(body.text, str) else body.text
        if not texts:
            raise RequestError("text is an empty list.", "Send at least one prompt.")
        return [service.encode(text) for text in texts], not isinstance(body.text, str)
    ids: Any = body.input_ids
    nested = bool(ids and isinstance(ids[0], list))
    return (ids if nested else [ids]), nested


def _spread(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts.")
    return value


class Teller:
    """Writes one sequence's answers, finished or (streaming, cumulative) not."""

    def __init__(
        self, service: Service, request: Request, wire: SamplingBody, logprobs: bool, texts: bool,
        mask: MaskMode | None,
    ) -> None:  # fmt: skip
        self.request, self.logprobs, self.mask, self.top_p = request, logprobs, mask, wire.top_p_ids
        self._thinks = [service.tok.id(THINK), service.tok.id(END_THINK)] if service.tok else []
        self.tok = service.tok if texts else None
        self.text = GrowingText(service.tok, request, wire) if service.tok else None
        self._written, self._retractions = dict[str, GrowingList](), 0

    def __call__(self, index: int | None = None) -> bytes:
        """SGLang's answer, in JSON."""
        request = self.request
        ended = request.finish  # read first: when it is set, all tokens are there
        count, start = request.told, len(request.prompt)
        output = request.ids[start : start + count]
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": finish_reason(request, ended, len(output)),
            "prompt_tokens": start,
            "completion_tokens": len(output),
            "cached_tokens": request.cached_tokens,
            "weight_version": request.weight_version,
            "weight_versions": [[version, a, min(b, count)] for version, a, b in request.versions],
            "reasoning_tokens": self._reasoning(output),
            "num_retractions": request.retractions,
            "dp_rank": 0,
        }
        if request.spec.verified:
            meta |= request.spec.told(len(output))
        if ended:
            meta["e2e_latency"] = request.ended - request.arrived
            meta |= sglang_choices(request)
            meta |= slime_support(request) if self.top_p else {}
        if self.logprobs:
            meta["output_token_logprobs_length"] = count
        if self.mask:
            meta |= sglang_support(request, count, self.mask)
        if self.text:
            self.text.read()
        told: dict[str, Any] = {"index": index} if index is not None else {}
        told |= {"text": self.text.text if self.text else "", "output_ids": output}
        lists = self._lists(output) if self.logprobs else {}
        parts = [b"," + dump(name) + b":" + rows.json() for name, rows in lists.items()]
        return b"".join([dump(told)[:-1], b',"meta_info":', dump(meta)[:-1], *parts, b"}}"])

    def _lists(self, output: list[int]) -> dict[str, GrowingList]:
        """Log-probs, of which only what is new is written."""
        request, params, count = self.request, self.request.params, len(output)
        if request.retractions != self._retractions:  # those of the prompt are told anew
            self._retractions = request.retractions
            self._written = {name: rows for name, rows in self._written.items() if name.startswith("output_")}
        self._write("output_token_logprobs", list(zip(request.logprobs[:count], output, strict=True)), 1)
        if params.top_logprobs:
            self._write("output_top_logprobs", request.top_logprobs[:count], params.top_logprobs)
        if params.logprob_ids:
            self._write("output_token_ids_logprobs", request.ids_logprobs[:count], len(params.logprob_ids))
        if request.score_from >= 0:
            # the very first token of a sequence has no log-prob
            first = [None] if request.score_from == 0 else []
            ids, values = request.prompt[request.score_from :], [*first, *request.input_logprobs]
            self._write("input_token_logprobs", list(zip(values, ids, strict=False)), 1)
            if params.top_logprobs:
                self._write("input_top_logprobs", first + request.input_top_logprobs, params.top_logprobs)
            if params.logprob_ids:
                self._write(
                    "input_token_ids_logprobs", first + request.input_ids_logprobs, len(params.logprob_ids)
                )
        return self._written

    def _write(self, name: str, rows: Sequence[Any], width: int) -> None:
        """Bring a list up to these rows, each an entry or a list of up to `width`."""
        written, block = self._written.setdefault(name, GrowingList()), max(BLOCK // width, 1)
        for start in range(written.rows, len(rows), block):
            written.add([self._row(row) for row in rows[start : start + block]])

    def _row(self, row: Any) -> Any:
        return self._entry(*row) if isinstance(row, tuple) else row and [self._entry(*pair) for pair in row]

    def _reasoning(self, output: list[int]) -> int:
        """Tokens of a thought that the prompt began."""
        if not self._thinks or self.request.prompt[-1] != self._thinks[0]:
            return 0
        return output.index(self._thinks[1]) if self._thinks[1] in output else len(output)

    def _entry(self, value: float | None, token: int) -> list[Any]:
        return [value, token, self.tok.decode([token]) if self.tok else None]


def finish_reason(request: Request, ended: str, count: int) -> dict[str, Any] | None:
    """SGLang's object; None while the request runs."""
    if ended == "stop":
        return {"type": "stop", "matched": request.matched}
    if ended == "length":
        return {"type": "length", "length": count}
    if ended and request.lost:
        return {"type": "abort", "message": "Abort: the grammar grew too complex to go on."}
    if ended:
        return {
            "type": "abort",
            "message": "Abort: the request was cancelled." if count else "Abort before prefill",
        }
    return None


class Sglang:
    """The handlers. `endpoints` lists them."""

    def __init__(self, service: Service) -> None:
        self.service, self.sessions = service, Sessions(service)

    def endpoints(self) -> list[Endpoint]:
        """The routes of this dialect."""
        generate = Endpoint("/generate", self.generate, ("POST", "PUT"), GenerateBody)
        return [generate, *self.sessions.endpoints()]

    async def generate(self, http: HttpRequest) -> Response:
        """Sample from one or many prompts, or score them."""
        body = await read_body(http, GenerateBody)
        sampling = body.sampling_params if isinstance(body.sampling_params, list) else [body.sampling_params]
        formed = any(wire.formed for wire in sampling)
        async with self.sessions.turn(body.session_params) as turn:
            plan = await aside(http, lambda: Plan(self.service, body, turn), formed)
            session = session_of(http, body.routing_key)
            if turn and turn.replaces:
                plan, watch = await self.service.on_engine(lambda s: self._replace(s, body, turn, session))
            else:
                for request in plan.requests:
                    request.session = session
                watch = await self.service.submit(plan.requests, each_token=body.stream)
        if body.stream:
            return EventStream(watch, _events(plan, watch))
        await self.service.finish(http, watch)
        return await written(plan.requests, plan.json)

    def _replace(
        self, scheduler: Scheduler, body: GenerateBody, turn: Turn, session: str
    ) -> tuple[Plan, Watch]:
        """Engine thread: end what a turn replaces, which has all its tokens now, if nothing is wrong with this one."""
        scheduler.settle()
        plan = Plan(self.service, body, turn)
        for request in plan.requests:
            request.session = session
        watch = Watch(self.service, plan.requests, body.stream)
        self.service.take(scheduler, watch, turn.replaces)
        return plan, watch


async def _events(plan: Plan, watch: Watch) -> AsyncIterator[bytes]:
    """Cumulative answers as they grow; when the client falls behind, intermediate ones are left out."""
    told = [0] * len(plan.requests)
    open_ones = set(range(len(plan.requests)))
    while open_ones:
        await watch.changed()
        for index in sorted(open_ones):
            request = plan.requests[index]
            done, count = bool(request.finish), request.told
            if not done and count == told[index]:
                continue
            told[index] = count
            if done:
                open_ones.discard(index)
            yield b"data: " + plan.tellers[index](index if plan.batched else None) + b"\n\n"
    yield DONE
