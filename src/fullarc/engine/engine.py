"""The Python face of the engine: prompts of token ids in, tokens with log-probs out, in the calling thread.

The HTTP server steps the same scheduler; both give the same bits for the same request.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fullarc.config.errors import FullarcError
from fullarc.config.seeds import derive
from fullarc.engine import determinism
from fullarc.engine.backend import Weights, forward_pass, kernels_of, prepare, resolve
from fullarc.engine.draft import Drafter
from fullarc.engine.request import Request, RequestError
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.scheduler import Scheduler
from fullarc.model import GlmMoeDsa, load_model


@dataclass(frozen=True)
class Output:
    """One completion. `logprobs[i]` belongs to `token_ids[i]`; a stop token is included in both.

    finish_reason: "stop" (a stop id was sampled) or "length". versions: weight version of each token. top_logprobs: the
    likeliest tokens at each place as (log-prob, id), best first, where they were asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: str
    cached_tokens: int
    versions: list[str]
    top_logprobs: list[list[tuple[float, int]]] = field(default_factory=list)


def load_weights(
    folder: str | Path, version: str = "0", dtype: str = "fp32", kernels: str = "auto"
) -> Weights:
    """Verified, fused weights of a checkpoint folder for computing in `dtype` (see `engine.products`) by `kernels`.

    Raises FullarcError naming what is wrong.
    """
    kernels = resolve(kernels, dtype)
    model = load_model(folder)
    check_finite(model, str(folder))
    return prepare(model, version, dtype, kernels)


def check_finite(model: GlmMoeDsa, source: str) -> None:
    """Raise FullarcError naming the first tensor from `source` with a value that is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise FullarcError(f"{source}: {name} contains NaN or infinity.", "Use an earlier checkpoint.")


def same_shape(new: Weights, old: Weights) -> None:
    """Raise FullarcError unless `new` can replace `old` in a running engine (only `index_topk` may differ)."""
    ours, theirs = old.config.model_dump(), new.config.model_dump()
    for name in ours:
        if (
            name not in ("index_topk", "eos_token_id", "pad_token_id", "initializer_range")
            and ours[name] != theirs[name]
        ):
            raise FullarcError(
                f"The new weights have {name} = {theirs[name]}, the engine runs {ours[name]}.",
                "Start another engine for another shape.",
            )


class Engine:
    """A model loaded for generation.

    Args:
        folder: checkpoint folder (Hugging Face `glm_moe_dsa`).
        max_batch: sequences that decode together.
        max_len: tokens of the longest sequence, prompt included; at most the model's positions.
        threads: that compute a step.
        prefix_tokens: size of the prefix cache.
        chunk_tokens: prompt tokens computed per step.
        dtype: "fp32", "bf16" (half the memory) or "fp8" (emulated); a quantised checkpoint's integers stay integers.
        draft_steps: tokens that the MTP layer drafts ahead, at most; 0 = none. The output is the same.
        kernels: "native" (in C, compiled on first use), "torch", or "auto": native where there is a compiler.
        rejection: accept drafts by rejection sampling: more of them at temperatures above 0, and other tokens (of the
            same distribution) than without drafts.
        deterministic: show at the start that prefill, decoding, any batch and scoring are equal to the bit here.

    Raises FullarcError if the folder is not a valid checkpoint, has no MTP layer to draft with, or is not computed so.
    """

    def __init__(
        self,
        folder: str | Path,
        max_batch: int = 64,
        max_len: int = 2048,
        threads: int = 1,
        prefix_tokens: int = 32768,
        chunk_tokens: int = 512,
        weight_version: str = "0",
        dtype: str = "fp32",
        draft_steps: int = 0,
        rejection: bool = False,
        kernels: str = "auto",
        deterministic: bool = False,
    ) -> None:
        weights = load_weights(folder, weight_version, dtype, kernels)
        longest = min(max_len, weights.config.max_position_embeddings)
        drafts = draft_steps > 0 and weights.has_mtp
        core = forward_pass(weights, max_batch, longest, drafts, threads)
        self.deterministic = deterministic
        if deterministic:
            determinism.check(core)
        drafter = Drafter(core, draft_steps, rejection) if draft_steps else None
        self.scheduler = Scheduler(
            core, max_queue=10**9, chunk_tokens=chunk_tokens, prefix_tokens=prefix_tokens, drafter=drafter
        )
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        stop_ids: Sequence[int] | None = None,
        forbidden_ids: Sequence[int] = (),
        top_logprobs: int = 0,
    ) -> list[Output]:
        """Complete every prompt; the i-th output belongs to the i-th prompt.

        `seeds` gives each prompt its own random stream; otherwise prompt i uses derive(seed, "sample", i).
        `stop_ids` None means the model's own (`eos_token_id`); () means none. `forbidden_ids` are never sampled.

        Raises RequestError for an empty or too long prompt, ids out of range or impossible sampling values.
        """
        if seeds is not None and len(seeds) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(seeds)} seeds.")
        stops = frozenset(self.scheduler.core.weights.config.eos_token_id if stop_ids is None else stop_ids)
        requests = []
        for number, prompt in enumerate(prompts):
            own = seeds[number] if seeds is not None else derive(seed, "sample", number)
            try:
                params = SamplingParams(
                    max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
                    forbidden=frozenset(forbidden_ids), top_logprobs=top_logprobs, stop_ids=stops, seed=own,
                )  # fmt: skip
            except ValueError as error:
                raise RequestError(f"{error}.") from None
            requests.append(self._request(prompt, params))
        self._run(requests)
        return [
            Output(
                r.output, r.logprobs, r.finish, r.weight_version, r.cached_tokens,
                [version for version, start, end in r.versions for _ in range(start, end)], r.top_logprobs,
            )
            for r in requests
        ]  # fmt: skip

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-prob (temperature 1) of each token given those before it; the first of a sequence is 0.0."""
        params = SamplingParams(max_new_tokens=0)
        requests = [self._request(ids, params, score_from=0) for ids in sequences]
        self._run(requests)
        return [[0.0, *r.input_logprobs] for r in requests]

    def update_weights(self, folder: str | Path, weight_version: str) -> None:
        """Replace the weights by those of `folder`; the engine is unchanged if that fails."""
        old = self.scheduler.core.weights
        weights = load_weights(folder, weight_version, old.dtype, kernels_of(old))
        same_shape(weights, old)
        self.scheduler.set_weights(weights)

    def _request(self, ids: Sequence[int], params: SamplingParams, score_from: int = -1) -> Request:
        request = Request(str(next(self._numbers)), list(ids), params, score_from)
        self.scheduler.check(request)
        return request

    def _run(self, requests: list[Request]) -> None:
        for request in requests:
            self.scheduler.submit(request)
        while not self.scheduler.idle:
            self.scheduler.step()
