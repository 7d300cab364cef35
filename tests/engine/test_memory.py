"""What an engine holds and what a step needs: no layer that is not in use, and nothing of [T, T]."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import adapter
from safetensors.torch import save_file

from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir
from fullarc.config.model import ModelConfig
from fullarc.engine import Engine
from fullarc.engine.backend import forward_pass, prepare
from fullarc.engine.core import Chunk
from fullarc.engine.engine import load_weights
from fullarc.engine.native.library import library
from fullarc.engine.native.memory import Arena
from fullarc.engine.native.weights import pack
from fullarc.engine.staging import Staging
from fullarc.model import GlmMoeDsa, checkpoint, load_model, quantize_checkpoint, save_model
from fullarc.model.checkpoint import state_to_disk
from fullarc.model.compressed import KINDS
from fullarc.model.quant import QuantScheme

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from live_bytes import peak_bytes

# whole vectors in every direction, so that nothing is filled up
SHAPE = dict(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=64,
    num_attention_heads=4, q_lora_rank=64, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=64, index_n_heads=16,
    index_head_dim=16, index_topk=64, max_position_embeddings=512, eos_token_id=(0,), pad_token_id=0,
)  # fmt: skip


def model_of(**changes):
    return GlmMoeDsa(ModelConfig(**SHAPE | changes)).init_weights(0).eval()


def saved(folder, **changes):
    save_model(model_of(**changes), folder)
    return folder


def tensors_of(value, seen):
    """All tensors under an object."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, ModelConfig) or id(value) in seen:
        return []
    seen.add(id(value))
    inside = value if isinstance(value, list | tuple) else getattr(value, "__dict__", value)
    inside = (
        inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list | tuple) else ()
    )
    return [tensor for one in inside for tensor in tensors_of(one, seen)]


@pytest.fixture
def held(monkeypatch, kernels):
    """Bytes of the weights that a call makes."""

    def measure(call):
        kept, keep = [], Arena.keep
        monkeypatch.setattr(Arena, "keep", lambda self, x: kept.append(x.nbytes) or keep(self, x))
        weights = call()
        monkeypatch.undo()
        if kernels == "native":
            return sum(kept)
        return sum({t.data_ptr(): t.nbytes for t in tensors_of(weights, set())}.values())

    return measure


def test_an_mtp_layer_that_does_not_draft_is_not_held(tmp_path, kernels, held):
    """It is as large as one more decoder layer with its experts, a projection and three norms; in C drafts have an
    output layer of their own, in 8 bits with two numbers a row."""
    two, three = saved(tmp_path / "two"), saved(tmp_path / "three", num_hidden_layers=3)
    bytes_of = {
        (folder, drafts): held(lambda f=folder, d=drafts: load_weights(f, kernels=kernels, drafts=d))
        for folder, drafts in ((two, True), (two, False), (three, False))
    }
    layer, size = bytes_of[three, False] - bytes_of[two, False], SHAPE["hidden_size"]
    assert layer > 4 * 3 * size * 64 * 5  # four experts and the shared one
    head = SHAPE["vocab_size"] * (size + 8) if kernels == "native" else 0
    assert bytes_of[two, True] - bytes_of[two, False] == layer + 4 * (2 * size * size + 3 * size) + head


def test_integers_of_a_layer_that_is_not_asked_for_are_not_restored(tmp_path, monkeypatch):
    plan, seen, restore = {"experts": QuantScheme(8, 0, True)}, [], checkpoint.decompress
    quantize_checkpoint(saved(tmp_path / "plain"), tmp_path / "int8", plan)
    monkeypatch.setattr(checkpoint, "decompress", lambda tensors: seen.extend(tensors) or restore(tensors))
    load_weights(tmp_path / "int8", drafts=False)
    assert seen and not [name for name in seen if name.startswith("model.layers.2.")]


@pytest.mark.parametrize("form", ["plain", "w4a8"])
def test_without_drafts_it_serves_as_with_them(tmp_path, kernels, form):
    """Also after updates with an MTP layer: from folders, tensor by tensor, and an adapter of all layers."""
    folders = [tmp_path / name for name in ("v0", "v1")]
    for seed, folder in enumerate(folders):
        save_model(GlmMoeDsa(ModelConfig(**SHAPE, initializer_range=0.2)).init_weights(seed), folder)
        if form == "w4a8":
            plan = {kind: QuantScheme(4 if kind == "experts" else 8, 0, True) for kind in KINDS}
            quantize_checkpoint(folder, folder.with_suffix(".w4a8"), plan)
    if form == "w4a8":
        folders = [folder.with_suffix(".w4a8") for folder in folders]
    wanted = dict(prompts=[list(range(1, 40))], max_new_tokens=12, seeds=[1], stop_ids=())
    with_drafts, without = (Engine(folders[0], 2, 128, kernels=kernels, draft_steps=d) for d in (2, 0))
    assert with_drafts.scheduler.weights.has_mtp and not without.scheduler.weights.has_mtp
    first = without.generate(**wanted)[0].token_ids
    assert first == with_drafts.generate(**wanted)[0].token_ids
    for engine in (with_drafts, without):
        engine.update_weights(folders[1], "1")
    after = without.generate(**wanted)[0].token_ids
    assert after == with_drafts.generate(**wanted)[0].token_ids != first
    assert not without.scheduler.weights.has_mtp
    if form == "plain":
        adapter(tmp_path / "a", without.origin.tensors("adapters"))
        for engine in (with_drafts, without):
            engine.load_adapter("a", tmp_path / "a")
        adapted = without.generate(**wanted, adapter="a")[0].token_ids
        assert adapted == with_drafts.generate(**wanted, adapter="a")[0].token_ids != after
        without.unload_adapter("a")
        staging = Staging(without.origin, without.scheduler.weights)
        weights = staging.from_tensors(state_to_disk(load_model(folders[0])), "2")
        assert not weights.has_mtp and "model.layers.2.eh_proj.weight" in staging.tensors(
            "adapters", coming=True
        )
        without.scheduler.set_weights(weights)
        assert without.generate(**wanted)[0].token_ids == first


