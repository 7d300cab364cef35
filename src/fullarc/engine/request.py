"""One sequence from arrival to end, how a request can be refused, and what is counted over all of them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fullarc.config.errors import FullarcError
from fullarc.engine.draft import Speculation
from fullarc.engine.guide import Guide
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.stops import StopWatch
from fullarc.engine.trace import Choices


class RequestError(FullarcError):
    """The request itself cannot be served (HTTP 400)."""


class QueueFullError(FullarcError):
    """Too many requests wait already (HTTP 429)."""


@dataclass(eq=False)
class Request:
    """One sequence from arrival to end. `on_token` and `on_finish` are called by the thread that steps.

    Attributes:
        score_from: first prompt position whose token gets an input log-prob; -1 = none.
        stops: what looks for stop strings, if there are any.
        top_logprobs, ids_logprobs: the likeliest tokens, and those asked for, at each output token.
        supports: the tokens that could be drawn at each output token, with the log-probs of that, where asked for.
        input_top_logprobs, input_ids_logprobs: the same at each scored prompt token.
        guide: decides what may be sampled next, where the output must follow a form.
        choices: collects the experts and keys that were chosen, where they are asked for.
        wants_hidden: whether the last hidden state of the prompt is kept, as `hidden` [hidden_size].
        versions: [version, start, end] spans over the output tokens.
        spec: drafts, and how many were accepted.
        finish: "" while it runs; then "stop" | "length" | "abort".
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
    cache_version: str = ""
    chain: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        if self.guide:
            self.params = replace(self.params, guided=True)

    @property
    def output(self) -> list[int]:
        """The completion so far."""
        return self.ids[len(self.prompt) :]


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
    spec: Speculation = field(default_factory=Speculation)
