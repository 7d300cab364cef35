"""Does vLLM's loader take a checkpoint? `python vllm_loads.py CHECKPOINT` in vLLM's environment for CPUs.

Its own classes parse config.json, choose a scheme for every layer, make parameters and read the weights. A CPU refuses
to *run* this architecture: there is no sparse attention, and no kernel for integer experts but on Arm. These refusals
are written down and passed over, because a loader does not depend on them; nothing is computed.

    parameters, loaded     how many there are, and how many a weight of the file was read into
    missing                names of the others
    schemes                how many layers of each scheme
    integers               elements and their sum, in parameters and in the file without its MTP layer
    refused                what the CPU would not run, in its words
"""

import collections
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_cpu import SETTINGS

MOE = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_"
LINEAR = "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16"


def pass_over(refused: set[str]) -> None:
    """Let what a CPU cannot run be loaded."""
    import importlib

    from vllm.platforms.cpu import CpuPlatform

    def noted(choose: Callable[..., Any], instead: Any) -> Callable[..., Any]:
        def chosen(*args: Any, **options: Any) -> Any:
            try:
                return choose(*args, **options)
            except (NotImplementedError, ValueError) as error:
                refused.add(str(error).split("\n")[0].split(" (weight_key")[0])
                return instead()

        return chosen

    def marlin() -> Any:
        return importlib.import_module("vllm.model_executor.kernels.linear").MarlinLinearKernel

    for module, name, instead in (
        (f"{MOE}w4a8_int8", "select_w4a8_int8_moe_backend", lambda: (None, None)),
        (f"{MOE}w8a8_int8", "select_int8_moe_backend", lambda: (None, None)),
        (f"{MOE}wna16", "select_wna16_moe_backend", lambda: (None, None)),
        (LINEAR, "choose_mp_linear_kernel", marlin),
    ):
        place = importlib.import_module(module)
        setattr(place, name, noted(getattr(place, name), instead))
    attention = CpuPlatform.get_attn_backend_cls.__func__

    def dense(cls: Any, selected: Any, attn_selector_config: Any, *args: Any, **options: Any) -> Any:
        if attn_selector_config.use_sparse:
            refused.add("Sparse Attention is not supported on CPU.")
        return attention(cls, selected, attn_selector_config._replace(use_sparse=False), *args, **options)

    CpuPlatform.get_attn_backend_cls = classmethod(dense)


def main(checkpoint: str) -> dict[str, Any]:
    """Load it."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
    from vllm.utils.torch_utils import set_default_torch_dtype

    refused: set[str] = set()
    pass_over(refused)
    files = [str(file) for file in Path(checkpoint).glob("*.safetensors")]
    config = EngineArgs(
        model=checkpoint, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=512
    ).create_engine_config()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/meet", 0, "gloo")
        initialize_model_parallel(1, 1)
        with set_default_torch_dtype(torch.bfloat16):
            model = initialize_model(vllm_config=config)
        loaded = model.load_weights(safetensors_weights_iterator(files, False))
    parameters = dict(model.named_parameters())
    mtp = f"model.layers.{config.model_config.hf_config.num_hidden_layers}."
    stored = [t for name, t in safetensors_weights_iterator(files, False) if not name.startswith(mtp)]
    layers = [module for module in model.modules() if getattr(module, "quant_method", None) is not None]
    names = [type(getattr(layer, "scheme", None) or layer.quant_method).__name__ for layer in layers]
    return {
        "model": type(model).__name__, "parameters": len(parameters), "loaded": len(loaded & parameters.keys()),
        "missing": sorted(parameters.keys() - loaded), "schemes": dict(collections.Counter(names)),
        "integers": [_integers(parameters.values()), _integers(stored)], "refused": sorted(refused),
    }  # fmt: skip


def _integers(tensors: Any) -> list[int]:
    import torch

    whole = [tensor for tensor in tensors if tensor.dtype in (torch.int8, torch.int32)]
    return [
        sum(tensor.numel() for tensor in whole),
        sum(int(tensor.sum(dtype=torch.int64)) for tensor in whole),
    ]


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(main(sys.argv[1])), file=answers, flush=True)
