"""The four stages in order at toy size, through the settings a recipe gives them."""

import json
import shutil

import pytest
import torch

from fullarc.chat import Tokenizer
from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.recipe import load_recipe
from fullarc.model import QuantScheme, load_config, load_model, save_model
from fullarc.model.quant import fake_quantize
from fullarc.train import run_dsa, run_midtrain, run_pretrain, run_sft

RUN = {"pretrain": run_pretrain, "midtrain": run_midtrain, "dsa": run_dsa, "sft": run_sft}
OVERRIDES = [
    "size=nano",
    "model.vocab_size=300",
    "model.index_topk=16",
    "stages.pretrain.seq_len=32",
    "stages.pretrain.batch_tokens=128",
    "stages.midtrain.rope_theta=50000.0",
    *(f"stages.{name}.seq_len=64" for name in ("midtrain", "dsa", "sft")),
    *(f"stages.{name}.batch_tokens=256" for name in ("midtrain", "dsa", "sft")),
    *(f"stages.{name}.steps=3" for name in RUN),
    "stages.dsa.indexer_steps=6",
    "stages.dsa.indexer_lr=0.05",
]


@pytest.fixture
def run(tmp_path, make_rows):
    """run(stage, model_in) -> (result, context); the data stage's folders are there."""
    recipe = load_recipe(None, OVERRIDES).recipe
    Tokenizer.train(["the cat sat on the mat " * 20], 300).save(tmp_path / "data" / "tokenizer")
    make_rows("data/rows/pretrain", n=12, length=32, isolate=False)
    for name in ("midtrain", "sft"):
        make_rows(f"data/rows/{name}", n=12, length=64)

    def start(name, model_in=None, **changes):
        stage = recipe.stages[name].model_copy(update=changes)
        logs, events = [], []
        ctx = StageContext(
            recipe, stage, name, tmp_path, tmp_path / "stages" / name, model_in, 1,
            lambda step, **metrics: logs.append((step, metrics)),
            lambda kind, **fields: events.append((kind, fields)),
        )  # fmt: skip
        return RUN[name](ctx), ctx, logs, events

    return start


def test_the_arc_from_pretraining_to_sft(run):
    result, pre, logs, _ = run("pretrain")
    config = load_config(pre.checkpoint)
    assert config.dense_attention and config.eos_token_id == Tokenizer.load(pre.checkpoint).stop_ids
    assert logs[-1][0] == 3 and logs[-1][1]["total"] == 3
    assert {"loss", "lr", "tokens_per_s", "grad_norm", "expert_load", "mtp_loss_1", "mtp_loss_3"} <= set(
        logs[-1][1]
    )
    assert result["loss"] == logs[-1][1]["loss"]

    _, mid, _, _ = run("midtrain", pre.checkpoint)
    assert load_config(mid.checkpoint).rope_theta == 50000.0

    result, dsa, logs, events = run("dsa", mid.checkpoint)
    assert load_config(dsa.checkpoint).index_topk == 16
    assert [kind for kind, _ in events].count("dense_against_sparse") == 3
    assert result["index_kl_warmup"] < result["index_kl_start"]
    assert result["loss_dense_warmup"] == pytest.approx(result["loss_dense_start"], abs=1e-6)
    assert result["loss_sparse_start"] != result["loss_dense_start"]
    assert logs[-1][0] == 9 and {"loss", "index_kl"} <= set(logs[-1][1])
    before, warm, end = (load_model(p) for p in (mid.checkpoint, dsa.out / "warmup", dsa.checkpoint))
    for name, value in warm.state_dict().items():
        if name.endswith("bias") and "indexer" not in name:
            continue
        if ".indexer." not in name:
            assert torch.equal(value, before.state_dict()[name]), name
    moved = [n for n, v in end.state_dict().items() if not torch.equal(v, warm.state_dict()[n])]
    assert any(".indexer." in n for n in moved) and any("mlp.experts" in n for n in moved)

    _, sft, _, _ = run("sft", dsa.checkpoint)
    indexer = "layers.0.self_attn.indexer.wq_b.weight"
    assert torch.equal(load_model(sft.checkpoint).state_dict()[indexer], end.state_dict()[indexer])
    assert (sft.checkpoint / "chat_template.jinja").is_file()
    assert load_config(sft.checkpoint).index_topk == 16


def test_a_stage_is_the_same_twice(run, tmp_path):
    _, ctx, _, _ = run("pretrain")
    first = json.loads((ctx.checkpoint / "manifest.json").read_text())["files"]["model.safetensors"]
    (ctx.checkpoint / "manifest.json").unlink()
    run("pretrain")
    assert json.loads((ctx.checkpoint / "manifest.json").read_text())["files"]["model.safetensors"] == first


def test_bad_input_is_named(run):
    with pytest.raises(FullarcError, match=r"packed to 32 tokens a row, stages.pretrain.seq_len is 64"):
        run("pretrain", seq_len=64)
    with pytest.raises(FullarcError, match="midtrain needs a model"):
        run("midtrain")


