"""What a quantised model loses is measured right; what others quantised becomes a checkpoint with their integers."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fullarc import quantize
from fullarc.chat import Tokenizer
from fullarc.config.errors import FullarcError
from fullarc.config.model import preset
from fullarc.engine import Engine
from fullarc.evals import bench_quantize
from fullarc.evals.bench_engine_peers import prompts
from fullarc.evals.bench_quantize import adopt, compared, logprobs, plan_of
from fullarc.model import GlmMoeDsa, load_model, quantize_checkpoint, save_model
from fullarc.model.compressed import kind_of

VOCAB = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantize") / "run" / "stages" / "sft" / "checkpoint"
    save_model(GlmMoeDsa(preset("2m", vocab_size=VOCAB, num_hidden_layers=2)).init_weights(0), path)
    Tokenizer.train(["one two one two"], VOCAB).save(path)
    return path


class Told:
    """In place of an engine: one whose next-token logits are given, whatever is asked."""

    def __init__(self, logits):
        core = SimpleNamespace(forward=lambda chunks: None, logits=lambda hidden, rows: logits[: len(rows)])
        self.scheduler = SimpleNamespace(core=core)


def test_what_is_lost_is_what_a_hand_computes():
    p, q = (
        torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]),
        torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]),
    )
    ids = [2, 1, 0]  # first a token of p = 0.25 and q = 0.5, then one on which both agree
    lost = compared(Told(q.log()), [ids, ids], [p.log(), p.log()])
    kl = 0.5 * torch.tensor(2.0).log() + 0.25 * torch.tensor(0.5).log()
    assert lost.kl == pytest.approx(float(kl) / 2, rel=1e-6) and lost.kl_se == pytest.approx(0, abs=1e-9)
    assert lost.perplexity == pytest.approx(0.5**0.5 - 1, rel=1e-6)
    assert lost.same == 0.5


def test_logprobs_are_those_of_the_model(folder):
    [ids] = prompts(1, 20, VOCAB)
    told = logprobs(Engine(folder, 1, 32, prefix_tokens=0), ids)
    with torch.inference_mode():
        model = load_model(folder)(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    assert told.shape == (19, VOCAB) and (told - model).abs().max() < 1e-4


def test_a_model_loses_nothing_to_itself_and_something_to_fewer_bits(folder, tmp_path):
    windows = prompts(3, 20, VOCAB)
    reference = [logprobs(Engine(folder, 1, 32, prefix_tokens=0), ids) for ids in windows]
    itself = compared(Engine(folder, 1, 32, prefix_tokens=0), windows, reference)
    assert (itself.kl, itself.perplexity, itself.same) == (0, 0, 1)
    losses = []
    for bits in (8, 4):
        quantize_checkpoint(folder, tmp_path / str(bits), plan_of(bits), True)
        losses.append(compared(Engine(tmp_path / str(bits), 1, 32, prefix_tokens=0), windows, reference).kl)
    assert 0 < losses[0] < losses[1]


def test_schemes_and_precisions_are_each_measured_as_what_they_are(folder, tmp_path, monkeypatch):
    """W4A16 against what `fullarc quantize` writes, FP8 and bf16 against engines that compute in them."""
    windows, asked = prompts(2, 20, VOCAB), []
    names = ("bf16", "FP8, emulated", "W4A16", "W4A8")
    monkeypatch.setattr(bench_quantize, "OURS", {name: bench_quantize.OURS[name] for name in names})
    monkeypatch.setattr(bench_quantize, "SPEED", ())
    monkeypatch.setattr(bench_quantize, "held_out", lambda checkpoint: windows)
    monkeypatch.setattr(bench_quantize, "_success", lambda of, _, dtype: asked.append((of.name, dtype)) or {})
    chosen = SimpleNamespace(checkpoint=folder, peers=None, success=True)
    told = {one["name"]: one["value"] for one in bench_quantize.measure(chosen)["claims"]}
    assert quantize.main([str(folder), str(tmp_path / "w4a16"), "--scheme", "w4a16"]) == 0
    reference = [logprobs(Engine(folder, 1, 32, prefix_tokens=0), ids) for ids in windows]
    by_hand = {
        "bf16": (folder, "bf16"),
        "FP8, emulated": (folder, "fp8"),
        "W4A16": (tmp_path / "w4a16", "fp32"),
    }
    for name, (path, dtype) in by_hand.items():
        lost = compared(Engine(path, 1, 32, prefix_tokens=0, dtype=dtype), windows, reference)
        kept = lost.kl * 1e3, 100 * lost.perplexity, 100 * lost.same
        of = [told[f"{name}: {key}"] for key in ("KL from fp32", "perplexity", "same first choice")]
        assert of == [round(value, 3) for value in kept] and lost.kl > 0
    assert asked == [
        (folder.name, "fp32"),
        (folder.name, "bf16"),
        (folder.name, "fp8"),
        ("W4A16", "fp32"),
        ("W4A8", "fp32"),
    ]


def test_bytes_are_those_of_the_file(folder, tmp_path):
    quantize_checkpoint(folder, tmp_path / "packed", plan_of(4))
    after, before = (load_file(at / "model.safetensors") for at in (tmp_path / "packed", folder))
    told = {one["name"]: one["value"] for one in bench_quantize._bytes(folder, tmp_path)}
    for what, experts in (("experts", True), ("all other quantised layers", False)):
        names = [name for name in before if kind_of(name) and ("mlp.experts." in name) == experts]
        leaves = ("_packed", "_scale", "_shape", "")
        now = sum(after[n + leaf].nbytes for n in names for leaf in leaves if n + leaf in after)
        assert told[f"W4A8: bytes of {what} against bf16"] == pytest.approx(
            now / sum(2 * before[name].numel() for name in names), abs=6e-4
        )


def test_speeds_are_told_for_every_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_quantize, "SPEED", ("nano", "2m"))
    monkeypatch.setattr(bench_quantize, "PAYS", ("2m",))
    monkeypatch.setattr(bench_quantize, "CONTEXT", 16)
    monkeypatch.setattr(bench_quantize, "in_turn", lambda works, repeats: [work() or 2.0 for work in works])
    nano, two = bench_quantize._speed(tmp_path)
    assert (nano["value"], nano["ok"], two["value"], two["ok"]) == (1.0, None, 1.0, True)


@pytest.mark.parametrize("left_alone", ["", "model.layers.0.mlp."])
def test_what_others_quantised_becomes_a_checkpoint_of_ours(folder, tmp_path, left_alone):
    """They save no MTP layer, other values of what is not quantised, and may leave matrices alone."""
    quantize_checkpoint(folder, tmp_path / "ours", plan_of(4), True)
    ours, original = (load_file(at / "model.safetensors") for at in (tmp_path / "ours", folder))
    made = {name: tensor for name, tensor in ours.items() if "layers.2." not in name}
    for name in [name for name in made if left_alone and name.startswith(left_alone)]:
        del made[name]
    made |= {name: tensor for name, tensor in original.items() if left_alone and name.startswith(left_alone)}
    made = {name: tensor + 1 if "norm" in name else tensor for name, tensor in made.items()}
    scales = [name for name in made if name.endswith("experts.3.down_proj.weight_scale")]
    for name in scales:
        made[name] = -2 * made[name]
    (tmp_path / "made").mkdir()
    save_file(made, tmp_path / "made" / "model.safetensors")

    adopt(tmp_path / "made", folder, tmp_path / "out", plan_of(4))
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == {name for name in ours if "layers.2." not in name}
    differ = [name for name in out if not torch.equal(out[name], ours[name])]
    assert sorted(differ) == sorted(scales) and torch.equal(out[scales[0]], made[scales[0]])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert all(kind_of(name) is None or out[name].dtype == torch.int8 for name in out)
    assert Engine(tmp_path / "out", 1, 32).generate(prompts(1, 8, VOCAB), 2, stop_ids=())


def test_without_a_run_there_is_nothing_to_measure_on(folder):
    with pytest.raises(FullarcError, match="belongs to no run with held-out text"):
        bench_quantize.held_out(folder)
