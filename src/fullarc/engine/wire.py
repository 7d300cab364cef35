"""SGLang's request and reply schemas, as far as an engine of token ids has them.

Fields that would change what is sampled and are not implemented are refused, never ignored; fields about text, which
this engine does not produce, are accepted and without effect.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullarc.engine.sampling import MAX_SEED, MAX_TOP_LOGPROBS, SamplingParams
from fullarc.engine.scheduler import Request, RequestError

MAX_SAMPLES = 1024
_Zero = Annotated[float, Field(ge=0, le=0)]
_Ids = list[Annotated[int, Field(strict=True)]]
_Count = Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)]


class SamplingBody(BaseModel):
    """`sampling_params` of POST /generate."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int = Field(128, strict=True, ge=0)
    min_new_tokens: int = Field(0, strict=True, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stop_token_ids: _Ids | None = None
    ignore_eos: bool = False
    sampling_seed: int | None = Field(None, ge=0, le=MAX_SEED)
    # of the biases only "never" is implemented
    logit_bias: dict[int, Annotated[float, Field(le=-100)]] | None = None
    # about text: without effect here
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    # not implemented: only their neutral values are accepted
    stop: Literal[None, ""] | Annotated[list[str], Field(max_length=0)] = None
    frequency_penalty: _Zero = 0
    presence_penalty: _Zero = 0
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] = 1
    json_schema: None = None
    regex: None = None
    ebnf: None = None


class GenerateBody(BaseModel):
    """POST /generate."""

    model_config = ConfigDict(extra="forbid")

    rid: str | list[str] | None = None
    input_ids: _Ids | list[_Ids]
    sampling_params: SamplingBody | list[SamplingBody] = Field(default_factory=SamplingBody)
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    stream: bool = False
    return_text_in_logprobs: bool = False
    top_logprobs_num: _Count | list[_Count] = 0
    routing_key: str | None = None

    @property
    def batched(self) -> bool:
        """Whether the reply is a list."""
        several = isinstance(self.sampling_params, SamplingBody) and self.sampling_params.n > 1
        return several or bool(self.input_ids and isinstance(self.input_ids[0], list))


class UpdateBody(BaseModel):
    """POST /update_weights_from_disk. `weight_version` defaults to one more than the present number."""

    model_config = ConfigDict(extra="forbid")

    model_path: str
    weight_version: str | None = None
    load_format: str | None = None
    abort_all_requests: bool = False
    flush_cache: Literal[True] = True
    keep_pause: bool = False
    is_async: bool = False


class PauseBody(BaseModel):
    """POST /pause_generation."""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class AbortBody(BaseModel):
    """POST /abort_request."""

    rid: str = ""
    abort_all: bool = False


def explain(error: ValidationError) -> str:
    """The first problem of a body in one sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    return f"{where}: {first['msg']}."


def requests_of(body: GenerateBody, prefix: str, eos: tuple[int, ...], seeds: "SeedSource") -> list[Request]:
    """The single-sequence requests in `body`: prompts in order, the n samples of a prompt next to each other.

    Raises RequestError for impossible values.
    """
    nested = bool(body.input_ids and isinstance(body.input_ids[0], list))
    prompts: list[list[int]] = body.input_ids if nested else [body.input_ids]  # type: ignore[list-item,assignment]
    count = len(prompts)
    sampling, logprob_start, rids = (
        _spread(value, count, name)
        for value, name in (
            (body.sampling_params, "sampling_params"),
            (body.logprob_start_len, "logprob_start_len"),
            (body.rid, "rid"),
        )
    )
    wants = _spread(body.return_logprob, count, "return_logprob")
    tops = _spread(body.top_logprobs_num, count, "top_logprobs_num")
    requests = []
    for number, prompt in enumerate(prompts):
        wire, rid = sampling[number], rids[number]
        for index in range(wire.n):
            name = f"{prefix}-{number}-{index}" if rid is None else rid
            if rid is not None and (wire.n > 1 or (count > 1 and isinstance(body.rid, str))):
                name = f"{rid}_{number}_{index}"
            start = logprob_start[number] if wants[number] else -1
            params = _params(wire, eos, index, seeds, tops[number] if wants[number] else 0)
            requests.append(Request(name, prompt, params, start))
    return requests


def _params(
    wire: SamplingBody, eos: tuple[int, ...], index: int, seeds: "SeedSource", top: int
) -> SamplingParams:
    stops = set(wire.stop_token_ids or ()) | (set() if wire.ignore_eos else set(eos))
    # samples of one prompt under one seed get neighbouring streams
    seed = seeds() if wire.sampling_seed is None else (wire.sampling_seed + index) & MAX_SEED
    try:
        return SamplingParams(
            max_new_tokens=wire.max_new_tokens, temperature=wire.temperature, top_p=wire.top_p, top_k=wire.top_k,
            min_p=wire.min_p, forbidden=frozenset(wire.logit_bias or ()), top_logprobs=top,
            stop_ids=frozenset(stops), min_new_tokens=wire.min_new_tokens, seed=seed,
        )  # fmt: skip
    except ValueError as error:
        raise RequestError(f"sampling_params: {error}.") from None


def _spread(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts.")
    return value


class SeedSource:
    """Seeds for requests that bring none: a counter, so a server's answers are a function of its history."""

    def __init__(self, start: int) -> None:
        self.next = start

    def __call__(self) -> int:
        self.next += 1
        return self.next & MAX_SEED


def reply(request: Request, logprobs: bool) -> dict[str, Any]:
    """SGLang's answer for one sequence, finished or (streaming, cumulative) not."""
    ended = request.finish  # read first: when it is set, all tokens are there
    count = len(request.logprobs)
    start = len(request.prompt)
    output = request.ids[start : start + count]
    finish: dict[str, Any] | None = None
    if ended == "stop":
        finish = {"type": "stop", "matched": request.matched}
    elif ended == "length":
        finish = {"type": "length", "length": len(output)}
    elif ended:
        before = "" if output else " before prefill"
        finish = {"type": "abort", "message": f"Abort{before}: the request was cancelled."}
    meta: dict[str, Any] = {
        "id": request.rid,
        "finish_reason": finish,
        "prompt_tokens": len(request.prompt),
        "completion_tokens": len(output),
        "cached_tokens": request.cached_tokens,
        "weight_version": request.weight_version,
        "weight_versions": [[version, a, min(b, count)] for version, a, b in request.versions],
    }
    if ended:
        meta["e2e_latency"] = request.ended - request.arrived
    if logprobs:
        pairs = zip(request.logprobs[:count], output, strict=True)
        meta["output_token_logprobs"] = [[logprob, token, None] for logprob, token in pairs]
        meta["output_token_logprobs_length"] = len(output)
        if request.params.top_logprobs:
            best = request.top_logprobs[:count]
            meta["output_top_logprobs"] = [[[value, token, None] for value, token in row] for row in best]
        if request.score_from >= 0:
            meta["input_token_logprobs"] = _input_logprobs(request)
    return {"text": "", "output_ids": output, "meta_info": meta}


def _input_logprobs(request: Request) -> list[list[float | int | None]]:
    """[log-prob, id, null] from `score_from` on; the very first token of a sequence has no log-prob."""
    ids, values = request.prompt[request.score_from :], list[float | None](request.input_logprobs)
    if request.score_from == 0:
        values.insert(0, None)
    return [[value, token, None] for value, token in zip(values, ids, strict=False)]
