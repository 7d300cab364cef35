"""From logits to tokens: one uniform number per token, and the inverse of the cumulative distribution.

    u = hash(seed, position) in [0, 1)            splitmix64 of a counter; position = index of the token in the sequence
    token = first v with  cdf(v) > u * cdf(V)     over the truncated distribution, in order of token id

Randomness depends on nothing but the request's seed and the token's position: a request gives the same tokens in any
batch, and a sequence cut off and continued goes on as if it had not been.

The log-prob returned with a token is that of the full softmax at the request's temperature, *before* forbidden tokens
and top-k / top-p / min-p are cut away (SGLang's meaning); with temperature 0 (argmax, lowest id on ties) it is the one
at temperature 1.

A row whose token has been drafted from a known distribution q is sampled by rejection (Leviathan et al. 2023, Alg. 1):

    the draft d with probability min(1, p(d) / q(d)), otherwise a token from max(0, p - q) / sum

so its distribution is p whatever q was; p and q are both truncated. Each draw has a stream of its own.
Shape suffixes: N rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fullarc.engine.native.library import available
from fullarc.engine.native.sample import draw, likeliest, logprobs, truncated

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
MAX_SEED = 2**64 - 1
MAX_TOP_LOGPROBS = 128
MAX_LOGPROB_IDS = 1024
# what a uniform number is for: one stream each, so that draws at one position are independent
PLAIN, DRAFT, ACCEPT, RESIDUAL = 0, 0x5851F42D4C957F2D, 0xDA3E39CB94B95BDB, 0x2545F4914F6CDD1D


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled.

    Attributes:
        max_new_tokens: bound on the completion; 0 = only score the prompt.
        temperature: 0 = argmax.
        top_p, top_k, min_p: truncation; 1, 0 and 0 switch them off (top_k -1 as well).
        forbidden: tokens that are never chosen; the truncation looks at what is left.
        top_logprobs: how many of the likeliest tokens are told with their log-probs at each step.
        stop_ids: tokens that end the completion; the stop token is part of it and carries a log-prob.
        min_new_tokens: stop tokens before this many tokens do not end the completion.
        seed: of the request's own random stream.
        frequency_penalty, presence_penalty, repetition_penalty, logit_bias: see `penalties`; neutral by default.
        logprob_ids: tokens whose log-probs are told at each step, whether they are sampled or not.
        guided: whether something else narrows the choice at each step (see `guide`).
        support: whether the tokens that could be drawn are told at each step.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    forbidden: frozenset[int] = frozenset()
    top_logprobs: int = 0
    stop_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprob_ids: tuple[int, ...] = ()
    guided: bool = False
    support: bool = False

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        need(self.max_new_tokens >= 0, f"max_new_tokens must be >= 0, got {self.max_new_tokens}")
        need(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
            f"temperature must be 0 or in {MIN_TEMPERATURE:g}..{MAX_TEMPERATURE:g}, got {self.temperature}",
        )
        need(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}")
        need(self.top_k >= -1, f"top_k must be >= -1, got {self.top_k}")
        need(0 <= self.min_p <= 1, f"min_p must be in 0..1, got {self.min_p}")
        need(
            0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            f"top_logprobs must be in 0..{MAX_TOP_LOGPROBS}, got {self.top_logprobs}",
        )
        need(self.min_new_tokens >= 0, f"min_new_tokens must be >= 0, got {self.min_new_tokens}")
        need(0 <= self.seed <= MAX_SEED, f"the seed must be in 0..2^64-1, got {self.seed}")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            need(-2 <= value <= 2, f"{name} must be in -2..2, got {value}")
        need(
            0.01 <= self.repetition_penalty <= 100,
            f"repetition_penalty must be in 0.01..100, got {self.repetition_penalty}",
        )
        need(all(abs(bias) <= 100 for _, bias in self.logit_bias), "logit_bias must be in -100..100")
        need(len(self.logprob_ids) <= MAX_LOGPROB_IDS, f"at most {MAX_LOGPROB_IDS} tokens can be asked for")

    @property
    def penalises(self) -> bool:
        """Whether the logits to choose from differ from the model's."""
        return bool(
            self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1 or self.logit_bias
        )

    @property
    def plain(self) -> bool:
        """Whether a token is drawn from the model's own distribution, or is its first choice."""
        return not (self.truncates or self.forbidden or self.penalises or self.guided)

    @property
    def alternatives(self) -> bool:
        """Whether more than the token that was drawn is told at each step."""
        return bool(self.top_logprobs or self.logprob_ids or self.support)

    @property
    def truncates(self) -> bool:
        """Whether the distribution is cut before sampling."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def uniforms(seeds: Sequence[int], positions: Sequence[int], stream: int = PLAIN) -> np.ndarray:
    """One double in [0, 1) per (seed, position) of a stream: two rounds of splitmix64, 52 bits kept.

    52 and not 53 so that u * total < total also after rounding: the last token is never overshot.
    """
    with np.errstate(over="ignore"):
        streams = np.array(seeds, dtype=np.uint64) ^ np.uint64(stream)
        mixed = _splitmix64(streams) + np.array(positions, dtype=np.uint64)
        return (_splitmix64(mixed) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@torch.inference_mode()
def sample(
    logits_NV: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    steered_NV: Tensor | None = None,
    drafted: tuple[Sequence[int], Sequence[int], Tensor] | None = None,
) -> tuple[list[int], list[float]]:
    """Next token and its log-prob for each row; see the module's docstring. Modifies nothing.

    `steered_NV` are the logits to choose from, where penalties make them differ from those that log-probs tell of.
    `drafted`: rows whose token was drafted, the drafts, and the probabilities [rows, V] that they were drawn from.
    """
    chosen_NV = _choosable(logits_NV if steered_NV is None else steered_NV, params)
    seeds = [p.seed for p in params]
    if available() and not (drafted and drafted[0]):
        apart_NV = None if chosen_NV is logits_NV else chosen_NV
        return draw(logits_NV, [p.temperature for p in params], seeds, positions, apart_NV)
    token_N = _drawn(chosen_NV, params, positions)
    if drafted and drafted[0]:
        rows, drafts, q_MV = drafted
        at_M, some = torch.tensor(rows), ([seeds[row] for row in rows], [positions[row] for row in rows])
        p_MV = _chances(chosen_NV[at_M], [params[row] for row in rows])
        token_N[at_M] = _rejection(p_MV, torch.tensor(drafts), q_MV, *some)
    logp_NV = _logprobs(logits_NV, params)
    return token_N.tolist(), logp_NV.gather(1, token_N[:, None])[:, 0].tolist()


@torch.inference_mode()
def draft(
    logits_NV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], independent: bool
) -> tuple[list[int], Tensor | None]:
    """Guesses of the tokens at `positions`, and what they were drawn from [N, V] where they are `independent`.

    Otherwise they are drawn by the number that will draw the token itself, which makes equal draws likely.
    """
    chosen_NV = _choosable(logits_NV, params)
    if not independent or all(p.temperature == 0 for p in params):
        return _drawn(chosen_NV, params, positions).tolist(), None
    chances_NV = _chances(chosen_NV, params)
    token_N = _inverse(chances_NV, uniforms([p.seed for p in params], positions, DRAFT))
    return _greedy(token_N, chosen_NV, params).tolist(), chances_NV


def _choosable(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits with -inf for tokens that may not be drawn; `logits_NV` itself where all may."""
    never = [(row, token) for row, p in enumerate(params) for token in sorted(p.forbidden)]
    if never:
        logits_NV = logits_NV.index_put(torch.tensor(never).unbind(1), torch.tensor(-torch.inf))
    if any(p.truncates for p in params):
        cuts = [(p.top_k, p.top_p, p.min_p) if p.truncates else (0, 1.0, 0.0) for p in params]
        return (truncated if available() else _truncated)(
            logits_NV, _temperatures(params), *zip(*cuts, strict=True)
        )
    return logits_NV


