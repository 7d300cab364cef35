"""LoRA adapters: bit for bit the checkpoint in which they are merged, whatever else is served."""

import gc
import re
import weakref

import pytest
import torch
from adapters import ALL, adapter, saved, stored, write

from fullarc.config.errors import FullarcError
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.lora import TENSORS, read_adapter
from fullarc.engine.request import Request, RequestError
from fullarc.engine.staging import Staging
from fullarc.model import QuantScheme, load_model, quantize_checkpoint

PROMPTS = [list(range(1, 60)), [7, 7, 9], [3 + (i * i) % 80 for i in range(70)]]
WANTED = dict(max_new_tokens=12, seeds=[1, 2, 3], stop_ids=(), top_logprobs=2)


def same(ours, theirs):
    return [(o.token_ids, o.logprobs, o.top_logprobs) for o in ours] == [
        (o.token_ids, o.logprobs, o.top_logprobs) for o in theirs
    ]


def engine(folder, **kwargs):
    return Engine(folder, **(dict(max_batch=4, max_len=128, chunk_tokens=48) | kwargs))


@pytest.mark.parametrize("chosen", [ALL, r"model\.layers\.1\.self_attn\.q_b_proj\.weight"])
def test_an_adapter_is_the_merged_checkpoint_to_the_bit(shaped, tmp_path, chosen, kernels):
    _, folder = shaped
    merged = saved(load_model(folder), adapter(tmp_path / "a", stored(folder), chosen), tmp_path / "merged")
    base, made, whole = (engine(one, kernels=kernels) for one in (folder, folder, merged))
    made.load_adapter("mine", tmp_path / "a")
    for _ in range(2):  # the second time from the prefix cache
        ours = made.generate(PROMPTS, adapter="mine", **WANTED)
        plain = base.generate(PROMPTS, **WANTED)
        assert same(ours, whole.generate(PROMPTS, **WANTED)) and not same(ours, plain)
        assert same(made.generate(PROMPTS, **WANTED), plain)


@pytest.mark.parametrize("steps", [0, 3])
def test_requests_of_all_adapters_run_beside_each_other(checkpoints, tmp_path, steps):
    folder = checkpoints["v0"]
    tensors, alone = stored(folder), {"": engine(folder).generate(PROMPTS, **WANTED)}
    made = engine(folder, draft_steps=steps)
    for number, name in enumerate(("one", "two")):
        other = adapter(tmp_path / name, tensors, seed=number)
        alone[name] = engine(saved(load_model(folder), other, tmp_path / f"merged {name}")).generate(
            PROMPTS, **WANTED
        )
        made.load_adapter(name, tmp_path / name)
    requests = {}
    for name in alone:
        for number, prompt in enumerate(PROMPTS):
            params = SamplingParams(max_new_tokens=12, seed=number + 1, top_logprobs=2)
            requests[name, number] = Request(f"{name} {number}", prompt, params, adapter=name)
            made.scheduler.check(requests[name, number])
            made.scheduler.submit(requests[name, number])
    while not made.scheduler.idle:
        made.scheduler.step()
    for (name, number), request in requests.items():
        expected = alone[name][number]
        assert (request.output, request.logprobs) == (expected.token_ids, expected.logprobs)
        assert request.cached_tokens == 0, "no other adapter's prefix"
    assert made.scheduler.core.weights is made.scheduler.weights


def test_every_adapter_has_its_turn(checkpoints, tmp_path):
    made = engine(checkpoints["v0"])
    for name in ("one", "two"):
        adapter(tmp_path / name, stored(checkpoints["v0"]))
        made.load_adapter(name, tmp_path / name)
    params = SamplingParams(max_new_tokens=30)
    requests = [Request(name, [1, 2, 3], params, adapter=name) for name in ("", "one", "two")]
    for request in requests:
        made.scheduler.submit(request)
    for _ in range(12):
        made.scheduler.step()
    assert [len(request.output) for request in requests] == [4, 4, 4]


