"""What is asked and how it is graded.

A task is a family of instances: `sample(seed)` draws one, `grade` judges what was answered or left behind, and
`solution` is an oracle that demonstrations and checks are made from. An outcome is a `Reward`, or says that there
is none to learn from: a broken environment is never a zero. Nothing here imports torch.
"""

from fullarc.tasks.base import (
    EnvError,
    Instance,
    Invalid,
    Outcome,
    Reward,
    Step,
    Task,
    Truncated,
    instance_seed,
    outcome_from_dict,
    outcome_to_dict,
    split_of,
)
from fullarc.tasks.demos import demos
from fullarc.tasks.registry import families, get, kinds

__all__ = [
    "EnvError",
    "Instance",
    "Invalid",
    "Outcome",
    "Reward",
    "Step",
    "Task",
    "Truncated",
    "demos",
    "families",
    "get",
    "instance_seed",
    "kinds",
    "outcome_from_dict",
    "outcome_to_dict",
    "split_of",
]
