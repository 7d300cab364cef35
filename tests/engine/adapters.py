"""PEFT's folders made by hand, and the checkpoints in which they are merged."""

import json
import re

import torch
from safetensors.torch import save_file

from fullarc.engine.lora import CONFIG, TENSORS
from fullarc.model import load_model, save_model
from fullarc.model.checkpoint import fill_state, state_to_disk

ALL = r"model\.layers\.\d+\.(self_attn|mlp)\..*(_proj|_with_mqa|wq_b|wk)\.weight"


def adapter(folder, tensors, chosen=ALL, rank=3, seed=0, config=None, edit=lambda parts: parts):
    """Write a PEFT folder that changes the matrices whose names match; returns the merged tensors."""
    generator = torch.Generator().manual_seed(seed)
    parts, merged, alpha = {}, dict(tensors), 5.0
    for name, weight in tensors.items():
        if weight.ndim == 2 and re.fullmatch(chosen, name):
            a = torch.randn(rank, weight.shape[1], generator=generator)
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.05
            module = "base_model.model." + name.removesuffix(".weight")
            parts |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            merged[name] = weight + (b @ a) * (alpha / rank)
    write(folder, {"r": rank, "lora_alpha": alpha} | (config or {}), edit(parts))
    return merged


def write(folder, config, parts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "bias": "none", "use_dora": False} | config)
    )
    save_file({name: value.contiguous() for name, value in parts.items()}, folder / TENSORS)


def saved(model, tensors, folder):
    """A checkpoint of other tensors."""
    fill_state(model, dict(tensors), folder)
    save_model(model, folder)
    return folder


def stored(folder):
    return {name: value.detach() for name, value in state_to_disk(load_model(folder)).items()}
