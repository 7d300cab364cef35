"""Gathered sparse attention against the masked one, in double precision and through the whole model."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from fullarc.config.model import ModelConfig
from fullarc.model import GlmMoeDsa, visibility
from fullarc.model import gather as gather_module
from fullarc.model import indexer as indexer_module
from fullarc.model import mla as mla_module
from fullarc.model.gather import gathered_attention
from fullarc.model.indexer import Index, Indexer, choose, select
from fullarc.model.pieces import Scratch

SMALL = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=3, intermediate_size=48,
    moe_intermediate_size=16, num_attention_heads=3, q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=10,
    qk_rope_head_dim=6, v_head_dim=14, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=8, index_head_dim=8,
    index_topk=8, max_position_embeddings=256, initializer_range=0.2, eos_token_id=(0,), pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def blocks(monkeypatch):
    """Small blocks, so that a short row has chunks with few and with many visible keys."""
    monkeypatch.setattr(visibility, "BLOCK", 16)
    monkeypatch.setattr(visibility, "LONG_BLOCK", 32)
    monkeypatch.setattr(indexer_module, "FEW", 5)

    def gather_from(times):
        monkeypatch.setattr(mla_module, "GATHER_FROM", times)

    return gather_from


def test_the_choice_is_that_of_select_ties_and_short_rows_included():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (80, 50), generator=generator).float()  # ties everywhere
    scores[40:] = torch.rand(40, 50, generator=generator)  # and none
    allowed = torch.rand(80, 50, generator=generator) < 0.4
    allowed[:, 0], allowed[50:] = True, True
    allowed[:5, 3:] = False  # fewer than k
    for rows in (slice(None), slice(5, 20), slice(40, 50), slice(50, None)):
        for k in (1, 7, 30):
            positions = choose(scores[rows].masked_fill(~allowed[rows], -torch.inf), k, Scratch())
            chosen = torch.zeros(len(positions), 51, dtype=torch.bool)
            chosen.scatter_(-1, torch.where(positions < 0, 50, positions).long(), True)
            assert torch.equal(chosen[..., :50], select(scores[rows], allowed[rows], k))
            steps = positions.diff(dim=-1)
            assert ((steps > 0) | (positions[:, 1:] < 0)).all(), "ascending, none twice"
            assert not (steps[positions[:, :-1] < 0]).any(), "then -1"


def test_outputs_and_gradients_are_those_of_attention_written_out(monkeypatch):
    monkeypatch.setattr(gather_module, "ROOM", 3 * 6 * 9 * 8)  # three queries at once
    generator = torch.Generator().manual_seed(1)
    B, t, H, S, k, C, R, N, V = 2, 300, 3, 90, 6, 5, 4, 7, 8

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.double).requires_grad_()

    q_nope, q_rope, keys, up_k, up_v = leaves = (
        normal(B, t, H, N), normal(B, t, H, R), normal(B, S, C + R), normal(H, N, C), normal(H, V, C)
    )  # fmt: skip
    weight = normal(B, t, H, V)
    positions = torch.rand(B, t, S, generator=generator).argsort(-1)[..., :k].sort(-1).values
    positions[0, :120] = torch.where(
        torch.arange(k) < torch.arange(120)[:, None] % k + 1, positions[0, :120], -1
    )
    out, mass = gathered_attention(*leaves, positions.int(), 0.3)
    mask = torch.zeros(B, t, S + 1, dtype=torch.bool)
    mask.scatter_(-1, torch.where(positions < 0, S, positions), True)
    mask = mask[..., :S]
    full_keys = torch.einsum("bsc,hnc->bshn", keys[..., :C], up_k)
    logits = torch.einsum("bthn,bshn->bths", q_nope, full_keys) + torch.einsum(
        "bthr,bsr->bths", q_rope, keys[..., C:]
    )
    full = (logits * 0.3).masked_fill(~mask[:, :, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bths,bsc,hvc->bthv", full, keys[..., :C], up_v)
    assert torch.allclose(out, expected, atol=1e-12)
    summed = full.sum(2).gather(-1, positions.clamp_min(0)) * (positions >= 0)
    assert torch.allclose(mass, summed) and not mass.requires_grad
    ours = torch.autograd.grad((out * weight).sum(), leaves)
    theirs = torch.autograd.grad((expected * weight).sum(), leaves)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("packed", ["", "continued", "apart"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"indexer_types": ("full", "shared", "shared")},
        {"attention_pattern": "FSF", "sliding_window": 70},
    ],
)
def test_the_model_is_the_same_gathered_and_masked(blocks, packed, changes):
    model = GlmMoeDsa(ModelConfig(**SMALL, **changes)).init_weights(5).double()
    ids = torch.randint(0, 61, (2, 120), generator=torch.Generator().manual_seed(6))
    docs = parents = None
    if packed == "apart":  # the second documents see blocks that do not begin at 0
        docs = torch.ones_like(ids)
        docs[0, 50:], docs[1, 60:] = 2, 2
    elif packed:
        docs = torch.ones_like(ids)
        docs[0, 90:], docs[1, 60:100], docs[1, 100:] = 2, 2, 0
        parents = torch.zeros_like(ids)
        parents[0, 90:] = 1
    used = []
    original = mla_module.gathered_attention

    def watched(q, *args):
        used.append(q.shape[1])
        return original(q, *args)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mla_module, "gathered_attention", watched)
        for times in (100, 4):
            blocks(times)
            out = model.trunk(ids, docs, parents, indexer_loss="sparse")
            valid = slice(None) if docs is None else docs > 0
            loss = out.hidden_BTD[valid].square().mean() + 3 * out.index_kl
            loss.backward()
            named = model.named_parameters()
            grads = {name: p.grad.clone() for name, p in named if p.grad is not None}
            model.zero_grad()
            results.append((out.hidden_BTD[valid].detach(), out.index_kl.detach(), grads))
            assert bool(used) == (times == 4)
    (masked, masked_kl, masked_grads), (gathered, gathered_kl, gathered_grads) = results
    assert torch.allclose(masked, gathered, atol=1e-6) and torch.allclose(masked_kl, gathered_kl, atol=1e-6)
    assert any("indexer" in name for name in masked_grads)
    assert masked_grads.keys() == gathered_grads.keys()
    for name, grad in masked_grads.items():
        assert torch.allclose(grad, gathered_grads[name], atol=1e-5, rtol=1e-4), name


def test_one_document_a_row_needs_no_square_of_booleans():
    chunks = visibility.visible_chunks(4096, None, None, 64, torch.device("cpu"))
    assert all(chunk.packed_BtS is None for chunk in chunks)
    last = chunks[-1].allowed_BtS
    assert last.shape == (1, 512, 4096) and last[0, 0].sum() == 3585 and last[0, -1].all()


def test_tiles_change_nothing_but_rounding():
    generator = torch.Generator().manual_seed(3)
    indexer = Indexer(ModelConfig(**SMALL))
    q, k, w = (
        torch.randn(s, generator=generator, requires_grad=True)
        for s in ((2, 150, 8, 8), (2, 1500, 8), (2, 150, 8))
    )
    full = indexer.scores(q, k, w)
    for b in range(2):
        assert torch.allclose(indexer.tiled_scores(q[b], k[b], w[b], Scratch()), full[b], atol=1e-5)
    positions = torch.randint(0, 1500, (2, 150, 9), generator=generator).int()
    some = indexer.scores_at(q, k, w, positions)
    expected = full.gather(-1, positions.long())
    assert torch.allclose(some, expected, atol=1e-5)
    weight = torch.randn(some.shape, generator=generator)
    ours = torch.autograd.grad((some * weight).sum(), (q, k, w))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, w))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def counted(original, count, *args):
    count.append(1)
    return original(*args)


@pytest.mark.parametrize("times", [4, 100])
def test_layers_that_share_a_choice_do_not_make_it_again(blocks, times):
    blocks(times)
    calls = {}
    for types in (("full",) * 3, ("full", "shared", "shared")):
        model = GlmMoeDsa(ModelConfig(**SMALL, indexer_types=types)).init_weights(5)
        count = []
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            for module, name in ((mla_module, "select"), (indexer_module, "choose")):
                original = getattr(module, name)
                patch.setattr(module, name, partial(counted, original, count))
            model.trunk(torch.randint(0, 61, (1, 120), generator=torch.Generator().manual_seed(6)))
        calls[types[1]] = len(count)
    assert calls["full"] == 3 * calls["shared"] > 0


def test_the_number_of_threads_changes_no_bit():
    generator = torch.Generator().manual_seed(7)
    shapes = (
        (2, 700, 3, 10),
        (2, 700, 3, 6),
        (2, 700, 18),
        (3, 10, 12),
        (3, 14, 12),
        (2, 700, 8, 8),
        (2, 700, 8),
        (2, 700, 8),
    )
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    *inputs, queries, keys, weights = leaves
    chunks = visibility.visible_chunks(700, None, None, 8, torch.device("cpu"))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            index = Index(Indexer(ModelConfig(**SMALL)), queries, [keys], weights, True, False)
            positions = index.choose(chunks)
            out, mass = gathered_attention(*inputs, positions, 0.3)
            own = index.scores_at(slice(0, 700), positions)
            loss = out.square().mean(0).sum() + (own * mass).mean(0).sum()
            found.append([positions, out, mass, own, *torch.autograd.grad(loss, leaves)])
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_gradient_is_kept_where_none_is_wanted():
    model = GlmMoeDsa(ModelConfig(**SMALL)).init_weights(5)
    ids = torch.randint(0, 61, (1, 120), generator=torch.Generator().manual_seed(6))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = model.trunk(ids).hidden_BTD
        with torch.inference_mode():
            found = model.trunk(ids).hidden_BTD
    finally:
        torch.set_num_threads(before)
    assert expected.requires_grad and not found.requires_grad and torch.allclose(expected, found, atol=1e-6)