# half of the bytes are the MTP layer's, in shards of its own
LARGE = SHAPE | dict(
    num_hidden_layers=1, hidden_size=256, intermediate_size=5120, moe_intermediate_size=1024,
    max_position_embeddings=64,
)  # fmt: skip
PEAK = """
import json, sys
from pathlib import Path
from fullarc.engine import Engine, engine
from fullarc.engine.native.library import library

def peak():
    [line] = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

def mapped():
    found, name = {}, ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].count("-"):
            name = Path(line.split()[-1]).stem
        elif line.startswith("Rss:") and name.startswith("shard"):
            found[name] = found.get(name, 0) + 1024 * int(line.split()[1])
    return found

def prepared(*arguments):
    made = prepare(*arguments)
    shards.update(mapped())
    return made

library()
prepare, shards, before = engine.prepare, {}, peak()
engine.prepare = prepared
Engine(sys.argv[1], 1, 64, prefix_tokens=0, draft_steps=int(sys.argv[2]))
print(json.dumps({"peak": peak() - before, "shards": shards}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is read from /proc")
def test_a_large_checkpoint_is_mapped_and_the_idle_layer_is_not_read(tmp_path):
    tensors, shards = state_to_disk(GlmMoeDsa(ModelConfig(**LARGE)).init_weights(0)), {}
    for name, tensor in sorted(tensors.items()):
        whose = "mtp" if name.startswith("model.layers.1.") else "trunk"
        shards.setdefault(f"shard-{whose}-{name.split('.')[-2]}", {})[name] = tensor
    with atomic_dir(
        tmp_path / "large"
    ) as folder:  # with a manifest, whose check reads all files, but maps none
        (folder / "config.json").write_text(json.dumps(ModelConfig(**LARGE).to_hf()))
        for name, part in shards.items():
            save_file(part, folder / f"{name}.safetensors", metadata={"format": "pt"})
    size = {name: sum(t.nbytes for t in part.values()) for name, part in shards.items()}
    large = [name for name in size if size[name] > 4e6]
    mtp = sum(size[name] for name in size if "mtp" in name)
    assert 0.45 < mtp / sum(size.values()) < 0.55 and len(large) == 6
    idle, drafting = (
        json.loads(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(tmp_path / "large"), drafts],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for drafts in ("0", "1")
    )  # fmt: skip
    for name in large:
        assert drafting["shards"][name] > 0.9 * size[name]
        assert (idle["shards"].get(name, 0) > 0.9 * size[name]) == ("trunk" in name)
        assert idle["shards"].get(name, 0) < 2**20 or "trunk" in name
    assert drafting["peak"] - idle["peak"] > mtp  # mapped, experts stacked, fused


@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_a_step_needs_memory_by_its_rows_and_by_the_length_and_not_by_both(attention):
    """room(rows, length) = a + b rows + c length (to whole lines of the cache); a [512, T] is not in it either."""
    longest, rows = 65_536, (128, 256, 512)
    model = pack(
        model_of(max_position_embeddings=longest, index_topk=64 if attention == "sparse" else longest)
    ).model
    lengths = [2**n for n in range(10, 17)]
    room = {
        (n, length): library().fullarc_room(ctypes.byref(model), n, length, 2)
        for n in rows
        for length in lengths
    }
    lines = 64 * 40  # each of its parts is rounded up
    for n in rows:
        for short, long in zip(lengths, lengths[1:], strict=False):
            per_token = (room[n, long] - room[n, short]) / (long - short)
            assert per_token == pytest.approx((room[n, 2048] - room[n, 1024]) / 1024, rel=0.01)
    for length in lengths[:-1]:
        assert (
            abs(room[512, length] - room[256, length] - 2 * (room[256, length] - room[128, length])) < lines
        )
        assert abs(room[512, length] - room[128, length] - room[512, 1024] + room[128, 1024]) < lines
    assert room[512, longest] < 512 * longest


@pytest.mark.parametrize("topk", [32, 4096])
def test_prefill_by_torch_needs_memory_by_the_length(topk):
    """Twice the prompt in chunks takes at most twice the memory, and much less than [T, T]."""
    weights = prepare(model_of(max_position_embeddings=4096, index_topk=topk), kernels="torch")
    peaks = []
    for length in (2048, 4096):
        core, ids = forward_pass(weights, 1, length), torch.arange(length) % 60 + 1

        def prefill(core=core, ids=ids):
            for start in range(0, len(ids), 128):
                core.forward([Chunk(0, start, ids[start : start + 128].tolist())])

        peaks.append(peak_bytes(prefill))
    assert peaks[1] <= 2.1 * peaks[0]


def test_weights_that_cannot_draft_are_refused_by_an_engine_that_does(tmp_path, kernels):
    folder = saved(tmp_path / "two")
    engine = Engine(folder, max_batch=1, max_len=64, draft_steps=2, kernels=kernels)
    before = engine.generate([[1, 2, 3]], 4, temperature=0.0)[0].token_ids
    with pytest.raises(FullarcError, match="no MTP layer"):
        engine.scheduler.set_weights(load_weights(folder, "1", kernels=kernels, drafts=False))
    assert engine.generate([[1, 2, 3]], 4, temperature=0.0)[0].token_ids == before
