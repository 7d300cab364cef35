"""Checkpoints are Hugging Face `glm_moe_dsa` folders; nothing is ever converted (design, contract 1).

On disk experts are stored one by one and the MTP layer is the layer after the last; in memory experts are stacked.
This file is the only place that knows both. Loading is strict: every tensor must be there, with its shape.
A quantised checkpoint (`model.compressed`) is loaded as the floats it stands for.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, verify_manifest
from fullarc.config.model import ModelConfig
from fullarc.model.compressed import (
    KindReport,
    Plan,
    Quantizer,
    compress,
    decompress,
    quantization_config,
    rounds_inputs,
)
from fullarc.model.glm import GlmMoeDsa
from fullarc.model.gptq import grams_of
from fullarc.model.moe import Experts
from fullarc.model.quant import Linear, quantize
from fullarc.model.rotation import rotate

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WEIGHTS = "model.safetensors"
_MTP_RENAMES = {"norm.weight": "shared_head.norm.weight"}
_MTP_COPIES = re.compile(r"model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight")
"""Released checkpoints repeat the embeddings and the output layer beside the MTP layer."""


def _disk_name(name: str, layers: int) -> str:
    """Name on disk of the parameter or buffer `name`: MTP layers are counted on after the last decoder layer."""
    mtp = re.match(r"mtp_(?:layer|later\.(\d+))\.(.*)", name)
    if mtp:
        number = layers + (0 if mtp[1] is None else int(mtp[1]) + 1)
        return f"model.layers.{number}.{_MTP_RENAMES.get(mtp[2], mtp[2])}"
    return name if name.startswith("lm_head.") else f"model.{name}"


def state_to_disk(model: GlmMoeDsa) -> dict[str, Tensor]:
    """All weights under their on-disk names, experts one by one."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        disk = _disk_name(name, model.config.num_hidden_layers)
        if ".experts." not in disk:
            tensors[disk] = value.contiguous()
            continue
        prefix, kind = disk.rsplit(".", 1)
        for expert, weight in enumerate(value):
            if kind == "gate_up_proj":
                gate, up = weight.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up.contiguous()
            else:
                tensors[f"{prefix}.{expert}.down_proj.weight"] = weight.contiguous()
    return tensors


def save_model(model: GlmMoeDsa, folder: Path, tokenizer_dir: Path | None = None) -> None:
    """Write the checkpoint folder in one step, with the tokenizer's files if `tokenizer_dir` is given."""
    with atomic_dir(Path(folder)) as temp:
        write_model(model, temp, tokenizer_dir)


def write_model(model: GlmMoeDsa, folder: Path, tokenizer_dir: Path | None = None) -> None:
    """Write the checkpoint's files into an existing folder (for callers that add files of their own)."""
    config = model.config.to_hf()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "temperature": 1.0,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(state_to_disk(model), folder / WEIGHTS, metadata={"format": "pt"})
    for name in TOKENIZER_FILES if tokenizer_dir else ():
        if (Path(tokenizer_dir or "") / name).is_file():
            shutil.copyfile(Path(tokenizer_dir or "") / name, folder / name)