def test_pretraining_starts_as_it_is_told(run):
    _, plain, _, _ = run("pretrain", steps=0, induction=False)
    embeddings = load_model(plain.checkpoint).embed_tokens.weight
    shutil.rmtree(plain.out)
    _, induction, _, _ = run("pretrain", steps=0, induction=True)
    constant = (load_model(induction.checkpoint).embed_tokens.weight.std(0) == 0).sum()
    assert constant > 0 and (embeddings.std(0) == 0).sum() == 0


def test_the_rate_of_the_adamw_group_is_relative(run):
    weights = []
    for scale in (1.0, 0.001):
        _, ctx, _, _ = run("pretrain", steps=1, lr=1e-2, warmup_steps=0, adamw_scale=scale)
        weights.append(load_model(ctx.checkpoint).state_dict())
        shutil.rmtree(ctx.out)
    _, start, _, _ = run("pretrain", steps=0)
    first = load_model(start.checkpoint).state_dict()

    def moved(name: str) -> list[float]:
        return [float((after[name] - first[name]).abs().max()) for after in weights]

    fast, slow = moved("lm_head.weight")
    assert fast == pytest.approx(1e-2, rel=0.2) and slow < fast / 500
    fast, slow = moved("layers.0.self_attn.o_proj.weight")
    assert fast == pytest.approx(slow, rel=1e-3), "Muon's matrices move as before"


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["zero1", "fsdp2", "fsdp2+ep", "cp", "pp"])
def test_two_processes_end_with_the_model_of_one_and_report_the_same(run, parallel):
    """Pre-training, then both phases of DSA, where most of the model is frozen at first."""
    found = {}
    for processes in (1, 2):
        result, pre, logs, _ = run("pretrain", processes=processes, parallel=parallel)
        dsa_result, dsa, dsa_logs, events = run("dsa", pre.checkpoint, processes=processes, parallel=parallel)
        states = [load_model(ctx.checkpoint).state_dict() for ctx in (pre, dsa)]
        found[processes] = result | dsa_result, [step for step, _ in logs + dsa_logs], events, states
        for ctx in (pre, dsa):
            shutil.rmtree(ctx.out)
    (one, steps, events, states), (two, *others, two_states) = found[1], found[2]
    assert others[0] == steps and [kind for kind, _ in others[1]] == [kind for kind, _ in events]
    for name in one.keys() - {"tokens_per_s"}:
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    # the warm-up of the MTP layer's indexer amplifies rounding: one process with other micro-batches differs as much
    for state, two_state, atol in zip(states, two_states, (1e-4, 5e-3), strict=True):
        assert all(torch.allclose(two_state[name], value, atol=atol) for name, value in state.items())


def test_an_error_of_a_stage_in_processes_is_its_own(run):
    with pytest.raises(FullarcError, match="Stage midtrain needs a model to start from"):
        run("midtrain", processes=2)


def test_quantisation_aware_sft_sees_the_quantised_model(run, tmp_path):
    _, start, _, _ = run("pretrain", steps=0)
    exported = load_model(start.checkpoint)
    with torch.no_grad():
        for name, weight in exported.named_parameters():
            if ".experts." in name:
                weight.copy_(fake_quantize(weight, QuantScheme(4, 16)))
    save_model(exported, tmp_path / "exported", start.checkpoint)

    first = {}
    cases = {
        "off": (start.checkpoint, 0),
        "aware": (start.checkpoint, 4),
        "exported": (tmp_path / "exported", 0),
    }
    for case, (model_in, bits) in cases.items():
        _, ctx, logs, _ = run("sft", model_in, steps=1, qat_bits=bits, qat_group=16, optimizer="adamw")
        first[case] = logs[0][1]["loss"], logs[0][1]["grad_norm"], load_model(ctx.checkpoint)
        shutil.rmtree(ctx.out)
    assert first["aware"][:2] == first["exported"][:2] != first["off"][:2]
    # what is stored are the full-precision weights, one small step away from where they began
    expert = "layers.1.mlp.experts.down_proj"
    before, after = load_model(start.checkpoint).state_dict()[expert], first["aware"][2].state_dict()[expert]
    rounding = (exported.state_dict()[expert] - before).abs().max()
    assert 0 < (after - before).abs().max() < rounding / 4


def test_quantisation_aware_sft_goes_on_quantised(run, monkeypatch):
    _, start, _, _ = run("pretrain", steps=0)
    settings = dict(steps=3, save_every=1, qat_bits=4, qat_group=16, qat_shared=True)
    _, whole, _, _ = run("sft", start.checkpoint, **settings)
    expected = load_model(whole.checkpoint).state_dict()
    shutil.rmtree(whole.out)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("fullarc.train.stages.save_checkpoint", killed)  # the last one, not those on the way
        run("sft", start.checkpoint, **settings)
    _, again, _, events = run("sft", start.checkpoint, **settings)
    assert ("resumed", 2) in [(kind, fields.get("step")) for kind, fields in events]
    state = load_model(again.checkpoint).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
