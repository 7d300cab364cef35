"""Sampling parameters in everybody's names, and their way to the engine's requests.

SGLang's names are the ones we keep (`SamplingBody`); OpenAI's and vLLM's are translated (`OpenAISampling`). What would
change the sampled tokens and is not implemented is refused, never ignored; what only asks for more information, or is
about images, grammars or adapters in its neutral value, is accepted and without effect.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fullarc.chat.forms import GrammarBody, OpenAIGrammarBody
from fullarc.engine.api.service import Service
from fullarc.engine.guide import Guide
from fullarc.engine.request import Request, RequestError
from fullarc.engine.sampling import MAX_LOGPROB_IDS, MAX_SEED, MAX_TOP_LOGPROBS, SamplingParams
from fullarc.engine.stops import MAX_STRINGS, StopStrings, StopWatch
from fullarc.engine.trace import Choices

MAX_SAMPLES = 1024
GREEDY = 1e-6  # temperatures below it are 0, as in SGLang
Ids = list[Annotated[int, Field(strict=True)]]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_TOP_LOGPROBS)]
Stop = str | list[str] | None
AskedIds = Annotated[Ids, Field(max_length=MAX_LOGPROB_IDS)]


class CustomParams(BaseModel):
    """What slime adds to SGLang's `sampling_params`: ask for the tokens that top-p kept at each step."""

    model_config = ConfigDict(extra="forbid")
    return_top_p_token_ids: bool = False


