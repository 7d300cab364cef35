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

from fullarc.engine.sampling import SamplingParams


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
    out_NV = logits_NV.clone()
    for row_V, p, prompt, known in zip(out_NV, params, prompts, ids, strict=True):
        if not p.penalises:
            continue
        if p.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(known)))
            old = row_V[seen]
            row_V[seen] = torch.where(old > 0, old / p.repetition_penalty, old * p.repetition_penalty)
        output = known[len(prompt) :]
        if output and (p.frequency_penalty or p.presence_penalty):
            count_V = torch.tensor(output).bincount(minlength=len(row_V))
            row_V -= p.frequency_penalty * count_V + p.presence_penalty * (count_V > 0)
        for token, bias in p.logit_bias:
            row_V[token] += bias
    return out_NV
