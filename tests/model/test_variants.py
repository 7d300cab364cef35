"""What the paper compares its network with: grouped queries, windows, separate MTP layers, MLA-256."""

import json
from pathlib import Path

import pytest
import torch
from hf_reference import tiny_config
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.model import ATTENTIONS, ModelConfig, preset
from fullarc.engine.weights import prepare
from fullarc.model import GlmMoeDsa, load_model, save_model
from fullarc.model.gqa import GQA
from fullarc.model.mla import MLA
from fullarc.model.ops import rope_tables
from fullarc.model.visibility import Visibility, visible_chunks

GROUPED = {"gqa_kv_heads": 2}
WINDOWED = {"attention_pattern": "SFSS", "sliding_window": 7, "index_topk": 1024}


def model(**overrides: object) -> GlmMoeDsa:
    net = GlmMoeDsa(tiny_config(max_position_embeddings=1024, **overrides)).init_weights(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return net


def tokens(rows: int, length: int, seed: int = 5) -> Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def seen_by(config: ModelConfig, length: int, window: int = 0) -> Visibility:
    positions = torch.arange(length)[None]
    cos, sin = rope_tables(positions, config.qk_rope_head_dim, config.rope_theta)
    near = (positions, window) if window else None
    chunks = visible_chunks(length, None, None, None, torch.device("cpu"), near) if window else None
    return Visibility(cos, sin, chunks)


# --- defaults --------------------


def test_a_plain_configuration_says_nothing_of_variants() -> None:
    assert not {"gqa_kv_heads", "attention_pattern", "sliding_window"} & tiny_config().to_hf().keys()
    assert tiny_config().to_hf()["model_type"] == "glm_moe_dsa"
    net = model()
    assert not any("mtp_later" in name for name in net.state_dict()) and len(net.mtp_layers) == 1


@pytest.mark.parametrize(
    "overrides", [GROUPED, WINDOWED, {"num_nextn_predict_layers": 3}, GROUPED | WINDOWED]
)
def test_parameters_are_counted(overrides: dict) -> None:
    net = model(**overrides)
    assert sum(p.numel() for p in net.parameters()) == net.config.parameter_count(with_mtp=True)


def test_the_attentions_of_table_1_have_equal_matrices() -> None:
    """All but the latents' norms, and the indexer that dense training leaves alone."""

    def matrices(shape: str) -> int:
        layer = GlmMoeDsa(preset("2m", **ATTENTIONS[shape])).layers[0].self_attn
        return sum(
            p.numel() for n, p in layer.named_parameters() if p.ndim > 1 and ".indexer." not in f".{n}"
        )

    assert matrices("mla") == matrices("mla-256") == matrices("gqa")
    wide, usual = (preset("2m", **ATTENTIONS[shape]) for shape in ("mla-256", "mla"))
    assert wide.num_attention_heads * 3 == usual.num_attention_heads * 2
    assert wide.qk_head_dim * 192 == usual.qk_head_dim * 256
    assert wide.parameter_count() == usual.parameter_count()


# --- grouped-query attention --------------------


def test_grouped_queries_equal_those_of_transformers() -> None:
    """GLM-4's attention: partial interleaved rotation, of the first dimensions where ours is of the last."""
    from transformers import GlmConfig
    from transformers.models.glm.modeling_glm import GlmAttention, GlmRotaryEmbedding

    c = tiny_config(gqa_kv_heads=2, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
    theirs_config = GlmConfig(
        hidden_size=c.hidden_size, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        partial_rotary_factor=0.5, attention_bias=False, max_position_embeddings=256, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    theirs_config._attn_implementation = "eager"
    theirs, ours = GlmAttention(theirs_config, 0).eval(), GQA(c)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
        for name in ("q_proj", "k_proj"):
            heads_HdD = getattr(ours, name).weight.unflatten(0, (-1, 32))
            first_rope = torch.cat((heads_HdD[:, 16:], heads_HdD[:, :16]), 1)
            getattr(theirs, name).weight.copy_(first_rope.flatten(0, 1))
        theirs.v_proj.weight.copy_(ours.v_proj.weight)
        theirs.o_proj.weight.copy_(ours.o_proj.weight)
        h = torch.randn(2, 20, c.hidden_size, generator=torch.Generator().manual_seed(0))
        places = torch.arange(20)[None]
        mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
        expected, _ = theirs(
            h, position_embeddings=GlmRotaryEmbedding(theirs_config)(h, places), attention_mask=mask
        )
        found, kl, _ = ours(h, seen_by(c, 20))
    assert kl is None and expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_grouped_queries_train_every_weight_and_need_no_indexer() -> None:
    net = model(**GROUPED)
    assert not any(".indexer." in name for name in net.state_dict())
    out = net.trunk(tokens(2, 40))
    assert out.index_kl is None
    out.hidden_BTD.square().sum().backward()
    for name, parameter in net.layers.named_parameters():
        if ".experts." not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_as_many_groups_as_heads_is_not_one_group() -> None:
    """Each group has its own keys: with one head's key projection changed, only its group's queries see it."""
    attention = GQA(tiny_config(gqa_kv_heads=2))
    torch.nn.init.normal_(attention.q_proj.weight), torch.nn.init.normal_(attention.k_proj.weight)
    h, seen = torch.randn(1, 6, 64), seen_by(tiny_config(), 6)
    with torch.no_grad():
        _, before = attention.queries_and_keys(h, seen.cos, seen.sin)
        attention.k_proj.weight[:32] += 1.0
        _, after = attention.queries_and_keys(h, seen.cos, seen.sin)
    changed = (before != after).flatten(2).any(-1)[0].tolist()
    assert changed == [True, True, False, False]


# --- windows --------------------


def test_a_window_equals_absorbed_attention_with_a_mask() -> None:
    c = tiny_config(index_topk=256)
    attention = MLA(c, 0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else None
        h = torch.randn(1, 30, c.hidden_size)
        seen = seen_by(c, 30, window=7)
        found, *_ = attention(h, seen)
        _, q_nope, q_rope = attention.queries(h, seen.cos, seen.sin)
        latent, k_rope = attention.latents(h, seen.cos, seen.sin)
        distance = torch.arange(30)[:, None] - torch.arange(30)
        allowed = (distance >= 0) & (distance < 7)
        out = attention.absorbed(
            q_nope[0], q_rope[0], latent.expand(30, -1, -1), k_rope.expand(30, -1, -1), allowed
        )
    torch.testing.assert_close(found[0], attention.o_proj(out), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouped", [{}, GROUPED])
def test_a_query_sees_exactly_its_window(grouped: dict) -> None:
    net = model(
        num_hidden_layers=1, first_k_dense_replace=1, attention_pattern="S", sliding_window=7, index_topk=1024,
        **grouped,
    )  # fmt: skip
    ids = tokens(1, 600)  # several blocks
    other = ids.clone()
    other[0, 511] = (other[0, 511] + 1) % 97
    with torch.no_grad():
        a, b = net.trunk(ids).hidden_BTD, net.trunk(other).hidden_BTD
    assert (a != b).any(-1)[0].nonzero()[:, 0].tolist() == list(range(511, 518))


@pytest.mark.parametrize("pattern, reached", [("FS", 600), ("SF", 600), ("SS", 511 + 2 * 6 + 1)])
def test_only_the_layers_marked_have_a_window(pattern: str, reached: int) -> None:
    """How far a token of a two-layer model is felt: two windows, or to the end where a layer sees everything."""
    net = model(num_hidden_layers=2, attention_pattern=pattern, sliding_window=7, index_topk=1024)
    ids = tokens(1, 600)
    other = ids.clone()
    other[0, 511] = (other[0, 511] + 1) % 97
    with torch.no_grad():
        a, b = net.trunk(ids).hidden_BTD, net.trunk(other).hidden_BTD
    assert (a != b).any(-1)[0].nonzero()[-1, 0] + 1 == reached


def test_a_window_wider_than_the_row_changes_nothing() -> None:
    wide = model(attention_pattern="SFSS", sliding_window=64, index_topk=256)
    full = GlmMoeDsa(tiny_config(index_topk=256))
    full.load_state_dict(wide.state_dict())
    ids = tokens(2, 64)
    with torch.no_grad():
        assert torch.equal(wide.trunk(ids).hidden_BTD, full.trunk(ids).hidden_BTD)


@pytest.mark.parametrize("overrides", [GROUPED, WINDOWED, GROUPED | WINDOWED])
def test_packed_documents_of_a_variant_stay_apart(overrides: dict) -> None:
    """Exactly: neighbours change no bit. Documents alone, and continuations of a stem, give the same numbers."""
    net = model(**overrides)
    stem, sizes = 50, [60, 200, 90]
    ids = tokens(1, stem + sum(sizes))
    docs = torch.cat([torch.full((size,), i + 1) for i, size in enumerate([stem, *sizes])])[None]
    parents = torch.where((docs == 2) | (docs == 4), 1, 0)
    changed = torch.where(docs == 3, (ids + 11) % 97, ids)
    with torch.no_grad():
        a, b = (net.trunk(x, docs, parents).hidden_BTD for x in (ids, changed))
        assert torch.equal(a[docs != 3], b[docs != 3]) and not torch.equal(a, b)
        for number, start in ((2, stem), (3, stem + 60), (4, stem + 260)):
            own = ids[:, start : start + sizes[number - 2]]
            whole = torch.cat((ids[:, :stem], own), 1) if number != 3 else own
            alone = net.trunk(whole).hidden_BTD[:, -own.shape[1] :]
            torch.testing.assert_close(a[:, start : start + own.shape[1]], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("overrides", [GROUPED, WINDOWED])
def test_a_variant_is_causal(overrides: dict) -> None:
    net = model(**overrides)
    ids = tokens(1, 60)
    other = ids.clone()
    other[0, 40] = (other[0, 40] + 1) % 97
    with torch.no_grad():
        a, b = net.trunk(ids).hidden_BTD, net.trunk(other).hidden_BTD
    assert torch.equal(a[:, :40], b[:, :40]) and not torch.equal(a[:, 40:], b[:, 40:])


# --- separate MTP layers --------------------


def test_every_step_has_its_own_layer_and_the_last_one_goes_on() -> None:
    net = model(num_nextn_predict_layers=2, index_topk=256)
    ids = tokens(1, 20)
    with torch.no_grad():
        before = net.mtp(net.trunk(ids).hidden_BTD, ids, steps=4).hidden
        net.mtp_later[0].eh_proj.weight.mul_(2)
        after = net.mtp(net.trunk(ids).hidden_BTD, ids, steps=4).hidden
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False, False]


def test_drafts_of_separate_layers_are_what_training_computes() -> None:
    from fullarc.engine.mtp import _advance, _draft

    net = model(num_nextn_predict_layers=3, index_topk=256)
    ids, hidden = _advance(net, [5, 9, 13, 2, 40, 41, 17], [])
    drafts = _draft(net, ids, hidden, 4)
    with torch.no_grad():
        full = torch.tensor([ids + drafts])
        states = net.mtp(net.trunk(full).hidden_BTD, full, steps=4).hidden
    assert drafts == [int(net.lm_head(state[0, len(ids) - 2]).argmax()) for state in states]


def test_copies_of_one_layer_are_the_shared_layer() -> None:
    shared, separate = model(index_topk=256), model(num_nextn_predict_layers=3, index_topk=256)
    state = {k: v for k, v in shared.state_dict().items() if not k.startswith("mtp_")}
    for name, value in shared.mtp_layer.state_dict().items():
        state |= {f"{place}.{name}": value for place in ("mtp_layer", "mtp_later.0", "mtp_later.1")}
    separate.load_state_dict(state)
    ids = tokens(2, 24)
    with torch.no_grad():
        hidden = shared.trunk(ids).hidden_BTD
        one, three = shared.mtp(hidden, ids), separate.mtp(hidden, ids)
    assert all(torch.equal(a, b) for a, b in zip(one.hidden, three.hidden, strict=True))
    assert three.router_load_LE.shape == (3, 8) and torch.equal(
        three.router_load_LE.sum(0), one.router_load_LE[0]
    )


def test_every_router_is_balanced_by_its_own_load() -> None:
    net = model(num_nextn_predict_layers=2)
    load = torch.ones(5, 8)
    load[4, 0] = 50
    net.update_router_bias(load, 0.01)
    biases = [layer.mlp.gate.e_score_correction_bias for layer in net.mtp_layers]
    assert not biases[0].any() and biases[1][0] == pytest.approx(-0.01)
    load[2, 0] = 50
    net.update_router_bias(load[:3], 0.01)
    assert not biases[0].any() and biases[1][0] == pytest.approx(-0.01), "the MTP layers were not run"
    assert net.layers[3].mlp.gate.e_score_correction_bias[0] == pytest.approx(-0.01)


# --- checkpoints --------------------


def test_separate_mtp_layers_are_the_layers_after_the_last(tmp_path: Path) -> None:
    from fullarc.model.checkpoint import read_tensors

    net = model(num_nextn_predict_layers=3)
    save_model(net, tmp_path / "m")
    names = read_tensors(tmp_path / "m").keys()
    assert {f"model.layers.{n}.eh_proj.weight" for n in (4, 5, 6)} <= names
    assert not any(name.startswith("model.layers.7.") or "mtp" in name for name in names)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert (config["model_type"], config["num_nextn_predict_layers"]) == ("glm_moe_dsa", 3)
    back = load_model(tmp_path / "m")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("overrides", [GROUPED, WINDOWED])
def test_a_variant_comes_back_and_other_programs_refuse_it(overrides: dict, tmp_path: Path) -> None:
    from transformers import AutoConfig

    net = model(**overrides)
    save_model(net, tmp_path / "m")
    back = load_model(tmp_path / "m")
    ids = tokens(1, 40)
    with torch.no_grad():
        assert torch.equal(back(ids).logits, net(ids).logits)
    with pytest.raises(ValueError, match="fullarc_variant"):
        AutoConfig.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("overrides, words", [(GROUPED, "grouped-query"), (WINDOWED, "sliding-window")])
def test_the_engine_refuses_a_variant(overrides: dict, words: str) -> None:
    with pytest.raises(FullarcError, match=words):
        prepare(model(**overrides))


def test_induction_heads_need_latent_attention() -> None:
    with pytest.raises(FullarcError, match="latent attention"):
        GlmMoeDsa(tiny_config(**GROUPED)).init_weights(0, induction=True)


@pytest.mark.parametrize(
    "overrides, field",
    [
        ({"gqa_kv_heads": 3}, "gqa_kv_heads"),
        ({"attention_pattern": "SF", "sliding_window": 4}, "attention_pattern"),
        ({"attention_pattern": "SFXF", "sliding_window": 4}, "attention_pattern"),
        ({"attention_pattern": "SFSF"}, "sliding_window"),
        ({"sliding_window": 4}, "sliding_window"),
        ({**WINDOWED, "index_topk_freq": 4}, "cannot share"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ],
)
def test_impossible_variants_are_named(overrides: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        tiny_config(**overrides)
