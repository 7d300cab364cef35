"""From logits to tokens: one uniform number per token, and the inverse of the cumulative distribution.

    u = hash(seed, position) in [0, 1)            splitmix64 of a counter; position = index of the token in the sequence
    token = first v with  cdf(v) > u * cdf(V)     over the truncated distribution, in order of token id

Randomness depends on nothing but the request's seed and the token's position: a request gives the same tokens in any
batch, and a sequence cut off and continued goes on as if it had not been.

The log-prob returned with a token is that of the full softmax at the request's temperature, *before* forbidden tokens
and top-k / top-p / min-p are cut away (SGLang's meaning); with temperature 0 (argmax, lowest id on ties) it is the one
at temperature 1.
Shape suffixes: N requests, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
MAX_SEED = 2**64 - 1
MAX_TOP_LOGPROBS = 64
MAX_LOGPROB_IDS = 1024


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
    def truncates(self) -> bool:
        """Whether the distribution is cut before sampling."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One double in [0, 1) per (seed, position): two rounds of splitmix64, 52 bits kept.

    52 and not 53 so that u * total < total also after rounding: the last token is never overshot.
    """
    with np.errstate(over="ignore"):
        mixed = _splitmix64(np.array(seeds, dtype=np.uint64)) + np.array(positions, dtype=np.uint64)
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
) -> tuple[list[int], list[float]]:
    """Next token and its log-prob for each row; see the module's docstring. Modifies nothing.

    `steered_NV` are the logits to choose from, where penalties make them differ from those that log-probs tell of.
    """
    logp_NV = kept_NV = _logprobs(logits_NV, params)
    if steered_NV is not None and steered_NV is not logits_NV:
        logits_NV, kept_NV = steered_NV, _logprobs(steered_NV, params)
    never = [(row, token) for row, p in enumerate(params) for token in sorted(p.forbidden)]
    if never:
        at = torch.tensor(never).unbind(1)
        kept_NV, logits_NV = (x.index_put(at, torch.tensor(-torch.inf)) for x in (kept_NV, logits_NV))
    if any(p.truncates for p in params):
        kept_NV = _truncate(kept_NV, params)
    cdf_NV = (
        kept_NV.softmax(-1).double().cumsum(-1)
    )  # softmax works row by row; exp's bits depend on the place
    u_N = torch.from_numpy(uniforms([p.seed for p in params], positions))
    token_N = torch.searchsorted(cdf_NV, (u_N * cdf_NV[:, -1])[:, None], right=True)[:, 0]
    if any(p.temperature == 0 for p in params):
        greedy_N = torch.tensor([p.temperature == 0 for p in params])
        token_N = torch.where(greedy_N, argmax(logits_NV), token_N)
    return token_N.tolist(), logp_NV.gather(1, token_N[:, None])[:, 0].tolist()


@torch.inference_mode()
def top_logprobs(logits_NV: Tensor, params: Sequence[SamplingParams]) -> list[list[tuple[float, int]]]:
    """The likeliest tokens of each row as (log-prob, id), best first, as many as its request wants; see `sample`."""
    count = min(max(p.top_logprobs for p in params), logits_NV.shape[-1])
    values_NC, ids_NC = _logprobs(logits_NV, params).sort(dim=-1, descending=True, stable=True)
    best = zip(values_NC[:, :count].tolist(), ids_NC[:, :count].tolist(), strict=True)
    return [
        list(zip(values, ids, strict=True))[: p.top_logprobs]
        for p, (values, ids) in zip(params, best, strict=True)
    ]


@torch.inference_mode()
def chosen_logprobs(logits_NV: Tensor, params: Sequence[SamplingParams]) -> list[list[tuple[float, int]]]:
    """(log-prob, id) of the tokens that each request asked for by `logprob_ids`; see `sample`."""
    logp_NV = _logprobs(logits_NV, params)
    return [
        list(zip(logp_V[list(p.logprob_ids)].tolist(), p.logprob_ids, strict=True))
        for logp_V, p in zip(logp_NV, params, strict=True)
    ]


def _logprobs(logits_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Log-probs [N, V] at each request's temperature (1 where it is 0)."""
    temperature_N = torch.tensor([p.temperature or 1.0 for p in params])
    return (logits_NV / temperature_N[:, None]).log_softmax(-1)


def argmax(logits_NV: Tensor) -> Tensor:
    """Index of the greatest logit of each row, the lowest id on ties."""
    size = logits_NV.shape[-1]
    best_NV = logits_NV == logits_NV.amax(-1, keepdim=True)
    return torch.where(best_NV, torch.arange(size), size).amin(-1)


def _truncate(logp_NV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`logp` with the tokens outside top-k, then top-p, then min-p at -inf; the best token always stays."""
    size = logp_NV.shape[-1]
    ordered_NV, order_NV = logp_NV.sort(dim=-1, descending=True, stable=True)
    k_N = torch.tensor([min(p.top_k, size) if p.top_k > 0 else size for p in params])
    keep_NV = torch.arange(size) < k_N[:, None]
    mass_NV = ordered_NV.masked_fill(~keep_NV, -torch.inf).exp().double()
    before_NV = mass_NV.cumsum(-1) - mass_NV
    p_N = torch.tensor([p.top_p for p in params], dtype=torch.float64)
    keep_NV &= (before_NV < p_N[:, None] * mass_NV.sum(-1, keepdim=True)) | (p_N[:, None] >= 1)
    min_p_N = torch.tensor([p.min_p for p in params])
    keep_NV &= (ordered_NV - ordered_NV[:, :1]).exp() >= min_p_N[:, None]
    keep_NV[:, 0] = True
    return logp_NV.masked_fill(~torch.zeros_like(keep_NV).scatter_(1, order_NV, keep_NV), -torch.inf)
