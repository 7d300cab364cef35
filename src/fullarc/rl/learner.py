"""The trainer's half of RL: a batch of episodes in, K exact updates and their metrics out.

Invariant: what happens depends on the weights, the optimizer state and the episodes only; no clock, no global
randomness. Forward and backward passes run on packed rows, and only positions whose token was sampled by the
policy are projected to the vocabulary.

Shapes: B rows, T positions, N trained positions of a micro-batch, D hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fullarc.config.stages import RLStage
from fullarc.rl.advantages import group_normalised, mean_centred
from fullarc.rl.batch import ROW_TOKENS, PackedRows, minibatches, pack
from fullarc.rl.groups import Trained
from fullarc.rl.losses import PolicyLoss, TokenStats, direct_double_sided, icepop_grpo, opd
from fullarc.train import LossSum, OptimSettings, Trainer, prepare, schedule, token_logprobs, trained


@dataclass(frozen=True)
class Objective:
    """A loss of `rl.losses` with the advantage that belongs to it; None = the teacher's, token by token."""

    loss: str
    advantages: Callable[[Sequence[float]], list[float]] | None


OBJECTIVES = {
    "reasoning_rl": Objective("icepop_grpo", group_normalised),
    "agentic_rl": Objective("direct_double_sided", mean_centred),
    "general_rl": Objective("icepop_grpo", group_normalised),
    "distil": Objective("opd", None),
}


def trained_logprobs(model: Any, rows: PackedRows, temperature: float) -> Tensor:
    """log π(token) in nats [N] of the trained positions, in row order, under the sampling temperature."""
    return _logprobs(model, rows, temperature, "off")[0]


def _logprobs(model: Any, rows: PackedRows, temperature: float, indexer_loss: str) -> tuple[Tensor, Any]:
    trunk = model.trunk(rows.input_ids, rows.doc_ids, rows.parent_ids, indexer_loss=indexer_loss)
    on = rows.weights > 0
    hidden_ND = trunk.hidden_BTD[on] / temperature
    return token_logprobs(hidden_ND, model.lm_head.weight, rows.targets[on]), trunk


@torch.no_grad()
def annotate(model: Any, rows: PackedRows, micro_rows: int, temperature: float) -> Tensor:
    """log π of every trained position as [B, T] (0 elsewhere), without gradients, micro-batch by micro-batch."""
    out_BT = torch.zeros_like(rows.rollout_logp)
    parts = rows.split(micro_rows)
    if parts:
        out_BT[rows.weights > 0] = torch.cat([trained_logprobs(model, part, temperature) for part in parts])
    return out_BT


