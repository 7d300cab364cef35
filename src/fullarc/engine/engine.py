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
from fullarc.engine.cache import Latents
from fullarc.engine.draft import Drafter
from fullarc.engine.lora import Adapter, merge, read_adapter
from fullarc.engine.origin import Origin, identify
from fullarc.engine.prefix import BLOCK, PrefixCache, block_bytes
from fullarc.engine.request import Request, RequestError
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.scheduler import Scheduler
from fullarc.engine.spill import MIB, SpillFile
from fullarc.model import GlmMoeDsa, load_config, load_model

LARGEST_MB = 1e9


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
    folder: str | Path, version: str = "0", dtype: str = "fp32", kernels: str = "auto", drafts: bool = True
) -> Weights:
    """Verified, fused weights of a checkpoint folder for computing in `dtype` (see `engine.products`) by `kernels`.

    What is read: every file once for its hash, where the folder has a manifest; then the tensors in use, which are
    memory-mapped, once to see that they are finite and once to be fused. Without `drafts` an MTP layer is not in use:
    it is neither checked nor kept.

    Raises FullarcError naming what is wrong.
    """
    kernels = resolve(kernels, dtype)
    # separate layers for each step draft nothing, and are never kept
    idle = not drafts and load_config(Path(folder)).num_nextn_predict_layers == 1
    model = load_model(folder, num_nextn_predict_layers=0) if idle else load_model(folder)
    check_finite(model, str(folder))
    return prepare(model, version, dtype, kernels)


def load(folder: str | Path, version: str, dtype: str, kernels: str, drafts: bool) -> tuple[Weights, Origin]:
    """`load_weights`, and what is remembered of the folder."""
    identity = identify(folder)
    weights = load_weights(folder, version, dtype, kernels, drafts)
    return weights, Origin(folder, identity)


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


def _prefixes(
    cache: Latents, tokens: int, mb: float | None, spill: str | Path | None, spill_mb: float
) -> PrefixCache:
    """A prefix cache of `mb` MB (None: of `tokens`) and of `spill_mb` more in a folder. Raises FullarcError."""
    for size, name in ((mb or 0.0, "prefix-mb"), (spill_mb, "prefix-spill-mb")):
        if not 0 <= size < LARGEST_MB:
            raise FullarcError(f"--{name} {size:g} is no size.", f"Give a number from 0 to {LARGEST_MB:g}.")
    block = block_bytes(cache)
    blocks = tokens // BLOCK if mb is None else int(mb * MIB) // block
    file = SpillFile(Path(spill), int(spill_mb * MIB), block) if spill else None
    try:
        return PrefixCache(cache, blocks, file)
    except RuntimeError:
        size = blocks * block / MIB
        raise FullarcError(
            f"There is no memory for {size:.0f} MB of prefixes.", "Give --prefix-mb less."
        ) from None


