"""Rows whose positions are divided over processes are the rows that one process has."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fullarc.config.errors import FullarcError
from fullarc.config.stages import Pretrain
from fullarc.model import load_model
from fullarc.train.parallel import ALONE, Ranks, launch
from fullarc.train.parallel.context import DividedContext

sys.path.insert(0, str(Path(__file__).parent))  # new processes look here too
import context_jobs as jobs
from equality import assert_as_one
from test_checkpoint import same_bits

SLOW = pytest.mark.slow
SIZES = [2, pytest.param(4, marks=SLOW)]
DENSE, MASKED, GATHERED = 128, 12, 2  # top-k; the last one is under a third of what is visible
LAYERS = 3
SHARED = {"indexer_types": ("full", "shared", "full")}
WINDOWS = {"attention_pattern": "FSF", "sliding_window": 7}


@pytest.mark.parametrize(
    "mode, topk, isolate, changes",
    [
        ("dense", DENSE, True, {}),
        ("sparse", MASKED, True, {}),
        ("sparse", GATHERED, False, SHARED),
        pytest.param("dense", DENSE, False, {}, marks=SLOW),
        pytest.param("dense", MASKED, True, {}, marks=SLOW),
        pytest.param("dense", GATHERED, True, {}, marks=SLOW),
        pytest.param("dense", DENSE, True, WINDOWS, marks=SLOW),
        pytest.param("dense", DENSE, True, {"num_nextn_predict_layers": 2}, marks=SLOW),
        pytest.param("warmup", MASKED, True, {}, marks=SLOW),
        pytest.param("sparse", MASKED, False, {}, marks=SLOW),
        pytest.param("sparse", MASKED, True, SHARED, marks=SLOW),
        pytest.param("sparse", GATHERED, True, {}, marks=SLOW),
        pytest.param("sparse", GATHERED, False, WINDOWS, marks=SLOW),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_loss_gradients_loads_and_choices_equal_one_process(
    config, make_rows, size, mode, topk, isolate, changes
):
    """Sums of the ranks' parts, to rounding; counts, loads and chosen keys exactly, each query on one rank."""
    config = config.model_copy(update={"index_topk": topk, "num_hidden_layers": LAYERS} | changes)
    rows = make_rows(isolate=isolate)
    (expected,) = launch(jobs.one_pass, 1, config, rows, mode)
    loss, grads, load, metrics, count, gathered, chosen = expected
    found = launch(jobs.one_pass, size, config, rows, mode)
    assert sum(one[0] for one in found) == pytest.approx(loss, rel=1e-5)
    assert sum(one[4] for one in found) == count > 0
    for name, value in grads.items():
        parts = sum(one[1][name] for one in found)
        assert np.allclose(parts, value, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(value).max())), name
    assert {name for one in found for name in one[1]} == grads.keys()
    if load is not None:
        assert np.array_equal(sum(one[2] for one in found), load)
    for name, (total, n) in metrics.items():
        assert sum(one[3][name][0] for one in found) == pytest.approx(total, rel=1e-5), name
        assert sum(one[3][name][1] for one in found) == n, name
    assert bool(gathered) == (topk == GATHERED and mode != "warmup")
    assert bool(sum(one[5] for one in found)) == bool(gathered)
    together = {}
    for *_, part in found:
        assert not together.keys() & part.keys()
        together |= part
    if chosen:  # plain causal attention asks nobody
        assert together == chosen
        most = max(len(keys) for (_, _, query), keys in chosen.items())
        assert most == topk if topk < DENSE and mode != "warmup" else most > MASKED


@pytest.mark.slow
@pytest.mark.parametrize("mode, topk", [("dense", DENSE), ("sparse", GATHERED)])
def test_activations_computed_again_and_bf16(config, make_rows, mode, topk):
    """Recomputed layers give the same bits; in bf16 the loss is that of one process but for its rounding."""
    config, rows = config.model_copy(update={"index_topk": topk}), make_rows()
    plain = launch(jobs.one_pass, 2, config, rows, mode)
    again = launch(jobs.one_pass, 2, config, rows, mode, True)
    for (loss, grads, *_), (other, others, *_) in zip(plain, again, strict=True):
        assert loss == other and grads.keys() == others.keys()
        assert all(np.array_equal(value, others[name]) for name, value in grads.items())
    half = launch(jobs.one_pass, 2, config, rows, mode, False, "bfloat16")
    (alone,) = launch(jobs.one_pass, 1, config, rows, mode, False, "bfloat16")
    assert sum(one[0] for one in half) == pytest.approx(alone[0], rel=2e-2)
    for name, value in alone[1].items():
        parts = sum(one[1][name] for one in half)
        assert np.linalg.norm(parts - value) < 0.1 * np.linalg.norm(value) + 1e-6, name


