"""The learner's updates against plain PyTorch on one unpacked sequence at a time."""

import pytest
import torch
from rl_support import nano, sample_batch, settings

from fullarc.rl.groups import select
from fullarc.rl.learner import Learner, concat
from fullarc.rl.loop import episodes_by_group


def batch_of(model, stage, batch=0, version=0):
    return episodes_by_group(sample_batch(model, stage, batch, version))


def chosen(learner, stage, groups):
    return select(groups, stage.group_size, 0, stage.tau, learner.objective.advantages).items


def logp(model, row, temperature=1.0):
    """log π of the sampled tokens of one row, alone in the batch."""
    ids = torch.tensor([row.ids])
    all_logp = torch.log_softmax(model(ids).logits[0] / temperature, -1)
    return torch.stack([all_logp[t - 1, row.ids[t]] for t in range(1, len(row.ids)) if row.loss_mask[t]])


def plain_step(model, optimizer, items, olds, stage, loss):
    """One clipped AdamW step on the equation as it is printed: means of means, no packing, no micro-batches."""
    total, weight = 0.0, 0.0
    for item, old in zip(items, olds, strict=True):
        row = item.episode.rows[0]
        new = logp(model, row, stage.temperature)
        mu = torch.tensor([p for p, m in zip(row.logprobs, row.loss_mask, strict=True) if m])
        if loss == "icepop":
            rho, r = (old - mu).exp(), (new - old).exp()
            gate = ((rho >= 1 / stage.beta) & (rho <= stage.beta)) * rho
            bounded = r.clamp(1 - stage.eps_low, 1 + stage.eps_high)
            per_token = gate * torch.minimum(r * item.advantage, bounded * item.advantage)
            total, weight = total + item.count * per_token.mean(), weight + item.count
        else:
            ratio = (new - mu).exp().detach()
            inside = (ratio > 1 - stage.eps_low) & (ratio < 1 + stage.eps_high)
            per_token = inside * ratio * item.advantage * new
            total, weight = total + item.count * per_token.sum(), weight + item.count * len(new)
    optimizer.zero_grad()
    (-total / weight).backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], stage.grad_clip)
    optimizer.step()
    return float((-total / weight).detach())


def adamw(model, stage):
    names = [n for n, _ in model.named_parameters() if ".indexer." not in n and not n.startswith("mtp_layer")]
    parameters = [p for n, p in model.named_parameters() if n in names]
    return torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


@pytest.mark.parametrize(
    "changes, loss",
    [
        ({"type": "reasoning_rl"}, "icepop"),
        ({"type": "reasoning_rl", "updates_per_push": 2, "lr": 3e-2}, "icepop"),
        ({"type": "reasoning_rl", "temperature": 0.7, "micro_batch_tokens": 8}, "icepop"),
        ({"type": "agentic_rl", "updates_per_push": 2}, "double"),
    ],
)
def test_updates_equal_plain_pytorch(changes, loss):
    stage = settings(optimizer="adamw", reset_optimizer=False, **changes)
    groups = batch_of(nano(), stage)
    groups[0][0] = type(groups[0][0])(
        groups[0][0].rows, 0, "general", None
    )  # repaired: another one counts twice
    ours, plain = Learner(nano(), stage), nano()
    items = chosen(ours, stage, groups)
    assert any(item.count == 2 for item in items)
    assert len({item.episode.group for item in items}) == 4
    assert len({item.episode.trained_tokens for item in items}) > 1
    first = [item for item in items if item.episode.group < 2]
    parts = [items] if stage.updates_per_push == 1 else [first, items[len(first) :]]
    optimizer = adamw(plain, stage)
    olds = [[logp(plain, i.episode.rows[0], stage.temperature).detach() for i in part] for part in parts]
    losses = [plain_step(plain, optimizer, p, old, stage, loss) for p, old in zip(parts, olds, strict=True)]
    metrics = ours.update(items)
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3, abs=1e-6)
    start = dict(nano().named_parameters())
    moved = 0
    for (name, ours_p), plain_p in zip(ours.model.named_parameters(), plain.parameters(), strict=True):
        if ".indexer." in name or name.startswith("mtp_layer"):
            assert torch.equal(ours_p, start[name]), f"{name} must stay frozen"
        else:
            torch.testing.assert_close(ours_p, plain_p, rtol=2e-3, atol=stage.lr * 2e-2, msg=name)
            moved += not torch.equal(ours_p, start[name])
    assert moved > 10
    if stage.updates_per_push == 1:
        assert metrics["mismatch_max"] < 1e-4


