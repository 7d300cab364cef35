"""One sequence from arrival to end, how a request can be refused, and what is counted over all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.engine.draft import Speculation
from fullarc.engine.fairness import Claim
from fullarc.engine.guide import Guide
from fullarc.engine.lora import Adapter
from fullarc.engine.prefix import Block
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.stops import StopWatch
from fullarc.engine.trace import Choices


class RequestError(FullarcError):
    """The request itself cannot be served (HTTP 400)."""


class QueueFullError(FullarcError):
    """Too many requests wait already (HTTP 429)."""


@dataclass(eq=False)
class Request:
    """One sequence from arrival to end. `on_token` and `on_finish` are called by the thread that steps, or, where work
    of a step is done behind the next one, by that one's (see `behind`).

    Attributes:
        score_from: first prompt position whose token gets an input log-prob; -1 = none.
        stops: what looks for stop strings, if there are any.
        top_logprobs, ids_logprobs: the likeliest tokens, and those asked for, at each output token.
        supports: the tokens that could be drawn at each output token, with the log-probs of that, where asked for.
        input_top_logprobs, input_ids_logprobs: the same at each scored prompt token.
        guide: decides what may be sampled next, where the output must follow a form.
        choices: collects the experts and keys that were chosen, where they are asked for.
        wants_hidden: whether the last hidden state of the prompt is kept, as `hidden` [hidden_size].
        priority: lower ones first.
        session: whose it is; sessions share slots and prompt tokens fairly.
        salt: prefixes are shared between requests of the same salt only.
        adapter: name of the LoRA adapter to compute with; "" = none.
        charged: the line of its session that its slot was charged to (see `waiting`).
        versions: [version, start, end] spans over the output tokens.
        spec: drafts, and how many were accepted.
        finish: "" while it runs; then "stop" | "length" | "abort".
        lost: whether it was aborted because its guide allowed nothing any more.
    """

    rid: str
    prompt: list[int]
    params: SamplingParams
    score_from: int = -1
    on_token: Callable[["Request"], None] | None = None
    on_finish: Callable[["Request"], None] | None = None
    stops: StopWatch | None = None
    guide: Guide | None = None
    choices: Choices | None = None
    wants_hidden: bool = False
    priority: int = 0
    session: str = ""
    salt: str = ""
    adapter: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    ids_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    supports: list[list[tuple[float, int]]] = field(default_factory=list)
    input_logprobs: list[float] = field(default_factory=list)
    input_top_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    input_ids_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)
    hidden: list[float] | None = None
    versions: list[tuple[str, int, int]] = field(default_factory=list)
    finish: str = ""
    lost: bool = False
    matched: int | str | None = None
    cached_tokens: int = 0
    retractions: int = 0
    weight_version: str = ""
    arrived: float = 0.0
    admitted: float = 0.0
    first_token: float = 0.0
    ended: float = 0.0
    spec: Speculation = field(default_factory=Speculation)
    # the scheduler's own
    slot: int = -1
    computed: int = 0
    charged: int = -1
    lora: Adapter | None = None
    space: tuple[int, int, str] | None = None
    held: Sequence[Block] = ()
    chain: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        if self.guide:
            self.params = replace(self.params, guided=True)

    @property
    def claim(self) -> Claim:
        """What it is next by."""
        return self.priority, self.session

    @property
    def unscored(self) -> bool:
        """Whether prompt tokens lack the log-probs that were asked for."""
        return self.score_from >= 0 and len(self.input_logprobs) < len(self.prompt) - max(self.score_from, 1)

    @property
    def told(self) -> int:
        """Output tokens of which all that was asked for is there: those that other threads may read; in the end all."""
        params, count = self.params, len(self.logprobs)
        if params.top_logprobs:
            count = min(count, len(self.top_logprobs))
        if params.logprob_ids:
            count = min(count, len(self.ids_logprobs))
        return min(count, len(self.supports)) if params.support else count

    @property
    def numbers(self) -> int:
        """About how many its answer holds."""
        of_token = 1 + self.params.top_logprobs + len(self.params.logprob_ids)
        return of_token * (len(self.logprobs) + len(self.input_logprobs)) + sum(map(len, self.supports))

    @property
    def output(self) -> list[int]:
        """The completion so far."""
        return self.ids[len(self.prompt) :]


def check(request: Request, config: ModelConfig, bound: int) -> None:
    """Raise RequestError if a model of this shape can never serve it in sequences of up to `bound` tokens."""
    prompt, vocab, choices = request.prompt, config.vocab_size, request.choices
    if not prompt:
        raise RequestError("input_ids is empty.", "Send at least one token.")
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise RequestError(
            f"input_ids contain a token outside 0..{vocab - 1}.", "Is it the model's tokenizer?"
        )
    if len(prompt) + min(request.params.max_new_tokens, 1) > bound:
        raise RequestError(
            f"The prompt has {len(prompt)} tokens; the engine serves sequences of up to {bound}.",
            "Shorten it, or start the engine with a larger --max-len.",
        )
    named = (
        *request.params.forbidden,
        *request.params.logprob_ids,
        *(t for t, _ in request.params.logit_bias),
    )
    if any(not 0 <= token < vocab for token in named):
        raise RequestError(
            f"A token named in logit_bias or token_ids_logprob lies outside 0..{vocab - 1}.",
            "Is it the model's tokenizer?",
        )
    if len(request.params.forbidden) >= vocab:
        raise RequestError("All tokens are forbidden.", "Leave at least one.")
    start = choices.experts_from if choices else None
    if start is not None and not 0 <= start <= len(prompt):
        raise RequestError(f"routed_experts_start_len {start} lies outside the prompt.")
    if choices and choices.keys and config.dense_attention:
        raise RequestError("This model attends to all keys: it has no indexer whose choice could be told.")
    if not -1 <= request.score_from <= len(prompt):
        raise RequestError(f"logprob_start_len {request.score_from} lies outside the prompt.")


@dataclass
class Counters:
    """Totals since the start, for /metrics."""

    requests: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    weight_updates: int = 0
    retracted: int = 0
    preempted: int = 0
    spec: Speculation = field(default_factory=Speculation)