def test_what_an_adapter_does_not_touch_is_shared(checkpoints, tmp_path):
    made = engine(checkpoints["v0"], kernels="torch", draft_steps=1)
    adapter(tmp_path / "a", stored(checkpoints["v0"]), r"model\.layers\.1\.mlp\.experts\.0\.up_proj\.weight")
    made.load_adapter("a", tmp_path / "a")
    base, own = made.scheduler.weights, made.scheduler.adapters["a"].weights
    assert own.layers[0] == base.layers[0] and own.layers[2] == base.layers[2] and own.mtp == base.mtp
    assert own.embed is base.embed and own.head is base.head and own.norm is base.norm
    assert own.layers[1].attention is base.layers[1].attention and own.layers[1].ffn is not base.layers[1].ffn


def test_what_an_adapter_does_not_touch_is_shared_in_c_too(checkpoints, tmp_path):
    """Each layer is a row of addresses: of the touched layer those of the FFN differ, and no others do."""
    made = engine(checkpoints["v0"], kernels="native", draft_steps=1)
    adapter(tmp_path / "a", stored(checkpoints["v0"]), r"model\.layers\.1\.mlp\.experts\.0\.up_proj\.weight")
    made.load_adapter("a", tmp_path / "a")
    base, own = made.scheduler.weights.model, made.scheduler.adapters["a"].weights.model
    assert (own.embed, own.norm, bytes(own.head)) == (base.embed, base.norm, bytes(base.head))
    for number in (0, 2, 3):
        assert bytes(own.layer[number]) == bytes(base.layer[number])
    touched, before = own.layer[1], base.layer[1]
    assert bytes(touched.hidden) == bytes(before.hidden) and bytes(touched.q) == bytes(before.q)
    assert touched.norm == before.norm and bytes(touched.out) == bytes(before.out)
    assert bytes(touched.gate_up) != bytes(before.gate_up)


def test_drafts_are_the_adapted_mtp_layers(shaped, tmp_path):
    _, folder = shaped
    merged = saved(load_model(folder), adapter(tmp_path / "a", stored(folder)), tmp_path / "merged")
    made, whole = engine(folder, draft_steps=3), engine(merged, draft_steps=3)
    made.load_adapter("a", tmp_path / "a")
    for one in (made, whole):
        one.scheduler.drafter.always()
    wanted = WANTED | dict(temperature=0.0)
    assert same(made.generate(PROMPTS, adapter="a", **wanted), whole.generate(PROMPTS, **wanted))
    assert made.scheduler.counters.spec == whole.scheduler.counters.spec


def test_stacked_experts_as_peft_names_them(checkpoints, tmp_path):
    """A [E r, I] with experts first, B [O, r E] with experts last; two parameters of one module are nested."""
    folder, generator = checkpoints["v0"], torch.Generator().manual_seed(0)
    config, tensors, rank = load_model(folder).config, stored(folder), 2
    experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    module, merged, parts = "model.layers.1.mlp.experts", dict(tensors), {}
    for nested, inputs, outputs, names in (
        (".base_layer", hidden, 2 * inner, ("gate_proj", "up_proj")), ("", inner, hidden, ("down_proj",))
    ):  # fmt: skip
        a = torch.randn(experts * rank, inputs, generator=generator)
        b = torch.randn(outputs, rank * experts, generator=generator) * 0.1
        path = f"base_model.model.{module}{nested}"
        parts |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        for expert in range(experts):
            delta = sum(
                torch.outer(b[:, k * experts + expert], a[expert * rank + k]) for k in range(rank)
            ) * ((4.0 if "down_proj" in names else 6.0) / rank)  # fmt: skip
            for name, rows in zip(names, delta.chunk(len(names)), strict=True):
                merged[f"{module}.{expert}.{name}.weight"] = (
                    tensors[f"{module}.{expert}.{name}.weight"] + rows
                )
    write(tmp_path / "a", {"r": 9, "lora_alpha": 4, "alpha_pattern": {r".*\.gate_up_proj": 6}}, parts)
    made, whole = engine(folder), engine(saved(load_model(folder), merged, tmp_path / "merged"))
    made.load_adapter("a", tmp_path / "a")
    ours, theirs = made.generate(PROMPTS, adapter="a", **WANTED), whole.generate(PROMPTS, **WANTED)
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids and one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
    assert not same(ours, made.generate(PROMPTS, **WANTED))


