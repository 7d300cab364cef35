"""The kernels in C against others: double precision, int64, `stable_topk`, numpy, the torch forward pass."""

import ctypes
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fullarc.config.model import ModelConfig
from fullarc.engine import core as plain
from fullarc.engine.backend import forward_pass, prepare, resolve
from fullarc.engine.core import Chunk
from fullarc.engine.fused import Part
from fullarc.engine.native import NativeCore, Unavailable, pack
from fullarc.engine.native import library as native_library
from fullarc.engine.native.core import multiply
from fullarc.engine.native.library import library
from fullarc.engine.native.sample import draw, likeliest, logprobs, truncated
from fullarc.engine.native.weights import BF16, F32, INT4, INT8, Packer
from fullarc.engine.sampling import uniforms
from fullarc.engine.weights import prepare as prepare_plain
from fullarc.model import GlmMoeDsa
from fullarc.model.ops import stable_topk
from fullarc.model.quant import PER_TOKEN, QuantScheme, dequantize, quantize

LONG = [3 + (i * i) % 80 for i in range(150)]
SIZES = [(64, 64), (1, 1), (33, 17), (96, 200), (257, 65), (1500, 20)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(weight, dtype="fp32", scale=None):
    """A product of one matrix, and what keeps it alive."""
    packer = Packer(dtype)
    return packer.product([Part(weight, scale)]), packer


def integers(inputs, outputs, bits):
    q, scale = quantize(randn(outputs, inputs), QuantScheme(bits, 0, tokens=True))
    scale[1::2] *= -1  # auto-round's are of either sign
    q[0], q[-1] = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    return dequantize(q, scale), scale, q


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs,outputs", SIZES)
def test_products_are_those_of_double_precision(inputs, outputs):
    weight, x = randn(outputs, inputs), randn(13, inputs, seed=1)
    product, kept = packed(weight)
    assert product.part[0].kind == F32 and kept
    exact = x.double() @ weight.double().T
    bound = 1e-6 * (x.abs().double() @ weight.abs().double().T)
    assert ((multiply(product, x)[:, :outputs] - exact).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("inputs,outputs", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_integers_are_those_of_int64(inputs, outputs, bits):
    weight, scale, q_w = integers(inputs, outputs, bits)
    product, kept = packed(weight, scale=scale)
    assert product.part[0].kind == (INT4 if bits == 4 else INT8) and kept
    x = randn(13, inputs, seed=1) * 10.0 ** torch.linspace(-3, 3, 13)[:, None]
    x[3], x[4] = 0, -0.3  # nothing; nothing but the extreme
    q_x, s_x = quantize(x, PER_TOKEN)
    expected = (q_x.long() @ q_w.long().T).float() * scale.T * s_x
    assert torch.equal(multiply(product, x)[:, :outputs], expected)


@pytest.mark.parametrize("inputs,outputs", SIZES)
def test_products_in_bf16_round_both_sides_and_nothing_else(inputs, outputs):
    weight, x = randn(outputs, inputs), randn(13, inputs, seed=1)
    product, kept = packed(weight, "bf16")
    assert product.part[0].kind == BF16 and kept
    rounded, other = x.bfloat16().double(), weight.bfloat16().double()
    bound = 1e-6 * (rounded.abs() @ other.abs().T)
    assert ((multiply(product, x)[:, :outputs] - rounded @ other.T).abs() <= bound + 1e-30).all()


@pytest.mark.parametrize("kind", ["fp32", "bf16", 8, 4])
def test_a_row_is_the_same_in_any_company_and_on_any_thread(kind):
    if isinstance(kind, int):
        weight, scale, _ = integers(70, 150, kind)
        product, kept = packed(weight, scale=scale)
    else:
        product, kept = packed(randn(150, 70), kind)
    x = randn(20, 70, seed=1)
    whole = multiply(product, x)
    assert kept and all(
        torch.equal(multiply(product, x[:n], threads=t), whole[:n]) for n in range(1, 21) for t in (1, 2)
    )
    assert all(torch.equal(multiply(product, x[n : n + 1]), whole[n : n + 1]) for n in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64-v2"])
def test_the_width_of_the_registers_changes_nothing(processor, monkeypatch):
    """Half as wide with fused multiplication, a quarter without it; integers everywhere."""
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no wider registers than those")
    narrow = library(processor)
    cases = [packed(randn(150, 70))] if processor == "x86-64-v3" else []
    cases += [
        packed(weight, scale=scale) for weight, scale, _ in (integers(70, 150, bits) for bits in (4, 8))
    ]
    x = randn(20, 70, seed=1)
    scores = randn(8, 3000)
    for product, _ in cases:
        wide = multiply(product, x)
        monkeypatch.setattr("fullarc.engine.native.core.library", lambda: narrow)
        assert torch.equal(multiply(product, x), wide)
        monkeypatch.undo()
    for row in scores:
        assert choose(row, 300, narrow) == choose(row, 300)


# --- choosing -------------------------------------------------------------------------------------------------------


def choose(scores, k, using=None):
    n = len(scores)
    filled = torch.full((-(-n // 16) * 16,), -torch.inf)
    filled[:n] = scores
    out, room = (ctypes.c_int32 * (k + 16))(*[-7] * (k + 16)), torch.empty(n // 4 + 64, dtype=torch.int32)
    (using or library()).fullarc_choose(filled.data_ptr(), n, k, out, room.data_ptr())
    assert out[k:] == [-7] * 16, "what lies behind is another query's"
    return out[:k]


@pytest.mark.parametrize(
    "n,k", [(17, 16), (100, 1), (150, 24), (1030, 1029), (1500, 64), (5000, 4999), (20_000, 256)]
)
def test_the_choice_is_that_of_stable_topk(n, k):
    plain_scores = randn(n)
    relu = plain_scores.clamp_min(0)  # half of them tie at zero
    steps = (plain_scores * 2).round() / 2
    unseen = plain_scores.clone()
    unseen[: (n - k) // 2] = -torch.inf
    same, huge = torch.full((n,), 0.25), plain_scores * 1e30
    one_sided = -plain_scores.abs() - 1
    for scores in (plain_scores, relu, steps, unseen, same, huge, one_sided, -relu + 0.0):
        assert choose(scores, k) == stable_topk(scores, k).tolist()


# --- drawing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 15, 16, 101, 4096])
def test_logprobs_are_those_of_double_precision(vocab):
    logits, temperatures = randn(5, vocab) * 8, [1.0, 0.01, 0.5, 2.0, 100.0]
    exact = (logits.double() / torch.tensor(temperatures)[:, None]).log_softmax(-1)
    ours = logprobs(logits.clone(), temperatures)
    largest = (logits.abs() / torch.tensor(temperatures)[:, None]).amax(1, keepdim=True)
    assert ((ours - exact).abs() <= 4e-6 + 3e-7 * largest).all()


@pytest.mark.parametrize("vocab", [1, 16, 101, 2048])
def test_tokens_are_where_the_cumulative_distribution_passes_u(vocab):
    logits, seeds = randn(1, vocab) * 3, [7 * n for n in range(400)]
    u = uniforms(seeds, [5] * 400)
    cdf = logits[0].double().softmax(-1).cumsum(0).numpy()
    tokens, told = draw(logits.expand(400, -1).contiguous(), [1.0] * 400, seeds, [5] * 400)
    expected = np.searchsorted(cdf, u * cdf[-1], side="right")
    edges = np.abs(cdf[None] - u[:, None] * cdf[-1]).min(1) < 1e-6  # fp32 may fall on either side
    assert (np.array(tokens) == expected)[~edges].all() and (~edges).sum() > 300
    assert (np.abs(np.array(tokens) - expected) <= 1).all()
    assert torch.equal(torch.tensor(told), logprobs(logits.clone(), [1.0])[0][tokens])


def test_what_has_no_probability_is_never_drawn_and_ties_go_to_the_lowest():
    logits = torch.full((3, 40), -torch.inf)
    logits[:, 7], logits[:, 21] = 2.0, 2.0
    tokens, told = draw(logits.repeat(100, 1), [1.0, 1.0, 0.0] * 100, range(300), [0] * 300)
    assert set(tokens[::3]) == set(tokens[1::3]) == {7, 21} and set(tokens[2::3]) == {7}
    assert told == pytest.approx([-np.log(2)] * 300)


def test_both_draw_the_same_numbers():
    rng = random.Random(0)
    seeds = [0, 1, 2**64 - 1, *(rng.randrange(2**64) for _ in range(500))]
    positions = [0, 2**31, 5, *(rng.randrange(100_000) for _ in range(500))]
    ours = (ctypes.c_double * len(seeds))()
    words = ctypes.c_uint64 * len(seeds)
    library().fullarc_uniform(len(seeds), words(*seeds), words(*positions), ours)
    assert list(ours) == uniforms(seeds, positions).tolist()


def ordered(logits, temperature):
    """Ids from the likeliest on, and their probabilities, in double precision."""
    chances = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(chances)), key=lambda token: (-logits[token].item(), token))
    return order, [chances[token] for token in order]


@pytest.mark.parametrize("vocab", [1, 16, 101, 1500])
@pytest.mark.parametrize("kind", ["any", "ties", "forbidden", "same"])
def test_truncation_keeps_what_sorting_keeps(vocab, kind):
    """Every cut alone and together, against sums along a sorted row; ties fall by id."""
    cuts = [(k, p, m) for k in (0, 1, 7, 5000) for p in (1.0, 0.9, 0.3, 1e-9) for m in (0.0, 0.05, 1.0)]
    row = randn(vocab, seed=vocab) * 3
    if kind == "ties":
        row = row.round()
    elif kind == "forbidden":
        row[1::2] = -torch.inf
    elif kind == "same":
        row = torch.zeros(vocab)
    temperatures = [(0.3, 1.0, 2.5)[n % 3] for n in range(len(cuts))]
    logits = row.repeat(len(cuts), 1)
    before = logits.clone()
    out = truncated(logits, temperatures, *zip(*cuts, strict=True))
    assert torch.equal(logits, before), "only the copy is cut"
    for cut, temperature, got in zip(cuts, temperatures, out, strict=True):
        top_k, top_p, min_p = cut
        order, chances = ordered(row, temperature)
        count = min(top_k or vocab, vocab)
        total, below, expected, unsure = sum(chances[:count]), 0.0, set(), set()
        for token, chance in list(zip(order, chances, strict=True))[:count]:
            if top_p < 1 and abs(below - top_p * total) < 2e-6:  # fp32 may fall on either side
                unsure.add(token)
            if min_p and chance < chances[0] and abs(chance - min_p * chances[0]) < 1e-6 * chances[0]:
                unsure.add(token)
            if (top_p == 1 or below < top_p * total) and chance >= min_p * chances[0]:
                expected.add(token)
            below += chance
        kept = set((got > -torch.inf).nonzero()[:, 0].tolist())
        expected -= {token for token in expected if row[token] == -torch.inf}
        assert (kept ^ expected) <= unsure, (cut, temperature)
        assert order[0] in kept and len(unsure) <= 4
        assert torch.equal(got[sorted(kept)], row[sorted(kept)])


@pytest.mark.parametrize("vocab", [1, 16, 101, 1500])
def test_the_likeliest_are_those_that_sorting_finds(vocab):
    rows = [randn(vocab) * 3, (randn(vocab) * 3).round(), torch.zeros(vocab), -randn(vocab).abs()]
    counts = [min(count, vocab) for count in (5, 128, 20, 0)]
    logits, temperatures = torch.stack(rows), [1.0, 0.5, 2.0, 1.0]
    for row, count, temperature, got in zip(
        rows, counts, temperatures, likeliest(logits, temperatures, counts), strict=True
    ):
        order, chances = ordered(row, temperature)
        assert [token for _, token in got] == order[:count]
        assert [value for value, _ in got] == pytest.approx(np.log(chances[:count]).tolist(), abs=1e-5)


# --- the forward pass -------------------------------------------------------------------------------------------------


def passes(core, tokens=LONG):
    hidden = core.forward([Chunk(0, 0, tokens)])[: len(tokens)]
    logits = core.logits(hidden, list(range(len(tokens))))
    ahead = core.look_ahead([Chunk(0, 1, tokens[1:])], hidden[:-1])[: len(tokens) - 1]
    return hidden, logits, ahead


def close(model, bound, dtype="fp32"):
    theirs = passes(plain.Core(prepare_plain(model, dtype=dtype), 2, 256, mtp=True))
    ours = passes(NativeCore(pack(model, dtype=dtype), 2, 256, mtp=True))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < bound * max(1.0, b.abs().max().item())


def test_it_agrees_with_torch(shaped):
    close(shaped[0], 2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
        {"n_routed_experts": 4, "n_group": 4, "topk_group": 3},
        {"n_shared_experts": 0},
        {"n_shared_experts": 2, "norm_topk_prob": False, "first_k_dense_replace": 0},
        {"first_k_dense_replace": 3, "num_attention_heads": 7, "index_n_heads": 3},
        {"num_attention_heads": 40, "index_n_heads": 40, "index_topk": 130},
        {"num_attention_heads": 100, "kv_lora_rank": 130},
        {"num_attention_heads": 64, "index_n_heads": 2, "index_topk": 125},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_it_agrees_with_torch_in_other_shapes(build, changes):
    config = build().config.model_dump() | changes
    model = GlmMoeDsa(ModelConfig(**config)).init_weights(4).eval()
    close(model, 2e-5)


def test_threads_change_nothing(shaped):
    crowd = [Chunk(1, 0, LONG[:70]), Chunk(2, 0, [5]), Chunk(3, 0, LONG)]
    results = []
    for threads in (1, 2, 3):
        core = NativeCore(pack(shaped[0]), 4, 256, threads=threads)
        core.forward(crowd)
        results.append(core.forward([Chunk(1, 70, [7, 8]), Chunk(0, 0, LONG), Chunk(3, 150, [4])]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_other_weights_may_look_at_more_keys(build):
    """With one layer a latent depends on its own token only, so what was kept is right for any top-k."""
    config = build().config.model_dump() | {"num_hidden_layers": 1}
    sparse = GlmMoeDsa(ModelConfig(**config)).init_weights(4).eval()
    dense = GlmMoeDsa(ModelConfig(**config | {"index_topk": 512})).eval()
    dense.load_state_dict(sparse.state_dict())
    changed, fresh = (NativeCore(pack(model), 1, 256) for model in (sparse, dense))
    for core in (changed, fresh):
        core.forward([Chunk(0, 0, LONG)])
    changed.weights = pack(dense)
    assert torch.equal(changed.forward([Chunk(0, 150, [9])]), fresh.forward([Chunk(0, 150, [9])]))


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_what_was_kept_can_be_put_back_anywhere(shaped, kernels):
    core = forward_pass(prepare(shaped[0], kernels=kernels), 3, 256)
    core.forward([Chunk(0, 0, LONG)])
    kept = core.cache.read(0, 0, 150)
    assert torch.equal(core.cache.read(0, 37, 90), kept[:, 37:127])
    for start, stop in ((0, 16), (16, 120), (120, 150)):
        core.cache.write(2, start, kept[:, start:stop].clone())
    assert torch.equal(core.cache.read(2, 0, 150), kept)
    ends = [core.forward([Chunk(slot, 150, [7])])[0] for slot in (0, 2)]
    assert torch.equal(*ends)


def test_not_a_number_stays_with_its_own_sequence(build):
    """What a bad update left in a slot is never read by the next sequence there."""
    model = build("sparse")
    core = NativeCore(pack(model), 1, 256)
    expected = core.forward([Chunk(0, 0, LONG[:100])]).clone()
    for kept in (core.cache.index_keys, core.cache.rows[..., : core.cache.width]):
        kept.fill_(torch.nan)
    assert torch.equal(core.forward([Chunk(0, 0, LONG[:100])]), expected)


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """A cache folder with nothing in it, and no memory of a library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.library.cache_clear()
    yield tmp_path
    native_library.library.cache_clear()


def test_without_a_compiler_torch_takes_over_and_says_so(anew, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(anew))
    monkeypatch.delenv("CC", raising=False)
    assert resolve("auto", "fp32") == "torch"
    assert "no C compiler" in capfd.readouterr().err
    with pytest.raises(Unavailable, match="apt-get install gcc"):
        resolve("native", "fp32")
    assert resolve("torch", "fp32") == "torch"


def test_a_compiler_that_fails_is_quoted(anew, monkeypatch):
    broken = anew / "cc"
    broken.write_text('#!/bin/sh\ncase "$1" in --version) echo 1;; *) echo out of luck >&2; exit 1;; esac\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(Unavailable, match="out of luck"):
        library()
    assert not list((anew / "fullarc" / "native").iterdir())


@pytest.mark.slow
def test_processes_that_start_together_all_find_a_whole_library(anew):
    code = "from fullarc.engine.native.library import library; library(); print('whole')"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=100)[0].strip() for process in started] == ["whole"] * 2
    assert len(list((anew / "fullarc" / "native").iterdir())) == 1


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_no_hindrance(anew, monkeypatch):
    (anew / "fullarc").write_text("a file where the folder should be")
    assert library() is not None


def test_fp8_is_emulated_by_torch_only():
    assert resolve("auto", "fp8") == "torch"
    with pytest.raises(Exception, match="do not compute in fp8"):
        resolve("native", "fp8")


def test_weights_of_one_kind_do_not_become_the_other(build):
    weights = pack(build(), "7")
    assert replace(weights, version="8").model is weights.model
    assert isinstance(forward_pass(weights, 1, 64), NativeCore)
