"""How far ahead does the MTP layer see? Greedy self-speculation, measured (GLM-5, Table 2).

One verify step: the trunk's state at the last token drafts d_1 … d_n by applying the shared MTP layer n times, or the
separate ones in turn (the post-norm state is carried on, as in training); the trunk then checks the drafts, keeps those
equal to its own greedy choice up to the first miss, and adds its own next token.

    accept length = tokens committed / verify steps, the bonus token included;  1 <= accept length <= n + 1

Invariant: the committed tokens are those of plain greedy decoding. This measures acceptance with full forward passes;
it is not the fast path.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fullarc.model import GlmMoeDsa, load_model

DEFAULT_TOKENS = 32


@dataclass(frozen=True)
class AcceptLength:
    """Result over all prompts. `outputs` are the committed tokens of each prompt."""

    mean: float
    per_position: list[float]
    verify_steps: int
    outputs: list[list[int]]


def mtp_accept_length(
    model: str | Path | GlmMoeDsa,
    prompts: Sequence[Sequence[int]],
    draft_steps: int = 4,
    max_new_tokens: int = DEFAULT_TOKENS,
) -> AcceptLength:
    """Speculate greedily on every prompt with `draft_steps` recursive MTP steps.

    `per_position[i]` is the share of verify steps whose draft i + 1 was accepted.
    Raises ValueError if the model has no MTP layer.
    """
    net = model if isinstance(model, GlmMoeDsa) else load_model(model)
    steps, committed, hits, outputs = 0, 0, [0] * draft_steps, []
    for prompt in prompts:
        ids, goal = list(prompt), min(len(prompt) + max_new_tokens, net.config.max_position_embeddings)
        ids, hidden = _advance(net, ids, [])
        while len(ids) < goal:
            drafts = _draft(net, ids, hidden, min(draft_steps, goal - len(ids)))
            before = len(ids)
            ids, hidden = _advance(net, ids, drafts)
            accepted = len(ids) - before - 1
            steps, committed = steps + 1, committed + accepted + 1
            for position in range(accepted):
                hits[position] += 1
        outputs.append(ids[len(prompt) : goal])
    return AcceptLength(committed / max(steps, 1), [hit / max(steps, 1) for hit in hits], steps, outputs)


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
