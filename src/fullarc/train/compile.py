"""Layers compiled to C++ by inductor, for runs that are long enough to earn back a minute of compiling.

Compiled are norms, projections, rotations, feed-forwards and what is added to the residual stream. Left out is what
depends on the data: the experts (how many tokens each gets) and what an attention does with the chunks of packed rows.
Nothing of the model's code knows of it, and names of weights stay as they are.

Invariant: results are those of the plain layers up to rounding, and the same in every process: each shape of a pass is
compiled for itself (`dynamic=False`), so a kernel does not depend on which shapes came before.
"""

import sysconfig
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from fullarc.config.errors import FullarcError
from fullarc.model import GlmMoeDsa
from fullarc.model.glm import DecoderLayer
from fullarc.model.mla import MLA
from fullarc.model.moe import MoE

SHAPES = 64  # that one function may be compiled for before it would silently run as it is


def compile_layers(model: GlmMoeDsa) -> GlmMoeDsa:
    """Compile the decoder and MTP layers of `model` in place, each at its first pass.

    Raises:
        FullarcError: there is no C++ compiler, or no header of Python for it.
    """
    _require_compiler()
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = SHAPES
    for layer in cast("list[DecoderLayer]", [*model.layers, *model.mtp_layers]):
        if isinstance(layer.self_attn, MLA):
            _leave_out(layer.self_attn, "_attend")
            _leave_out(layer.self_attn, "_index")
        else:
            _leave_out(layer.self_attn, "forward")
        if isinstance(layer.mlp, MoE):
            _leave_out(layer.mlp, "forward")
            if layer.mlp.shared_experts is not None:
                layer.mlp.shared_experts.compile(dynamic=False)
        layer.compile(dynamic=False)
    return model


def _leave_out(module: nn.Module, method: str) -> None:
    setattr(module, method, torch.compiler.disable(getattr(module, method)))


def _require_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise FullarcError(
            "`compile` needs a C++ compiler, and there is none here.", "Install g++, or set compile = false."
        ) from None
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise FullarcError(
            f"`compile` needs Python's header, and {header} is not there.",
            "Install the python3-dev package, or set compile = false.",
        )
