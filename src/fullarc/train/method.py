"""What a stage's settings mean to the trainer: its loss, its update rule, its rate and what moves.

Invariant: a method is a function of the settings alone; where rows, weights and checkpoints are is the caller's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fullarc.config.stages import DSA, LMStage
from fullarc.train.losses import LmLoss, indexer_warmup_loss
from fullarc.train.optim import OptimSettings
from fullarc.train.schedule import schedule
from fullarc.train.trainer import LossFn, trained


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a stretch of training goes: one trainable set, one loss, one schedule.

    Attributes:
        steps: optimizer steps.
        lr: learning rate of each step.
        trainable: which parameter names move.
    """

    steps: int
    optim: OptimSettings
    lr: Callable[[int], float]
    trainable: Callable[[str], bool]
    loss: LossFn
    router_bias_rate: float = 0.0


def method_of(stage: LMStage) -> Method:
    """The stage's own."""
    return Method(
        steps=stage.steps,
        optim=OptimSettings(
            kind=stage.optimizer,
            weight_decay=stage.weight_decay,
            clip=stage.grad_clip,
            adamw_scale=stage.adamw_scale,
        ),
        lr=schedule(
            peak=stage.lr,
            final=stage.lr_end,
            warmup=stage.warmup_steps,
            total=stage.steps,
            shape=stage.schedule,
        ),
        trainable=trained(indexer=stage.indexer_weight > 0, mtp=stage.mtp_steps > 0),
        loss=LmLoss(
            mtp_steps=stage.mtp_steps,
            mtp_weight=stage.mtp_weight,
            mtp_rows=stage.mtp_rows,
            mtp_detached=stage.mtp_detached,
            aux_weight=stage.aux_loss,
            index_weight=stage.indexer_weight,
        ),
        router_bias_rate=stage.router_bias_rate,
    )


def warm_up_of(stage: DSA) -> Method:
    """Of its indexer alone, before sparse adaptation (GLM-5 section 2.1.1)."""
    return Method(
        steps=stage.indexer_steps,
        optim=method_of(stage).optim,
        lr=schedule(
            peak=stage.indexer_lr, final=stage.indexer_lr_end, total=stage.indexer_steps, shape="cosine"
        ),
        trainable=trained(indexer=True, mtp=stage.mtp_steps > 0, trunk=False),
        loss=partial(indexer_warmup_loss, mtp_steps=stage.mtp_steps),
        router_bias_rate=0.0,
    )