def test_scales(checkpoints, tmp_path):
    """alpha / r, alpha / sqrt(r) with use_rslora, and a module's own alpha."""
    tensors = stored(checkpoints["v0"])
    config = load_model(checkpoints["v0"]).config
    found = []
    for change in ({}, {"use_rslora": True}, {"alpha_pattern": {"o_proj": 30.0}}):
        adapter(tmp_path / "a", tensors, r".*layers\.1\.self_attn\.o_proj.*", rank=4, config=change)
        (delta,) = read_adapter(tmp_path / "a", config).values()
        found.append(delta.scale)
    assert found == [5 / 4, 5 / 2, 30 / 4]


def test_new_base_weights_carry_the_adapters(checkpoints, tmp_path):
    made = engine(checkpoints["v0"])
    adapter(tmp_path / "a", stored(checkpoints["v0"]))
    made.load_adapter("a", tmp_path / "a")
    made.generate(PROMPTS, adapter="a", **WANTED)
    made.update_weights(checkpoints["v1"], "1")
    other = adapter(tmp_path / "b", stored(checkpoints["v1"]))
    whole = engine(saved(load_model(checkpoints["v1"]), other, tmp_path / "merged"))
    ours = made.generate(PROMPTS, adapter="a", **WANTED)
    assert same(ours, whole.generate(PROMPTS, **WANTED)) and {o.weight_version for o in ours} == {"1"}
    assert [o.cached_tokens for o in ours] == [0, 0, 0]
    with pytest.raises(FullarcError, match="says nothing of the adapter 'a'"):
        made.scheduler.set_weights(made.scheduler.weights)


def test_an_unloaded_adapter_serves_those_who_have_it_and_is_gone_with_them(checkpoints, tmp_path):
    made = engine(checkpoints["v0"])
    adapter(tmp_path / "a", stored(checkpoints["v0"]))
    made.load_adapter("a", tmp_path / "a")
    alone = made.generate([PROMPTS[0]], 12, adapter="a", seeds=[1], stop_ids=())[0]
    running = Request("r", PROMPTS[0], SamplingParams(max_new_tokens=12, seed=1), adapter="a")
    made.scheduler.submit(running)
    while len(running.output) < 4:
        made.scheduler.step()
    weights = weakref.ref(made.scheduler.adapters["a"].weights)
    made.unload_adapter("a")
    with pytest.raises(RequestError, match="'a' is loaded"):
        made.generate([[1]], 1, adapter="a")
    with pytest.raises(RequestError, match="'a' is loaded"):
        made.unload_adapter("a")
    adapter(tmp_path / "a", stored(checkpoints["v0"]), seed=7)
    made.load_adapter("a", tmp_path / "a")
    again = made.generate([PROMPTS[0]], 12, adapter="a", seeds=[1], stop_ids=())[0]
    assert running.output == alone.token_ids and running.logprobs == alone.logprobs
    assert again.logprobs != alone.logprobs and again.cached_tokens == 0, "another one of the same name"
    del running
    gc.collect()
    assert weights() is None


def without(name):
    return lambda parts: {key: value for key, value in parts.items() if name not in key}


def changed(name, change):
    return lambda parts: {key: change(value) if name in key else value for key, value in parts.items()}


