"""What the variants of the paper's tables are measured by: each from forward passes of the model itself.

The engine serves GLM-5's attention only, so nothing here samples. An answer is right when every one of its tokens is
the model's first choice given the tokens before it, which is what greedy decoding would have had to write.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from fullarc.chat import Tokenizer
from fullarc.data.longctx import Case, Filler, cases
from fullarc.data.pack import pack_concat
from fullarc.evals.stats import mean
from fullarc.model import GlmMoeDsa
from fullarc.model.gqa import GQA
from fullarc.model.mla import MLA
from fullarc.model.visibility import Visibility
from fullarc.train import Batch, evaluate

SORTS = ("needle", "multi_key", "multi_value")
PASS_TOKENS = 4096


def held_rows(tok: Tokenizer, texts: Sequence[str], length: int, rows: int, skip: int = 0) -> Batch:
    """The first `rows` rows of concatenated documents; the first `skip` tokens of each are read but not predicted.

    Fewer rows when the texts have fewer tokens. The tokens that end documents are no targets: they are no text.
    """
    eos, docs, tokens = tok.id("<|endoftext|>"), list[tuple[list[int], list[int]]](), 0
    for text in texts:
        ids = tok.encode(text)
        docs.append(([*ids, eos], [1] * len(ids) + [0]))
        tokens += len(ids) + 1
        if tokens >= rows * length:
            break
    packed = pack_concat(docs, length)
    ids_BT, loss_BT = (torch.from_numpy(x[:rows].astype(np.int64)) for x in (packed.ids, packed.loss))
    loss_BT[:, :skip] = 0
    return Batch(ids_BT, loss_BT.bool(), torch.ones_like(ids_BT), torch.zeros_like(ids_BT), False)


def bits_per_byte(model: GlmMoeDsa, tok: Tokenizer, held: Batch) -> float:
    """Cross-entropy of the rows' targets in bits per byte of their text."""
    targets_BT, mask_BT = held.targets(1)
    size = sum(len(tok.token_bytes(token)) for token in targets_BT[mask_BT].tolist())
    nats = evaluate(model, held.split(max(1, PASS_TOKENS // held.ids_BT.shape[1])))["loss"]
    return nats * int(mask_BT.sum()) / math.log(2) / size


def questions(tok: Tokenizer, texts: Sequence[str], length: int, each: int, seed: int) -> list[Case]:
    """`each` questions of every sort about documents of `length` tokens, hidden among sentences of `texts`."""
    return cases(tok, Filler(tok, texts), [length], each * len(SORTS), seed, SORTS)


@torch.no_grad()
def recall(model: GlmMoeDsa, tok: Tokenizer, asked: Sequence[Case]) -> dict[str, float]:
    """Shares of right answers to questions of one length, and the cost of an answer's token in nats.

    Returns:
        needle, multi_key: share answered exactly; values: share of the values that are right, each given the ones
        before it; recall: the mean of the three; nats.
    """
    right: dict[str, list[float]] = {"needle": [], "multi_key": [], "values": []}
    costs: list[float] = []
    size = max(1, PASS_TOKENS // asked[0].length)
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        hidden_BTD = model.trunk(
            torch.tensor([[*one.prompt_ids, *one.answer_ids] for one in part])
        ).hidden_BTD
        for one, hidden_TD in zip(part, hidden_BTD, strict=True):
            answer = torch.tensor(one.answer_ids)
            logp_AV = model.lm_head(hidden_TD[-len(answer) - 1 : -1]).log_softmax(-1)
            costs += (-logp_AV.gather(1, answer[:, None])[:, 0]).tolist()
            hits = (logp_AV.argmax(-1) == answer).tolist()
            if one.sort == "multi_value":
                right["values"] += [float(all(hits[i] for i in run)) for run in _numbers(tok, one.answer_ids)]
            else:
                right[one.sort].append(float(all(hits)))
    shares = {name: mean(values) for name, values in right.items()}
    return {**shares, "recall": mean(list(shares.values())), "nats": mean(costs)}


def _numbers(tok: Tokenizer, ids: Sequence[int]) -> list[list[int]]:
    """Places of the tokens of each number among `ids`."""
    digits = [tok.token_bytes(token).strip().isdigit() for token in ids]
    return [list(run) for is_number, run in groupby(range(len(ids)), key=digits.__getitem__) if is_number]


@torch.no_grad()
def largest_logit(model: GlmMoeDsa, ids_BT: Tensor) -> float:
    """The largest scaled product of a query and an earlier-or-equal key, over layers, heads and rows."""
    largest: list[float] = []

    def look(attention: MLA | GQA, args: tuple[Tensor, Visibility]) -> None:
        h_BTD, seen = args[:2]
        q_BHTd, k_BHTd = _queries_and_keys(attention, h_BTD, seen.cos, seen.sin)
        scores_BHTT = q_BHTd @ k_BHTd.mT * attention.scale
        future_TT = torch.ones(scores_BHTT.shape[-2:], dtype=torch.bool).triu(1)
        largest.append(float(scores_BHTT.masked_fill(future_TT, -torch.inf).max()))

    hooks = [
        module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, MLA | GQA)
    ]
    try:
        model.trunk(ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return max(largest)


def _queries_and_keys(attention: MLA | GQA, h_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(attention, GQA):
        return attention.queries_and_keys(h_BTD, cos, sin)
    _, q_nope, q_rope = attention.queries(h_BTD, cos, sin)
    latent_BTC, k_rope_BTR = attention.latents(h_BTD, cos, sin)
    k_nope_BHTN = torch.einsum("btc,hnc->bhtn", latent_BTC, attention.up_projections()[0])
    k_rope_BHTR = k_rope_BTR[:, None].expand(-1, attention.heads, -1, -1)
    return torch.cat((q_nope, q_rope), -1).transpose(1, 2), torch.cat((k_nope_BHTN, k_rope_BHTR), -1)
