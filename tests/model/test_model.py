"""Properties of the network that no other implementation can vouch for."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_reference import tiny_config

from fullarc.config.errors import FullarcError
from fullarc.config.model import ModelConfig, preset
from fullarc.model import GlmMoeDsa, mla, shift_targets
from fullarc.model.indexer import Indexer
from fullarc.model.moe import MoE
from fullarc.model.ops import rope_tables, stable_topk, topk_mask
from fullarc.model.pieces import Scratch


def model(**overrides: int) -> GlmMoeDsa:
    torch.manual_seed(0)
    net = GlmMoeDsa(tiny_config(**overrides)).init_weights(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return net


def test_released_configuration_counts_to_the_number() -> None:
    config = ModelConfig()
    assert config.parameter_count() == 743_911_199_232
    assert config.parameter_count(with_mtp=True) == 753_864_119_552
    with torch.device("meta"):
        small = GlmMoeDsa(preset("2m"))
    assert sum(p.numel() for p in small.parameters()) == preset("2m").parameter_count(with_mtp=True)


# --- top-k ------------------------------------------------------------------------------------------------------


def test_stable_topk_is_a_stable_sort_whatever_the_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (50, 40), generator=generator).float()
    scores[:, ::7] = -0.0
    expected = scores.argsort(dim=-1, descending=True, stable=True)[:, :9].sort(-1).values
    assert torch.equal(stable_topk(scores, 9), expected)
    padded = F.pad(scores, (0, 100), value=-torch.inf)
    assert torch.equal(stable_topk(padded, 9), expected)
    assert not torch.equal(padded.topk(9).indices.sort(-1).values, expected), (
        "torch.topk would do: drop our rule"
    )
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, expected, True)
    assert torch.equal(topk_mask(scores, 9), mask)


# --- the start of training --------------------


def attention_back(net: GlmMoeDsa, length: int, back: int) -> torch.Tensor:
    """Mean attention [H] of layer 0 to the token `back` before, on random tokens, from the projections."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, net.config.vocab_size, (4, length), generator=generator)
    attention = net.layers[0].self_attn
    with torch.no_grad():
        h = net.layers[0].input_layernorm(net.embed_tokens(ids))
        cos, sin = rope_tables(torch.arange(length)[None], net.config.qk_rope_head_dim, net.config.rope_theta)
        _, q_nope, q_rope = attention.queries(h, cos, sin)
        latent, k_rope = attention.latents(h, cos, sin)
        k_nope = attention.kv_b_proj(latent).unflatten(-1, (attention.heads, -1))[..., : attention.nope]
        scores = torch.einsum("bthn,bshn->bhts", q_nope, k_nope)
        scores = (scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * attention.scale
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1).diagonal(-back, 2, 3).mean((0, 2))


def test_chosen_heads_begin_by_looking_a_fixed_distance_back() -> None:
    for length in (100, 1000):
        net = GlmMoeDsa(preset("2m")).init_weights(0, induction=True)
        for head, back in enumerate((1, 2)):
            heads = attention_back(net, length, back)
            assert heads[head] > 0.85, heads
            assert heads.sum() - heads[head] < 0.2, "no other head looks there"
    assert attention_back(GlmMoeDsa(preset("2m")).init_weights(0), 100, 1).max() < 0.1


@pytest.mark.parametrize("size", ["1m", "2m", "5m"])
def test_a_start_with_induction_prefers_what_followed_before(size: str) -> None:
    """Random tokens, written twice: only looking them up can make the second writing likelier than the first."""
    generator = torch.Generator().manual_seed(2)
    once = torch.randint(0, preset(size).vocab_size, (8, 64), generator=generator)
    ids = torch.cat((once, once), 1)

    def costs(induction: bool) -> tuple[float, float]:
        net = GlmMoeDsa(preset(size)).init_weights(0, induction)
        with torch.no_grad():
            logits = net(ids).logits[:, :-1]
        cost = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        return cost[:, :60].mean().item(), cost[:, 66:].mean().item()

    first, second = costs(True)
    assert second < first - 0.4
    plain_first, plain_second = costs(False)
    assert abs(plain_second - plain_first) < 0.05
    assert first < plain_first + 0.15, "it costs nothing where there is nothing to look up"


