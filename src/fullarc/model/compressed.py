"""Quantised checkpoints in the pack-quantized form of compressed-tensors, which transformers and vLLM know.

On disk a quantised matrix X.weight [O, I] is three tensors:

    X.weight_packed  int32 [O, ceil(I * bits / 32)]     X.weight_scale  fp32 [O, G]     X.weight_shape  (O, I)

and `quantization_config` in config.json says, by patterns of module names, which matrices have which scheme. Norms,
router, indexer, MTP projection, embeddings and output layer are always left alone.

Invariant: what is loaded is, to the bit, what quantisation-aware training computed with (`model.quant`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.model.quant import WORD, QuantScheme, dequantize, pack, quantize, unpack

KINDS = {
    "experts": r".*\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
    "shared": r".*\.mlp\.shared_experts\.(gate|up|down)_proj$",
    "dense": r".*\.mlp\.(gate|up|down)_proj$",
    "attention": r".*\.self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)$",
}
"""Modules that can be quantised, by kind."""
_ALONE = (
    r".*\.mlp\.gate$",
    r".*\.indexer\..*",
    r".*\.eh_proj$",
    r".*embed_tokens$",
    r".*(lm_head|shared_head\.head)$",
)
_FORMAT = "pack-quantized"

Plan = Mapping[str, QuantScheme]
"""The scheme of each kind that is to be quantised."""


@dataclass
class KindReport:
    """What quantisation did to one kind of matrix; `error` is ||W - W'|| / ||W|| over all of them."""

    kind: str
    bits: int
    group: int
    matrices: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    error: float = 0.0


def kind_of(name: str) -> str | None:
    """Kind of the tensor `name`, None if it is never quantised."""
    module, _, leaf = name.rpartition(".")
    return next(
        (kind for kind, pattern in KINDS.items() if leaf == "weight" and re.match(pattern, module)), None
    )


def compress(tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], list[KindReport]]:
    """The tensors of a checkpoint with those of the plan's kinds quantised, and what that did to each kind.

    Raises:
        FullarcError: a group does not divide a matrix, or the checkpoint has nothing of a kind.
    """
    out: dict[str, Tensor] = {}
    reports = {kind: KindReport(kind, scheme.bits, scheme.group) for kind, scheme in plan.items()}
    squares = dict.fromkeys(plan, (0.0, 0.0))
    for name, weight in tensors.items():
        kind = kind_of(name)
        if kind is None or kind not in plan:
            out[name] = weight
            continue
        try:
            q, scale = quantize(weight, plan[kind])
        except FullarcError as error:
            raise FullarcError(f"{name}: {error.message}", error.hint) from None
        shape = torch.tensor(weight.shape)
        parts = {"packed": pack(q, plan[kind].bits), "scale": scale, "shape": shape}
        out |= {f"{name}_{part}": value for part, value in parts.items()}
        report, (lost, whole) = reports[kind], squares[kind]
        difference = weight.double() - dequantize(q, scale)
        squares[kind] = lost + float(difference.square().sum()), whole + float(weight.double().square().sum())
        report.matrices += 1
        report.bytes_before += weight.nbytes
        report.bytes_after += sum(value.nbytes for value in parts.values())
    for kind, report in reports.items():
        if not report.matrices:
            raise FullarcError(f"The checkpoint has no matrix of the kind '{kind}'.")
        lost, whole = squares[kind]
        report.error = (lost / whole) ** 0.5 if whole else 0.0
    return out, list(reports.values())


def decompress(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every packed matrix restored to fp32; others are passed on, so a plain checkpoint is itself.

    Raises:
        FullarcError: parts of a matrix are missing or do not fit together.
    """
    out = dict(tensors)
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        weight = name.removesuffix("_packed")
        for part in ("scale", "shape"):
            if f"{weight}_{part}" not in tensors:
                raise FullarcError(f"Tensor {weight}_{part} is missing.", "Use another checkpoint.")
        words, scale, shape = (out.pop(f"{weight}_{part}") for part in ("packed", "scale", "shape"))
        out[weight] = _restore(name, words, scale, tuple(shape.tolist()))
    return out


def _restore(name: str, words: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One matrix; its number of bits is what the width of its words implies."""
    if len(shape) == words.ndim == scale.ndim == 2 and shape[0] == len(words) == len(scale):
        for bits in (4, 8):
            if words.shape[1] == -(-shape[1] * bits // WORD) and shape[1] % scale.shape[1] == 0:
                return dequantize(unpack(words, bits, shape[1]), scale)
    raise FullarcError(
        f"{name} {tuple(words.shape)} with scales {tuple(scale.shape)} is not a matrix {shape} of 4 or 8 bits.",
        "Only symmetric pack-quantized checkpoints can be read.",
    )


def quantization_config(plan: Plan) -> dict[str, Any]:
    """What config.json says about it, in the words of compressed-tensors."""
    groups = []
    for scheme in dict.fromkeys(plan.values()):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if scheme.group else "channel",
            "group_size": scheme.group or None,
            "dynamic": False,
        }
        targets = [f"re:{KINDS[kind]}" for kind in plan if plan[kind] == scheme]
        groups.append(
            {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None,
             "format": _FORMAT}
        )  # fmt: skip
    alone = (*_ALONE, *(pattern for kind, pattern in KINDS.items() if kind not in plan))
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [f"re:{pattern}" for pattern in alone],
    }
