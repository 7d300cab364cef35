"""The engine against the trainer's own forward, and its speculation against its own greedy decoding."""

import pytest
import torch

from fullarc.engine import Engine, core, mtp_accept_length
from fullarc.engine import attention as attention_module
from fullarc.engine.weights import prepare
from fullarc.model import QuantScheme, load_model, mla, quantize_checkpoint
from fullarc.model import indexer as indexer_module
from fullarc.model.ops import topk_mask

PROMPTS = [[5, 9, 13, 2] * 20, list(range(1, 60)), [7]]


def reference(model, ids):
    """Log-probs of each token of `ids` given those before it, by one full forward of the trainer's model."""
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [0.0, *logp[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]


def test_sampled_logprobs_are_those_of_the_trainer(shaped, kernels):
    model, folder = shaped
    outputs = Engine(folder, max_batch=4, max_len=256, chunk_tokens=48, kernels=kernels).generate(
        PROMPTS, max_new_tokens=40, seed=3, stop_ids=()
    )
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert len(output.token_ids) == len(output.logprobs) == 40
        expected = reference(model, prompt + output.token_ids)[len(prompt) :]
        assert output.logprobs == pytest.approx(expected, abs=5e-5)


def test_scores_are_those_of_the_trainer(shaped, kernels):
    model, folder = shaped
    sequences = [
        *PROMPTS,
        [int(t) for t in torch.randint(1, 90, (300,), generator=torch.Generator().manual_seed(0))],
    ]
    scores = Engine(folder, max_batch=2, max_len=320, chunk_tokens=100, kernels=kernels).score(sequences)
    for ids, row in zip(sequences, scores, strict=True):
        assert row == pytest.approx(reference(model, ids), abs=5e-5)


def as_sets(chosen, length):
    """Positions [N, k] with -1 after the last, 0 | -inf [N, S] or booleans [N, S], as booleans [N, length]."""
    sets = torch.zeros(len(chosen), length + 1, dtype=torch.bool)
    if chosen.dtype != torch.bool and not chosen.is_floating_point():
        return sets.scatter_(1, chosen.long() % (length + 1), True)[:, :length]
    mask = (chosen if chosen.dtype == torch.bool else chosen == 0)[:, :length]
    sets[:, : mask.shape[1]] = mask
    return sets[:, :length]


@pytest.mark.parametrize("gather_from", [3, 1000])
def test_index_sets_equal_those_of_the_trainer(shaped, monkeypatch, gather_from):
    """Gathered as positions from three times the top-k on, or masked throughout."""
    model, folder = shaped
    length, trainer, engine = 100, {}, {}
    ids = [int(t) for t in torch.randint(1, 90, (length,), generator=torch.Generator().manual_seed(5))]
    masked, gathered, chosen_by_engine = mla.MLA._choose, mla.Index.choose, core.choose

    def put(sets, key, rows, chosen):
        sets.setdefault(key, torch.zeros(length, length, dtype=torch.bool))[rows] = as_sets(chosen, length)

    def spy_masked(self, index, chunk):
        scores, mask = masked(self, index, chunk)
        put(trainer, id(index.indexer), chunk.part, mask[0])
        return scores, mask

    def spy_gathered(self, run):
        positions = gathered(self, run)
        put(trainer, id(self.indexer), slice(run[0].part.start, run[-1].part.stop), positions[0])
        return positions

    def spy_engine(iq, w, grid, keys, topk, scratch):
        chosen = chosen_by_engine(iq, w, grid, keys, topk, scratch)
        real = [at for at, row in enumerate(grid.rows) if row >= 0]
        put(engine, keys.data_ptr(), [grid.rows[at] for at in real], chosen[real])
        return chosen

    for module in (mla, attention_module):
        monkeypatch.setattr(module, "GATHER_FROM", gather_from)
    monkeypatch.setattr(mla.MLA, "_choose", spy_masked)
    monkeypatch.setattr(mla.Index, "choose", spy_gathered)
    monkeypatch.setattr(core, "choose", spy_engine)
    if not model.config.dense_attention:
        with torch.no_grad():
            model(torch.tensor([ids]))
    Engine(folder, max_batch=1, max_len=128, kernels="torch").score([ids])
    layers = 0 if model.config.dense_attention else sum(map(model.config.has_indexer, range(3)))
    assert len(engine) == len(trainer) == layers
    for ours, theirs in zip(engine.values(), trainer.values(), strict=True):
        assert torch.equal(ours, theirs) and ours[-1].sum() == model.config.index_topk


def test_the_quick_selection_is_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    causal = torch.arange(256) <= torch.arange(200, 232)[:, None]
    distinct = torch.randn(32, 256, generator=generator)
    tied = torch.randint(0, 3, (32, 256), generator=generator).float() * torch.tensor(-0.0)
    for scores in (distinct, tied, distinct.round()):
        for k in (1, 24, 128):
            exact = topk_mask(scores.masked_fill(~causal, -torch.inf), k) & causal
            assert torch.equal(indexer_module.select(scores, causal, k), exact)


def greedy(model, ids, count):
    """Plain greedy decoding by full forwards, the lowest id on ties."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_speculation_commits_exactly_the_greedy_tokens(shaped):
    model, folder = shaped
    result = mtp_accept_length(folder, PROMPTS, draft_steps=3, max_new_tokens=8)
    outputs = Engine(folder, max_batch=4, max_len=256).generate(PROMPTS, 8, temperature=0.0, stop_ids=())
    for prompt, ours, engine in zip(PROMPTS, result.outputs, outputs, strict=True):
        assert ours == greedy(model, prompt, 8) == engine.token_ids
    assert mtp_accept_length(folder, PROMPTS, 3, 8, full_passes=True).outputs == result.outputs
    assert 1.0 <= result.mean <= 4.0 and len(result.per_position) == 3


def test_drafts_that_are_always_right_are_all_accepted(build):
    """A model that always says the same token: every draft is right, so each step commits draft_steps + 1."""
    model = build()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.mtp_layer.norm.weight.zero_()
    result = mtp_accept_length(model, [[3, 4, 5]], draft_steps=4, max_new_tokens=20)
    assert result.outputs == [[0] * 20]
    # the first token comes with the prompt; the last step has room for three drafts only
    assert (result.steps, result.tokens, result.mean) == ([4], [19], 19 / 4)
    assert result.per_position == [1.0, 1.0, 1.0, 0.75]


def test_drafts_follow_the_training_alignment(build):
    """Depth d at the last known position must be what `GlmMoeDsa.mtp` computes there in training."""
    from fullarc.engine.mtp import _advance, _draft

    model = build()
    ids, hidden = _advance(model, [5, 9, 13, 2, 40, 41, 17], [])
    drafts = _draft(model, ids, hidden, 3)
    with torch.no_grad():
        full = torch.tensor([ids + drafts])
        states = model.mtp(model.trunk(full).hidden_BTD, full, steps=3).hidden
        at = len(ids) - 2
        assert drafts == [int(model.lm_head(state[0, at]).argmax()) for state in states]


def test_a_quantised_checkpoint_is_served_as_training_saw_it(shaped, kernels, tmp_path):
    model, folder = shaped
    scheme = QuantScheme(4, 4)  # divides the odd shape's rows too
    quantize_checkpoint(folder, tmp_path / "int4", {"experts": scheme})
    engine = Engine(tmp_path / "int4", max_batch=4, max_len=256, chunk_tokens=48, kernels=kernels)
    scores = engine.score(PROMPTS[:2])
    aware = load_model(folder).quantize_experts(scheme)
    for ids, row in zip(PROMPTS, scores, strict=False):
        assert row == pytest.approx(reference(aware, ids), abs=5e-5)
        assert row != pytest.approx(reference(model, ids), abs=1e-2)
    weights = [prepare(net).layers[1].ffn for net in (aware, load_model(tmp_path / "int4"))]
    assert torch.equal(weights[0].gate_up.weight, weights[1].gate_up.weight) and torch.equal(
        weights[0].down.weight, weights[1].down.weight
    )