@pytest.mark.parametrize("less", [{"num_hidden_layers": 1, "first_k_dense_replace": 1}, {"kv_lora_rank": 2}])
def test_a_model_without_room_for_induction_heads_says_so(less: dict[str, int]) -> None:
    with pytest.raises(FullarcError, match="needs two layers"):
        GlmMoeDsa(tiny_config(**less)).init_weights(0, induction=True)


# --- documents stay apart --------------------


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 97, (1, 96), generator=torch.Generator().manual_seed(5))
    docs = torch.tensor([[1] * 40 + [2] * 50 + [0] * 6])
    return ids, docs


@pytest.mark.parametrize("gather_from", [3, 1000], ids=["gathered", "masked"])
def test_a_document_is_untouched_by_its_neighbours(gather_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "GATHER_FROM", gather_from)
    net = model()
    ids, docs = packed()
    changed = ids.clone()
    changed[:, :40] = (changed[:, :40] + 11) % 97
    with torch.no_grad():
        a, b = net.trunk(ids, docs).hidden_BTD, net.trunk(changed, docs).hidden_BTD
        assert not torch.equal(a[:, :40], b[:, :40])
        assert torch.equal(a[:, 40:90], b[:, 40:90])
        alone = net.trunk(ids[:, 40:90]).hidden_BTD
        assert (a[:, 40:90] - alone).abs().max() < 1e-5


def test_mtp_does_not_look_into_the_next_document() -> None:
    net = model()
    ids, docs = packed()
    changed = ids.clone()
    changed[:, 40:] = (changed[:, 40:] + 11) % 97
    with torch.no_grad():
        outs = [net.mtp(net.trunk(x, docs).hidden_BTD, x, docs).hidden for x in (ids, changed)]
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a[:, :40], b[:, :40])


@pytest.mark.parametrize("gather_from", [3, 1000], ids=["gathered", "masked"])
def test_mtp_of_a_document_is_untouched_by_the_one_before(
    gather_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla, "GATHER_FROM", gather_from)
    net = model()
    ids, docs = packed()
    changed = ids.clone()
    changed[:, :40] = (changed[:, :40] + 11) % 97
    with torch.no_grad():
        outs = [net.mtp(net.trunk(x, docs).hidden_BTD, x, docs, steps=3).hidden for x in (ids, changed)]
    for a, b in zip(*outs, strict=True):
        assert not torch.equal(a[:, :40], b[:, :40])
        assert torch.equal(a[:, 40:90], b[:, 40:90])


def test_gradients_do_not_cross_documents() -> None:
    net = model()
    ids, docs = packed()
    embedded: list[torch.Tensor] = []
    net.embed_tokens.register_forward_hook(lambda *args: (args[2].retain_grad(), embedded.append(args[2]))[0])
    net.trunk(ids, docs).hidden_BTD[:, 40:90].sum().backward()
    assert embedded[0].grad is not None
    assert embedded[0].grad[:, :40].abs().max() == 0
    assert embedded[0].grad[:, 40:90].abs().max() > 0


def test_continuations_of_a_shared_prefix_equal_separate_copies() -> None:
    """The last prefix token is repeated in each continuation: it is the one that predicts their first tokens."""
    net = model()
    prefix, tails = torch.arange(30), [torch.arange(40, 61), torch.arange(50, 81)]
    shared = torch.cat([prefix[:-1], prefix[-1:], tails[0], prefix[-1:], tails[1]])[None]
    docs = torch.tensor([[1] * 29 + [2] * 22 + [3] * 32])
    parents = torch.tensor([[0] * 29 + [1] * 54])
    with torch.no_grad():
        together = net.trunk(shared, docs, parents).hidden_BTD[0]
        for tail, start in zip(tails, (29, 51), strict=True):
            alone = net.trunk(torch.cat([prefix, tail])[None]).hidden_BTD[0, 29:]
            assert (together[start : start + 1 + len(tail)] - alone).abs().max() < 2e-5
        assert (together[:29] - net.trunk(prefix[None]).hidden_BTD[0, :29]).abs().max() < 2e-5


