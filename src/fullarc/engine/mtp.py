"""How far ahead does the MTP layer see? Greedy self-speculation, measured (GLM-5, Table 2).

    accept length = tokens committed / verify steps, the trunk's own included;  1 <= accept length <= drafts + 1

The engine's own speculative decoding does it, with a fixed number of drafts. There the second and later drafts see
rows of the first kind for what came before them. By full passes, which also serve the paper's comparisons (other
attentions, a separate MTP layer for every step), each draft sees rows of its own depth, as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fullarc.engine.backend import forward_pass, prepare
from fullarc.engine.draft import Drafter, Speculation
from fullarc.engine.request import Request
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.scheduler import Scheduler
from fullarc.model import GlmMoeDsa, load_model

DEFAULT_TOKENS = 32
BATCH = 16


@dataclass(frozen=True)
class AcceptLength:
    """Result over all prompts.

    Attributes:
        mean: accept length.
        per_position: share of verify steps whose draft 1, 2, … was accepted.
        outputs: the committed tokens of each prompt.
        steps, tokens: verify steps of each prompt and the tokens that they committed.
    """

    mean: float
    per_position: list[float]
    outputs: list[list[int]]
    steps: list[int]
    tokens: list[int]

    @property
    def verify_steps(self) -> int:
        """Of all prompts."""
        return sum(self.steps)


def mtp_accept_length(
    model: str | Path | GlmMoeDsa,
    prompts: Sequence[Sequence[int]],
    draft_steps: int = 4,
    max_new_tokens: int = DEFAULT_TOKENS,
    full_passes: bool = False,
) -> AcceptLength:
    """Decode every prompt greedily with `draft_steps` drafts a step.

    `full_passes`: compute everything anew in each step, the later drafts' attention included, as training does. It is
    slow and differs little; for comparisons with models that the engine does not serve.

    Raises FullarcError if the model has no MTP layer.
    """
    net = model if isinstance(model, GlmMoeDsa) else load_model(model)
    if full_passes or net.config.variant or len(net.mtp_layers) > 1:
        runs = [_by_full_passes(net, prompt, draft_steps, max_new_tokens) for prompt in prompts]
    else:
        runs = _by_engine(net, prompts, draft_steps, max_new_tokens)
    total = Speculation()
    for spec, _ in runs:
        total.add(spec)
    return AcceptLength(
        total.accept_length,
        [hits / max(total.verified, 1) for hits in total.per_position(draft_steps)],
        [output for _, output in runs],
        [spec.verified for spec, _ in runs],
        [spec.verified + spec.accepted for spec, _ in runs],
    )


def _by_engine(
    net: GlmMoeDsa, prompts: Sequence[Sequence[int]], draft_steps: int, max_new_tokens: int
) -> list[tuple[Speculation, list[int]]]:
    longest = min(max(map(len, prompts)) + max_new_tokens, net.config.max_position_embeddings)
    core = forward_pass(prepare(net), min(BATCH, len(prompts)), longest, mtp=net.mtp_layer is not None)
    drafter = Drafter(core, draft_steps, adaptive=False)
    scheduler = Scheduler(core, max_queue=len(prompts), drafter=drafter)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    requests = [Request(str(number), list(prompt), params) for number, prompt in enumerate(prompts)]
    for request in requests:
        scheduler.check(request)
        scheduler.submit(request)
    while not scheduler.idle:
        scheduler.step()
    return [(r.spec, r.output) for r in requests]


def _by_full_passes(
    net: GlmMoeDsa, prompt: Sequence[int], draft_steps: int, max_new_tokens: int
) -> tuple[Speculation, list[int]]:
    spec = Speculation()
    goal = min(len(prompt) + max_new_tokens, net.config.max_position_embeddings)
    ids, hidden = _advance(net, list(prompt), [])
    while len(ids) < goal:
        drafts, before = _draft(net, ids, hidden, min(draft_steps, goal - len(ids))), len(ids)
        ids, hidden = _advance(net, ids, drafts)
        spec.count(len(drafts), len(ids) - before - 1)
    return spec, ids[len(prompt) : goal]


@torch.inference_mode()
def _advance(net: GlmMoeDsa, ids: list[int], drafts: list[int]) -> tuple[list[int], torch.Tensor]:
    """Check `drafts` behind `ids`: all tokens that are certain now, and the trunk's states of all but the last."""
    hidden_BTD = net.trunk(torch.tensor([ids + drafts])).hidden_BTD
    greedy = net.lm_head(hidden_BTD[0, len(ids) - 1 :]).argmax(-1).tolist()
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == greedy[accepted]:
        accepted += 1
    return ids + greedy[: accepted + 1], hidden_BTD[:, : len(ids) + accepted]


@torch.inference_mode()
def _draft(net: GlmMoeDsa, ids: list[int], hidden_BTD: torch.Tensor, steps: int) -> list[int]:
    """The next `steps` tokens as the MTP layer sees them; `hidden` covers all of `ids` but the last token.

    Depth d joins state t with the embedding of token t + 1 + d, which is depth 0 on the sequence moved by d.
    """
    known, last = list(ids), hidden_BTD.shape[1] - 1
    h_BTD = torch.nn.functional.pad(hidden_BTD, (0, 0, 0, 1))
    for depth in range(steps):
        h_BTD = net.mtp(h_BTD, torch.tensor([known[depth:]]), steps=1, first=depth).hidden[0]
        known.append(int(net.lm_head(h_BTD[0, last]).argmax()))
    return known[len(ids) :]