class Learner:
    """One model in training.

    Args:
        model: the policy.
        settings: the stage's settings.
        teachers: kind of task -> frozen model, for distillation.
        workers: forward passes computed at once.
    """

    def __init__(
        self, model: Any, settings: RLStage, teachers: Mapping[str, Any] | None = None, workers: int = 1
    ) -> None:
        self.settings, self.teachers = settings, dict(teachers or {})
        self.objective = OBJECTIVES[getattr(settings, "type", "reasoning_rl")]
        self._stats_lock = Lock()
        self.trainer = Trainer(
            prepare(model, settings),
            OptimSettings(
                kind=settings.optimizer, weight_decay=settings.weight_decay, clip=settings.grad_clip
            ),
            schedule(
                peak=settings.lr,
                final=settings.lr_end,
                total=settings.steps * settings.updates_per_push,
                shape=settings.schedule,
            ),
            trained(indexer=not settings.freeze_indexer, mtp=False),
            workers=workers,
        )

    @property
    def model(self) -> Any:
        """The policy."""
        return self.trainer.model

    def update(self, items: Sequence[Trained]) -> dict[str, float]:
        """K updates on one batch; the means of their metrics. An empty batch changes nothing and gives {}."""
        batches = [self._packed(part) for part in minibatches(items, self.settings.updates_per_push)]
        if len(batches) > 1 and self.objective.loss != "direct_double_sided":
            # π_old of the first minibatch is π_θ itself; the others need it before the weights move.
            batches[1:] = [replace(rows, old_logp=self._annotate(self.model, rows)) for rows in batches[1:]]
        stats = TokenStats()
        steps = []
        for rows in batches:
            micro = rows.split(self._micro_rows(rows))
            steps.append(self.trainer.step(micro, lambda model, part: self._loss(model, part, stats)))
        if not steps:
            return {}
        if self.settings.reset_optimizer:
            self.trainer.optimizer.reset()
        means = {name: sum(step[name] for step in steps) / len(steps) for name in ("loss", "grad_norm", "lr")}
        return {**means, **stats.result(), "fill": sum(rows.fill for rows in batches) / len(batches)}

    def mismatch(self, items: Sequence[Trained], rows_limit: int = 4) -> dict[str, float]:
        """|log π_trainer − log π_engine| over the first rows of a batch sampled with exactly these weights."""
        rows = self._pack(items).split(rows_limit)[:1]
        if not rows:
            return {}
        gap = (self._annotate(self.model, rows[0]) - rows[0].rollout_logp)[rows[0].weights > 0].abs()
        return {"parity_mean": float(gap.mean()), "parity_max": float(gap.max())}

    def _packed(self, items: Sequence[Trained]) -> PackedRows:
        if not self.teachers:
            return self._pack(items)
        packed = []
        for kind in dict.fromkeys(item.episode.kind for item in items):
            rows = self._pack([item for item in items if item.episode.kind == kind])
            packed.append(replace(rows, teacher_logp=self._annotate(self.teachers[kind], rows)))
        return concat(packed)

    def _pack(self, items: Sequence[Trained]) -> PackedRows:
        positions = self.model.config.max_position_embeddings
        return pack(items, self.settings.loss_mean, min(ROW_TOKENS, positions))

    def _annotate(self, model: Any, rows: PackedRows) -> Tensor:
        return annotate(model, rows, self._micro_rows(rows), self.settings.temperature)

    def _micro_rows(self, rows: PackedRows) -> int:
        return max(1, self.settings.micro_batch_tokens // rows.input_ids.shape[1])

    def _loss(self, model: Any, rows: PackedRows, stats: TokenStats) -> LossSum:
        s = self.settings
        learn_indexer = not s.freeze_indexer and not model.config.dense_attention
        new, trunk = _logprobs(model, rows, s.temperature, "sparse" if learn_indexer else "off")
        on = rows.weights > 0
        weights, mu, advantages = rows.weights[on], rows.rollout_logp[on], rows.advantages[on]
        old = new.detach() if rows.old_logp is None else rows.old_logp[on]
        out: PolicyLoss
        if self.objective.loss == "direct_double_sided":
            out = direct_double_sided(new, mu, advantages, weights, eps_low=s.eps_low, eps_high=s.eps_high)
        else:
            bounds = {"beta": s.beta, "clip_low": s.eps_low, "clip_high": s.eps_high}
            if self.objective.loss == "opd":
                assert rows.teacher_logp is not None
                advantages = rows.teacher_logp[on] - new.detach()
                out = opd(new, old, mu, rows.teacher_logp[on], weights, **bounds)
            else:
                out = icepop_grpo(new, old, mu, advantages, weights, **bounds)
        with self._stats_lock:
            stats.add(out, new, mu, weights, old, advantages)
        count = float(out.weight)
        total = out.loss + count * trunk.index_kl if learn_indexer else out.loss
        return LossSum(total, count, {"loss": (float(out.loss.detach()), count)})


def concat(parts: Sequence[PackedRows]) -> PackedRows:
    """Stack packed rows; shorter rows are padded on the right to the longest."""
    T = max(part.input_ids.shape[1] for part in parts)

    def stack(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        return torch.cat([torch.nn.functional.pad(t, (0, T - t.shape[1])) for t in tensors])

    names = PackedRows.__dataclass_fields__
    return PackedRows(**{name: stack(name) for name in names})  # type: ignore[arg-type]
