"""Training on several processes: torch.distributed, thin and outside the model (GLM-5 section 2.4)."""

from fullarc.train.parallel.launch import RankFailed, launch
from fullarc.train.parallel.owners import ShardedOptimizer
from fullarc.train.parallel.ranks import ALONE, Ranks

__all__ = ["ALONE", "RankFailed", "Ranks", "ShardedOptimizer", "launch"]