BAD = [
    (dict(config={"use_dora": True}), "use_dora = True"),
    (dict(config={"bias": "all"}), "bias = 'all'"),
    (dict(config={"peft_type": "IA3"}), "peft_type = 'IA3'"),
    (dict(config={"modules_to_save": ["lm_head"]}), "modules_to_save"),
    (dict(config={"init_lora_weights": "pissa"}), "init_lora_weights = 'pissa'"),
    (dict(config={"alora_invocation_tokens": [1]}), "alora_invocation_tokens"),
    (dict(config={"lora_alpha": "much"}), "cannot be read"),
    (dict(config={"lora_alpha": float("nan")}), "contains NaN"),
    (dict(config={"alpha_pattern": {"(": 1.0}}), "cannot be read"),
    (dict(edit=without("lora_B")), "do not fit together"),
    (dict(edit=changed("lora_B", lambda b: b[:, :2])), "do not fit together"),
    (dict(edit=changed("lora_B", lambda b: b[:-1])), "is for"),
    (dict(edit=changed("lora_A", lambda a: a / 0)), "NaN or infinity"),
    (dict(edit=lambda parts: {"base_model.model.lm_head.weight": torch.ones(2, 2)}), "not a matrix of a LoRA"),
    (dict(edit=lambda parts: {k.replace("layers.1", "layers.9"): v for k, v in parts.items()}), "no matrix of this"),
    (dict(edit=lambda parts: {k.replace("self_attn.q_b_proj", "mlp.gate"): v for k, v in parts.items()}),
     "no matrix of this"),
]  # fmt: skip


@pytest.mark.parametrize("how, message", BAD)
def test_a_bad_adapter_is_named_and_changes_nothing(checkpoints, tmp_path, how, message):
    made = engine(checkpoints["v0"])
    adapter(tmp_path / "a", stored(checkpoints["v0"]), r".*layers\.1\.self_attn\.q_b_proj.*", **how)
    with pytest.raises(FullarcError, match=re.escape(message)) as caught:
        made.load_adapter("a", tmp_path / "a")
    assert "\n" not in str(caught.value) and not made.scheduler.adapters


def test_files_that_are_missing_or_torn(checkpoints, tmp_path):
    made = engine(checkpoints["v0"])
    adapter(tmp_path / "a", stored(checkpoints["v0"]))
    (tmp_path / "a" / TENSORS).write_bytes((tmp_path / "a" / TENSORS).read_bytes()[:-9])
    with pytest.raises(FullarcError, match="cannot be read"):
        made.load_adapter("a", tmp_path / "a")
    (tmp_path / "a" / TENSORS).unlink()
    for folder in (tmp_path / "a", tmp_path / "nowhere"):
        with pytest.raises(FullarcError, match="is no adapter"):
            made.load_adapter("a", folder)


def test_a_quantised_checkpoint_takes_no_adapter_and_no_tensor(checkpoints, tmp_path):
    """Said by that name, whether an adapter is there when the checkpoint comes or comes to it."""
    adapter(tmp_path / "a", stored(checkpoints["v0"]))
    quantize_checkpoint(checkpoints["v0"], tmp_path / "q", {"experts": QuantScheme(4, 0)})
    says = re.escape(
        f"{tmp_path / 'q'} is quantised: its matrices are integers with scales, so no adapter can be"
    )
    integers, floats = engine(tmp_path / "q"), engine(checkpoints["v0"])
    with pytest.raises(FullarcError, match=says):
        integers.load_adapter("a", tmp_path / "a")
    floats.load_adapter("a", tmp_path / "a")
    with pytest.raises(FullarcError, match=says):
        floats.update_weights(tmp_path / "q", "1")
    assert floats.scheduler.version == "0"
    floats.unload_adapter("a")
    floats.update_weights(tmp_path / "q", "1")
    staging = Staging(integers.origin, integers.scheduler.weights)
    with pytest.raises(
        FullarcError, match="is quantised: .* no tensor can take another's place. Update from a whole"
    ):
        staging.from_tensors({"model.norm.weight": torch.ones(32)}, "1")
