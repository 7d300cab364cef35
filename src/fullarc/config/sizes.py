"""The one dial: what a `size` implies for the model, the data and every stage type.

A size is a layer of values between the defaults (`config.stages`, GLM-5's choices where the paper prints them) and
the recipe file; a file or the command line can override all of it. The network's shapes are `config.model`'s; here
`index_topk` is the number of keys after the dsa stage (before it the model is dense: `Recipe.dense_model`).
"""

from typing import Any

from fullarc.config.model import SIZES as MODELS

Layer = dict[str, Any]

_RL_NANO: Layer = {
    "steps": 2,
    "prompts": 4,
    "group_size": 4,
    "lr": 1e-4,
    "max_new_tokens": 32,
    "max_len": 256,
    "max_turns": 2,
    "concurrency": 8,
    "micro_batch_tokens": 2048,
    "save_every": 1,
}
# Small groups leave room for many prompts: docs/log.md.
_RL_2M: Layer = {
    "group_size": 4,
    "lr": 3e-4,
    "max_new_tokens": 64,
    "max_len": 768,
    "max_turns": 5,
    "concurrency": 64,
    "micro_batch_tokens": 2048,
    "save_every": 10,
}
# on-policy, so the trainer's core is free while one samples
_SINGLE_TURN_2M = {"max_turns": 1, "max_new_tokens": 48, "max_len": 256, "engines": 2}
_RL_LARGE: Layer = {
    "steps": 100,
    "prompts": 16,
    "group_size": 16,
    "lr": 2e-5,
    "max_new_tokens": 256,
    "max_len": 2048,
}

# Copying names out of a request is learnt abruptly, and later the more families share the tokens: docs/log.md.
_FAMILIES_2M = {
    "terminal": ["count_lines", "search", "rename", "sum_column", "replace", "fix_python"],
    "reasoning": ["extreme", "lookup", "count", "rotate", "sort_numbers", "chain_sum"],
    "general": ["json", "bullets", "upper", "language", "ending", "brackets"],
}


def _lm(steps: int, seq_len: int, rows: int, lr: float, lr_end: float, **more: Any) -> Layer:
    return {
        "steps": steps,
        "seq_len": seq_len,
        "batch_tokens": rows * seq_len,
        "lr": lr,
        "lr_end": lr_end,
        **more,
    }


# the demo, on a laptop's two cores in ten to fifteen minutes, and what is smaller
_LAPTOP: Layer = {
    "data": {"max_mb": 6.0, "tokenizer_mb": 2.0, "language_weight": 20},
    "tasks": {"families": _FAMILIES_2M},
    "stages": {
        "pretrain": _lm(100, 256, 16, 1.5e-2, 3e-3, adamw_scale=3, mtp_rows=0.25, induction=True),
        "midtrain": _lm(
            90,
            1024,
            4,
            1e-2,
            3e-3,
            adamw_scale=3,
            mtp_rows=0.25,
            demos=200,
            save_every=20,
            trajectory_share=0.05,
            synthetic_share=0.8,
        ),
        "dsa": _lm(
            20,
            1024,
            2,
            1e-3,
            3e-4,
            adamw_scale=3,
            schedule="linear",
            mtp_rows=0.5,
            mtp_steps=1,
            indexer_steps=20,
            indexer_lr=2e-2,
            micro_batch_rows=1,
            save_every=20,
        ),
        "sft": _lm(
            255,
            1024,
            4,
            1.5e-2,
            5e-4,
            adamw_scale=3,
            # the layer follows the trunk, which does not change for it: docs/log.md
            mtp_rows=0.25,
            mtp_detached=True,
            replay=0.15,
            demos=10_800,
            mix={"reasoning": 0.76, "terminal": 0.14, "general": 0.1},
        ),
        "reasoning_rl": _RL_2M
        | _SINGLE_TURN_2M
        | {
            "steps": 135,
            "prompts": 96,
            "optimizer": "muon_split",
            "lr": 2.5e-3,
            "lr_end": 2.5e-4,
            "schedule": "linear",
            # without some of the other instructions they are unlearnt, and format with them: docs/log.md
            "mix": {"reasoning": 0.85, "general": 0.15},
        },
        "agentic_rl": _RL_2M
        | {
            "steps": 15,
            "prompts": 24,
            "optimizer": "muon_split",
            "lr": 2e-3,
            "lr_end": 5e-4,
            "schedule": "linear",
            "reset_optimizer": False,
        },
        "general_rl": _RL_2M | _SINGLE_TURN_2M | {"steps": 10, "prompts": 32},
        "distil": _RL_2M | {"steps": 8, "prompts": 64, "group_size": 1},
    },
    "eval": {
        "heldout_tokens": 8192,
        "problems": 16,
        "instructions": 6,
        "episodes": 8,
        "needles": 5,
        "max_new_tokens": 64,
        "max_turns": 5,
        "temperature": 1.0,
    },
}


