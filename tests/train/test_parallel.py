"""Several processes train as one would, and fail as one would."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import rank_jobs as jobs
import torch
from equality import assert_as_one, moments
from safetensors.torch import load_file
from test_checkpoint import same_bits

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir
from fullarc.model import load_model
from fullarc.train import load_checkpoint
from fullarc.train.parallel import ALONE, RankFailed, launch
from fullarc.train.parallel.owners import share_out

SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


def ranks_of(parent):
    """Processes that the launcher's fork server has running."""
    servers = [child for child in parent.children() if "forkserver" in " ".join(child.cmdline())]
    return [child for server in servers for child in server.children()]


@pytest.mark.parametrize("size", SIZES)
def test_training_equals_one_process(config, make_rows, size):
    """And all ranks have the same bits."""
    rows = make_rows()
    expected_metrics, expected = jobs.train(ALONE, config, rows)
    results = launch(jobs.train, size, config, rows)
    for metrics, weights in results:
        assert_as_one(metrics, weights, expected_metrics, expected, rel=1e-5, atol=2e-5)
        assert all(np.array_equal(value, results[0][1][name]) for name, value in weights.items())


@pytest.mark.parametrize("kind", ["muon_split", pytest.param("adamw", marks=pytest.mark.slow)])
@pytest.mark.parametrize("size", SIZES)
def test_the_sharded_optimizer_makes_the_same_bits_with_a_share_of_the_state(config, size, kind):
    """Every rank ends with the weights of the whole optimizer; its state is divided without overlap."""
    expected, whole = jobs.optimize(ALONE, config, kind)
    results = launch(jobs.optimize, size, config, kind)
    for weights, _ in results:
        for name, value in weights.items():
            assert np.array_equal(value, expected[name]), name
    states = [state for _, state in results]
    assert sorted(name for state in states for name in state) == sorted(whole)
    for state in states:
        assert all(np.array_equal(value, whole[name]) for name, value in state.items())
    held = [sum(value.nbytes for value in state.values()) for state in states]
    largest = max(2 * value.nbytes for value in whole.values())
    assert sum(held) == sum(value.nbytes for value in whole.values())
    assert max(held) <= sum(held) / size + largest, held