class SamplingBody(GrammarBody):
    """`sampling_params` of POST /generate."""

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int | None = Field(128, strict=True, ge=0)
    min_new_tokens: int = Field(0, strict=True, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stop: Stop = None
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_STRINGS)] | None = None
    ignore_eos: bool = False
    sampling_seed: int | None = Field(None, ge=0, le=MAX_SEED)
    logit_bias: dict[int, float] | None = Field(None, max_length=MAX_LOGPROB_IDS)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    # not SGLang's: a turn may begin with a tool call instead of following the form
    tool_call_instead: bool = False
    # what is told, not what is sampled
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int | None = None
    custom_params: CustomParams | None = None
    # not implemented: only their neutral values are accepted
    stop_regex: None = None
    watermark: None = None
    beam_width: Annotated[int, Field(le=1)] | None = None

    @property
    def top_p_ids(self) -> bool:
        """Whether slime asks for the tokens that could be drawn."""
        return self.custom_params is not None and self.custom_params.return_top_p_token_ids

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings, none of them empty."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class OpenAISampling(OpenAIGrammarBody):
    """The sampling fields of OpenAI's routes, with vLLM's and SGLang's extensions."""

    model_config = ConfigDict(extra="ignore")

    max_tokens: int | None = Field(None, strict=True, ge=0)
    min_tokens: int = Field(0, strict=True, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = Field(None, strict=True, ge=1, le=MAX_SAMPLES)
    seed: int | None = Field(None, strict=True)
    stop: Stop = None
    stop_token_ids: Annotated[Ids, Field(max_length=MAX_STRINGS)] | None = None
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = Field(None, max_length=MAX_LOGPROB_IDS)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    routed_experts_prompt_start: int = Field(0, strict=True, ge=0)
    # refused unless neutral
    bad_words: Annotated[list[str], Field(max_length=0)] | None = None
    allowed_token_ids: None = None
    use_beam_search: Literal[False, None] = None
    watermarking: Literal[False, None] = None
    thinking_token_budget: None = None
    repetition_detection: None = None
    stop_regex: Annotated[str, Field(max_length=0)] | Annotated[list[str], Field(max_length=0)] | None = None
    custom_logit_processor: None = None
    logits_processors: Annotated[list[Any], Field(max_length=0)] | None = None
    truncate_prompt_tokens: None = None
    extra_args: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    def native(self, default_max: int | None) -> SamplingBody:
        """The same in SGLang's names, but for the form (see `grammar`)."""
        named: dict[str, Any] = {
            "max_new_tokens": default_max if self.max_tokens is None else self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "min_p": self.min_p, "n": self.n, "stop": self.stop, "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos, "sampling_seed": None if self.seed is None else self.seed & MAX_SEED,
            "logit_bias": self.logit_bias, "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty, "repetition_penalty": self.repetition_penalty,
            "skip_special_tokens": self.skip_special_tokens, "no_stop_trim": self.include_stop_str_in_output,
        }  # fmt: skip
        neutral = ("temperature", "top_p", "top_k", "min_p", "n", "frequency_penalty", "presence_penalty",
                   "repetition_penalty")  # fmt: skip
        return SamplingBody.model_construct(
            **{name: value for name, value in named.items() if value is not None or name not in neutral}
        )


def known(service: Service, name: str, tokens: Sequence[int]) -> None:
    """Refuse ids that no token of the model has. Raises RequestError."""
    size = service.scheduler.weights.config.vocab_size
    for token in tokens:
        if not 0 <= token < size:
            raise RequestError(
                f"{name}: there is no token {token}; the model's are 0..{size - 1}.",
                "Is it the model's tokenizer?",
            )


def fits(service: Service, count: int) -> None:
    """Refuse more sequences at once than the queue ever holds: to send them again would be in vain.

    A single one may come again: it is the queue that is closed then. Raises RequestError.
    """
    if count > max(service.scheduler.max_queue, 1):
        raise RequestError(
            f"{count} sequences at once are more than the {service.scheduler.max_queue} that may wait.",
            "Send fewer at a time, or start the engine with a larger --max-queue.",
        )


def build(
    service: Service,
    prompt: Sequence[int],
    wire: SamplingBody,
    rids: Sequence[str],
    *,
    score_from: int = -1,
    top: int = 0,
    logprob_ids: Sequence[int] = (),
    support: bool = False,
    wants_hidden: bool = False,
    choices: Callable[[], Choices | None] = lambda: None,
    guide: Callable[[], Guide | None] = lambda: None,
) -> list[Request]:
    """The `wire.n` samples of one prompt as requests named `rids`, each with choices and a guide of its own.

    Raises RequestError for impossible values.
    """
    scheduler, stops, strings = service.scheduler, set(wire.stop_token_ids or ()), None
    guides = [guide() for _ in rids]
    if not wire.ignore_eos or any(guides):  # a form ends where it is complete
        stops |= set(scheduler.weights.config.eos_token_id)
    room = wire.max_new_tokens
    if room is None:
        room = max(scheduler.max_len - len(prompt), 1)
    elif wire.min_new_tokens > room:
        raise RequestError(
            f"sampling_params: min_new_tokens must be in [0, max_new_tokens({room})], got {wire.min_new_tokens}."
        )
    known(service, "stop_token_ids", wire.stop_token_ids or ())
    temperature = 0.0 if 0 <= wire.temperature < GREEDY else wire.temperature
    bias = wire.logit_bias or {}
    if bias and any(guides):
        raise RequestError(
            "logit_bias and a form of the output (or a forced tool_choice) contradict each other.",
            "Leave one of them.",
        )
    try:
        if wire.stop_strings:
            if service.tok is None:
                raise ValueError("stop needs text, and this model's folder has no tokenizer.json")
            token_bytes = service.tok.token_bytes
            strings = StopStrings(wire.stop_strings)
        requests = []
        for index, rid in enumerate(rids):
            # samples of one prompt under one seed get neighbouring streams
            seed = service.seeds() if wire.sampling_seed is None else (wire.sampling_seed + index) & MAX_SEED
            params = SamplingParams(
                max_new_tokens=room, temperature=temperature, top_p=wire.top_p, top_k=wire.top_k, min_p=wire.min_p,
                forbidden=frozenset(token for token, value in bias.items() if value <= -100), top_logprobs=top,
                stop_ids=frozenset(stops), min_new_tokens=wire.min_new_tokens, seed=seed,
                frequency_penalty=wire.frequency_penalty, presence_penalty=wire.presence_penalty,
                repetition_penalty=wire.repetition_penalty, logprob_ids=tuple(logprob_ids), support=support,
                logit_bias=tuple((token, value) for token, value in bias.items() if not value <= -100),
            )  # fmt: skip
            request = Request(
                rid,
                list(prompt),
                params,
                score_from,
                wants_hidden=wants_hidden,
                choices=choices(),
                guide=guides[index],
            )
            if strings:
                request.stops = StopWatch(strings, token_bytes)
            requests.append(request)
    except ValueError as error:
        raise RequestError(f"sampling_params: {error}.") from None
    return requests