def quantize_checkpoint(
    folder: Path,
    out: Path,
    plan: Plan,
    wide: bool = False,
    quantizer: Quantizer = quantize,
    turn: bool = False,
    rows: Sequence[Sequence[int]] = (),
) -> list[KindReport]:
    """Write the checkpoint `folder`, quantised by `plan`, as the checkpoint `out` (an existing one is replaced).

    Everything but the trainer's state comes along. Returns what happened to each kind of matrix.

    Args:
        wide: store integers of 4 bits in bytes where inputs are rounded too, as vLLM's experts want them.
        quantizer: how integers and scales are found.
        turn: rotate latents and values first (`model.rotation`).
        rows: token ids that the model reads before, so that integers make up for each other's errors (`model.gptq`).

    Raises:
        FullarcError: `folder` is no checkpoint, is damaged or quantised already, or does not fit the plan.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if is_quantized(folder):
        raise FullarcError(f"{folder} is quantised already.", "Start from the checkpoint it was made of.")
    if (folder / "manifest.json").exists():
        verify_manifest(folder)
    tensors = read_tensors(folder)
    if turn:
        tensors = rotate(tensors, ModelConfig.from_hf(config))
    grams = None
    if rows:
        model = GlmMoeDsa(ModelConfig.from_hf(config))
        fill_state(model, dict(tensors), folder)
        grams = grams_of(model.eval(), rows)
    tensors, reports = compress(tensors, plan, wide, quantizer, grams)
    with atomic_dir(Path(out)) as temp:
        for file in folder.iterdir():
            if file.is_file() and file.name != "manifest.json" and ".safetensors" not in file.name:
                shutil.copyfile(file, temp / file.name)
        content = config | {"quantization_config": quantization_config(plan, wide)}
        (temp / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
    return reports


def load_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a checkpoint folder."""
    return ModelConfig.from_hf(_read_config(folder))


def stored_config(folder: Path) -> ModelConfig:
    """The same, of what the folder's files hold: transformers leaves MTP layers out and does not say so."""
    config = load_config(folder)
    if any(name.startswith(f"model.layers.{config.num_hidden_layers}.") for name in read_tensors(folder)):
        return config
    return ModelConfig(**(config.model_dump() | {"num_nextn_predict_layers": 0}))


def _read_config(folder: Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except OSError:
        raise FullarcError(
            f"{folder} is not a checkpoint: it has no config.json.", "Check the path."
        ) from None
    except (ValueError, TypeError):
        raise FullarcError(f"{path} is not a JSON object.", "Use another checkpoint.") from None


def load_model(
    folder: str | Path, dtype: str | torch.dtype = "float32", **config_overrides: object
) -> GlmMoeDsa:
    """The model stored in `folder`, in evaluation mode.

    Args:
        folder: a Hugging Face `glm_moe_dsa` folder, ours or another's.
        dtype: of the weights in memory.
        config_overrides: fields of the configuration to change, e.g. `index_topk`, none that changes a shape; with
            `num_nextn_predict_layers=0` an MTP layer is left out, unread.

    Raises:
        FullarcError: naming the file or tensor that is missing, damaged, misshapen or not expected.
    """
    folder = Path(folder)
    if (folder / "manifest.json").exists():
        verify_manifest(folder)
    config = stored_config(folder)
    if config_overrides:
        config = ModelConfig(**(config.model_dump() | config_overrides))
    with torch.device("meta"):
        model = GlmMoeDsa(config)
    load_state(model, folder)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return model.to(dtype).eval()


def load_state(model: GlmMoeDsa, folder: Path) -> None:
    """Put the tensors of `folder` into `model` (which may be on the meta device). Strict; see `load_model`."""
    stored, mtp = read_tensors(folder), f"model.layers.{model.config.num_hidden_layers}."
    if not model.config.num_nextn_predict_layers:
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(mtp)}
    tensors, scales = decompress(stored)
    fill_state(model, tensors, folder)
    if scales:
        _set_scales(model, scales, folder)


def is_quantized(folder: Path) -> bool:
    """Whether config.json says that some matrices are stored as integers."""
    return "quantization_config" in _read_config(folder)


