"""The network, as pure `nn.Module`s: GLM-5 exactly, from a toy to 744B. Touches no files but checkpoints."""

from fullarc.model.checkpoint import load_config, load_model, quantize_checkpoint, save_model, write_model
from fullarc.model.glm import GlmMoeDsa, ModelOutput, MTPOutput, TrunkOutput, shift_targets
from fullarc.model.quant import QuantScheme

__all__ = [
    "GlmMoeDsa",
    "MTPOutput",
    "ModelOutput",
    "QuantScheme",
    "TrunkOutput",
    "load_config",
    "load_model",
    "quantize_checkpoint",
    "save_model",
    "shift_targets",
    "write_model",
]
