"""Which rank of a pipeline has which part of the model, and what it does when (GLM-5 section 2.4).

Pure functions of the configuration. Invariant: the stages cover every part once, in order; layers that share an
indexer's choice are in one stage; with MTP the last stage is the output layer alone and the one before it ends with
the MTP layer.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig


@dataclass(frozen=True)
class Stage:
    """What one rank of the pipeline has: a run of layers; perhaps the finish, perhaps the output layer."""

    layers: range
    finish: bool
    output: bool


def plan_stages(config: ModelConfig, size: int, mtp_steps: int) -> list[Stage]:
    """The stages of `size` ranks whose dearest one is as cheap as can be, in multiplications per token.

    Raises:
        FullarcError: there are fewer parts than ranks.
    """
    total = config.num_hidden_layers
    groups, (layers, mtp) = config.index_groups, _layer_costs(config)
    head = config.hidden_size * config.vocab_size
    costs = [sum(layers[n] for n in group) for group in groups] + [mtp_steps * mtp if mtp_steps else head]
    runs = size - 1 if mtp_steps else size
    if not 1 <= runs <= len(costs):
        shared = "" if len(groups) == total else " (those that share an indexer's choice stay together)"
        raise FullarcError(
            f"A pipeline of {total} layers{shared} has at most {len(costs) + size - runs} ranks, not {size}.",
            "Choose fewer processes, or another `parallel`.",
        )
    stages, start = [], 0
    for end in _cuts(tuple(costs), runs):
        mine, finish = groups[start:end], end == len(costs)
        run = range(mine[0].start, mine[-1].stop) if mine else range(total, total)
        stages.append(Stage(run, finish, output=finish and not mtp_steps))
        start = end
    return stages + [Stage(range(total, total), finish=False, output=True)] if mtp_steps else stages


def _layer_costs(config: ModelConfig) -> tuple[list[int], int]:
    """Weights that one token is multiplied with in each layer, and in the MTP layer."""
    c = config
    attention = c.hidden_size * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
    attention += c.num_attention_heads * (
        c.q_lora_rank * c.qk_head_dim
        + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        + c.v_head_dim * c.hidden_size
    )
    experts = c.num_experts_per_tok + c.n_shared_experts
    moe = 3 * c.hidden_size * c.moe_intermediate_size * experts + c.hidden_size * c.n_routed_experts
    dense = 3 * c.hidden_size * c.intermediate_size
    layers = [dense if n < c.first_k_dense_replace else moe for n in range(c.num_hidden_layers)]
    return [attention + one for one in layers], attention + moe + 2 * c.hidden_size**2


def _cuts(costs: tuple[int, ...], size: int) -> list[int]:
    """Ends of `size` non-empty runs of the parts, the dearest as cheap as possible."""

    @cache
    def best(start: int, runs: int) -> tuple[int, tuple[int, ...]]:
        if runs == 1:
            return sum(costs[start:]), (len(costs),)
        found = []
        for end in range(start + 1, len(costs) - runs + 2):
            dearest, ends = best(end, runs - 1)
            found.append((max(sum(costs[start:end]), dearest), (end, *ends)))
        return min(found)

    return list(best(0, size)[1])


Action = tuple[Literal["forward", "backward"], int]


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """What a stage does, in order: enough forward passes to fill the pipeline behind it, then one of each in turn."""
    ahead = min(stages - stage - 1, micro_batches)
    actions: list[Action] = [("forward", m) for m in range(ahead)]
    for m in range(micro_batches):
        if m + ahead < micro_batches:
            actions.append(("forward", m + ahead))
        actions.append(("backward", m))
    return actions