@pytest.mark.parametrize("size", SIZES)
def test_training_equals_one_process(config, make_rows, size):
    rows = make_rows()
    expected_metrics, expected = jobs.train(ALONE, config, rows)
    results = launch(jobs.train, size, config, rows)
    for metrics, weights in results:
        assert_as_one(metrics, weights, expected_metrics, expected, rel=1e-4, atol=5e-5)
        assert all(np.array_equal(value, results[0][1][name]) for name, value in weights.items())


@pytest.mark.slow
def test_what_a_rank_keeps_for_the_backward_pass_is_its_share(config, make_rows):
    """A half and a quarter, but for latents and index keys, which are whole everywhere; both ranks keep alike."""
    length = 512
    sizes = {"max_position_embeddings": length, "index_topk": 32, "vocab_size": 64}
    config = config.model_copy(update=sizes)
    rows = make_rows(length=length, isolate=False)
    whole = jobs.kept(ALONE, config, rows)
    layers, passes = config.num_hidden_layers, jobs.SPARSE.mtp_steps
    stored = config.kv_lora_rank + config.qk_rope_head_dim + config.index_head_dim
    # one row in MTP, two in the trunk; fp32
    gathered = 4 * length * stored * (2 * layers + passes)
    for size in (2, 4):
        parts = launch(jobs.kept, size, config, rows)
        assert max(parts) - gathered < 1.05 * whole / size
        assert max(parts) < 1.01 * min(parts)


@pytest.mark.slow
def test_a_phase_goes_on_to_the_same_bits_and_by_one_process(make_rows, tmp_path):
    rows = make_rows()
    whole = launch(jobs.phase, 2, rows, tmp_path / "whole")[0]
    for folder in ("same", "alone"):
        with pytest.raises(FullarcError, match="Enough"):
            launch(jobs.phase, 2, rows, tmp_path / folder, 3)
    launch(jobs.phase, 2, rows, tmp_path / "same")
    assert same_bits(tmp_path / "whole", tmp_path / "same")
    metrics = jobs.phase(ALONE, rows, tmp_path / "alone")
    for name in metrics.keys() - {"tokens_per_s"}:
        assert metrics[name] == pytest.approx(whole[name], rel=1e-4), name
    weights, moved = (load_model(tmp_path / name).state_dict() for name in ("whole", "alone"))
    assert all(np.allclose(moved[name], value, atol=2e-5) for name, value in weights.items())


@pytest.mark.slow
def test_a_bad_weight_stops_all_ranks_and_is_named(config, make_rows):
    for message in launch(jobs.bad_weight, 2, config, make_rows()):
        assert "Step 0: the loss of micro-batch 0 is NaN" in message
        assert "weight layers.1.self_attn.kv_b_proj.weight" in message


def test_rows_that_cannot_be_divided_are_refused(config):
    with pytest.raises(FullarcError, match="cannot divide the rows of grouped-query attention"):
        jobs.new_trainer(config.model_copy(update={"gqa_kv_heads": 1}), Ranks(0, 2))
    with pytest.raises(FullarcError, match="Rows of 32 positions cannot be divided over 3 ranks"):
        DividedContext(Ranks(0, 3)).runs(32)
    with pytest.raises(ValueError, match="seq_len 256 cannot be cut into two equal runs for each of 3 proc"):
        Pretrain(processes=3, parallel="cp")
    Pretrain(processes=4, parallel="cp")
    runs = [DividedContext(Ranks(rank, 4)).runs(32) for rank in range(4)]
    assert runs[1] == [(4, 8), (24, 28)]
    assert sorted(run for two in runs for run in two) == [(start, start + 4) for start in range(0, 32, 4)]