def test_micro_batches_do_not_change_the_update():
    results = []
    for tokens in (8, 256, 4096):
        stage = settings(micro_batch_tokens=tokens)
        learner = Learner(nano(), stage)
        learner.update(chosen(learner, stage, batch_of(nano(), stage)))
        results.append(learner.model.lm_head.weight.detach())
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


def test_optimizer_reset_makes_each_push_a_first_step():
    states = {}
    for reset in (False, True):
        stage = settings(reset_optimizer=reset)
        learner = Learner(nano(), stage)
        learner.update(chosen(learner, stage, batch_of(nano(), stage)))
        states[reset] = [
            t for n, t in learner.trainer.optimizer.tensors().items() if "exp_avg" in n or "momentum" in n
        ]
    assert any(t.abs().max() > 0 for t in states[False]) and not any(t.abs().max() > 0 for t in states[True])


def test_distillation_asks_the_teacher_of_each_kind():
    stage = settings(type="distil", group_size=1, prompts=16, steps=1, max_turns=1, lr=1e-2)
    teachers = {"reasoning": nano(2), "general": nano(3)}
    learner = Learner(nano(), stage, teachers)
    items = chosen(learner, stage, batch_of(nano(), stage))
    rows = learner._packed(items)
    expected = [v for i in items for v in logp(teachers[i.episode.kind], i.episode.rows[0]).tolist()]
    assert sorted(rows.teacher_logp[rows.weights > 0].tolist()) == pytest.approx(sorted(expected), abs=1e-5)
    assert len(rows.input_ids) == 2 and rows.targets.shape == rows.teacher_logp.shape

    def gap():
        """KL(student || teacher) estimated on fresh samples of the student."""
        found = []
        for episodes in batch_of(learner.model, stage, batch=99):
            for row in episodes[0].rows:
                found.append(logp(learner.model, row) - logp(teachers[episodes[0].kind], row))
        return float(torch.cat(found).mean().detach())

    before = gap()
    for step in range(20):
        learner.update(chosen(learner, stage, batch_of(learner.model, stage, batch=step)))
    assert gap() < 0.5 * before


def test_rows_of_different_length_are_stacked_with_padding():
    stage = settings()
    learner = Learner(nano(), stage)
    items = chosen(learner, stage, batch_of(nano(), stage))
    from fullarc.rl.batch import pack

    both = concat([pack(items[:8], "token", 16), pack(items[8:], "token", 64)])
    assert both.targets.shape[1] == 64 and float(both.weights.sum()) == sum(
        i.episode.trained_tokens for i in items
    )
    assert both.old_logp is None


def test_mismatch_sees_an_engine_that_disagrees():
    stage = settings()
    learner = Learner(nano(), stage)
    same = chosen(learner, stage, batch_of(nano(), stage))
    assert learner.mismatch(same)["parity_max"] < 1e-5
    assert learner.mismatch(chosen(learner, stage, batch_of(nano(5), stage)))["parity_max"] > 1e-3
    assert learner.mismatch([]) == {} and learner.update([]) == {}


def test_the_learning_rate_falls_linearly_over_all_updates_if_it_is_told_to():
    stage = settings(schedule="linear", lr=1e-2, lr_end=1e-3, steps=2, updates_per_push=2)
    learner = Learner(nano(), stage)
    items = chosen(learner, stage, batch_of(nano(), stage))
    means = [learner.update(items)["lr"] for _ in range(2)]
    # 10, 7, 4 and 1 thousandths, two a push
    assert means == pytest.approx([8.5e-3, 2.5e-3])
    assert Learner(nano(), settings(lr=1e-2, steps=2)).trainer.lr(1) == 1e-2
