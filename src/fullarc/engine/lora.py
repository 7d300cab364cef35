"""LoRA adapters in PEFT's folders (adapter_config.json, adapter_model.safetensors), merged into weights of their own.

    W' = W + s B A          s = alpha / r, or alpha / sqrt(r) with `use_rslora`          (Hu et al., 2021)

Every matrix of attention, indexer, dense layers and experts can be adapted, experts one by one or as PEFT names the
stacked ones (`target_parameters`, rank r for each expert). Merged weights share the layers' halves (attention, FFN)
that the adapter does not touch with the base; a merged half costs what the base's does.

Invariant: the same weights, to the bit, as of a checkpoint in which W' stands in the place of W.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig
from fullarc.engine.backend import Weights, adapt
from fullarc.model import GlmMoeDsa
from fullarc.model.checkpoint import fill_state

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_numbers = itertools.count(1)
_PART = re.compile(r"base_model\.model\.(.+?)(\.base_layer)*\.lora_([AB])\.weight")
_TARGET = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(?!gate\.).+\.weight")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False, None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "lora_bias": (False, None), "trainable_token_indices": (None,),
    "layer_replication": (None,), "use_qalora": (False, None), "use_bdlora": (False, None),
    # the others leave a base of their own behind, which is not ours
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "velora_config": (None,), "kasa_config": (None,),
    "monteclora_config": (None,),
}  # fmt: skip


@dataclass(frozen=True)
class Delta:
    """What is added to one matrix [O, I]: scale * `b` [O, r] times `a` [r, I]."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """The merged matrix, in fp32."""
        return weight.float() + (self.b @ self.a) * self.scale


Deltas = Mapping[str, Delta]
"""By the matrices' on-disk names."""


@dataclass(eq=False)
class Adapter:
    """A loaded adapter; `weights` are those of the base with its deltas. `number`: no two have the same."""

    name: str
    folder: str
    deltas: Deltas
    weights: Weights
    number: int = field(default_factory=lambda: next(_numbers))


def read_adapter(folder: str | Path, config: ModelConfig) -> dict[str, Delta]:
    """The deltas of an adapter folder. Raises FullarcError naming what is missing, damaged or not served."""
    folder = Path(folder)
    try:
        told = json.loads((folder / CONFIG).read_text())
        alpha, rslora = float(told["lora_alpha"]), bool(told.get("use_rslora"))
        patterns = {
            re.compile(rf"(.*\.)?({key})"): float(v) for key, v in (told.get("alpha_pattern") or {}).items()
        }
        tensors = load_file(folder / TENSORS)
    except OSError as error:
        raise FullarcError(
            f"{folder} is no adapter: {error.strerror or error}.", f"It needs {CONFIG} and {TENSORS}."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, re.error) as error:
        raise FullarcError(
            f"{folder}: the adapter cannot be read: {error!r:.200}.", "Save it with PEFT again."
        ) from None
    for key, neutral in _NEUTRAL.items():
        if key in told and told[key] not in neutral:
            raise FullarcError(
                f"{folder}: the adapter has {key} = {told[key]!r:.80}; only plain LoRA is served.",
                "Merge it.",
            )

    def scale(name: str, rank: int) -> float:
        own = next((value for pattern, value in patterns.items() if pattern.fullmatch(name)), alpha)
        return own / (math.sqrt(rank) if rslora else rank)

    deltas: dict[str, Delta] = {}
    for module, a, b in _pairs(folder, tensors):
        if module.endswith(".experts"):
            deltas |= _experts(folder, module, a, b, config, scale)
        else:
            deltas[f"{module}.weight"] = Delta(a, b, scale(module, len(a)))
    return deltas


def _pairs(folder: Path, tensors: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """(module, A, B) in fp32."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _PART.fullmatch(name)
        if match is None or value.ndim != 2:
            raise FullarcError(f"{folder}: {name[:200]} is not a matrix of a LoRA adapter.", "Merge it.")
        value = value.float()
        if not torch.isfinite(value).all():
            raise FullarcError(f"{folder}: {name[:200]} contains NaN or infinity.", "Use an earlier one.")
        found.setdefault(name[: match.start(3) - len(".lora_")], {})[match[3]] = value
    pairs = []
    for path, parts in found.items():
        a, b = parts.get("A"), parts.get("B")
        if a is None or b is None or a.shape[0] != b.shape[1] or not len(a):
            raise FullarcError(f"{folder}: lora_A and lora_B of {path[:200]} do not fit together.")
        pairs.append((path.removeprefix("base_model.model.").replace(".base_layer", ""), a, b))
    return pairs


def _experts(
    folder: Path, module: str, a: Tensor, b: Tensor, config: ModelConfig, scale: Callable[[str, int], float]
) -> dict[str, Delta]:
    """PEFT's deltas of stacked experts: A [E r, I] with experts first, B [O, r E] with experts last."""
    experts, inner, outer = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    shapes = {(outer, 2 * inner): "gate_up_proj", (inner, outer): "down_proj"}
    kind = shapes.get((a.shape[1], b.shape[0]))
    if kind is None or len(a) % experts:
        raise FullarcError(
            f"{folder}: the adapter of {module[:200]} does not fit {experts} experts of this model."
        )
    a_ErI, b_EOr = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
    factor = scale(f"{module}.{kind}", a_ErI.shape[1])
    deltas: dict[str, Delta] = {}
    for expert, (a_rI, b_Or) in enumerate(zip(a_ErI, b_EOr, strict=True)):
        parts = {"gate": b_Or[:inner], "up": b_Or[inner:]} if kind == "gate_up_proj" else {"down": b_Or}
        for name, rows in parts.items():
            deltas[f"{module}.{expert}.{name}_proj.weight"] = Delta(a_rI, rows, factor)
    return deltas


@torch.no_grad()
def merge(base: Weights, tensors: Mapping[str, Tensor], deltas: Deltas, source: str) -> Weights:
    """`base` with the deltas of the adapter `source`; `tensors` are base's, by their on-disk names.

    Raises FullarcError for a matrix that the model has not, or another shape.
    """
    merged = dict(tensors)
    touched: dict[str, set[int]] = {"self_attn": set(), "mlp": set()}
    for name, delta in deltas.items():
        weight, target = tensors.get(name), _TARGET.fullmatch(name)
        if weight is None or target is None:
            raise FullarcError(
                f"{source}: the adapter changes {name[:200]}, which is no matrix of this model's layers.",
                "Attention, dense layers and experts can be adapted.",
            )
        if weight.shape != (len(delta.b), delta.a.shape[1]):
            raise FullarcError(
                f"{source}: the adapter of {name} is for {(len(delta.b), delta.a.shape[1])}, not {tuple(weight.shape)}."
            )
        merged[name] = delta.added_to(weight)
        if not torch.isfinite(merged[name]).all():
            raise FullarcError(
                f"{source}: with the adapter {name} contains NaN or infinity.", "Use an earlier one."
            )
        touched[target[2]].add(int(target[1]))
    with torch.device("meta"):
        model = GlmMoeDsa(base.config)
    fill_state(model, merged, Path(source))
    return adapt(base, model.eval(), touched["self_attn"], touched["mlp"])
