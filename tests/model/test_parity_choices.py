"""What our network and transformers' choose on the way: keys, experts; with padding on the left; and what only we keep.

Same recipe as test_parity.py: large random weights in fp32, T up to 4 x index_topk.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_reference import saved_reference, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GlmMoeDsaForCausalLM

import fullarc.model.indexer as indexer_module
import fullarc.model.mla as mla_module
import fullarc.model.moe as moe_module
from fullarc.config.recipe import load_recipe
from fullarc.model import GlmMoeDsa, load_model, save_model
from fullarc.model.visibility import Chunk

ATOL = 5e-5
SHAPES = [
    {},
    {"index_n_heads": 16},
    {"index_n_heads": 32},
    {"n_group": 4, "topk_group": 2},
    {"index_topk_freq": 3, "index_skip_topk_offset": 1},
    {"norm_topk_prob": False, "n_shared_experts": 2},
    {"qk_nope_head_dim": 12, "v_head_dim": 28},
]


def both(folder: Path, **overrides: object) -> tuple[GlmMoeDsaForCausalLM, GlmMoeDsa]:
    reference = saved_reference(folder, tiny_config(num_nextn_predict_layers=0, **overrides))
    return reference, load_model(folder)


def ids_of(length: int) -> Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(7))


def their_choices(model: GlmMoeDsaForCausalLM, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys that count [B, T, S] of each layer with an indexer; weights of the experts [B * T, E] of each MoE layer."""
    keys, experts = [], []
    past = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()

    def indexed(_module: object, _args: object, out: Tensor) -> None:
        taken = torch.zeros(*out.shape[:2], ids.shape[1], dtype=torch.bool).scatter_(-1, out.long(), True)
        keys.append(taken & past)

    def routed(_module: object, _args: object, out: tuple[Tensor, Tensor, Tensor]) -> None:
        experts.append(torch.zeros_like(out[0]).scatter_(-1, out[2], out[1]))

    hooks = [layer.self_attn.indexer.register_forward_hook(indexed)
             for layer in model.model.layers if layer.self_attn.indexer is not None]  # fmt: skip
    hooks += [layer.mlp.gate.register_forward_hook(routed)
              for layer in model.model.layers if hasattr(layer.mlp, "gate")]  # fmt: skip
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return keys, experts