# --- MTP alignment --------------------


@pytest.mark.parametrize("topk, indexer_loss", [(4096, "off"), (40, "off"), (40, "sparse")])
def test_packed_rows_of_many_blocks_equal_their_documents_alone(
    topk: int, indexer_loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of very different lengths, some continuing a shared stem, in rows of several blocks of keys.

    All are masked: gathered keys give another last bit, by which a near tie of the indexer may fall otherwise.
    """
    monkeypatch.setattr(mla, "GATHER_FROM", 1000)
    net = model(index_topk=topk, max_position_embeddings=1024)
    generator = torch.Generator().manual_seed(4)
    stem, sizes = 70, [[150, 90, 200, 40], [20, 300, 60, 100]]
    ids = torch.randint(0, net.config.vocab_size, (2, 560), generator=generator)
    docs, parents, alone = torch.zeros_like(ids), torch.zeros_like(ids), []
    for row, lengths in enumerate(sizes):
        docs[row, :stem], at = 1, stem
        for number, length in enumerate(lengths, start=2):
            inherits = number % 2 == 0
            docs[row, at : at + length], parents[row, at : at + length] = number, int(inherits)
            own = ids[row, at : at + length]
            whole = torch.cat((ids[row, :stem], own)) if inherits else own
            alone.append((row, slice(at, at + length), whole[None], len(whole) - length))
            at += length
    packed = net.trunk(ids, docs, parents, indexer_loss)
    for row, part, whole, skip in alone:
        single = net.trunk(whole).hidden_BTD[0, skip:]
        torch.testing.assert_close(packed.hidden_BTD[row, part], single, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_long_row_never_makes_a_tensor_of_all_pairs() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.untyped_storage().nbytes() // out.element_size())
            return out

    length = 3072
    net = model(index_topk=64, max_position_embeddings=length)
    with Largest() as seen:
        net.trunk(torch.zeros(1, length, dtype=torch.long)).hidden_BTD.sum().backward()
    assert length * 64 < seen.size < length * length / 4


def test_mtp_step_reads_the_right_tokens() -> None:
    """Step d at position t sees tokens up to t+1+d and nothing later."""
    net = model(index_topk=256)
    ids = torch.randint(0, 97, (1, 30))
    base = net.mtp(net.trunk(ids).hidden_BTD, ids).hidden
    for position in (12, 20):
        other = ids.clone()
        other[0, position] = (other[0, position] + 1) % 97
        moved = net.mtp(net.trunk(other).hidden_BTD, other).hidden
        for step in range(3):
            first = (base[step] - moved[step]).abs().sum(-1)[0].nonzero()[0].item()
            assert first == position - 1 - step


def test_the_alignment_table_of_the_design_is_what_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row: whose embedding and state a step joins, and which token `shift_targets` gives it."""
    design = (Path(__file__).parents[2] / "docs/design.md").read_text(encoding="utf-8")
    row = re.compile(
        r"^\| (?:trunk|MTP step (\d)) \| t(?: \+ (\d))? \| ?(?:(trunk)|step (\d)|) \| t \+ (\d) \|$", re.M
    )
    said = row.findall(design)
    assert [step for step, *_ in said] == ["", "0", "1", "2"]
    net, ids = model(index_topk=256), torch.arange(1, 31)[None]
    joined: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = net.mtp_layer.join
    monkeypatch.setattr(net.mtp_layer, "join", lambda e, h: joined.append((e, h)) or plain(e, h))
    with torch.no_grad():
        trunk = net.trunk(ids).hidden_BTD
        states = net.mtp(trunk, ids, steps=3).hidden
        embedded = net.embed_tokens(ids)
    for step, reads, of_trunk, of_step, predicts in said:
        targets, _ = shift_targets(ids, torch.ones_like(ids), None, int(predicts))
        assert targets[0, 4] == ids[0, 4 + int(predicts)]
        if not step:
            assert not reads and not of_trunk and predicts == "1"
            continue
        assert int(predicts) == 2 + int(step), "LmLoss asks for targets 2 + d"
        embedding, state = joined[int(step)]
        assert torch.equal(embedding[0, 4], embedded[0, 4 + int(reads)])
        assert torch.equal(state, trunk if of_trunk else states[int(of_step)])


def test_shift_targets_table() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    loss = torch.ones(1, 6)
    docs = torch.tensor([[1, 1, 1, 2, 2, 0]])
    targets, weight = shift_targets(ids, loss, docs, 1)
    assert targets.tolist() == [[2, 3, 4, 5, 6, 0]] and weight.tolist() == [[1, 1, 0, 1, 0, 0]]
    targets, weight = shift_targets(ids, loss, docs, 2)
    assert targets[0, 0] == 3 and weight.tolist() == [[1, 0, 0, 0, 0, 0]]


# --- indexer --------------------


def scores_by_hand(indexer: Indexer, q_latent: torch.Tensor, h: torch.Tensor, theta: float) -> torch.Tensor:
    """I [T, T] of one row in double, number by number; the first dimensions are rotated in neighbouring pairs."""
    q_latent, h = q_latent.double(), h.double()
    heads, dim = indexer.heads, indexer.dim

    def rotated(x: list[float], position: int) -> list[float]:
        out = list(x)
        for i in range(indexer.rope_dim // 2):
            angle = position * theta ** (-2 * i / indexer.rope_dim)
            a, b = x[2 * i], x[2 * i + 1]
            out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
        return out

    queries, keys, weights = [], [], []
    for t in range(len(h)):
        q = (indexer.wq_b.weight.double() @ q_latent[t]).tolist()
        queries.append([rotated(q[j * dim : (j + 1) * dim], t) for j in range(heads)])
        k = indexer.wk.weight.double() @ h[t]
        k = (k - k.mean()) / (((k - k.mean()) ** 2).mean() + 1e-6) ** 0.5
        keys.append(rotated((k * indexer.k_norm.weight.double() + indexer.k_norm.bias.double()).tolist(), t))
        weights.append((indexer.weights_proj.weight.double() @ h[t] / math.sqrt(heads)).tolist())
    out = torch.zeros(len(h), len(h), dtype=torch.float64)
    for t in range(len(h)):
        for s in range(len(h)):
            for j in range(heads):
                dot = sum(a * b for a, b in zip(queries[t][j], keys[s], strict=True)) / math.sqrt(dim)
                out[t, s] += weights[t][j] * max(dot, 0.0)
    return out


def test_index_scores_are_the_formula() -> None:
    """I[t, s] = sum_j w[t, j] / sqrt(J) * ReLU(q[t, j] . k[s] / sqrt(d)), by each of the ways to compute it."""
    indexer = model().layers[1].self_attn.indexer
    generator = torch.Generator().manual_seed(3)
    h, q_latent = torch.randn(11, 64, generator=generator), torch.randn(11, 32, generator=generator)
    with torch.no_grad():
        indexer.k_norm.weight.add_(0.3 * torch.randn(32, generator=generator))
        indexer.k_norm.bias.add_(0.3 * torch.randn(32, generator=generator))
        expected = scores_by_hand(indexer, q_latent, h, 1e4)
    cos, sin = rope_tables(torch.arange(11), indexer.rope_dim, 1e4)
    q, k, w = indexer.queries(q_latent, cos, sin), indexer.keys(h, cos, sin), indexer.head_weights(h)
    found = [indexer.scores(q[None], k[None], w[None])[0], indexer.tiled_scores(q, k, w, Scratch())]
    with torch.no_grad():
        found.append(indexer.scores(q[None], k[None], w[None])[0])
    everything = torch.arange(11, dtype=torch.int32).expand(1, 11, 11)
    found.append(indexer.scores_at(q[None], k[None], w[None], everything)[0])
    assert expected.abs().max() > 1 and (expected == 0).float().mean() < 0.5
    for scores in found:
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_indexer_loss_reaches_the_indexer_only(kind: str) -> None:
    net = model()
    ids, docs = packed()
    out = net.trunk(ids, docs, indexer_loss=kind)
    assert out.index_kl is not None and out.index_kl.item() > 0
    out.index_kl.backward()
    for name, parameter in net.named_parameters():
        if name.startswith("layers.") and ".indexer." in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None or parameter.grad.abs().sum() == 0, name


def test_language_model_loss_does_not_reach_the_indexer() -> None:
    net = model()
    net.trunk(*packed(), indexer_loss="sparse").hidden_BTD.sum().backward()
    assert all(
        p.grad is None or p.grad.abs().sum() == 0 for n, p in net.named_parameters() if ".indexer." in n
    )


def test_indexer_kl_by_hand() -> None:
    from fullarc.model.indexer import indexer_kl

    scores = torch.tensor([[[0.0, 0.0, 9.0]]])
    attention = torch.tensor([[[[0.75, 0.25, 0.0]], [[0.25, 0.75, 0.0]]]])
    support = torch.tensor([[[True, True, False]]])
    kl, rows = indexer_kl(scores, attention.sum(1), support)
    assert rows == 1 and abs(kl.item()) < 1e-6
    attention = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.5, 0.5, 0.0]]]])
    kl, _ = indexer_kl(scores, attention.sum(1), support)
    expected = 0.75 * torch.log(torch.tensor(0.75 / 0.5)) + 0.25 * torch.log(torch.tensor(0.25 / 0.5))
    assert abs(kl.item() - expected.item()) < 1e-6