def fill_state(model: GlmMoeDsa, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put `tensors`, which have their on-disk names, into `model`; errors name `folder`. Empties `tensors`."""
    layers = model.config.num_hidden_layers
    state: dict[str, Tensor] = {}
    for name, current in model.state_dict().items():
        value = _take(tensors, _disk_name(name, layers), current.shape, folder)
        state[name] = value

    def spare(name: str) -> bool:
        """MTP layers' copies of embeddings and output layer are never read, nor is an MTP layer nobody asked for."""
        asked = model.config.num_nextn_predict_layers
        copy = _MTP_COPIES.fullmatch(name)
        if asked:
            return copy is not None and layers <= int(copy[1]) < layers + asked
        return name.startswith(f"model.layers.{layers}.")

    unexpected = [name for name in tensors if not spare(name)]
    if unexpected:
        raise FullarcError(
            f"{folder}: unexpected tensor {sorted(unexpected)[0]}.",
            "config.json describes another shape of model.",
        )
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _set_scales(model: GlmMoeDsa, scales: dict[str, Tensor], folder: Path) -> None:
    """Tell the modules whose products are of integers, by config.json, the scales of their weights."""
    rounds = rounds_inputs(_read_config(folder).get("quantization_config") or {})
    layers = model.config.num_hidden_layers

    def of(matrix: str) -> Tensor | None:
        scale = scales.get(f"{matrix}.weight")
        if scale is None or not rounds(matrix):
            return None
        if scale.shape[1] != 1:
            raise FullarcError(
                f"{folder}: {matrix} rounds its inputs and has {scale.shape[1]} scales a row.",
                "Sums of integers need one scale a row.",
            )
        return scale

    for name, module in model.named_modules():
        disk = _disk_name(name, layers)
        if isinstance(module, Linear):
            module.scale = of(disk)
        elif isinstance(module, Experts):
            gates, ups, downs = (
                [of(f"{disk}.{expert}.{part}_proj") for expert in range(len(module.down_proj))]
                for part in ("gate", "up", "down")
            )
            both = [
                torch.cat((gate, up))
                for gate, up in zip(gates, ups, strict=True)
                if gate is not None and up is not None
            ]
            inner = [down for down in downs if down is not None]
            if len(both) == len(inner) == len(downs):
                module.scales = torch.stack(both), torch.stack(inner)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files of `folder`, or of those that its index lists.

    They are memory-mapped: what is not used is not read.
    """
    files = _files(Path(folder))
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise FullarcError(f"{file} cannot be read: {error}.", "Use another checkpoint.") from None
    return tensors


def _files(folder: Path) -> list[Path]:
    """The files with tensors. Raises FullarcError naming one that the index lists and that is not there."""
    index = folder / f"{WEIGHTS}.index.json"
    try:
        listed = json.loads(index.read_text()).get("weight_map") or {} if index.is_file() else {}
        files = [folder / name for name in sorted(set(listed.values()))]
    except (OSError, ValueError, AttributeError, TypeError):
        raise FullarcError(f"{index} cannot be read.", "Use another checkpoint.") from None
    for file in files:
        if file.parent != folder or not file.is_file():
            raise FullarcError(
                f"{file} is missing, although {index.name} lists it.", "Use another checkpoint."
            )
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FullarcError(f"{folder} holds no .safetensors file.", "Check the path.")
    return files


def _take(tensors: dict[str, Tensor], disk: str, shape: torch.Size, folder: Path) -> Tensor:
    """Remove and return the tensor of one parameter, stacking experts."""

    def one(name: str, expected: tuple[int, ...]) -> Tensor:
        value = tensors.pop(name, None)
        if value is None:
            raise FullarcError(
                f"{folder}: tensor {name} is missing.", "The checkpoint does not fit its config.json."
            )
        if tuple(value.shape) != expected:
            raise FullarcError(
                f"{folder}: tensor {name} has shape {tuple(value.shape)}, expected {expected}."
            )
        return value.float() if name.endswith("e_score_correction_bias") else value

    if ".experts." not in disk:
        return one(disk, tuple(shape))
    prefix, kind = disk.rsplit(".", 1)
    experts, rows, columns = shape
    if kind == "down_proj":
        return torch.stack([one(f"{prefix}.{e}.down_proj.weight", (rows, columns)) for e in range(experts)])
    half = (rows // 2, columns)
    return torch.stack(
        [
            torch.cat(
                (one(f"{prefix}.{e}.gate_proj.weight", half), one(f"{prefix}.{e}.up_proj.weight", half))
            )
            for e in range(experts)
        ]
    )
