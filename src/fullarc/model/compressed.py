"""Quantised checkpoints in the forms of compressed-tensors, which transformers and vLLM know.

On disk a quantised matrix X.weight [O, I] is, where only weights are rounded or they have 4 bits (pack-quantized),

    X.weight_packed  int32 [O, ceil(I * bits / 32)]     X.weight_scale  fp32 [O, G]     X.weight_shape  (O, I)

and where inputs are rounded too and weights have 8 bits (int-quantized; `wide`: 4 bits as well, one in a byte)

    X.weight  int8 [O, I]     X.weight_scale  fp32 [O, 1]

`quantization_config` in config.json says, by patterns of module names, which matrices have which scheme. Norms, router,
indexer, MTP projection, embeddings and output layer are always left alone. kv_b_proj never rounds its inputs: while
decoding it is absorbed into queries and outputs and has none.

Invariant: what is loaded is, to the bit, what quantisation-aware training computed with (`model.quant`).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.model.gptq import compensated
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
_ABSORBED = r".*\.self_attn\.kv_b_proj$"
_PACKED, _BYTES, _MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

Plan = Mapping[str, QuantScheme]
"""The scheme of each kind that is to be quantised."""


@dataclass
class KindReport:
    """What quantisation did to one kind of matrix; `error` is ||W - W'|| / ||W|| over all of them.

    Bytes are of the checkpoint as it was and as it is; `ratio` is to what bf16 would take.
    """

    kind: str
    bits: int
    group: int
    tokens: bool
    matrices: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    ratio: float = 0.0
    error: float = 0.0


Quantizer = Callable[[Tensor, QuantScheme], tuple[Tensor, Tensor]]
"""How integers and scales are found: `quant.quantize`, or a search."""


def kind_of(name: str) -> str | None:
    """Kind of the tensor `name`, None if it is never quantised."""
    module, _, leaf = name.rpartition(".")
    return next(
        (kind for kind, pattern in KINDS.items() if leaf == "weight" and re.match(pattern, module)), None
    )


def compress(
    tensors: Mapping[str, Tensor],
    plan: Plan,
    wide: bool = False,
    quantizer: Quantizer = quantize,
    grams: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[KindReport]]:
    """The tensors of a checkpoint with those of the plan's kinds quantised, and what that did to each kind.

    Matrices whose modules have Gram matrices of their inputs in `grams` get integers that make up for each other's
    errors (`model.gptq`).

    Raises:
        FullarcError: a group does not divide a matrix, or the checkpoint has nothing of a kind.
    """
    out: dict[str, Tensor] = {}
    reports = {
        kind: KindReport(kind, scheme.bits, scheme.group, scheme.tokens) for kind, scheme in plan.items()
    }
    squares, weights = dict.fromkeys(plan, (0.0, 0.0)), dict.fromkeys(plan, 0)
    for name, weight in tensors.items():
        kind = kind_of(name)
        if kind is None or kind not in plan:
            out[name] = weight
            continue
        module = name.removesuffix(".weight")
        scheme = _of_module(module, plan[kind])
        try:
            q, scale = quantizer(weight, scheme)
            if (gram := (grams or {}).get(module)) is not None:
                q = compensated(weight, scale, scheme, gram)
        except FullarcError as error:
            raise FullarcError(f"{name}: {error.message}", error.hint) from None
        if _form(scheme, wide) == _BYTES:
            parts = {name: q, f"{name}_scale": scale}
        else:
            shape = torch.tensor(weight.shape)
            parts = {f"{name}_packed": pack(q, scheme.bits), f"{name}_scale": scale, f"{name}_shape": shape}
        out |= parts
        report, (lost, whole) = reports[kind], squares[kind]
        difference = weight.double() - dequantize(q, scale)
        squares[kind] = lost + float(difference.square().sum()), whole + float(weight.double().square().sum())
        weights[kind] += weight.numel()
        report.matrices += 1
        report.bytes_before += weight.nbytes
        report.bytes_after += sum(value.nbytes for value in parts.values())
    for kind, report in reports.items():
        if not report.matrices:
            raise FullarcError(f"The checkpoint has no matrix of the kind '{kind}'.")
        lost, whole = squares[kind]
        report.error = (lost / whole) ** 0.5 if whole else 0.0
        report.ratio = report.bytes_after / (2 * weights[kind])
    return out, list(reports.values())


def _of_module(module: str, scheme: QuantScheme) -> QuantScheme:
    """The scheme of one matrix of a kind."""
    return replace(scheme, tokens=False) if re.match(_ABSORBED, module) else scheme


def _form(scheme: QuantScheme, wide: bool) -> str:
    return _BYTES if scheme.tokens and (scheme.bits == 8 or wide) else _PACKED


def decompress(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors with every quantised matrix restored to fp32, and the scales of those, by the matrix's name.

    Others are passed on, so a plain checkpoint is itself.

    Raises:
        FullarcError: parts of a matrix are missing or do not fit together.
    """
    out, scales = dict(tensors), dict[str, Tensor]()

    def part(weight: str, name: str) -> Tensor:
        if f"{weight}_{name}" not in out:
            raise FullarcError(f"Tensor {weight}_{name} is missing.", "Use another checkpoint.")
        return out.pop(f"{weight}_{name}")

    for name, value in tensors.items():
        if name.endswith(".weight_packed"):
            weight = name.removesuffix("_packed")
            scales[weight], shape = part(weight, "scale").float(), part(weight, "shape")
            out[weight] = _restore(name, out.pop(name), scales[weight], tuple(shape.tolist()))
        elif name.endswith(".weight") and value.dtype == torch.int8:
            scales[name] = scale = part(name, "scale").float().reshape(-1, 1)
            if value.ndim != 2 or len(scale) != len(value):
                raise FullarcError(f"{name} {tuple(value.shape)} does not fit {len(scale)} scales of rows.")
            out[name] = dequantize(value, scale)
    return out, scales


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


