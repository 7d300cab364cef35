"""Our network against transformers' `GlmMoeDsaForCausalLM`, and the mutants that these tests must catch.

Recipe: fp32, weights of standard deviation 0.2 (logits of about 7), T = 3 x index_topk, 8 index heads, perturbed
norms and biases. Noise is 1.5e-5; the smallest mutant (latent epsilon) is 7e-5.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hf_reference import reference_model, saved_reference, tiny_config
from torch import Tensor
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa

import fullarc.model.indexer as indexer_module
import fullarc.model.mla as mla_module
from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig, preset
from fullarc.model import GlmMoeDsa, QuantScheme, load_model, quantize_checkpoint, save_model
from fullarc.model.moe import MoE

ATOL = 5e-5


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[GlmMoeDsaForCausalLM, GlmMoeDsa, Tensor, Path]:
    folder = tmp_path_factory.mktemp("hf")
    config = tiny_config(num_nextn_predict_layers=0)
    reference = saved_reference(folder, config)
    ids = torch.randint(0, config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    return reference, load_model(folder), ids, folder


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_logits_agree(pair: tuple) -> None:
    reference, ours, ids, _ = pair
    with torch.no_grad():
        assert reference(ids).logits.abs().max() > 3
        assert difference(reference(ids).logits, ours(ids).logits) < ATOL


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_group": 4, "topk_group": 2},
        {"index_n_heads": 32},
        {"rope_theta": 1e6},
        {"qk_nope_head_dim": 12, "v_head_dim": 28},  # values of another width than queries and keys
        {"qk_nope_head_dim": 40, "qk_rope_head_dim": 4, "v_head_dim": 20},
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},  # IndexShare: layers 0 and 3 choose
        {"indexer_types": ("full", "shared", "full", "shared")},
    ],
)
def test_logits_agree_for_other_shapes(overrides: dict, tmp_path: Path) -> None:
    config = tiny_config(num_nextn_predict_layers=0, **overrides)
    reference = saved_reference(tmp_path, config)
    ids = torch.randint(0, config.vocab_size, (2, 64))
    with torch.no_grad():
        assert difference(reference(ids).logits, load_model(tmp_path)(ids).logits) < ATOL


def test_indexers_are_where_the_released_numbers_put_them() -> None:
    """GLM-5.2: every fourth layer after the first three; transformers derives the same list."""
    config = ModelConfig(index_topk_freq=4, index_skip_topk_offset=3)
    full = [layer for layer in range(78) if config.has_indexer(layer)]
    assert full == [0, 1, *range(2, 78, 4)] and len(full) == 21
    fields = {key: config.to_hf()[key] for key in ("index_topk_freq", "index_skip_topk_offset")}
    theirs = GlmMoeDsaConfig(num_hidden_layers=78, **fields).indexer_types
    assert [layer for layer, kind in enumerate(theirs) if kind == "full"] == full
    by_pattern = ModelConfig.from_hf(tiny_config().to_hf() | {"index_topk_pattern": "FSFS"})
    assert [by_pattern.has_indexer(layer) for layer in range(4)] == [True, False, True, False]
    assert ModelConfig.from_hf(by_pattern.to_hf()) == by_pattern
    shared = tiny_config(indexer_types=("full", "shared", "shared", "full"))
    assert sum(p.numel() for p in GlmMoeDsa(shared).parameters()) == shared.parameter_count(with_mtp=True)


def test_a_shared_indexer_learns_from_all_layers_that_it_serves() -> None:
    """The mean of the layers' KL has the gradient of the KL from their mean attention (arXiv 2603.12201)."""
    config = tiny_config(num_hidden_layers=3, indexer_types=("full", "shared", "shared"))
    model, seen = GlmMoeDsa(config).init_weights(3), []
    ids = torch.randint(0, config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    original = mla_module.indexer_kl

    def watched(scores: Tensor, attention: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((scores, attention, support))
        return original(scores, attention, support)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_module, "indexer_kl", watched)
        loss = model.trunk(ids, indexer_loss="dense").index_kl
    seen = tuple(seen)  # of the forward pass: the backward pass computes them again
    indexer = model.layers[0].self_attn.indexer
    gradient = torch.autograd.grad(loss, list(indexer.parameters()), retain_graph=True)
    mean = sum(attention for _, attention, _ in seen) / 3  # rows are normalised inside
    kl, rows = original(seen[0][0], mean, seen[0][2])
    expected = torch.autograd.grad(kl / rows, list(indexer.parameters()))
    for ours, by_hand in zip(gradient, expected, strict=True):
        assert ours.abs().max() > 0 and torch.allclose(ours, by_hand, atol=1e-6)


@pytest.mark.slow  # imports compressed_tensors
def test_a_quantised_checkpoint_is_the_same_to_transformers(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    saved_reference(tmp_path / "plain", tiny_config(num_nextn_predict_layers=0))
    rest = {kind: QuantScheme(8, 0) for kind in ("shared", "dense", "attention")}
    quantize_checkpoint(tmp_path / "plain", tmp_path / "int4", {"experts": QuantScheme(4, 16)} | rest)
    reference = GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    ids = torch.randint(0, 97, (2, 48))
    with torch.no_grad():
        logits = load_model(tmp_path / "int4")(ids).logits
        assert difference(reference(ids).logits, logits) < ATOL
        assert difference(load_model(tmp_path / "plain")(ids).logits, logits) > 0.1


@pytest.mark.slow  # imports compressed_tensors
def test_a_w4a8_checkpoint_is_the_same_to_transformers(tmp_path: Path) -> None:
    """But for the inputs of its routed experts: transformers fuses those, and then rounds nothing."""
    pytest.importorskip("compressed_tensors")
    saved_reference(tmp_path / "plain", tiny_config(num_nextn_predict_layers=0))
    plan = {kind: QuantScheme(8, 0, tokens=True) for kind in ("shared", "dense", "attention")}
    plan["experts"] = QuantScheme(4, 0, tokens=True)
    quantize_checkpoint(tmp_path / "plain", tmp_path / "w4a8", plan)
    reference = GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "w4a8", dtype=torch.float32)
    ours, ids = load_model(tmp_path / "w4a8"), torch.randint(0, 97, (1, 12))

    def apart() -> float:
        with torch.no_grad():
            return (reference(ids).logits - ours(ids).logits).abs().median().item()

    assert apart() > 1e-3
    for layer in ours.layers[1:]:
        assert isinstance(layer.mlp, MoE)
        layer.mlp.experts.scales = (None, None)
    assert apart() < 1e-5
    ours.layers[0].self_attn.o_proj.scale = None
    assert apart() > 1e-3


def test_dense_configuration_agrees(tmp_path: Path) -> None:
    config = tiny_config(num_nextn_predict_layers=0, index_topk=256)
    assert config.dense_attention
    reference = saved_reference(tmp_path, config)
    ids = torch.randint(0, config.vocab_size, (2, 64))
    with torch.no_grad():
        assert difference(reference(ids).logits, load_model(tmp_path)(ids).logits) < ATOL


def test_gradients_agree(pair: tuple) -> None:
    reference, ours, ids, _ = pair
    reference.zero_grad(), ours.zero_grad()
    for model in (reference, ours):
        F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(reference.named_parameters())
    compared = 0
    for name, parameter in ours.named_parameters():
        other = theirs.get(f"model.{name}", theirs.get(name))
        if ".indexer." in name:
            assert parameter.grad is None and other.grad is None
            continue
        scale = other.grad.abs().max().item()
        assert difference(parameter.grad, other.grad) < 1e-4 * max(scale, 1e-3), name
        compared += 1
    assert compared > 30


def test_cached_decoding_of_transformers_agrees_with_our_full_forward(pair: tuple) -> None:
    reference, ours, ids, _ = pair
    with torch.no_grad():
        out = reference(ids[:, :40], use_cache=True)
        steps = []
        for t in range(40, 48):
            out = reference(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        assert difference(torch.cat(steps, 1), ours(ids).logits[:, 40:]) < ATOL


def test_eager_attention_agrees(pair: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sdpa: logits, and gradients of all that learns."""
    _, ours, ids, folder = pair
    eager = GlmMoeDsaForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    calls, attention = [], modeling_glm_moe_dsa.eager_attention_forward
    monkeypatch.setattr(
        modeling_glm_moe_dsa, "eager_attention_forward", lambda *a, **k: calls.append(1) or attention(*a, **k)
    )
    eager.zero_grad(), ours.zero_grad()
    logits = [model(ids).logits for model in (eager, ours)]
    assert len(calls) == 4 and difference(*logits) < ATOL
    for found in logits:
        F.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(eager.named_parameters())
    for name, parameter in ours.named_parameters():
        if ".indexer." not in name:
            other = theirs.get(f"model.{name}", theirs.get(name)).grad
            assert difference(parameter.grad, other) < 1e-4 * max(other.abs().max().item(), 1e-3), name


@pytest.mark.parametrize(
    "overrides",
    [{}, {"indexer_types": ("full", "shared", "full", "shared")}, {"n_group": 4, "topk_group": 2}],
    ids=["plain", "index_share", "groups"],
)
def test_transformers_loads_what_we_save(overrides: dict, tmp_path: Path) -> None:
    torch.manual_seed(0)  # a near tie of two keys, which one seed in six has, may fall otherwise
    config = tiny_config(**overrides)
    ours = GlmMoeDsa(config).init_weights(3)
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            value.normal_(std=0.1) if name.endswith("e_score_correction_bias") else value.mul_(4)
    save_model(ours, tmp_path / "ours")
    theirs = GlmMoeDsaForCausalLM.from_pretrained(tmp_path / "ours").float().eval()
    assert [layer.self_attn.indexer is not None for layer in theirs.model.layers] == [
        config.has_indexer(layer) for layer in range(4)
    ]
    ids = torch.randint(0, config.vocab_size, (2, 48))
    with torch.no_grad():
        assert difference(theirs(ids).logits, ours(ids).logits) < ATOL
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs", num_nextn_predict_layers=0)
    with torch.no_grad():
        assert difference(again(ids).logits, ours(ids).logits) < ATOL


def test_mtp_weights_survive_our_round_trip(tmp_path: Path) -> None:
    ours = GlmMoeDsa(tiny_config()).init_weights(3)
    save_model(ours, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert ours.state_dict().keys() == again.state_dict().keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True)
    )


def _half_split_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize(
    "mutant", ["half_split_indexer_rope", "no_relu", "latent_eps", "rms_eps", "one_key_less"]
)
def test_mutants_are_caught(pair: tuple, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, _, ids, folder = pair
    overrides = {
        "latent_eps": {"latent_norm_eps": 1e-5},
        "rms_eps": {"rms_norm_eps": 1e-3},
        "one_key_less": {"index_topk": 15},
    }
    mutated = load_model(folder, **overrides.get(mutant, {}))
    if mutant == "half_split_indexer_rope":
        monkeypatch.setattr(indexer_module, "apply_rope", _half_split_rope)
    elif mutant == "no_relu":
        monkeypatch.setattr(indexer_module, "F", SimpleNamespace(relu=lambda x, inplace=False: x))
        monkeypatch.setattr(torch.Tensor, "relu_", lambda x: x)
    with torch.no_grad():
        assert difference(reference(ids).logits, mutated(ids).logits) > ATOL


def test_indexer_mutants_hide_when_everything_is_selected(
    pair: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the tests above use T > index_topk: below it a wrong indexer is invisible."""
    reference, _, ids, folder = pair
    mutated = load_model(folder)
    monkeypatch.setattr(indexer_module, "apply_rope", _half_split_rope)
    with torch.no_grad():
        assert difference(reference(ids[:, :16]).logits, mutated(ids[:, :16]).logits) < ATOL


def test_reference_has_no_hidden_randomness() -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    a, b = reference_model(config), reference_model(config)
    ids = torch.arange(48)[None]
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)


def test_a_checkpoint_in_shards_is_read_as_transformers_wrote_it(tmp_path: Path) -> None:
    config = tiny_config()
    reference = reference_model(config)
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and (tmp_path / "model.safetensors.index.json").is_file()
    ours = load_model(tmp_path)
    assert ours.mtp_layer is None, "transformers leaves the MTP layer out, whatever config.json says"
    ids = torch.randint(0, config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert difference(reference(ids).logits, ours(ids).logits) < ATOL

    (tmp_path / "stray.safetensors").write_bytes(b"not listed, not read")
    load_model(tmp_path)
    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(FullarcError, match=f"{shards[1].name} is missing, although"):
        load_model(tmp_path)


def test_an_mtp_layer_that_is_not_asked_for_is_left_where_it_is(tmp_path: Path) -> None:
    model = GlmMoeDsa(tiny_config()).init_weights(1)
    save_model(model, tmp_path / "model")
    trunk = load_model(tmp_path / "model", num_nextn_predict_layers=0)
    assert trunk.mtp_layer is None
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(trunk(ids).logits, model(ids).logits)


def test_config_json_is_in_the_form_of_the_hub(tmp_path: Path) -> None:
    """What transformers adds of its own, and older versions and other engines refuse, is not in it."""
    config = preset("tiny-std")
    said = config.to_hf()
    assert not {"layer_types", "mlp_layer_types", "indexer_types", "transformers_version"} & said.keys()
    read = GlmMoeDsaConfig(**{key: value for key, value in said.items() if key != "model_type"})
    theirs = read.to_dict()
    assert {key for key in said if key in theirs and theirs[key] != said[key]} <= {"dtype"}
    assert ModelConfig.from_hf(theirs) == config.model_copy(update={"indexer_types": ("full",) * 4})


def test_tiny_std_has_the_widths_that_kernels_insist_on() -> None:
    config = preset("tiny-std")
    assert config.kv_lora_rank + config.qk_rope_head_dim == 576
    assert (config.qk_head_dim, config.v_head_dim, config.index_n_heads, config.index_head_dim) == (
        256,
        256,
        32,
        128,
    )
    released = preset("glm5-744b")
    for name in ("index_topk", "qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank"):
        assert getattr(config, name) == getattr(released, name)
    assert not config.dense_attention and config.parameter_count() < 25e6
