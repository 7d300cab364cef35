"""llm-compressor and auto-round: `python compressors.py CHECKPOINT OUT METHOD SCHEME ROWS`.

METHOD is one of METHODS; SCHEME a JSON file with the `quantization_config` that is wanted, experts first; ROWS one with
token ids [rows, length] to calibrate on. OUT becomes a folder of safetensors, quantised matrices in the forms of
compressed-tensors. There is no MTP layer in it, because transformers' model of this architecture has none.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

ITERATIONS = 100  # auto-round's, a layer
BATCH = 8
METHODS = ("rtn", "gptq", "auto-round")


def by_llm_compressor(
    method: str, model: Any, scheme: dict[str, Any], ids: list[list[int]], out: Path
) -> None:
    """Round to nearest, or GPTQ layer by layer; saved by itself."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    groups = {
        name: {key: value for key, value in group.items() if key != "format"}
        for name, group in scheme["config_groups"].items()
    }
    modifier = GPTQModifier if method == "gptq" else QuantizationModifier
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    oneshot(
        model=model, dataset=data, recipe=modifier(config_groups=groups, ignore=scheme["ignore"]),
        num_calibration_samples=len(ids), max_seq_length=len(ids[0]), shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(out, save_compressed=True)


def by_auto_round(
    model: Any, tokenizer: Any, scheme: dict[str, Any], ids: list[list[int]], out: Path
) -> None:
    """Rounding and clipping that are trained layer by layer, in fp32; its integers and scales, and nothing else."""
    from auto_round import AutoRound
    from safetensors.torch import save_file

    wanted = {name: _layer(group) for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and (group := _group(scheme, name)) is not None}  # fmt: skip
    plain = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
    rest = {name: plain for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name not in wanted}  # fmt: skip
    first = _layer(scheme["config_groups"]["group_0"])  # of experts, which are no modules of their own yet
    rows: Any = [
        {"input_ids": torch.tensor(row), "attention_mask": torch.ones(len(row), dtype=torch.long)}
        for row in ids
    ]
    quantised, _ = AutoRound(
        model, tokenizer, scheme=first, layer_config=wanted | rest, iters=ITERATIONS, seqlen=len(ids[0]),
        dataset=torch.utils.data.DataLoader(rows, batch_size=BATCH), nsamples=len(ids), batch_size=BATCH,
        amp=False, scale_dtype="fp32", device_map="cpu", enable_torch_compile=False, low_cpu_mem_usage=False,
    ).quantize()  # fmt: skip
    tensors = {}
    for name, module in quantised.named_modules():
        if hasattr(module, "weight") and hasattr(module, "scale"):
            weight, scale = f"{name.removesuffix('.orig_layer')}.weight", module.scale.float().reshape(-1, 1)
            whole = module.weight.detach().float() / scale
            if float((whole - whole.round()).abs().max()) > 0.01:
                raise RuntimeError(f"{weight} is not made of integers and the scale that auto-round gives.")
            tensors[weight], tensors[f"{weight}_scale"] = whole.round().to(torch.int8), scale.contiguous()
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors")


def _group(scheme: dict[str, Any], module: str) -> dict[str, Any] | None:
    """The group that a module belongs to."""
    groups = scheme["config_groups"].values()
    return next(
        (g for g in groups if any(re.match(t.removeprefix("re:"), module) for t in g["targets"])), None
    )


def _layer(group: dict[str, Any]) -> dict[str, Any]:
    """A group in auto-round's words."""
    tokens = group["input_activations"] is not None
    return {
        "bits": group["weights"]["num_bits"], "group_size": -1, "sym": True, "data_type": "int",
        "act_bits": 8 if tokens else 16, "act_group_size": -1, "act_sym": True, "act_dynamic": True,
        "act_data_type": "int",
    }  # fmt: skip


def main(checkpoint: str, out: str, method: str, scheme: str, rows: str) -> None:
    """Quantise and save."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    said, ids = json.loads(Path(scheme).read_text()), json.loads(Path(rows).read_text())
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if method == "auto-round":
        by_auto_round(model, AutoTokenizer.from_pretrained(checkpoint), said, ids, Path(out))
    else:
        by_llm_compressor(method, model, said, ids, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
