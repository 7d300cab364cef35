"""`fullarc bench engine --part vllm --peers FOLDER`: decoding in bf16 beside vLLM's, with another model as large.

vLLM has no sparse attention on CPUs, so it runs its GLM-4-MoE, compiled: the same layers, experts, widths and
vocabulary as `TINY`, with grouped-query attention. Sides in turn, one thread, medians. Its environment takes 3.5 GB.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fullarc.evals.bench import claim
from fullarc.evals.bench_engine_peers import REPEATS, STEPS, TINY, Ours, Precision, prompts, saved
from fullarc.evals.bench_train import in_turn
from fullarc.evals.peers import Child, environments, vllm_cpu

BATCH, CONTEXT = 16, 512
GLM4_MOE = {
    **TINY.model_dump(include={
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
        "first_k_dense_replace",
    }),
    "num_key_value_heads": 2, "head_dim": 64, "use_qk_norm": True, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 2048, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
"""15.8 M weights; TINY has 16.1."""


def claims(peers: Path | None, root: Path) -> Iterator[dict[str, Any]]:
    """Tokens per second of ours against vLLM's."""
    name = f"tiny: decode in bf16, batch {BATCH}, context {CONTEXT}: against vLLM's GLM-4-MoE of this size, compiled"
    if peers is None:
        yield claim(name, None, "x", ">= 1", None, "needs --peers")
        return
    python, batch = environments.python_of("vllm_cpu", peers), prompts(BATCH, CONTEXT, TINY.vocab_size)
    mine = Ours(saved("tiny", root / "bf16"), BATCH, CONTEXT, Precision("bf16"))
    with Child("vLLM", [str(python), vllm_cpu.__file__, str(root / "glm4-moe")]) as vllm:
        vllm.ask("open", model=GLM4_MOE, sequences=BATCH, tokens=CONTEXT + 512, eager=False)
        vllm.ask("start", prompts=batch)
        mine.start(batch)

        def theirs() -> float:
            return float(vllm.ask("decode", steps=STEPS)["seconds"])

        one, other = in_turn([mine.decode, theirs], REPEATS)
    tokens = BATCH * STEPS
    detail = f"{tokens / one:,.0f} against {tokens / other:,.0f} tokens/s"
    yield claim(name, other / one, "x", ">= 1", other / one >= 1, detail)
