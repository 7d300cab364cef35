"""Losses of the language-model stages; the output projection is taken in chunks (GLM-5 section 2.4).

A full [N, V] block of logits never exists: each chunk of positions is projected, turned into its loss and its
gradients, and freed, so peak memory falls with the number of chunks.

A loss function maps (model, batch) to a `LossSum`: the *sum* over its tokens and how many there were. The
trainer divides by the count of the whole step, so gradient accumulation is exact in tokens.

Shapes: B rows, T positions, N chosen positions, D hidden, V vocabulary, L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fullarc.train.rows import Batch

CHUNK = 512


@dataclass(frozen=True)
class LossSum:
    """What a loss function returns.

    Attributes:
        total: scalar with a graph; the sum whose mean over `count` is descended.
        count: weight of this micro-batch in the step (tokens here; RL may count sequences).
        metrics: `name: (sum, count)`; logged as the ratio of the step's totals.
        router_load_LE: tokens per MoE layer and expert, or None.
    """

    total: Tensor
    count: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    router_load_LE: Tensor | None = None


class _CrossEntropySum(torch.autograd.Function):
    """sum(lse - logit[target]); gradients are made in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD) if need_weight else None
        nll = hidden_ND.new_zeros(())
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            logits_CV = hidden_ND[part] @ weight_VD.T
            targets_C1 = targets_N[part, None]
            chosen_C = logits_CV.gather(1, targets_C1)[:, 0]
            largest_C = logits_CV.amax(-1)
            grad_CV = logits_CV.sub_(largest_C[:, None]).exp_()
            sum_C = grad_CV.sum(-1)
            nll += (largest_C + sum_C.log() - chosen_C).sum()
            if need_hidden or need_weight:
                grad_CV.div_(sum_C[:, None])
                grad_CV.scatter_add_(1, targets_C1, grad_CV.new_full((1, 1), -1.0).expand(len(targets_C1), 1))
                if grad_hidden_ND is not None:
                    torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[part])
                if grad_weight_VD is not None:
                    grad_weight_VD.addmm_(grad_CV.T, hidden_ND[part])
            del grad_CV, logits_CV  # or two chunks would live at once
        ctx.grads = grad_hidden_ND, grad_weight_VD
        return nll

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_total, (grad_hidden_ND, grad_weight_VD) = grad_outputs[0], ctx.grads
        hidden = None if grad_hidden_ND is None else grad_hidden_ND * grad_total
        weight = None if grad_weight_VD is None else grad_weight_VD * grad_total
        return hidden, weight, None, None


def cross_entropy_sum(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int = CHUNK) -> Tensor:
    """Summed cross-entropy of `targets_N` in nats.

    The gradients of one backward pass are computed on the way; peak extra memory is chunk * V plus D * (N +
    V).
    """
    total: Tensor = _CrossEntropySum.apply(hidden_ND, weight_VD, targets_N, chunk)
    return total