def test_the_gradient_of_the_indexers_kl_is_that_of_its_formula() -> None:
    """Of 200 queries, so that not all are computed at once; one has no support."""
    from fullarc.model.indexer import indexer_kl

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 200, 12, generator=generator, dtype=torch.float64).requires_grad_()
    attention = torch.rand(2, 3, 200, 12, generator=generator, dtype=torch.float64)
    support = torch.rand(2, 200, 12, generator=generator) < 0.6
    support[1, 150] = False
    support[0, :, 0] = True
    p = (attention.sum(1) * support).detach()
    p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)
    q = (scores.exp() * support) / (scores.exp() * support).sum(-1, keepdim=True).clamp_min(1e-30)
    expected = torch.where(support, p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log(), 0.0).sum()
    kl, rows = indexer_kl(scores, attention.sum(1), support)
    assert rows == support.any(-1).sum() < 400 and torch.allclose(kl, expected)
    by_formula, ours = (torch.autograd.grad(3 * loss, scores)[0] for loss in (expected, kl))
    assert ours.abs().max() > 0.1 and torch.allclose(ours, by_formula, atol=1e-12)


# --- the two forms of attention --------------------


def test_absorbed_equals_expanded() -> None:
    net = model(index_topk=256)
    attention = net.layers[1].self_attn
    h = torch.randn(1, 20, 64)
    cos, sin = rope_tables(torch.arange(20)[None], 16, net.config.rope_theta)
    from fullarc.model.visibility import Visibility

    with torch.no_grad():
        expanded, *_ = attention(h, Visibility(cos, sin))
        _, q_nope, q_rope = attention.queries(h, cos, sin)
        latent, k_rope = attention.latents(h, cos, sin)
        allowed = torch.ones(20, 20, dtype=torch.bool).tril()
        out = attention.absorbed(
            q_nope[0], q_rope[0], latent.expand(20, -1, -1), k_rope.expand(20, -1, -1), allowed
        )
        assert (attention.o_proj(out) - expanded[0]).abs().max() < 1e-4 * expanded.abs().max()


