"""Penalties and biases: what a request adds to its logits before a token is chosen.

    repetition  l_v <- l_v / r if l_v > 0 else l_v * r     for every v in the prompt or the output    (CTRL)
    frequency   l_v <- l_v - f * (how often v was sampled)                                            (OpenAI)
    presence    l_v <- l_v - p * [v was sampled]                                                      (OpenAI)
    bias        l_v <- l_v + b_v

They steer the choice only: reported log-probs are those of the model, as they are before forbidden tokens and
truncation, so that a trainer finds the same ones again. Shape suffixes: N requests, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fullarc.engine.native.library import available
from fullarc.engine.native.sample import penalise
from fullarc.engine.sampling import SamplingParams

NEUTRAL = (1.0, 0.0, 0.0)


@torch.inference_mode()
def penalised(
    logits_NV: Tensor,
    params: Sequence[SamplingParams],
    prompts: Sequence[list[int]],
    ids: Sequence[list[int]],
) -> Tensor:
    """Logits to choose from; `logits_NV` itself where no request asks for anything.

    `ids` are the sequences so far, each beginning with its prompt.
    """
    if not any(p.penalises for p in params):
        return logits_NV
    out_NV = logits_NV.contiguous().clone()
    told = [
        (row, (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)) for row, p in enumerate(params)
    ]
    rows, factors = (
        [row for row, given in told if given != NEUTRAL],
        [given for _, given in told if given != NEUTRAL],
    )
    if rows and available():
        penalise(out_NV, rows, [ids[row] for row in rows], [len(prompts[row]) for row in rows], factors)
    else:
        for row, given in zip(rows, factors, strict=True):
            _penalise(out_NV[row], ids[row], len(prompts[row]), *given)
    biases = [(row, token, bias) for row, p in enumerate(params) for token, bias in p.logit_bias]
    if biases:
        at, tokens, values = zip(*biases, strict=True)
        out_NV.index_put_((torch.tensor(at), torch.tensor(tokens)), torch.tensor(values), accumulate=True)
    return out_NV


def _penalise(
    row_V: Tensor, ids: list[int], prompt: int, repetition: float, frequency: float, presence: float
) -> None:
    if repetition != 1:
        seen = torch.tensor(sorted(set(ids)))
        old = row_V[seen]
        row_V[seen] = torch.where(old > 0, old / repetition, old * repetition)
    if len(ids) > prompt:
        count_V = torch.tensor(ids[prompt:]).bincount(minlength=len(row_V))
        row_V -= frequency * count_V + presence * (count_V > 0)
