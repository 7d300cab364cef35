"""Chunked losses against torch's own on full logits, and the multi-token alignment against loops."""

import pytest
import torch
import torch.nn.functional as F
from live_bytes import peak_bytes

from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa, mla, visibility
from fullarc.train import Batch, LmLoss, Rows, evaluate, token_logprobs
from fullarc.train.losses import cross_entropy_sum, indexer_warmup_loss


def inputs(n=23, d=8, v=37, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(v, d, generator=g, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=g)


@pytest.mark.parametrize("chunk", [1, 4, 23, 100])
def test_token_logprobs_equal_full_softmax_with_gradients(chunk):
    hidden, weight, targets = inputs()
    upstream = torch.linspace(-2, 3, 23, dtype=torch.float64)
    full = F.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad(full @ upstream, (hidden, weight))
    ours = token_logprobs(hidden, weight, targets, chunk)
    got = torch.autograd.grad(ours @ upstream, (hidden, weight))
    assert torch.allclose(ours, full, atol=1e-12)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_token_logprobs_keep_leading_shape():
    hidden, weight, targets = inputs(n=24)
    grid = token_logprobs(hidden.view(2, 12, 8), weight, targets.view(2, 12), 5)
    assert torch.equal(grid.flatten(), token_logprobs(hidden, weight, targets, 5))


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_cross_entropy_equals_torch_with_gradients(chunk):
    hidden, weight, targets = inputs()
    logits = hidden @ weight.T
    full = F.cross_entropy(logits, targets, reduction="sum")
    expected = torch.autograd.grad(full * 0.3, (hidden, weight))
    total = cross_entropy_sum(hidden, weight, targets, chunk)
    got = torch.autograd.grad(total * 0.3, (hidden, weight))
    assert torch.allclose(total, full, atol=1e-10)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_no_targets_is_zero_not_nan():
    hidden, weight, targets = inputs()
    total = cross_entropy_sum(hidden[:0], weight, targets[:0])
    total.backward()
    assert total.item() == 0 and not weight.grad.any()


@pytest.mark.parametrize("kind", ["logprobs", "cross_entropy"])
def test_peak_memory_falls_with_the_number_of_chunks(kind):
    n, v = 1024, 2048

    def step(chunk):
        hidden, weight, targets = inputs(n, 16, v, torch.float32)
        if kind == "logprobs":
            token_logprobs(hidden, weight, targets, chunk).sum().backward()
        else:
            cross_entropy_sum(hidden, weight, targets, chunk).backward()

    peaks = [peak_bytes(lambda chunk=chunk: step(chunk)) for chunk in (1024, 256, 64)]
    logits = 4 * n * v
    assert peaks[0] > logits
    assert peaks[1] < peaks[0] / 2.5 and peaks[2] < peaks[1] / 1.5


@pytest.mark.parametrize("kind", ["warm-up", "sparse"])
def test_memory_of_an_indexer_that_learns_grows_with_the_length_and_not_with_its_square(kind):
    """Forward and backward over one long document; a number for every pair and head would be more than all there is."""
    loss = LmLoss(index_weight=1.0) if kind == "sparse" else indexer_warmup_loss
    peaks = []
    for length in (1024, 2048):
        model = GlmMoeDsa(
            preset("nano", vocab_size=64, max_position_embeddings=length, index_topk=32)
        ).init_weights(1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kind == "sparse" or ".indexer." in name)
        ids = torch.arange(length)[None] % 61
        batch = Batch(ids, ids >= 0, torch.ones_like(ids), torch.zeros_like(ids), isolate=False)
        peaks.append(peak_bytes(lambda model=model, batch=batch: loss(model, batch).total.backward()))
        learnt = [
            p.grad
            for name, p in model.named_parameters()
            if name.startswith("layers.") and ".indexer." in name
        ]
        assert all(grad.abs().sum() > 0 for grad in learnt)
    assert peaks[1] < 2.6 * peaks[0]
    assert peaks[1] < 4 * length * length * model.config.index_n_heads


@pytest.mark.parametrize("isolate", [True, False])
def test_a_warm_up_computed_again_has_the_gradients_of_one_that_is_kept(make_rows, isolate, monkeypatch):
    """To the bit; layers that share an indexer's choice included."""
    monkeypatch.setattr(visibility, "BLOCK", 8)
    monkeypatch.setattr(visibility, "LONG_BLOCK", 8)
    sizes = {"num_hidden_layers": 3, "indexer_types": ("full", "shared", "full"), "index_topk": 6}
    model = GlmMoeDsa(preset("nano", vocab_size=64, max_position_embeddings=128, **sizes)).init_weights(1)
    batch = Rows(make_rows(isolate=isolate), 3, 0).next()
    asked = [parameter for name, parameter in model.named_parameters() if ".indexer." in name]
    found, again, plain = [], [], mla.MLA._dense_kl

    def counted(*arguments):
        again.append(1)
        return plain(*arguments)

    monkeypatch.setattr(mla.MLA, "_dense_kl", counted)
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(mla, "checkpoint", lambda compute, *arguments, **_: compute(*arguments))
        loss = indexer_warmup_loss(model, batch, mtp_steps=2).total
        forward = len(again)
        found.append([loss, *torch.autograd.grad(loss, asked)])
        assert len(again) == (1 if kept else 2) * forward
        again.clear()
    assert all(map(torch.equal, *found)) and all(grad.abs().sum() > 0 for grad in found[0])


def by_hand(model, batch, mtp_steps, mtp_rows):
    """Loss terms token by token from full logits: (lm sum, lm count, [(mtp sum, count) per depth])."""
    out = model.trunk(batch.ids_BT, **batch.structure)
    part = batch.rows(0, mtp_rows)
    states = [
        out.hidden_BTD,
        *model.mtp(out.hidden_BTD[:mtp_rows], part.ids_BT, **part.structure, steps=mtp_steps).hidden,
    ]
    sums = []
    for shift, state in enumerate(states, 1):
        logp = model.lm_head(state).log_softmax(-1)
        total, count = 0.0, 0
        for row in range(len(state)):
            for t in range(state.shape[1] - shift):
                docs, s = batch.docs_BT[row], t + shift
                if docs[t] > 0 and docs[t] == docs[s] and batch.loss_BT[row, s]:
                    total, count = total - logp[row, t, batch.ids_BT[row, s]], count + 1
        sums.append((total, count))
    return sums


def test_lm_and_mtp_terms_equal_the_loop(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    loss = LmLoss(mtp_steps=3, mtp_weight=0.3, mtp_rows=0.5, chunk=16)(model, batch)
    (lm, count), *depths = by_hand(model, batch, 3, 2)
    expected = lm + 0.3 / 3 * 2 * sum(total for total, _ in depths)
    assert loss.count == count
    assert torch.allclose(loss.total, expected, rtol=1e-5)
    for depth, (total, targets) in enumerate(depths, 1):
        assert loss.metrics[f"mtp_loss_{depth}"] == (pytest.approx(float(total.detach()), rel=1e-5), targets)
    assert loss.router_load_LE.shape[0] == 2  # one MoE layer in the trunk, and the MTP layer


def test_a_detached_mtp_term_trains_the_mtp_layer_alone(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()

    def grads(**settings):
        model.zero_grad()
        loss = LmLoss(mtp_steps=3, aux_weight=0.01, **settings)(model, batch)
        loss.total.backward()
        return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole, joint = grads()
    apart, detached = grads(mtp_detached=True)
    _, plain = grads(mtp_weight=0.0, mtp_detached=True)
    assert torch.equal(whole.total, apart.total) and whole.metrics == apart.metrics
    mtp = {name for name in detached if name.startswith("mtp_layer.")}
    assert mtp and detached.keys() == joint.keys() == plain.keys()
    for name in mtp:
        assert torch.equal(detached[name], joint[name]), name
    for name in detached.keys() - mtp:
        assert torch.equal(detached[name], plain[name]) and not torch.equal(joint[name], plain[name]), name


def test_evaluate_is_the_mean_over_all_targets(model, make_rows):
    batch = Rows(make_rows(), 4, 0).next()
    (lm, count), _ = by_hand(model, batch, 1, 1)
    assert evaluate(model, batch.split(1))["loss"] == pytest.approx(float(lm.detach()) / count, rel=1e-5)


def test_indexer_kl_reaches_only_the_indexer(model, make_rows):
    batch = Rows(make_rows(), 2, 0).next()
    plain = LmLoss(mtp_steps=1)(model, batch)
    plain.total.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert not [name for name in before if ".indexer." in name]
    model.zero_grad()
    LmLoss(mtp_steps=1, index_weight=1.0)(model, batch).total.backward()
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is not None, name
        else:
            assert torch.allclose(parameter.grad, before[name], atol=1e-6), name
