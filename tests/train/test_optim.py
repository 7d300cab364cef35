"""Muon Split against torch.optim.Muon, the SVD, and itself one head at a time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fullarc.config.errors import FullarcError
from fullarc.train import Optimizer, OptimSettings, optim
from fullarc.train.optim import cut, newton_schulz, uses_adamw

HEADS = SimpleNamespace(num_attention_heads=4, qk_nope_head_dim=6, v_head_dim=10)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(name, weight, grads, lr=0.02, **settings):
    """The weight after one step per gradient."""
    parameter = nn.Parameter(weight.clone())
    optimizer = Optimizer({name: parameter}, OptimSettings(**settings), HEADS)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step(lr)
    return parameter.detach()


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 20), (2, 20, 5)])
def test_newton_schulz_keeps_singular_vectors_and_evens_values(shape):
    x = random(*shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ newton_schulz(x) @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    off = core - torch.diag_embed(values)
    assert off.abs().max() < 1e-4
    large = s / s.amax(-1, keepdim=True) > 0.05
    assert values[large].min() > 0.6 and values[large].max() < 1.25


@pytest.mark.parametrize("shape", [(2, 24, 24), (2, 24, 30), (2, 96, 192), (2, 192, 64)])
def test_newton_schulz_equals_its_steps_in_double_precision(shape):
    """Also where most singular values are small and where they are zero."""
    low = random(shape[0], shape[1], 4, seed=1) @ random(shape[0], 4, shape[2], seed=2)
    for x in (random(*shape), low + 1e-3 * random(*shape), low):
        expected = x.double() / x.double().flatten(1).norm(dim=1)[:, None, None]
        for _ in range(5):
            gram = expected @ expected.mT
            expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
        assert (newton_schulz(x) - expected).norm() < 1e-4 * expected.norm()


def test_neither_batches_nor_threads_change_a_bit(monkeypatch):
    shapes = {"a": (5, 64, 96), "b": (3, 192, 32), "c": (96, 64), "d": (1, 32, 96), "e": (7, 5)}

    def moved(workers, cached):
        monkeypatch.setattr(optim, "CACHED", cached)
        weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
        directions = {name: random(*shape, seed=1) for name, shape in shapes.items()}
        optim.add_orthogonal_(weights, directions, HEADS, True, 0.1, workers)
        return weights

    expected = moved(1, optim.CACHED)
    for workers, cached in ((1, 1), (2, 1), (3, 20_000), (2, optim.CACHED)):
        for name, weight in moved(workers, cached).items():
            assert torch.equal(weight, expected[name]), (name, workers, cached)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_whole_matrix_equals_torch_muon(shape):
    weight, grads = random(*shape), [random(*shape, seed=i) for i in range(1, 5)]
    ours = run("o_proj.weight", weight, grads)
    parameter = nn.Parameter(weight.clone())
    theirs = torch.optim.Muon(
        [parameter], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for grad in grads:
        parameter.grad = grad.clone()
        theirs.step()
    moved, reference = ours - weight, parameter.detach() - weight
    assert (moved - reference).norm() / reference.norm() < 0.02  # theirs orthogonalises in bf16


def test_q_heads_move_as_if_alone():
    weight, grads = random(4 * 16, 12), [random(4 * 16, 12, seed=i) for i in (1, 2, 3)]
    together = run("self_attn.q_b_proj.weight", weight, grads)
    alone = [
        run("o_proj.weight", weight[h * 16 : h * 16 + 16], [g[h * 16 : h * 16 + 16] for g in grads])
        for h in range(4)
    ]
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    whole = run("self_attn.q_b_proj.weight", weight, grads, kind="muon")
    assert torch.allclose(whole, run("o_proj.weight", weight, grads), atol=1e-6)
    assert not torch.allclose(whole, together, atol=1e-3)


def test_key_and_value_parts_move_as_if_alone():
    weight, grads = random(4 * 16, 12), [random(4 * 16, 12, seed=i) for i in (1, 2, 3)]
    together = run("self_attn.kv_b_proj.weight", weight, grads)
    parts = []
    for h in range(4):
        for start, stop in ((0, 6), (6, 16)):
            rows = slice(h * 16 + start, h * 16 + stop)
            parts.append(run("o_proj.weight", weight[rows], [g[rows] for g in grads]))
    assert torch.allclose(together, torch.cat(parts), atol=1e-6)


def test_whole_muon_takes_all_keys_and_all_values():
    weight, grads = random(4 * 16, 12), [random(4 * 16, 12, seed=i) for i in (1, 2)]
    whole = run("self_attn.kv_b_proj.weight", weight, grads, kind="muon").view(4, 16, 12)
    for part in (slice(0, 6), slice(6, 16)):
        flat = [t.view(4, 16, 12)[:, part].reshape(-1, 12) for t in (weight, *grads)]
        assert torch.allclose(
            whole[:, part].reshape(-1, 12), run("o_proj.weight", flat[0], flat[1:]), atol=1e-6
        )


def test_experts_gate_and_up_move_as_if_alone():
    weight, grads = random(3, 8, 12), [random(3, 8, 12, seed=i) for i in (1, 2)]
    together = run("mlp.experts.gate_up_proj", weight, grads)
    for e in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            alone = run("o_proj.weight", weight[e, half], [g[e, half] for g in grads])
            assert torch.allclose(together[e, half], alone, atol=1e-6)


def test_equal_shapes_of_different_layers_do_not_mix():
    a, b = random(8, 6), random(6, 8, seed=9)  # one is the other's shape transposed: same batched call
    grads = random(8, 6, seed=1), random(6, 8, seed=2)
    parameters = {"a.o_proj.weight": nn.Parameter(a.clone()), "b.o_proj.weight": nn.Parameter(b.clone())}
    optimizer = Optimizer(parameters, OptimSettings(), HEADS)
    for parameter, grad in zip(parameters.values(), grads, strict=True):
        parameter.grad = grad
    optimizer.step(0.02)
    for parameter, weight, grad in zip(parameters.values(), (a, b), grads, strict=True):
        assert torch.allclose(parameter.detach(), run("o_proj.weight", weight, [grad]), atol=1e-6)


def test_update_has_rms_a_fifth_of_the_rate():
    weight = torch.zeros(4 * 16, 12)
    for name in ("q_b_proj.weight", "kv_b_proj.weight", "o_proj.weight"):
        moved = run(name, weight, [random(4 * 16, 12, seed=5)], lr=1.0)
        assert moved.square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_blocks_cover_every_parameter_once(model):
    for name, parameter in model.named_parameters():
        if not uses_adamw(name, parameter):
            counter = torch.zeros_like(parameter)
            for split in (True, False):
                for view, shape in cut(name, counter, model.config, split):
                    assert view.numel() == shape[0] * shape[1] * shape[2]
                    view += 1
            assert (counter == 2).all(), name


def test_embeddings_head_norms_biases_and_router_are_adamw(model):
    names = {n for n, p in model.named_parameters() if uses_adamw(n, p)}
    assert {"embed_tokens.weight", "lm_head.weight", "layers.1.mlp.gate.weight", "norm.weight"} <= names
    left = {n for n, _ in model.named_parameters()} - names
    assert not [n for n in left if "norm" in n or "bias" in n]
    assert {"layers.0.mlp.gate_proj.weight", "layers.1.mlp.experts.gate_up_proj"} <= left
    assert "layers.1.self_attn.indexer.weights_proj.weight" in left


def test_adamw_equals_torch():
    weight, grads = random(6, 5), [random(6, 5, seed=i) for i in (1, 2, 3)]
    ours = run("embed_tokens.weight", weight, grads, adamw_scale=0.5)
    parameter = nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([parameter], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grad in grads:
        parameter.grad = grad.clone()
        theirs.step()
    assert torch.allclose(ours, parameter.detach(), atol=1e-6)


def make_pair():
    parameters = {
        "q_b_proj.weight": nn.Parameter(random(64, 12)),
        "norm.weight": nn.Parameter(random(5)),
    }
    return parameters, Optimizer(parameters, OptimSettings(), HEADS)


def steps(parameters, optimizer, seeds):
    for seed in seeds:
        for parameter in parameters.values():
            parameter.grad = random(*parameter.shape, seed=seed)
        optimizer.step(0.01)


def test_state_continues_bit_for_bit():
    straight, one = make_pair()
    steps(straight, one, (1, 2, 3, 4))
    parameters, two = make_pair()
    steps(parameters, two, (1, 2))
    saved = {name: tensor.clone() for name, tensor in two.tensors().items()}
    fresh = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    three = Optimizer(fresh, OptimSettings(), HEADS)
    three.load_tensors(saved)
    steps(fresh, three, (3, 4))
    for name in straight:
        assert torch.equal(straight[name], fresh[name])


def test_reset_forgets_everything():
    parameters, used = make_pair()
    steps(parameters, used, (1, 2))
    used.reset()
    fresh = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    steps(parameters, used, (3,))
    steps(fresh, Optimizer(fresh, OptimSettings(), HEADS), (3,))
    for name in fresh:
        assert torch.equal(parameters[name], fresh[name])


def test_errors_name_the_parameter():
    parameters, optimizer = make_pair()
    with pytest.raises(FullarcError, match=r"q_b_proj.weight .* no gradient"):
        optimizer.step(0.1)
    with pytest.raises(FullarcError, match=r"momentum.*q_b_proj.weight is missing"):
        optimizer.load_tensors({})
    with pytest.raises(FullarcError, match="too many, first other"):
        optimizer.load_tensors(optimizer.tensors() | {"other": torch.zeros(1)})