class _TokenLogprobs(torch.autograd.Function):
    """log softmax at the targets; the backward pass projects each chunk again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        logp_N, lse_N = hidden_ND.new_empty(len(hidden_ND)), hidden_ND.new_empty(len(hidden_ND))
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            logits_CV = hidden_ND[part] @ weight_VD.T
            lse_N[part] = logits_CV.logsumexp(-1)
            logp_N[part] = logits_CV.gather(1, targets_N[part, None])[:, 0] - lse_N[part]
            del logits_CV  # or two chunks would live at once
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, lse_N)
        ctx.chunk = chunk
        return logp_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, lse_N = ctx.saved_tensors
        grad_N = grad_outputs[0]
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_ND), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_C1 = grad_N[part, None]
            grad_CV = (hidden_ND[part] @ weight_VD.T).sub_(lse_N[part, None]).exp_().mul_(-grad_C1)
            grad_CV.scatter_add_(1, targets_N[part, None], grad_C1)
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[part])
            if grad_weight_VD is not None:
                grad_weight_VD.addmm_(grad_CV.T, hidden_ND[part])
            del grad_CV
        return grad_hidden_ND, grad_weight_VD, None, None


def token_logprobs(hidden: Tensor, weight_VD: Tensor, targets: Tensor, chunk: int = CHUNK) -> Tensor:
    """log p(target) in nats at every position, differentiable, never holding more than [chunk, V] logits.

    Args:
        hidden: [..., D], e.g. [B, T, D] after the final norm.
        weight_VD: output projection.
        targets: int64 [...], same leading shape.
    """
    flat_ND = hidden.reshape(-1, hidden.shape[-1])
    logp_N = _TokenLogprobs.apply(flat_ND, weight_VD, targets.reshape(-1), chunk)
    return logp_N.view(targets.shape)


@dataclass(frozen=True, kw_only=True)
class LmLoss:
    """Next token + lambda * mean over depths of multi-token prediction + router balance + indexer KL.

    With N the step's next-token targets and B_mtp = ceil(mtp_rows * B) the rows the MTP runs on (rows come
    shuffled), the step's loss is

        1/N sum CE(t+1) + mtp_weight / depths * B / B_mtp * 1/N sum_d CE(t+2+d)
        + aux_weight * aux + index_weight * KL

    Attributes:
        mtp_detached: the MTP term trains the MTP layer only; embedding, trunk and output layer learn as without it.
        aux_weight: weight of the sequence balance loss.
        index_weight: weight of the KL on the selected set (inputs are detached in the model); 0 = not
            computed.
    """

    mtp_steps: int = 0
    mtp_weight: float = 0.3
    mtp_rows: float = 1.0
    mtp_detached: bool = False
    aux_weight: float = 0.0
    index_weight: float = 0.0
    chunk: int = CHUNK

    @property
    def indexer(self) -> str:
        """What the model computes of the indexer's loss."""
        return "sparse" if self.index_weight else "off"

    def __call__(self, model: Any, batch: Batch) -> LossSum:
        out = model.trunk(batch.ids_BT, **batch.structure, indexer_loss=self.indexer)
        targets = batch.targets(1)
        head_VD = model.lm_head.weight
        total, count = _ce(model, out.hidden_BTD, head_VD, targets, self.chunk)
        weight = int(targets[1].sum())  # of the rows, of which another process may have a part
        metrics: dict[str, tuple[float, float]] = {"loss": (float(total.detach()), count)}
        parts, load_LE = [out], out.router_load_LE
        if self.mtp_steps:
            n_rows = math.ceil(self.mtp_rows * len(batch.ids_BT))
            part = batch.rows(0, n_rows)
            extra = model.mtp(
                out.hidden_BTD[:n_rows],
                part.ids_BT,
                **part.structure,
                steps=self.mtp_steps,
                indexer_loss=self.indexer,
                detached=self.mtp_detached,
            )
            if self.mtp_detached:
                head_VD = head_VD.detach()
            scale = self.mtp_weight / self.mtp_steps * len(batch.ids_BT) / n_rows
            for depth, state_BTD in enumerate(extra.hidden):
                loss, predicted = _ce(model, state_BTD, head_VD, part.targets(2 + depth), self.chunk)
                total = total + scale * loss
                metrics[f"mtp_loss_{depth + 1}"] = (float(loss.detach()), predicted)
            parts.append(extra)
            load_LE = torch.cat((load_LE, extra.router_load_LE))
        if self.aux_weight:
            total = total + self.aux_weight * weight * sum(part.aux_loss for part in parts)
        if self.index_weight:
            kl = sum(part.index_kl for part in parts)
            total = total + self.index_weight * weight * kl
            metrics["index_kl"] = (float(out.index_kl.detach()) * weight, count)
        return LossSum(total, count, metrics, load_LE)


def _ce(
    model: Any, hidden_BTD: Tensor, head_VD: Tensor, targets: tuple[Tensor, Tensor], chunk: int
) -> tuple[Tensor, int]:
    """Summed cross-entropy at the trained positions here only, and their number."""
    targets_BT, mask_BT = map(model.context.targets, targets)
    total = cross_entropy_sum(hidden_BTD[mask_BT], head_VD, targets_BT[mask_BT], chunk)
    return total, int(mask_BT.sum())


def indexer_warmup_loss(model: Any, batch: Batch, mtp_steps: int = 0) -> LossSum:
    """KL of the dense attention, summed over heads, to the indexer's softmax: the first phase of DSA (2.1.1).

    The MTP layer's indexer learns beside the others when `mtp_steps` > 0. Only indexers should be trainable,
    so no other graph is kept.
    """
    out = model.trunk(batch.ids_BT, **batch.structure, indexer_loss="dense")
    tokens_BT = batch.docs_BT > 0
    weight, count = int(tokens_BT.sum()), int(model.context.targets(tokens_BT).sum())
    total = out.index_kl
    if mtp_steps:
        extra = model.mtp(
            out.hidden_BTD, batch.ids_BT, **batch.structure, steps=mtp_steps, indexer_loss="dense"
        )
        total = total + extra.index_kl
    return LossSum(total * weight, count, {"index_kl": (float(out.index_kl.detach()) * weight, count)})


@torch.no_grad()
def evaluate(model: Any, batches: Sequence[Batch], indexer_loss: str = "off") -> dict[str, float]:
    """Mean next-token loss in nats over the batches' targets, and the indexer's KL ("dense" or "sparse").

    With "dense" the attention is dense too, so that one model can be measured both ways.
    """
    loss, kl, count = 0.0, 0.0, 0
    for batch in batches:
        out = model.trunk(batch.ids_BT, **batch.structure, indexer_loss=indexer_loss)
        nll, targets = _ce(model, out.hidden_BTD, model.lm_head.weight, batch.targets(1), CHUNK)
        loss, count = loss + float(nll), count + targets
        kl += float(out.index_kl) * targets if out.index_kl is not None else 0.0
    means = {"loss": loss / max(count, 1)}
    return means if indexer_loss == "off" else means | {"index_kl": kl / max(count, 1)}
