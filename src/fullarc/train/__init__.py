"""From packed rows to weights: one trainer, Muon Split, chunked losses, resumable checkpoints, the stages."""

from fullarc.train.checkpoint import Steps, latest, load_checkpoint, save_checkpoint
from fullarc.train.compute import prepare
from fullarc.train.losses import LmLoss, LossSum, evaluate, token_logprobs
from fullarc.train.optim import Optimizer, OptimSettings
from fullarc.train.rows import Batch, Rows
from fullarc.train.schedule import learning_rate, schedule
from fullarc.train.stages import Phase, run_dsa, run_midtrain, run_phase, run_pretrain, run_sft
from fullarc.train.trainer import NonFinite, Trainer, trained

__all__ = [
    "Batch",
    "LmLoss",
    "LossSum",
    "NonFinite",
    "OptimSettings",
    "Optimizer",
    "Phase",
    "Rows",
    "Steps",
    "Trainer",
    "evaluate",
    "latest",
    "learning_rate",
    "load_checkpoint",
    "prepare",
    "run_dsa",
    "run_midtrain",
    "run_phase",
    "run_pretrain",
    "run_sft",
    "save_checkpoint",
    "schedule",
    "token_logprobs",
    "trained",
]
