"""What cannot be trained is said in one sentence that names it, and everything is as it was."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import LOSS, make_trainer, tiny, tiny_phase

from fullarc.config.errors import FullarcError
from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa
from fullarc.train import NonFinite, Rows, load_checkpoint, run_phase, save_checkpoint
from fullarc.train.parallel import launch

MATRIX = "layers.0.self_attn.q_b_proj.weight"


def everything(trainer):
    """Copies of weights, optimizer state and step."""
    tensors, values = trainer.state()
    return {n: v.clone() for n, v in (trainer.model.state_dict() | tensors).items()}, dict(values)


@pytest.fixture
def saved(config, make_rows, tmp_path):
    """A checkpoint after a step, its folder open for changes, and a trainer that has gone elsewhere."""
    rows = Rows(make_rows(), 4, 0)
    one, other = (make_trainer(GlmMoeDsa(config).init_weights(seed)) for seed in (1, 2))
    one.step([rows.next()], LOSS)
    for _ in range(2):
        other.step([rows.next()], LOSS)
    save_checkpoint(tmp_path / "c", one, {"at": 1})
    return tmp_path / "c", other


def change(file, **tensors):
    """Replace tensors of a safetensors file; None removes."""
    found = {name: value.clone() for name, value in load_file(file).items()}
    for name, value in tensors.items():
        if value is None:
            del found[name]
        else:
            found[name] = value
    save_file(found, file)


@pytest.mark.parametrize(
    "part, name, value, message",
    [
        ("trainer/optimizer/*", f"momentum.{MATRIX}", None, "momentum.*q_b_proj.weight is missing"),
        (
            "trainer/optimizer/*",
            f"momentum.{MATRIX}",
            torch.zeros(2, 2),
            r"q_b_proj.weight has shape \(2, 2\)",
        ),
        ("trainer/optimizer/*", "adamw.exp_avg.norm.weight", torch.zeros(3), r"norm.weight has shape \(3,\)"),
        ("trainer/optimizer/*", "adamw.exp_avg_sq.norm.weight", None, "exp_avg_sq.norm.weight is missing"),
        ("trainer/optimizer/*", "momentum.layers.9", torch.zeros(1), "too many, first momentum.layers.9"),
        ("model", "lm_head.weight", None, "tensor lm_head.weight is missing"),
        ("model", "lm_head.weight", torch.zeros(2, 2), r"lm_head.weight has shape \(2, 2\)"),
        ("model", "model.layers.7.norm.weight", torch.zeros(2), "unexpected tensor model.layers.7.norm"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(saved, part, name, value, message, monkeypatch):
    folder, trainer = saved
    before = everything(trainer)
    (file,) = folder.glob(f"{part}.safetensors")
    change(file, **{name: value})
    monkeypatch.setattr("fullarc.train.checkpoint.verify_manifest", lambda folder: None)
    with pytest.raises(FullarcError, match=message):
        load_checkpoint(folder, trainer)
    tensors, values = everything(trainer)
    assert values == before[1] and tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


def test_a_checkpoint_of_another_optimizer_or_model_changes_nothing(saved, config):
    folder, trainer = saved
    wider = GlmMoeDsa(preset("nano", vocab_size=64, max_position_embeddings=128, moe_intermediate_size=32))
    for other, message in (
        (make_trainer(trainer.model, kind="adamw"), "trained with muon_split, not adamw"),
        (make_trainer(wider.init_weights(0)), r"gate_proj.weight has shape \(16, 32\), expected \(32, 32\)"),
    ):
        before = everything(other)[0]
        with pytest.raises(FullarcError, match=message):
            load_checkpoint(folder, other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in everything(other)[0].items())


def test_rows_longer_than_the_positions_are_refused_before_the_first_step(make_rows, tmp_path):
    rows = make_rows(length=160)
    with pytest.raises(
        FullarcError, match="rows of 160 tokens exceed the model's max_position_embeddings 128"
    ):
        run_phase(tiny_phase(rows), tiny, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("planted", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [
    "embed_tokens.weight", "layers.1.mlp.experts.down_proj", "mtp_layer.eh_proj.weight",
    "layers.1.mlp.gate.e_score_correction_bias", "mtp_layer.mlp.gate.e_score_correction_bias",
])  # fmt: skip
def test_a_bad_weight_stops_a_phase_with_its_name_and_the_last_checkpoint_is_good(
    make_rows, tmp_path, name, planted
):
    rows, started = make_rows(n=10), []

    def start():
        started.append(tiny())
        return started[-1]

    def plant(step, **_):
        if step == 5:
            started[0].state_dict()[name].fill_(planted)

    with pytest.raises(NonFinite, match=f"Step 5: .* is NaN or infinite; first not finite: weight {name}"):
        run_phase(tiny_phase(rows), start, tmp_path / "out", log=plant)
    assert not (tmp_path / "out").exists()
    for out in ("out", "straight"):  # goes on from the last good checkpoint; from the start
        run_phase(tiny_phase(rows), tiny, tmp_path / out)
    files = [load_file(tmp_path / n / "model.safetensors") for n in ("out", "straight")]
    assert all(torch.equal(value, files[1][n]) for n, value in files[0].items())


def test_a_bad_router_bias_shows_in_no_loss_and_stops_a_step_all_the_same(config, make_rows):
    name, rows = "layers.1.mlp.gate.e_score_correction_bias", Rows(make_rows(), 4, 0)
    trainer, batch = make_trainer(GlmMoeDsa(config).init_weights(1)), rows.next()
    trainer.step([batch], LOSS)
    bias = trainer.model.state_dict()[name]
    bias[2] = torch.nan
    before = everything(trainer)
    assert LOSS(trainer.model, batch).total.isfinite()
    message = f"Step 1: a buffer of the model is NaN or infinite; first not finite: weight {name} .1 in all"
    with pytest.raises(NonFinite, match=message):
        trainer.step([batch], LOSS)
    tensors, values = everything(trainer)
    assert values == before[1]
    assert all(
        torch.equal(tensor.nan_to_num(7.0), before[0][name].nan_to_num(7.0))
        for name, tensor in tensors.items()
    )
    bias[2] = 0.0
    assert trainer.step([batch], LOSS)["count"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("parallel, size, message", [
    ("fsdp2", 2, "1 micro-batches do not divide evenly over 2 ranks"),
    ("fsdp2+ep", 3, "4 experts cannot be divided evenly over 3 ranks"),
    ("cp", 3, "Rows of 32 positions cannot be divided over 3 ranks"),
    ("pp", 4, "A pipeline of 2 layers has at most 3 ranks, not 4"),
])  # fmt: skip
def test_ranks_that_do_not_divide_leave_nothing(make_rows, tmp_path, parallel, size, message):
    import rank_jobs

    job = partial(rank_jobs.phase, parallel=parallel, batch_rows=4, micro_rows=4)
    with pytest.raises(FullarcError, match=message):
        launch(job, size, make_rows(n=10), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