SIZES: dict[str, Layer] = {
    # a whole arc in about a minute: for tests, learns little
    "nano": {
        "model": MODELS["nano"] | {"index_topk": 64},
        "data": {"sources": ["local"], "max_mb": 0.4, "tokenizer_mb": 0.2},
        "stages": {
            "pretrain": _lm(10, 64, 8, 5e-3, 1e-3, warmup_steps=2, save_every=5, induction=True),
            "midtrain": _lm(4, 256, 2, 1e-3, 5e-4, demos=16, save_every=2),
            "dsa": _lm(3, 256, 2, 5e-4, 5e-4, indexer_steps=3, save_every=2),
            "sft": _lm(10, 256, 4, 2e-3, 5e-4, warmup_steps=2, demos=48, save_every=5),
            "reasoning_rl": _RL_NANO | {"max_turns": 1},
            "agentic_rl": _RL_NANO,
            "general_rl": _RL_NANO | {"max_turns": 1},
            "distil": _RL_NANO | {"prompts": 8, "group_size": 1},
        },
        "engine": {"max_batch": 16, "max_len": 512},
        "eval": {
            "after": "last",
            "heldout_tokens": 2048,
            "problems": 4,
            "episodes": 1,
            "needle_lengths": [128, 256],
            "needles": 2,
            "max_new_tokens": 32,
            "max_turns": 2,
        },
    },
    # of the demo's family, for comparisons
    "1m": _LAPTOP | {"model": MODELS["1m"] | {"index_topk": 384}},
    # the demo
    "2m": _LAPTOP | {"model": MODELS["2m"] | {"index_topk": 384}},
    # a night on a workstation's CPU, or minutes on a GPU
    "5m": {
        "model": MODELS["5m"] | {"max_position_embeddings": 4096, "index_topk": 256},
        "data": {"max_mb": 40.0},
        "stages": {
            "pretrain": _lm(2000, 512, 32, 3e-3, 6e-4, warmup_steps=50, induction=True),
            "midtrain": _lm(300, 2048, 8, 6e-4, 3e-4, demos=4000),
            "dsa": _lm(100, 2048, 8, 3e-4, 3e-4, indexer_steps=100),
            "sft": _lm(1000, 2048, 8, 2e-3, 2e-4, warmup_steps=30, demos=20_000),
            **{kind: _RL_LARGE | {"lr": 5e-5} for kind in ("reasoning_rl", "general_rl", "distil")},
            "agentic_rl": _RL_LARGE | {"lr": 5e-5, "max_turns": 8},
        },
        "engine": {"max_len": 4096},
        "eval": {"needle_lengths": [512, 1024, 2048]},
    },
    "20m": {
        "model": MODELS["20m"] | {"max_position_embeddings": 8192, "index_topk": 512},
        "data": {"max_mb": 400.0, "tokenizer_mb": 20.0},
        "stages": {
            "pretrain": _lm(8000, 1024, 64, 2e-3, 4e-4, warmup_steps=200, induction=True),
            "midtrain": _lm(800, 4096, 16, 4e-4, 2e-4, demos=20_000),
            "dsa": _lm(200, 4096, 16, 2e-4, 2e-4, indexer_steps=200),
            "sft": _lm(3000, 4096, 16, 1e-3, 1e-4, warmup_steps=100, demos=60_000),
            **{kind: _RL_LARGE | {"max_len": 4096} for kind in ("reasoning_rl", "general_rl", "distil")},
            "agentic_rl": _RL_LARGE | {"max_len": 4096, "max_turns": 16},
        },
        "engine": {"max_len": 8192, "max_batch": 128},
        "eval": {"needle_lengths": [1024, 2048, 4096], "problems": 64},
    },
    # the released model; steps, batches and rates are the recipe file's, which says which of them the paper prints
    "glm5-744b": {"model": MODELS["glm5-744b"]},
}
# a model for other engines' kernels, trained as 5m is
SIZES["tiny-std"] = SIZES["5m"] | {"model": MODELS["tiny-std"]}