class Engine:
    """A model loaded for generation.

    Args:
        folder: checkpoint folder (Hugging Face `glm_moe_dsa`).
        max_batch: sequences that decode together.
        max_len: tokens of the longest sequence, prompt included; at most the model's positions.
        threads: that compute a step.
        prefix_tokens: size of the prefix cache; prefix_mb: the same in MB of memory, if given.
        prefix_spill: folder for a nameless file of up to `prefix_spill_mb` MB, which takes what the prefix cache has no
            memory for; None = none.
        chunk_tokens: prompt tokens computed per step.
        dtype: "fp32", "bf16" (half the memory) or "fp8" (emulated); a quantised checkpoint's integers stay integers.
        draft_steps: tokens that the MTP layer drafts ahead, at most; 0 = none, and the layer takes no memory. The
            output is the same.
        kernels: "native" (in C, compiled on first use), "torch", or "auto": native where there is a compiler.
        rejection: accept drafts by rejection sampling: more of them at temperatures above 0, and other tokens (of the
            same distribution) than without drafts.
        deterministic: show at the start that prefill, decoding, any batch and scoring are equal to the bit here.
        overlap: do what a step leaves (stop strings, prefixes, callbacks) in a second thread behind the next one's
            forward pass. The output is the same.

    Raises FullarcError if the folder is not a valid checkpoint, has no MTP layer to draft with, is not computed so, if
    a size is not positive or larger than memory, or if prefixes cannot be spilled as wanted.
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
        prefix_mb: float | None = None,
        prefix_spill: str | Path | None = None,
        prefix_spill_mb: float = 1024.0,
        overlap: bool = False,
    ) -> None:
        for option, value in (("--max-batch", max_batch), ("--max-len", max_len), ("--threads", threads)):
            if value < 1:
                raise FullarcError(f"{option} is {value}.", "Give at least 1.")
        weights, self.origin = load(folder, weight_version, dtype, kernels, draft_steps > 0)
        longest = min(max_len, weights.config.max_position_embeddings)
        drafts = draft_steps > 0 and weights.has_mtp
        try:
            core = forward_pass(weights, max_batch, longest, drafts, threads)
        except (OSError, OverflowError, RuntimeError) as error:  # as mmap and PyTorch have it
            raise FullarcError(
                f"There is no memory for {max_batch} sequences of {longest} tokens ({error}).",
                "Choose a smaller --max-batch or --max-len.",
            ) from None
        self.deterministic = determinism.check(core) if deterministic else None
        drafter = Drafter(core, draft_steps, rejection) if draft_steps else None
        prefixes = _prefixes(core.cache, prefix_tokens, prefix_mb, prefix_spill, prefix_spill_mb)
        self.scheduler = Scheduler(core, prefixes, 10**9, chunk_tokens, drafter, overlap)
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
        adapter: str = "",
    ) -> list[Output]:
        """Complete every prompt; the i-th output belongs to the i-th prompt.

        `seeds` gives each prompt its own random stream; otherwise prompt i uses derive(seed, "sample", i).
        `stop_ids` None means the model's own (`eos_token_id`); () means none. `forbidden_ids` are never sampled.
        `adapter`: name of a loaded LoRA adapter to compute with.

        Raises RequestError for an empty or too long prompt, ids out of range, impossible sampling values or an unknown
        adapter.
        """
        if seeds is not None and len(seeds) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts but {len(seeds)} seeds.")
        stops = frozenset(self.scheduler.weights.config.eos_token_id if stop_ids is None else stop_ids)
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
            requests.append(self._request(prompt, params, adapter=adapter))
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
        old = self.scheduler.weights
        weights, origin = load(folder, weight_version, old.dtype, kernels_of(old), old.has_mtp)
        same_shape(weights, old)
        adapters = self.scheduler.adapters_in_use
        tensors = origin.tensors("adapters") if adapters else {}
        merged = {a: merge(weights, tensors, a.deltas, a.folder) for a in adapters}
        self.scheduler.set_weights(weights, merged)
        self.origin = origin

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Make the LoRA adapter of a PEFT folder known as `name`, in the place of an earlier one of that name.

        Raises FullarcError naming what is wrong with it; then nothing has changed.
        """
        weights = self.scheduler.weights
        deltas = read_adapter(folder, weights.config)
        merged = merge(weights, self.origin.tensors("adapters"), deltas, str(folder))
        self.scheduler.adapters[name] = Adapter(name, str(folder), deltas, merged)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises RequestError if there is none of that name."""
        if self.scheduler.adapters.pop(name, None) is None:
            raise RequestError(f"No adapter {name[:200]!r} is loaded.")

    def _request(
        self, ids: Sequence[int], params: SamplingParams, score_from: int = -1, adapter: str = ""
    ) -> Request:
        request = Request(str(next(self._numbers)), list(ids), params, score_from, adapter=adapter)
        self.scheduler.check(request)
        return request

    def _run(self, requests: list[Request]) -> None:
        for request in requests:
            self.scheduler.submit(request)
        while not self.scheduler.idle:
            self.scheduler.step()
