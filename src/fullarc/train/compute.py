"""How passes are computed: in which precision, and what is kept for the backward pass.

Mixed precision has no casts of its own here: a model in bf16 keeps fp32 weights, its activations are bf16 from the
embedding on, and every product casts its weight (`GlmMoeDsa.compute_dtype`). So checkpoints, the optimizer and the
order of everything are those of fp32.
"""

import torch

from fullarc.config.stages import Compute
from fullarc.model import GlmMoeDsa

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(model: GlmMoeDsa, how: Compute) -> GlmMoeDsa:
    """Make `model` compute its passes as `how` says; its weights are not touched."""
    model.compute_dtype = DTYPES[how.precision]
    model.checkpoint_activations = how.checkpoint_activations
    return model