# --- experts --------------------


def test_moe_equals_a_loop_over_tokens() -> None:
    net = model()
    moe = net.layers[1].mlp
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        moe.gate.e_score_correction_bias.normal_(std=0.2)
        y, stats = moe(x, None)
        _, chosen, weights = moe.gate(x.flatten(0, 1))
        for m, token in enumerate(x.flatten(0, 1)):
            expected = moe.shared_experts(token[None])[0]
            for expert, weight in zip(chosen[m], weights[m], strict=True):
                gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
                expected = expected + weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
            assert (y.flatten(0, 1)[m] - expected).abs().max() < 1e-4
    assert stats.load_E.sum() == 2 * 9 * 2


def test_the_balance_loss_is_the_loop_over_sequences() -> None:
    """Mean over sequences of sum_e f_e P_e in double, padding left out; a sequence that is all padding counts as 0."""
    moe = model().layers[1].mlp
    x = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(2))
    lengths, (experts, k) = (9, 4, 0), (8, 2)
    with torch.no_grad():
        moe.gate.e_score_correction_bias.normal_(std=0.2)
    expected, load = 0.0, [0] * experts
    for row, length in zip(x.double(), lengths, strict=True):
        hits, probability = [0] * experts, [0.0] * experts
        for token in row[:length]:
            s = (1 / (1 + (-(moe.gate.weight.double() @ token)).exp())).tolist()
            by_choice = sorted(
                range(experts), key=lambda e: -(s[e] + float(moe.gate.e_score_correction_bias[e]))
            )
            for e in by_choice[:k]:
                hits[e], load[e] = hits[e] + 1, load[e] + 1
            for e in range(experts):
                probability[e] += s[e] / sum(s)
        for e in range(experts):
            f, p = experts * hits[e] / (k * max(length, 1)), probability[e] / max(length, 1)
            expected += f * p / len(lengths)
    _, stats = moe(x, torch.arange(9) < torch.tensor(lengths)[:, None])
    assert stats.load_E.tolist() == load and sum(load) == k * sum(lengths)
    assert stats.aux_loss.item() == pytest.approx(expected, rel=1e-5)
    stats.aux_loss.backward()
    assert moe.gate.weight.grad.abs().sum() > 0


