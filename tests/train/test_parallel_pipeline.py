"""A pipeline of processes trains as one process does, and holds no more than 1F1B says."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fullarc.config.errors import FullarcError
from fullarc.config.model import preset
from fullarc.model import load_model
from fullarc.train.parallel import ALONE, launch
from fullarc.train.parallel.plan import Stage, one_forward_one_backward, plan_stages

sys.path.insert(0, str(Path(__file__).parent))  # new processes look here too
import pipeline_jobs as jobs
from equality import assert_as_one, moments
from test_checkpoint import same_bits

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "size, mode, changes",
    [
        (2, "dense", {}),
        pytest.param(2, "plain", {"num_hidden_layers": 4}, marks=SLOW),
        pytest.param(2, "sparse", {"index_topk": 6}, marks=SLOW),
        pytest.param(2, "warmup", {"index_topk": 6}, marks=SLOW),
        pytest.param(4, "dense", {}, marks=SLOW),
        pytest.param(4, "plain", {"num_hidden_layers": 4}, marks=SLOW),
        pytest.param(4, "detached", {}, marks=SLOW),
        pytest.param(
            3, "sparse", {"index_topk": 6, "num_hidden_layers": 4, "index_topk_freq": 2}, marks=SLOW
        ),
        pytest.param(4, "warmup", {"index_topk": 6}, marks=SLOW),
        pytest.param(3, "dense", {"num_nextn_predict_layers": 2}, marks=SLOW),
        pytest.param(
            2, "plain", {"gqa_kv_heads": 1, "attention_pattern": "SF", "sliding_window": 7}, marks=SLOW
        ),
    ],
)
def test_training_equals_one_process(config, make_rows, size, mode, changes):
    """Everything is somewhere, and once but for the embedding, whose two copies stay equal; and a rank holds as many
    micro-batches as there are ranks after it."""
    config, rows = config.model_copy(update=changes), make_rows()
    expected_metrics, expected, _, state = jobs.train(ALONE, config, rows, mode)
    results = launch(jobs.train, size, config, rows, mode)
    held = [name for _, weights, *_ in results for name in weights]
    twice = {name for name in held if held.count(name) > 1}
    assert set(held) == expected.keys() and twice == (
        {"embed_tokens.weight"} if size > 2 or mode == "plain" else set()
    )
    assert sorted(name for *_, names in results for name in names) == state
    for rank, (metrics, weights, most, _) in enumerate(results):
        assert most == size - rank
        assert_as_one(metrics, weights, expected_metrics, expected, rel=1e-4, atol=5e-5)
        for name, value in weights.items():
            for _, others, *_ in results:
                assert name not in others or np.array_equal(value, others[name]), name


@pytest.mark.slow
def test_bf16_activations_travel_and_are_computed_again(config, make_rows):
    rows = make_rows()
    expected, _, _, _ = jobs.train(ALONE, config, rows, "dense", "bfloat16")
    for metrics, *_ in launch(jobs.train, 4, config, rows, "dense", "bfloat16"):
        for step, expected_step in zip(metrics, expected, strict=True):
            for name in ("loss", "mtp_loss_1", "mtp_loss_2", "grad_norm"):
                assert step[name] == pytest.approx(expected_step[name], rel=1e-2), name


def test_the_mtp_layer_is_before_the_output_layer_and_stages_are_balanced(config):
    """The output layer of MTP and of the model on the last stage, the rest of MTP on the one before (GLM-5 2.4)."""
    config = config.model_copy(update={"num_hidden_layers": 8, "first_k_dense_replace": 0})
    last = Stage(range(8, 8), finish=False, output=True)
    assert plan_stages(config, 2, 3) == [Stage(range(8), finish=True, output=False), last]
    # three applications of the MTP layer are worth a little more than three layers
    assert plan_stages(config, 3, 3)[1:] == [Stage(range(6, 8), finish=True, output=False), last]
    assert [len(stage.layers) for stage in plan_stages(config, 4, 3)] == [4, 4, 0, 0]
    whole = plan_stages(config.model_copy(update={"vocab_size": 32}), 4, 0)
    assert [len(stage.layers) for stage in whole] == [2, 2, 2, 2]
    assert [(stage.finish, stage.output) for stage in whole] == [(False, False)] * 3 + [(True, True)]
    shared = config.model_copy(update={"index_topk_freq": 4, "index_skip_topk_offset": 1})
    for stage in plan_stages(shared, 3, 3)[:2]:
        assert not stage.layers or shared.has_indexer(stage.layers.start)
    glm5 = plan_stages(preset("glm5-744b"), 16, 1)
    assert glm5[-2].finish and not glm5[-2].output and glm5[-1].output


def test_a_pipeline_longer_than_the_model_is_refused(config):
    plan_stages(config, 4, 2)
    plan_stages(config, 3, 0)
    with pytest.raises(FullarcError, match="A pipeline of 2 layers has at most 4 ranks, not 5"):
        plan_stages(config, 5, 2)
    with pytest.raises(FullarcError, match="A pipeline of 2 layers has at most 3 ranks, not 4"):
        plan_stages(config, 4, 0)
    shared = config.model_copy(update={"indexer_types": ("full", "shared")})
    with pytest.raises(
        FullarcError, match="2 layers .those that share .* stay together. has at most 3 ranks, not 4"
    ):
        plan_stages(shared, 4, 2)


@pytest.mark.parametrize("stages, micro_batches", [(1, 3), (2, 1), (4, 2), (4, 4), (4, 9)])
def test_the_schedule_keeps_what_is_ahead_of_it_and_never_waits_for_itself(stages, micro_batches):
    """Played with queues between the stages: no deadlock, every micro-batch once each way, in order."""
    plans = [one_forward_one_backward(stage, stages, micro_batches) for stage in range(stages)]
    done = [0] * stages
    passed = {("forward", -1, m) for m in range(micro_batches)} | {
        ("backward", stages, m) for m in range(micro_batches)
    }
    while any(done[stage] < len(plans[stage]) for stage in range(stages)):
        moved = False
        for stage, plan in enumerate(plans):
            if done[stage] < len(plan):
                kind, m = plan[done[stage]]
                if (kind, stage - 1 if kind == "forward" else stage + 1, m) in passed:
                    passed.add((kind, stage, m))
                    done[stage], moved = done[stage] + 1, True
        assert moved, "deadlock"
    for stage, plan in enumerate(plans):
        live = most = 0
        for kind, _ in plan:
            live += 1 if kind == "forward" else -1
            most = max(most, live)
        assert live == 0 and most == min(stages - stage, micro_batches)
        assert [m for kind, m in plan if kind == "backward"] == list(range(micro_batches))


@pytest.mark.slow
def test_a_phase_goes_on_to_the_same_bits_by_fewer_ranks_and_by_one(make_rows, tmp_path):
    rows = make_rows()
    whole = launch(jobs.phase, 3, rows, tmp_path / "whole")[0]
    for folder in ("same", "fewer", "alone", "zero1"):
        with pytest.raises(FullarcError, match="Enough"):
            launch(jobs.phase, 3, rows, tmp_path / folder, 3)
        assert [p.name for p in (tmp_path / f"{folder}.steps").glob("step-*")] == ["step-00000002"]
    launch(jobs.phase, 3, rows, tmp_path / "same")
    assert same_bits(tmp_path / "whole", tmp_path / "same")
    states = [moments(tmp_path / name) for name in ("whole", "same")]
    assert states[0] and states[0].keys() == states[1].keys()
    assert all(states[1][name].equal(value) for name, value in states[0].items())
    others = {
        "fewer": launch(jobs.phase, 2, rows, tmp_path / "fewer")[0],
        "alone": jobs.phase(ALONE, rows, tmp_path / "alone"),
        "zero1": launch(jobs.phase, 2, rows, tmp_path / "zero1", 0, "zero1")[0],
    }
    weights = load_model(tmp_path / "whole").state_dict()
    for folder, metrics in others.items():
        for name in metrics.keys() - {"tokens_per_s"}:
            assert metrics[name] == pytest.approx(whole[name], rel=1e-4), name
        moved = load_model(tmp_path / folder).state_dict()
        assert all(np.allclose(moved[name], value, atol=5e-5) for name, value in weights.items())


@pytest.mark.slow
def test_a_bad_weight_stops_all_ranks_and_is_named(config, make_rows):
    for message in launch(jobs.bad_weight, 3, config, make_rows()):
        assert "Step 0: the loss of micro-batch 0 is NaN" in message
        assert "weight layers.1.self_attn.kv_b_proj.weight" in message
