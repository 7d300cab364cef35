"""The update: exact under accumulation, whole or not at all, and only where it is allowed."""

from functools import partial

import pytest
import torch

from fullarc.config.errors import FullarcError
from fullarc.model import GlmMoeDsa
from fullarc.train import Batch, LmLoss, LossSum, NonFinite, OptimSettings, Rows, Trainer, trained
from fullarc.train.losses import indexer_warmup_loss
from fullarc.train.trainer import load_statistics

DENSE = trained(indexer=False, mtp=True)
LOSS = LmLoss(mtp_steps=2)


def make_trainer(model, lr=0.01, trainable=DENSE, bias_rate=0.0, **settings):
    return Trainer(model, OptimSettings(**settings), lambda step: lr, trainable, bias_rate)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_overfits_one_batch_at_every_depth(model, make_rows):
    batch = Rows(make_rows(n=2), 2, 0).next()
    rate = lambda step: 0.03 * (1 - step / 80)  # noqa: E731 at a constant rate the end is chance
    trainer = Trainer(model, OptimSettings(weight_decay=0.0), rate, DENSE)
    first = trainer.step([batch], LOSS)
    for _ in range(79):
        last = trainer.step([batch], LOSS)
    assert first["loss"] > 3.5
    assert last["loss"] < 0.1 and last["mtp_loss_1"] < 0.3 and last["mtp_loss_2"] < 0.6


def test_accumulation_weighs_tokens(model, make_rows):
    batch = Rows(make_rows(), 8, 0).next()
    batch.loss_BT[:3] &= torch.arange(32) < 6  # uneven rows: a mean of means would differ
    grads = {}
    for size in (8, 4, 1):
        trainer = make_trainer(model, lr=0.0, clip=0.0)
        trainer.step(batch.split(size), LOSS)
        grads[size] = {name: p.grad.clone() for name, p in trainer.parameters.items()}
    for size in (4, 1):
        for name, grad in grads[8].items():
            assert torch.allclose(grads[size][name], grad, atol=1e-6), name


def test_gradient_is_the_mean_over_tokens(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    out = LOSS(model, batch)
    (out.total / out.count).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    trainer = make_trainer(model, lr=0.0, clip=0.0)
    norm = trainer.step(batch.split(2), LOSS)["grad_norm"]
    for name, parameter in trainer.parameters.items():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-6)
    assert norm == pytest.approx(float(torch.stack([g.norm() for g in expected.values()]).norm()), rel=1e-4)


def test_clipping_limits_the_whole_norm(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    trainer = make_trainer(model, lr=0.0, clip=0.01)
    assert trainer.step([batch], LOSS)["grad_norm"] > 0.1
    clipped = torch.stack([p.grad.norm() for p in trainer.parameters.values()]).norm()
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_no_target_in_the_step_is_an_error_but_an_empty_micro_batch_is_not(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    trainer = make_trainer(model)
    empty = Batch(batch.ids_BT, torch.zeros_like(batch.loss_BT), batch.docs_BT, batch.parents_BT, True)
    before = weights(model)
    with pytest.raises(FullarcError, match="Step 0: no token of the batch is a training target"):
        trainer.step([empty, empty], LOSS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer.step([empty, batch], LOSS)


def test_nan_weight_stops_and_is_named(model, make_rows):
    rows = Rows(make_rows(), 4, 0)
    trainer = make_trainer(model, bias_rate=0.1)
    trainer.step([rows.next()], LOSS)
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    check_stop(trainer, rows.next(), r"Step 1: .*weight layers.1.self_attn.o_proj.weight \(1 in all\)")


def test_nan_gradient_stops_and_is_named(model, make_rows):
    rows = Rows(make_rows(), 4, 0)
    trainer = make_trainer(model, bias_rate=0.1)
    trainer.step([rows.next()], LOSS)
    model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * torch.inf)
    check_stop(trainer, rows.next(), r"the gradient is NaN .*gradient of layers.0.mlp.up_proj.weight \(1 in")


def check_stop(trainer, batch, message):
    """The step fails with `message` and changes neither weights, router bias, moments nor the step number."""
    before = weights(trainer.model)
    moments = {name: value.clone() for name, value in trainer.optimizer.tensors().items()}
    with pytest.raises(NonFinite, match=message):
        trainer.step([batch], LOSS)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)), name
    for name, value in trainer.optimizer.tensors().items():
        assert torch.equal(value, moments[name]), name
    assert trainer.step_number == 1
    assert all(p.grad is None for p in trainer.parameters.values())