def test_router_bias_moves_against_the_load() -> None:
    net = model()
    load = torch.zeros(3, 8)
    load[:, 0] = 10
    net.update_router_bias(load, 0.001)
    bias = net.layers[1].mlp.gate.e_score_correction_bias
    assert bias[0] == pytest.approx(-0.001) and (bias[1:] > 0).all()


# --- bad input --------------------


def test_impossible_input_is_named() -> None:
    net = model()
    with pytest.raises(ValueError, match="outside 0..96"):
        net(torch.tensor([[97]]))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        net(torch.zeros(1, 257, dtype=torch.long))
    with pytest.raises(FullarcError, match="no model size"):
        preset("3m")
    ids, hidden = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, net.config.hidden_size)
    for call, message in [
        (lambda: net(ids[0]), r"input_ids must be integers \[batch, time\], got torch.int64 \(8,\)"),
        (lambda: net(ids.float()), r"input_ids must be integers .* got torch.float32"),
        (lambda: net(ids, ids[:, 1:]), r"doc_ids \(2, 7\) must have the shape of input_ids \(2, 8\)"),
        (lambda: net(ids, ids, ids[:1]), r"parent_ids \(1, 8\) must have the shape of input_ids"),
        (lambda: net(ids, None, ids), "parent_ids need doc_ids"),
        (lambda: net.trunk(ids, indexer_loss="all"), "indexer_loss must be .* got 'all'"),
        (lambda: net.mtp(hidden[:, 1:], ids), r"hidden_BTD \(2, 7, 64\) does not belong to input_ids"),
        (lambda: net.mtp(hidden, ids - 1), "outside 0..96"),
        (lambda: model(num_nextn_predict_layers=0).mtp(hidden, ids), "num_nextn_predict_layers is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_tokens_reach_their_experts_and_their_gradients_come_back() -> None:
    """Output and gradients of the dispatched layer against every expert on every token."""
    net = model()
    moe = next(layer.mlp for layer in net.layers if isinstance(layer.mlp, MoE))
    x = torch.randn(2, 7, net.config.hidden_size, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    parameters = [x, *moe.parameters()]
    out, _ = moe(x, None)
    _, chosen_MK, weights_MK = moe.gate(x.flatten(0, 1))
    gate_EMF, up_EMF = (x.flatten(0, 1) @ moe.experts.gate_up_proj.mT).chunk(2, -1)
    every_MED = ((F.silu(gate_EMF) * up_EMF) @ moe.experts.down_proj.mT).transpose(0, 1)
    expected = (
        every_MED.gather(1, chosen_MK[..., None].expand(-1, -1, x.shape[-1])) * weights_MK[..., None]
    ).sum(1)
    expected = (expected + moe.shared_experts(x.flatten(0, 1))).view_as(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)
    grads = (torch.autograd.grad((y * x.detach().cos()).sum(), parameters) for y in (out, expected))
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
