"""vLLM on a CPU in a process of its own: `python vllm_cpu.py FOLDER`; orders as JSON lines in, answers out.

    open     model, sequences, tokens, eager   make a GLM-4-MoE of random bf16 weights by its config, and load it
    start    prompts        bring all sequences to their first token and leave them there
    decode   steps          → seconds of so many steps of the engine, a token for every sequence each

Its engine runs in this process, one thread, without a prefix cache, and compiles unless it is told to be eager. What
vLLM prints goes to standard error.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def make(config: dict[str, Any], folder: Path) -> None:
    """Save a model of this shape."""
    import torch
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(0)
    Glm4MoeForCausalLM(Glm4MoeConfig(**config)).bfloat16().save_pretrained(folder)


class Side:
    """What is open at present."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, model: dict[str, Any], sequences: int, tokens: int, eager: bool) -> dict[str, Any]:
        """Make and load."""
        make(model, self.folder)
        import torch
        from vllm import LLM, SamplingParams

        torch.set_num_threads(1)
        self.params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self.engine = LLM(
            str(self.folder), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=tokens, max_num_seqs=sequences,
            enforce_eager=eager, enable_prefix_caching=False, seed=0,
        ).llm_engine  # fmt: skip
        return {"threads": torch.get_num_threads()}

    def start(self, prompts: list[list[int]]) -> dict[str, Any]:
        """All of them to their first token."""
        waiting = set(map(str, range(len(prompts))))
        for number, ids in enumerate(prompts):
            self.engine.add_request(str(number), {"prompt_token_ids": ids}, self.params)
        while waiting:
            waiting -= {out.request_id for out in self.engine.step() if out.outputs[0].token_ids}
        self.running = len(prompts)
        return {}

    def decode(self, steps: int) -> dict[str, Any]:
        """Steps in each of which every sequence gets one token."""
        began = time.perf_counter()
        told = [len(self.engine.step()) for _ in range(steps)]
        seconds = time.perf_counter() - began
        return (
            {"seconds": seconds}
            if set(told) == {self.running}
            else {"error": f"steps told of {told} sequences"}
        )


def main(folder: Path) -> None:
    """Answer orders until standard input ends."""
    os.environ.update(SETTINGS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side(folder)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(getattr(side, order.pop("do"))(**order)), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