def test_a_loss_of_any_kind_plugs_in(model):
    def push_up_token_3(model, ids):
        return LossSum(-model.lm_head(model.trunk(ids).hidden_BTD)[..., 3].sum(), 2.0, {"reward": (6.0, 2)})

    trainer = make_trainer(model, trainable=trained(indexer=False, mtp=False))
    ids = torch.tensor([[1, 2, 5, 6]])
    before = model(ids).logits[..., 3].mean().item()
    assert trainer.step([ids, ids], push_up_token_3)["reward"] == 3.0
    assert model(ids).logits[..., 3].mean().item() > before


def test_a_micro_batch_without_graph_or_count_is_left_out(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()

    def loss(model, part):
        return LOSS(model, part) if part is batch else LossSum(torch.zeros(()), 0)

    assert make_trainer(model).step([None, batch], loss)["count"] == float(batch.targets(1)[1].sum())


def test_router_bias_moves_against_the_load_of_all_micro_batches(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    load = sum(LOSS(model, part).router_load_LE for part in batch.split(2))
    make_trainer(model, bias_rate=0.05).step(batch.split(2), LOSS)
    for router, load_E in zip((model.layers[1].mlp.gate, model.mtp_layer.mlp.gate), load, strict=True):
        assert torch.allclose(router.e_score_correction_bias, 0.05 * torch.sign(load_E.mean() - load_E))


def test_indexer_warmup_changes_only_the_indexer(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    before = weights(model)
    trainer = make_trainer(model, trainable=trained(indexer=True, mtp=True, trunk=False))
    loss = partial(indexer_warmup_loss, mtp_steps=2)
    first = trainer.step([batch], loss)["index_kl"]
    for _ in range(10):
        last = trainer.step([batch], loss)["index_kl"]
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {n for n, _ in model.named_parameters() if ".indexer." in n}
    assert last < first


@pytest.mark.parametrize(
    "choice, part, moves",
    [
        (trained(indexer=False, mtp=True), ".indexer.", False),
        (trained(indexer=False, mtp=False), "mtp_layer.", False),
        (trained(indexer=False, mtp=False), "layers.0.mlp.", True),
    ],
)
def test_frozen_sets(model, make_rows, choice, part, moves):
    before = weights(model)
    loss = LmLoss(mtp_steps=1 if choice("mtp_layer.norm.weight") else 0)
    make_trainer(model, trainable=choice).step([Rows(make_rows(), 4, 0).next()], loss)
    for name, value in model.state_dict().items():
        if name.startswith(part) or (part.startswith(".") and part in name):
            assert torch.equal(value, before[name]) != moves, name


def test_a_parameter_without_gradient_is_an_error(model, make_rows):
    trainer = make_trainer(model, trainable=trained(indexer=True, mtp=True))
    with pytest.raises(FullarcError, match=r"indexer.* has no gradient"):
        trainer.step([Rows(make_rows(), 4, 0).next()], LOSS)


def test_workers_change_nothing(config, make_rows):
    """Two passes at once give, to the bit, the weights of one after the other."""
    batches = [Rows(make_rows(), 8, seed).next().split(2) for seed in (1, 2, 3)]
    states = []
    for workers in (1, 2):
        model = GlmMoeDsa(config).init_weights(1)
        trainer = Trainer(model, OptimSettings(), lambda step: 0.01, DENSE, 1e-3, workers)
        for batch in batches:
            trainer.step(batch, LOSS)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*[s.values() for s in states], strict=True))


def test_load_statistics_by_hand(config):
    load = torch.tensor([[4.0, 4, 4, 4], [0, 0, 12, 4]])
    assert load_statistics(load, config) == {
        "expert_load": 3.0, "expert_load/layer_1": 1.0, "expert_load/mtp": 3.0, "dead_experts": 2.0,
    }  # fmt: skip
    assert load_statistics(load[:1], config).keys() == {"expert_load", "dead_experts", "expert_load/layer_1"}
    assert load_statistics(torch.zeros(0, 0), config) == {}


def test_a_step_tells_the_load_of_every_layer_over_all_micro_batches(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    for module in (model.layers[1].mlp.gate, model.mtp_layer.mlp.gate):
        module.weight.data *= 5  # so that micro-batches differ
    loads = [LOSS(model, part).router_load_LE for part in batch.split(1)]
    load = sum(loads)
    uneven = [one.amax(-1) / one.mean(-1) for one in (load, loads[0], loads[-1])]
    assert all((uneven[0] - one).abs().max() > 1e-3 for one in uneven[1:])
    metrics = make_trainer(model).step(batch.split(1), LOSS)
    for name, load_E in zip(("layer_1", "mtp"), load, strict=True):
        assert metrics[f"expert_load/{name}"] == pytest.approx(float(load_E.max() / load_E.mean()))
    assert metrics["expert_load"] == max(metrics["expert_load/layer_1"], metrics["expert_load/mtp"])
    assert metrics["dead_experts"] == float((load == 0).sum())