def quantization_config(plan: Plan, wide: bool = False) -> dict[str, Any]:
    """What config.json says about it, in the words of compressed-tensors.

    Routed experts come first, whatever the plan's order: transformers takes the first group for theirs.
    """
    targets: dict[QuantScheme, list[str]] = {}
    for kind, whole in KINDS.items():
        if kind not in plan:
            continue
        scheme = plan[kind]
        if kind == "attention" and scheme.tokens:
            targets.setdefault(_of_module("model.layers.0.self_attn.kv_b_proj", scheme), []).append(_ABSORBED)
            whole = whole.replace("kv_b_proj|", "")
        targets.setdefault(scheme, []).append(whole)
    groups = []
    for scheme, patterns in targets.items():
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if scheme.group else "channel",
            "group_size": scheme.group or None,
            "dynamic": False,
        }
        groups.append(
            {"targets": [f"re:{pattern}" for pattern in patterns], "weights": weights,
             "input_activations": dict(_TOKENS) if scheme.tokens else None, "output_activations": None,
             "format": _form(scheme, wide)}
        )  # fmt: skip
    forms = {group["format"] for group in groups}
    alone = (*_ALONE, *(pattern for kind, pattern in KINDS.items() if kind not in plan))
    return {
        "quant_method": "compressed-tensors",
        "format": forms.pop() if len(forms) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        "ignore": [f"re:{pattern}" for pattern in alone],
    }


def rounds_inputs(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Which modules round their inputs to 8 bits a token, by what a `quantization_config` says; {}: none does.

    Raises:
        FullarcError: inputs are to be rounded in another way.
    """
    groups = list(dict(config.get("config_groups") or {}).values())
    for group in groups:
        said = group.get("input_activations")
        if said and any(said.get(key) != value for key, value in _TOKENS.items()):
            raise FullarcError(
                f"config.json asks for inputs rounded as {said}.", "Only INT8, symmetric, by token is known."
            )

    def fits(target: str, module: str) -> bool:
        if target.startswith("re:"):
            return re.match(target.removeprefix("re:"), module) is not None
        return target == "Linear" or module == target or module.endswith(f".{target}")

    def asks(module: str) -> bool:
        found = [group for group in groups if any(fits(target, module) for target in group["targets"])]
        return bool(found and found[0].get("input_activations"))

    return asks
