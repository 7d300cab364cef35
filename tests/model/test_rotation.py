"""Rotations that are folded into weights: the same network, with its outliers spread."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa, QuantScheme, load_model, quantize_checkpoint, save_model
from fullarc.model.checkpoint import read_tensors
from fullarc.model.rotation import hadamard, rotate

SHAPE = dict(vocab_size=64, q_lora_rank=24, index_topk=16, max_position_embeddings=256, initializer_range=0.2)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A network with outliers: in each latent and each head's values one channel is 30 times the others."""
    model = GlmMoeDsa(preset("nano", **SHAPE)).init_weights(4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layernorm" in name:
                weight.mul_(torch.rand(weight.shape, generator=generator) + 0.5)
                if "q_a" in name or "kv_a" in name:
                    weight[3] *= 30
        for layer in [*model.layers, model.mtp_layer]:
            layer.self_attn.up_projections()[1][:, 5] *= 30
    save_model(model, tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("size", [1, 16, 24, 7])
def test_the_matrix_is_orthogonal_and_flat(size: int) -> None:
    turn = hadamard(size, 3)
    assert torch.allclose(turn @ turn.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    block = size & -size
    assert torch.allclose(turn[turn != 0].abs(), torch.tensor(block**-0.5, dtype=torch.float64))
    assert (turn != 0).sum() == size * block


def test_a_rotated_network_is_the_same_function(source: Path, tmp_path: Path) -> None:
    model = load_model(source)
    save_model(model, tmp_path / "turned")
    before, after = read_tensors(source), rotate(read_tensors(source), model.config)
    assert set(after) == set(before)
    changed = {name.split("self_attn.")[-1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"{part}.weight"
        for part in ("q_a_proj", "q_a_layernorm", "q_b_proj", "indexer.wq_b", "kv_a_proj_with_mqa",
                     "kv_a_layernorm", "kv_b_proj", "o_proj")
    }  # fmt: skip
    for tail in changed:
        layers = [name for name in before if name.endswith(f"self_attn.{tail}")]
        assert len(layers) == model.config.num_hidden_layers + 1, "the MTP layer as well"
        assert not any(torch.equal(before[name], after[name]) for name in layers), tail
    (tmp_path / "turned/manifest.json").unlink()
    save_file(after, tmp_path / "turned/model.safetensors")
    turned = load_model(tmp_path / "turned")
    ids = torch.randint(0, 64, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = turned(ids), model(ids)
        assert torch.allclose(ours.logits, theirs.logits, atol=2e-4)
        drafts = [net.mtp(theirs.trunk.hidden_BTD, ids, steps=2).hidden[1] for net in (turned, model)]
    assert torch.allclose(*drafts, atol=2e-4)


def test_every_layer_turns_its_own_way(source: Path) -> None:
    tensors, config = read_tensors(source), load_model(source).config
    names = [f"model.layers.{layer}.self_attn.q_a_proj.weight" for layer in (0, 1)]
    tensors[names[1]] = tensors[names[0]].clone()
    turned = rotate(tensors, config)
    assert not torch.allclose(turned[names[0]], turned[names[1]])
    again, other = rotate(tensors, config), rotate(tensors, config, seed=1)
    assert torch.equal(again[names[0]], turned[names[0]]) and not torch.equal(
        other[names[0]], again[names[0]]
    )


def test_outliers_cost_less_after_it(source: Path, tmp_path: Path) -> None:
    """W8A8 of attention alone: what a product's rounded inputs lose falls by more than half."""
    model = load_model(source)
    ids = torch.randint(0, 64, (4, 60), generator=torch.Generator().manual_seed(1))
    lost = []
    for turn in (False, True):
        out = tmp_path / f"out{turn}"
        quantize_checkpoint(source, out, {"attention": QuantScheme(8, 0, tokens=True)}, turn=turn)
        with torch.no_grad():
            logits, reference = load_model(out)(ids).logits, model(ids).logits
            kl = torch.nn.functional.kl_div(
                logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none"
            )
        lost.append(float(kl.sum(-1).median()))
    assert lost[1] < lost[0] / 2
