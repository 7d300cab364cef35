"""Checkpoints: whole, resumable bit for bit after SIGKILL, and never fewer than one good one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from equality import moments
from safetensors.torch import load_file, save_file

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir
from fullarc.config.model import preset
from fullarc.config.stages import Compute
from fullarc.model import GlmMoeDsa, load_model
from fullarc.train import (
    LmLoss,
    OptimSettings,
    Phase,
    Rows,
    Steps,
    Trainer,
    checkpoint,
    latest,
    load_checkpoint,
    run_phase,
    save_checkpoint,
    schedule,
    trained,
)
from fullarc.train.checkpoint import saved_data_state

LOSS = LmLoss(mtp_steps=1)


def make_trainer(model, **settings):
    choice = trained(indexer=False, mtp=True)
    return Trainer(model, OptimSettings(**settings), lambda step: 0.01, choice, router_bias_rate=0.01)


def tiny():
    return GlmMoeDsa(preset("nano", vocab_size=64, max_position_embeddings=128, index_topk=128)).init_weights(
        1
    )


def tiny_phase(rows, steps=9):
    return Phase(
        steps=steps,
        rows=Path(rows),
        batch_rows=4,
        micro_rows=2,
        optim=OptimSettings(),
        lr=schedule(peak=0.01, final=0.001, warmup=2, total=steps, shape="cosine"),
        trainable=trained(indexer=False, mtp=True),
        loss=LmLoss(mtp_steps=2, mtp_rows=0.5, aux_weight=1e-3),
        router_bias_rate=0.01,
        save_every=2,
        log_every=1,
        seed=5,
    )


def train_and_die(rows, out, **how):
    """Run in a child: trains, and is killed from outside; what it prints says when it may be."""
    torch.set_num_threads(1)
    computed = {name: how.pop(name) for name in list(how) if name in Compute.model_fields}
    phase = replace(tiny_phase(rows), compute=Compute(**computed), **how)
    run_phase(phase, tiny, Path(out), log=lambda step, **_: print(step, flush=True))


def same_bits(a, b):
    left, right = (load_file(folder / "model.safetensors") for folder in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def kill_after(step, rows, out, how=""):
    """Train in a child process (computing as `how` says) and SIGKILL it once it has reported `step`."""
    code = f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
    code += f"from test_checkpoint import train_and_die; train_and_die({str(rows)!r}, {str(out)!r}, {how})"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as child:
        for line in child.stdout:
            if int(line) == step:
                child.send_signal(signal.SIGKILL)
                break
        assert child.wait() == -signal.SIGKILL


def test_killed_and_resumed_ends_with_the_same_bits(make_rows, tmp_path):
    rows = make_rows(n=10)
    run_phase(tiny_phase(rows), tiny, tmp_path / "straight")
    kill_after(5, rows, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    assert latest(tmp_path / "killed.steps") is not None
    events, logged = [], []
    run_phase(
        tiny_phase(rows),
        tiny,
        tmp_path / "killed",
        log=lambda step, **_: logged.append(step),
        event=lambda kind, **fields: events.append((kind, fields["step"])),
    )
    assert events[0][0] == "resumed" and events[0][1] >= 4, "the fault must have happened after a save"
    assert logged[0] == events[0][1] + 1 and logged[-1] == 9
    assert same_bits(tmp_path / "straight", tmp_path / "killed")
    assert not (tmp_path / "killed.steps").exists()
    states = [moments(tmp_path / name) for name in ("straight", "killed")]
    assert states[0] and all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_killed_while_the_batch_grows_ends_with_the_same_bits(make_rows, tmp_path):
    """Steps 0-3 have two rows, 4-7 four, the last two six."""
    rows, counts = make_rows(n=10, loss=np.ones((10, 32), np.uint8)), []
    phase = replace(tiny_phase(rows, 10), batch_rows=6, batch_start=2, batch_warmup=8, save_every=3)
    phase = replace(phase, loss=LmLoss(), trainable=trained(indexer=False, mtp=False))
    run_phase(phase, tiny, tmp_path / "straight", log=lambda step, **told: counts.append(told["count"]))
    stream, expected = Rows(rows, 6, 5), []
    for size in [2] * 4 + [4] * 4 + [6] * 2:
        expected.append(float(stream.next(size).targets(1)[1].sum()))
    assert counts == expected
    assert saved_data_state(tmp_path / "straight")["rows"] == stream.state(), "each row once, none left out"

    def killed(step, **_):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_phase(phase, tiny, tmp_path / "killed", log=killed)
    assert latest(tmp_path / "killed.steps").name == "step-00000003"
    run_phase(phase, tiny, tmp_path / "killed")
    assert same_bits(tmp_path / "straight", tmp_path / "killed")
    run_phase(replace(phase, batch_warmup=0), tiny, tmp_path / "constant")
    assert not same_bits(tmp_path / "straight", tmp_path / "constant")


def test_a_finished_phase_is_not_trained_again(make_rows, tmp_path):
    rows = make_rows(n=10)
    first = run_phase(tiny_phase(rows, 3), tiny, tmp_path / "out")
    again = run_phase(tiny_phase(rows, 3), lambda: pytest.fail("trained again"), tmp_path / "out")
    assert first == again and first["loss"] > 0 and first["tokens_per_s"] > 0


def test_save_and_load_restore_everything(model, config, make_rows, tmp_path):
    rows = Rows(make_rows(), 4, 0)
    trainer = make_trainer(model)
    for _ in range(3):
        trainer.step([rows.next()], LOSS)
    save_checkpoint(tmp_path / "c", trainer, {"rows": rows.state()})
    other = make_trainer(GlmMoeDsa(config).init_weights(9))
    assert load_checkpoint(tmp_path / "c", other) == {"rows": rows.state()}
    assert other.step_number == 3
    assert model.layers[1].mlp.gate.e_score_correction_bias.any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    batch = rows.next()
    for one in (trainer, other):
        one.step([batch], LOSS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert {p.suffix for p in (tmp_path / "c").rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert torch.equal(load_model(tmp_path / "c").norm.weight, load_model(tmp_path / "c").norm.weight)


@pytest.mark.parametrize("files", [1, 3])
def test_files_of_whole_tensors_from_before_are_still_read(model, config, make_rows, tmp_path, files):
    trainer = make_trainer(model)
    trainer.step([Rows(make_rows(), 4, 0).next()], LOSS)
    save_checkpoint(tmp_path / "c", trainer, {})
    state, folder = trainer.optimizer.tensors(), tmp_path / "c" / "trainer"
    shutil.rmtree(folder / "optimizer")
    for number in range(files):
        part = f"-{number + 1:05d}-of-{files:05d}" if files > 1 else ""
        mine = {name: state[name] for name in sorted(state)[number::files]}
        save_file(mine, folder / f"optimizer{part}.safetensors")
    with atomic_dir(tmp_path / "old") as old:
        shutil.copytree(
            tmp_path / "c", old, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json")
        )
    other = make_trainer(GlmMoeDsa(config).init_weights(9))
    load_checkpoint(tmp_path / "old", other)
    read = other.optimizer.tensors()
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_another_optimizer_is_refused(model, tmp_path):
    save_checkpoint(tmp_path / "c", make_trainer(model), {})
    with pytest.raises(FullarcError, match="trained with muon_split, not adamw"):
        load_checkpoint(tmp_path / "c", make_trainer(model, kind="adamw"))


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.gate.e_score_correction_bias"])
def test_nan_weights_are_never_saved(model, tmp_path, name):
    model.state_dict()[name][0] = torch.nan
    with pytest.raises(FullarcError, match=f"{name} is not finite"):
        save_checkpoint(tmp_path / "c", make_trainer(model), {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_of_the_disk_and_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(checkpoint.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(OSError, match="No space left") as raised:
        save_checkpoint(tmp_path / "c", make_trainer(model), {})
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
def test_saving_and_loading_alone_warn_of_nothing(model, tmp_path):
    save_checkpoint(tmp_path / "c", make_trainer(model), {})
    load_checkpoint(tmp_path / "c", make_trainer(model))


def save_steps(steps, trainer, numbers):
    for number in numbers:
        trainer.step_number = number
        steps.save(trainer, {"at": number})


def test_keeps_the_newest_two_and_clears_leftovers(model, tmp_path):
    steps = Steps(tmp_path / "s")
    (tmp_path / "s" / ".step-00000001.99.tmp").mkdir(parents=True)
    save_steps(steps, make_trainer(model), (1, 2, 10))
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["step-00000002", "step-00000010"]
    assert latest(tmp_path / "s") == steps.path(10)


def test_damaged_or_torn_checkpoints_are_passed_over(model, tmp_path):
    events = []
    steps = Steps(tmp_path / "s", lambda kind, **fields: events.append((kind, fields)))
    save_steps(steps, make_trainer(model), (1, 2))
    weights = steps.path(2) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    steps.path(3).mkdir()  # no manifest
    (tmp_path / "s" / "step-new").mkdir()
    assert steps.latest() == steps.path(1)
    assert [kind for kind, _ in events] == ["checkpoint_damaged"] * 2
    assert "model.safetensors is damaged" in events[1][1]["reason"]
    with pytest.raises(FullarcError, match="damaged"):
        load_checkpoint(steps.path(2), make_trainer(model))


def test_a_good_checkpoint_outlives_damaged_newer_ones(model, tmp_path):
    steps = Steps(tmp_path / "s")
    save_steps(steps, make_trainer(model), (1,))
    for number in (7, 8, 9):
        steps.path(number).mkdir()
    save_steps(steps, make_trainer(model), (2,))
    assert steps.latest() == steps.path(2)


def test_nothing_saved_yet(tmp_path):
    assert latest(tmp_path / "none") is None


def test_a_model_without_trainer_state_is_named(model, tmp_path):
    from fullarc.model import save_model

    save_model(model, tmp_path / "m")
    with pytest.raises(FullarcError, match="no trainer state"):
        load_checkpoint(tmp_path / "m", make_trainer(model))


def test_extra_files_travel_with_the_checkpoint(model, tmp_path):
    def write(folder):
        (folder / "behaviour.json").write_text(json.dumps({"version": 3}))

    save_checkpoint(tmp_path / "c", make_trainer(model), {}, extra=write)
    assert "behaviour.json" in (tmp_path / "c" / "manifest.json").read_text()