def _drawn(chosen_NV: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    """A token [N] for each row, by the number of its seed and position."""
    seeds = [p.seed for p in params]
    if available():
        return torch.tensor(draw(chosen_NV, [p.temperature for p in params], seeds, positions)[0])
    token_N = _inverse(_chances(chosen_NV, params), uniforms(seeds, positions))
    return _greedy(token_N, chosen_NV, params)


def _greedy(token_N: Tensor, chosen_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The tokens, or the first greatest logit's where the temperature is 0."""
    return torch.where(torch.tensor([p.temperature == 0 for p in params]), argmax(chosen_NV), token_N)


def _chances(chosen_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What tokens are drawn from [N, V]."""
    # softmax works row by row; exp's bits depend on the place
    return _logprobs(chosen_NV, params).softmax(-1).double()


def _inverse(chances_NV: Tensor, u: np.ndarray) -> Tensor:
    """Tokens [N] at which the cumulative distributions pass `u`; the rows need not sum to one."""
    cdf_NV = chances_NV.cumsum(-1)
    return torch.searchsorted(cdf_NV, (torch.from_numpy(u) * cdf_NV[:, -1])[:, None], right=True)[:, 0]


def _rejection(
    p_MV: Tensor, drafts_M: Tensor, q_MV: Tensor, seeds: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """The draft where it is accepted, a token of the residual elsewhere; all [M]."""
    at = drafts_M[:, None]
    accepted_M = torch.from_numpy(uniforms(seeds, positions, ACCEPT)) * q_MV.gather(1, at)[
        :, 0
    ] < p_MV.gather(1, at).squeeze(1)
    residual_MV = (p_MV - q_MV).clamp_min_(0.0)
    # an accepted row's residual may be empty; what is drawn there is not used
    other_M = _inverse(residual_MV, uniforms(seeds, positions, RESIDUAL)).clamp_max(p_MV.shape[-1] - 1)
    return torch.where(accepted_M, drafts_M, other_M)


@torch.inference_mode()
def told_logprobs(logits_NV: Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-prob at temperature 1 of one token a row: to the bit what `sample` tells of it."""
    logp_NV = _logprobs(logits_NV, [SamplingParams()] * len(tokens))
    return logp_NV.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


@torch.inference_mode()
def top_logprobs(logits_NV: Tensor, params: Sequence[SamplingParams]) -> list[list[tuple[float, int]]]:
    """The likeliest tokens of each row as (log-prob, id), best first, as many as its request wants; see `sample`."""
    counts = [min(p.top_logprobs, logits_NV.shape[-1]) for p in params]
    if available():
        return likeliest(logits_NV, _temperatures(params), counts)
    values_NC, ids_NC = _logprobs(logits_NV, params).sort(dim=-1, descending=True, stable=True)
    most = max(counts)
    best = zip(values_NC[:, :most].tolist(), ids_NC[:, :most].tolist(), strict=True)
    return [
        list(zip(values, ids, strict=True))[:count] for count, (values, ids) in zip(counts, best, strict=True)
    ]


@torch.inference_mode()
def chosen_logprobs(logits_NV: Tensor, params: Sequence[SamplingParams]) -> list[list[tuple[float, int]]]:
    """(log-prob, id) of the tokens that each request asked for by `logprob_ids`; see `sample`."""
    logp_NV = _logprobs(logits_NV, params)
    return [
        list(zip(logp_V[list(p.logprob_ids)].tolist(), p.logprob_ids, strict=True))
        for logp_V, p in zip(logp_NV, params, strict=True)
    ]


@torch.inference_mode()
def supports(steered_NV: Tensor, params: Sequence[SamplingParams]) -> list[list[tuple[float, int]]]:
    """(log-prob, id) of every token that could be drawn, in order of ids, for rows that ask for it: what penalties,
    forbidden tokens and truncation leave, and the log-probs with which it is drawn. With temperature 0 the argmax
    alone.
    """
    chosen_NV = _choosable(steered_NV, params)
    chances_NV = _chances(chosen_NV, params)
    best_N, rows = argmax(chosen_NV).tolist(), list[list[tuple[float, int]]]()
    for row, p in enumerate(params):
        if not p.support:
            rows.append([])
        elif p.temperature == 0:
            rows.append([(0.0, best_N[row])])
        else:
            ids = chances_NV[row].nonzero()[:, 0]
            rows.append(list(zip(chances_NV[row][ids].log().tolist(), ids.tolist(), strict=True)))
    return rows


def _logprobs(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Log-probs [N, V] at each request's temperature (1 where it is 0)."""
    temperatures = _temperatures(params)
    if available():
        return logprobs(logits_NV, temperatures)
    return (logits_NV / torch.tensor(temperatures)[:, None]).log_softmax(-1)


def _temperatures(params: Sequence[SamplingParams]) -> list[float]:
    """Those that log-probs are told at."""
    return [p.temperature or 1.0 for p in params]


def argmax(logits_NV: Tensor) -> Tensor:
    """Index of the greatest logit of each row, the lowest id on ties."""
    size = logits_NV.shape[-1]
    best_NV = logits_NV == logits_NV.amax(-1, keepdim=True)
    return torch.where(best_NV, torch.arange(size), size).amin(-1)


def _truncated(
    logits_NV: Tensor, temperatures: Sequence[float], top_k: Sequence[int], top_p: Sequence[float],
    min_p: Sequence[float],
) -> Tensor:  # fmt: skip
    """Logits with the tokens outside top-k, then top-p, then min-p at -inf; the best token always stays."""
    size = logits_NV.shape[-1]
    logp_NV = (logits_NV / torch.tensor(temperatures)[:, None]).log_softmax(-1)
    ordered_NV, order_NV = logp_NV.sort(dim=-1, descending=True, stable=True)
    k_N = torch.tensor([min(k, size) if k > 0 else size for k in top_k])
    keep_NV = torch.arange(size) < k_N[:, None]
    mass_NV = ordered_NV.masked_fill(~keep_NV, -torch.inf).exp().double()
    before_NV = mass_NV.cumsum(-1) - mass_NV
    p_N = torch.tensor(top_p, dtype=torch.float64)
    keep_NV &= (before_NV < p_N[:, None] * mass_NV.sum(-1, keepdim=True)) | (p_N[:, None] >= 1)
    keep_NV &= (ordered_NV - ordered_NV[:, :1]).exp() >= torch.tensor(min_p)[:, None]
    keep_NV[:, 0] = True
    return logits_NV.masked_fill(~torch.zeros_like(keep_NV).scatter_(1, order_NV, keep_NV), -torch.inf)
