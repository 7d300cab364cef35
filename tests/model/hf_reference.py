"""Tiny random models built by transformers: the independent implementation that ours is held against."""

from pathlib import Path
from typing import Any

import torch
from transformers import GlmMoeDsaForCausalLM

from fullarc.config.model import ModelConfig
from fullarc.evals.bench_train import transformers_config

TINY: dict[str, Any] = dict(
    vocab_size=97, hidden_size=64, num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=96,
    moe_intermediate_size=32, num_attention_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, index_n_heads=8,
    index_head_dim=32, index_topk=16, max_position_embeddings=256, eos_token_id=(0, 1, 2), pad_token_id=0,
)  # fmt: skip


def tiny_config(**overrides: Any) -> ModelConfig:
    """A small configuration whose index_topk is well below the lengths tested."""
    return ModelConfig(**(TINY | overrides))


def reference_model(config: ModelConfig, std: float = 0.2, seed: int = 0) -> GlmMoeDsaForCausalLM:
    """A transformers model with large random weights, perturbed norms and non-zero balancing biases."""
    torch.manual_seed(seed)
    model = GlmMoeDsaForCausalLM(transformers_config(config)).float().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                value.normal_(std=0.1)
            elif "norm" in name:
                value.add_(torch.randn_like(value) * 0.1)
            elif value.is_floating_point() and "inv_freq" not in name:
                value.normal_(std=std)
    return model


def saved_reference(folder: Path, config: ModelConfig, **kwargs: Any) -> GlmMoeDsaForCausalLM:
    """The same, also written to `folder` by transformers."""
    model = reference_model(config, **kwargs)
    model.save_pretrained(folder)
    return model