@pytest.mark.parametrize(
    "size, blind", [(2, False), (3, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_sums_go_through_shared_memory_in_the_order_of_the_ranks(size, blind):
    """Where one rank cannot see the memory, none uses it, and sums are the same up to their order."""
    for rank, (shared, doubles, results) in enumerate(launch(jobs.sums, size, blind)):
        assert (shared, doubles) == (not blind, False)
        for summed, spread, reduced in results:
            inputs = [jobs.random(rank, [array.shape for array in summed.values()]) for rank in range(size)]
            for i in summed:
                total = sum((tensors[i] for tensors in inputs[1:]), inputs[0][i]).numpy()
                assert np.allclose(summed[i], total, rtol=1e-6) if blind else np.array_equal(summed[i], total)
                assert np.array_equal(spread[i], inputs[i % size][i].numpy())
                owned = total if i % size == rank else inputs[rank][i].numpy()
                assert (
                    np.allclose(reduced[i], owned, rtol=1e-6) if blind else np.array_equal(reduced[i], owned)
                )


def test_owners_are_balanced():
    costs = {"a": 8.0, "b": 7.0, "c": 6.0, "d": 5.0, "e": 4.0}
    assert share_out(costs, 2) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 0}
    assert share_out(costs, 1) == dict.fromkeys(costs, 0)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_read_by_any_number(config, make_rows, tmp_path):
    """Weights and moments bit for bit, and none twice; no file but safetensors and JSON."""
    saved = launch(jobs.save, 2, config, make_rows(), tmp_path / "saved")
    state = saved[0][1] | saved[1][1]
    files = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}
    listed = json.loads((tmp_path / "saved" / "manifest.json").read_text())["files"]
    assert sum(name.startswith("trainer/optimizer/") for name in listed) == 2
    read = {1: [jobs.load(ALONE, config, tmp_path / "saved")]}
    read[4] = launch(jobs.load, 4, config, tmp_path / "saved")
    for ranks in read.values():
        assert sorted(name for _, part in ranks for name in part) == sorted(state)
        for weights, part in ranks:
            assert all(np.array_equal(value, saved[0][0][name]) for name, value in weights.items())
            assert all(np.array_equal(value, state[name]) for name, value in part.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_torchs_own_loader_divides_a_checkpoint_and_what_it_writes_is_one(config, make_rows, tmp_path, size):
    folder = tmp_path / "saved"
    jobs.save(ALONE, config, make_rows(), folder)
    expected = {"weights": jobs.arrays(load_file(folder / "model.safetensors"))}
    expected["optimizer"] = jobs.arrays(moments(folder))
    for found in launch(jobs.divide_by_torch, size, folder, tmp_path / "divided"):
        for kind, tensors in expected.items():
            assert tensors and tensors.keys() == found[kind].keys()
            assert all(np.array_equal(value, found[kind][name]) for name, value in tensors.items())
    with atomic_dir(tmp_path / "again") as again:
        shutil.copytree(
            folder, again, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json", "optimizer")
        )
        shutil.copytree(tmp_path / "divided", again / "trainer" / "optimizer")
    _, state = jobs.load(ALONE, config, tmp_path / "again")
    assert state.keys() == expected["optimizer"].keys()
    assert all(np.array_equal(value, state[name]) for name, value in expected["optimizer"].items())


@pytest.mark.slow
def test_a_phase_begun_by_two_ranks_and_ended_by_one_equals_one_process(make_rows, tmp_path):
    rows = make_rows()
    expected = jobs.phase(ALONE, rows, tmp_path / "alone")
    with pytest.raises(FullarcError, match="Enough"):
        launch(jobs.phase, 2, rows, tmp_path / "moved", 3)
    assert [p.name for p in (tmp_path / "moved.steps").glob("step-*")] == ["step-00000002"]
    metrics = jobs.phase(ALONE, rows, tmp_path / "moved")
    for name in metrics.keys() - {"tokens_per_s"}:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
    weights, moved = (load_model(tmp_path / name).state_dict() for name in ("alone", "moved"))
    assert all(np.allclose(moved[name], value, atol=2e-5) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero1", "fsdp2", "fsdp2+ep"])
def test_a_phase_goes_on_to_the_same_bits(make_rows, tmp_path, parallel):
    """Weights, router biases and moments."""
    job, rows = partial(jobs.phase, parallel=parallel), make_rows()
    whole = launch(job, 2, rows, tmp_path / "whole")[0]
    with pytest.raises(FullarcError, match="Enough"):
        launch(job, 2, rows, tmp_path / "same", 3)
    assert [p.name for p in (tmp_path / "same.steps").glob("step-*")] == ["step-00000002"]
    metrics = launch(job, 2, rows, tmp_path / "same")[0]
    assert all(metrics[name] == whole[name] for name in metrics.keys() - {"tokens_per_s"})
    assert same_bits(tmp_path / "whole", tmp_path / "same")
    states = [moments(tmp_path / name) for name in ("whole", "same")]
    assert states[0] and states[0].keys() == states[1].keys()
    assert all(states[1][name].equal(value) for name, value in states[0].items())


@pytest.mark.parametrize("size", SIZES)
def test_rows_go_to_their_owners_and_back(size):
    assert launch(jobs.exchange, size) == [True] * size


@pytest.mark.slow
@pytest.mark.parametrize("size, experts", [(2, False), (2, True), (3, False), (4, False), (4, True)])
def test_fsdp_equals_one_process(config, make_rows, tmp_path, size, experts):
    """Metrics and weights to rounding, a share of everything on each rank, and a checkpoint like any other.

    Three ranks divide nothing evenly.
    """
    rows = make_rows()
    expected_metrics, expected, whole = jobs.fsdp(ALONE, config, rows, tmp_path / "alone")
    results = launch(jobs.fsdp, size, config, rows, tmp_path / "sharded", experts)
    for metrics, weights, held in results:
        for step, expected_step in zip(metrics, expected_metrics, strict=True):
            assert step["count"] == expected_step["count"]
            for name in step.keys() - {"seconds"}:
                assert step[name] == pytest.approx(expected_step[name], rel=1e-4), name
        for name, value in weights.items():
            assert np.allclose(value, expected[name], atol=5e-5), name
        share = 0.5 if size == 3 else 1 / size  # of four experts somebody has two
        assert held["weights"] <= whole["weights"] * share
        assert held["moments"] <= whole["moments"] * share * 1.02
    launch(jobs.fsdp_load, 2, config, tmp_path / "sharded", tmp_path / "again", experts)
    states = [moments(tmp_path / name) for name in ("alone", "sharded", "again")]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    for name, value in states[1].items():
        assert torch.allclose(states[0][name], value, atol=5e-5), name
        assert torch.equal(states[2][name], value), name
    alone = jobs.new_trainer(config)
    assert load_checkpoint(tmp_path / "sharded", alone) == {"place": 7}
    assert all(torch.equal(value, states[1][name]) for name, value in alone.optimizer.tensors().items())
    again = load_model(tmp_path / "again").state_dict()
    assert all(np.array_equal(again[name].numpy(), value) for name, value in results[0][1].items())


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_bad_loss_of_one_rank_stops_all_and_changes_nothing(config, make_rows, fsdp):
    told = launch(jobs.bad_loss, 2, config, make_rows(), fsdp)
    assert all("Step 0: the loss of micro-batch 3 is NaN or infinite" in message for message in told)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", ["lm_head.weight", "layers.1.mlp.experts.down_proj"])
def test_every_rank_names_what_is_not_finite_on_one(config, make_rows, experts, name):
    told = launch(jobs.not_finite, 2, config, make_rows(), experts, name)
    assert told[0] == told[1]
    assert f"first not finite: weight {name}" in told[0][0] and "the loss of micro-batch" in told[0][0]
    assert f"the gradient is NaN or infinite; first not finite: gradient of {name} (1 in all)" in told[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero1", "fsdp2", "fsdp2+ep", "cp", "pp"])
def test_a_bad_router_bias_of_one_rank_stops_all_and_is_never_saved(config, make_rows, tmp_path, parallel):
    name, out = "mtp_layer.mlp.gate.e_score_correction_bias", tmp_path / "out"
    for step, save in launch(jobs.bad_bias, 2, config, make_rows(), parallel, out):
        assert "Step 0: a buffer of the model is NaN or infinite" in step
        assert f"first not finite: weight {name} (1 in all). Nothing was updated" in step
        assert save == f"{name} is not finite; the checkpoint {out} was not written."
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "how, error, message",
    [
        ("refused", FullarcError, "The rows are of another model. Pack them again."),
        ("crashed", RankFailed, "Rank 1 of 2 failed: KeyError: 'lost'."),
        ("killed", RankFailed, "Rank 1 of 2 was killed."),
    ],
)
def test_the_first_failure_is_the_error_and_ends_all(how, error, message):
    with pytest.raises(error) as raised:
        launch(jobs.fail, 2, how)
    assert str(raised.value) == message
    assert not ranks_of(psutil.Process())


def test_a_result_that_cannot_travel_is_told():
    with pytest.raises(RankFailed, match="ended with what cannot be sent: .*lambda"):
        launch(jobs.unsendable, 2)


@pytest.mark.slow
def test_ranks_end_with_their_parent(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import rank_jobs, pathlib\n"
        "from fullarc.train.parallel import launch\n"
        f"if __name__ == '__main__': launch(rank_jobs.wait_for_ever, 2, pathlib.Path({str(tmp_path)!r}))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": ":".join(sys.path)})
    try:
        pids = _until(lambda: [int(p.stem) for p in tmp_path.glob("*.pid")], lambda found: len(found) == 2)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _until(lambda: [pid for pid in pids if psutil.pid_exists(pid)], lambda left: not left)


def _until(look, good, seconds=30.0):
    end = time.monotonic() + seconds
    while not good(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found