def our_choices(model: GlmMoeDsa, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The same of ours."""
    keys, experts, asked = [], [], []
    select, choose = mla_module.select, indexer_module.Index.choose

    def masked(scores: Tensor, allowed: Tensor, k: int) -> Tensor:
        keys.append(select(scores, allowed, k))
        return keys[-1]

    def gathered(index: indexer_module.Index, run: list[Chunk]) -> Tensor:
        positions = choose(index, run)
        if not any(index is other for other in asked):  # layers that share a choice ask again
            asked.append(index)
            taken = torch.zeros(*ids.shape, ids.shape[1] + 1, dtype=torch.bool)
            keys.append(taken.scatter_(-1, positions.long() % taken.shape[-1], True)[..., :-1])
        return positions

    def routed(_module: object, _args: object, out: tuple[Tensor, Tensor, Tensor]) -> None:
        experts.append(torch.zeros_like(out[0]).scatter_(-1, out[1], out[2]))

    gates = [layer.mlp.gate for layer in model.layers if isinstance(layer.mlp, moe_module.MoE)]
    hooks = [gate.register_forward_hook(routed) for gate in gates]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(mla_module, "select", masked)
        patch.setattr(indexer_module.Index, "choose", gathered)
        model(ids)
    for hook in hooks:
        hook.remove()
    return keys, experts


@pytest.mark.parametrize("overrides", SHAPES)
@pytest.mark.parametrize("length", [24, 64])
def test_the_same_keys_and_experts_are_chosen(overrides: dict, length: int, tmp_path: Path) -> None:
    reference, ours = both(tmp_path, **overrides)
    keys, experts = our_choices(ours, ids_of(length))
    their_keys, their_experts = their_choices(reference, ids_of(length))
    assert len(keys) == sum(map(ours.config.has_indexer, range(4))) and len(experts) == 3
    for mine, theirs in zip(keys, their_keys, strict=True):
        assert torch.equal(mine, theirs) and mine.sum(-1).max() == 16
    for mine, theirs in zip(experts, their_experts, strict=True):
        assert torch.equal(mine > 0, theirs > 0), "the same experts"
        assert (mine - theirs).abs().max() < ATOL, "with the same weights"


@pytest.mark.parametrize("overrides", SHAPES[3:])
def test_gradients_agree_for_other_shapes(overrides: dict, tmp_path: Path) -> None:
    reference, ours = both(tmp_path, **overrides)
    ids = ids_of(64)
    for model in (reference, ours):
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        other = theirs.get(f"model.{name}", theirs.get(name))
        assert (parameter.grad is None) == (other.grad is None) == (".indexer." in name), name
        if parameter.grad is not None:
            scale = max(other.grad.abs().max().item(), 1e-3)
            assert (parameter.grad - other.grad).abs().max() < 1e-4 * scale, name


def test_padding_on_the_left_agrees_at_once_and_cached(tmp_path: Path) -> None:
    """Rows of unequal length, as transformers batches them: their padding is our document 0.

    Where its own cached decoding chooses other keys than its full pass (a near tie, at one position here), neither is
    a reference.
    """
    reference, ours = both(tmp_path)
    ids, real = ids_of(60), torch.ones(2, 60, dtype=torch.long)
    real[1, :21] = 0
    positions = (real.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = reference(ids, attention_mask=real, position_ids=positions).logits
        logits, past = [], None
        for part in (slice(0, 40), *(slice(t, t + 1) for t in range(40, 60))):
            out = reference(ids[:, part], attention_mask=real[:, : part.stop], position_ids=positions[:, part],
                            past_key_values=past, use_cache=True)  # fmt: skip
            past = out.past_key_values
            logits.append(out.logits)
        cached = torch.cat(logits, 1)
        packed, alone = ours(ids, real).logits, ours(ids[1:, 21:]).logits
    assert (packed - expected)[real > 0].abs().max() < ATOL
    assert (alone[0] - expected[1, 21:]).abs().max() < ATOL, "padding changes nothing"
    settled = (real > 0) & ((cached - expected).abs().amax(-1) < ATOL)
    assert settled.sum() >= real.sum() - 1
    assert (packed - cached)[settled].abs().max() < ATOL


def test_the_tie_rule_alone_can_part_two_implementations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two index heads ReLU leaves ties at the border: torch.topk's choice among them depends on the length."""
    model = both(tmp_path, index_n_heads=2)[1]
    ids = ids_of(60)

    def parts(ids: Tensor) -> Tensor:
        """Logits of the first 40 tokens."""
        with torch.no_grad():
            return model(ids).logits[:, :40]

    assert (parts(ids) - parts(ids[:, :40])).abs().max() < ATOL

    def careless(scores: Tensor, allowed: Tensor, k: int) -> Tensor:
        masked = scores.masked_fill(~allowed, -torch.inf)
        taken = masked.topk(min(k, scores.shape[-1]), dim=-1).indices
        return torch.zeros_like(allowed).scatter(-1, taken, True) & allowed

    monkeypatch.setattr(mla_module, "select", careless)
    assert (parts(ids) - parts(ids[:, :40])).abs().max() > 0.1


@pytest.mark.parametrize("mutant", ["no_indexer_choice", "half_split_rope", "no_bias", "bias_in_weights"])
def test_more_mutants_are_caught(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What released implementations got wrong at first: dense attention, RoPE by halves, the balancing bias."""
    reference, ours = both(tmp_path)
    ids = ids_of(64)

    def difference() -> float:
        with torch.no_grad():
            return (reference(ids).logits - ours(ids).logits).abs().max().item()

    def by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    assert difference() < ATOL
    if mutant == "no_indexer_choice":
        monkeypatch.setattr(mla_module, "GATHER_FROM", 1000)
        monkeypatch.setattr(mla_module, "select", lambda scores, allowed, k: allowed)
    elif mutant == "half_split_rope":
        monkeypatch.setattr(mla_module, "apply_rope", by_halves)
        assert indexer_module.apply_rope is not by_halves
    else:
        for layer in ours.layers[1:]:
            if mutant == "no_bias":
                layer.mlp.gate.e_score_correction_bias.zero_()
            else:
                bias = layer.mlp.gate.e_score_correction_bias
                layer.mlp.gate.register_forward_hook(
                    lambda _module, _args, out, bias=bias: (out[0], out[1], out[2] + bias[out[1]])
                )
    assert difference() > ATOL


def test_the_mtp_layer_that_transformers_drops_is_kept(tmp_path: Path) -> None:
    """It is the layer after the last; copies of embedding and head that some checkpoints store in it are not read."""
    ours = GlmMoeDsa(tiny_config()).init_weights(3)
    save_model(ours, tmp_path / "ours")
    GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    dropped = {name for name in mine if name.startswith("model.layers.4.")}
    assert mine.keys() - theirs.keys() == dropped
    tails = {name.removeprefix("model.layers.4.") for name in dropped}
    assert {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"} <= tails
    assert "self_attn.indexer.wq_b.weight" in tails and "mlp.experts.7.down_proj.weight" in tails
    copies = {name: torch.zeros(97, 64) for name in ("embed_tokens.weight", "shared_head.head.weight")}
    (tmp_path / "ours" / "manifest.json").unlink()
    save_file(mine | {f"model.layers.4.{name}": value for name, value in copies.items()},
              tmp_path / "ours" / "model.safetensors")  # fmt: skip
    again = load_model(tmp_path / "ours").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in ours.state_dict().items())


def test_the_released_model_can_be_built_without_memory() -> None:
    """744B: body, embeddings and output layer; with the MTP layer 753.9B (GLM-5 Table 10 and the checkpoint's size)."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/glm5-744b.toml").recipe
    with torch.device("meta"):
        model = GlmMoeDsa(recipe.model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 753_864_119_552
    assert sum(n for name, n in sizes.items() if not name.startswith("mtp_layer.")) == 743_911_199_232
    assert len(model.layers) == 78
