"""Other programs fail in words; variants are chosen by their times. What they compute is tested where
FULLARC_PEERS names the folder of their environments."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fullarc.chat import Tokenizer
from fullarc.config.errors import FullarcError
from fullarc.config.model import preset
from fullarc.engine import Engine
from fullarc.evals import bench_engine_peers, bench_quantize
from fullarc.evals.bench_engine_peers import STEPS, prompts, saved
from fullarc.evals.bench_quantize import plan_of
from fullarc.evals.peers import QUIET, Child, environments, llama
from fullarc.evals.peers.llama import VARIANTS, Llama, Variant
from fullarc.model import GlmMoeDsa, QuantScheme, quantize_checkpoint, save_model

PEERS = os.environ.get("FULLARC_PEERS")
needs_peers = pytest.mark.skipif(not PEERS, reason="FULLARC_PEERS names no folder of environments")


# --- processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path):
    """A process that answers "echo", refuses "refuse", and dies of SIGILL at "die"."""
    script = tmp_path / "child.py"
    script.write_text(
        textwrap.dedent("""
        import json, os, signal, sys
        for line in sys.stdin:
            order = json.loads(line)
            do = order.pop("do")
            if do == "die":
                print("GGML_ASSERT(rows)", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGILL)
            print(json.dumps({"error": "no such shape"} if do == "refuse" else order), flush=True)
    """)
    )
    with Child("other", [sys.executable, str(script)]) as one:
        yield one


def test_a_process_answers_refuses_and_dies_in_words(child):
    assert child.ask("echo", ids=[1, 2]) == {"ids": [1, 2]}
    with pytest.raises(FullarcError, match="other refuses the order 'refuse': no such shape"):
        child.ask("refuse")
    assert child.alive and child.ask("echo") == {}
    with pytest.raises(FullarcError, match=r"other ended with -4 at the order 'die': GGML_ASSERT\(rows\)"):
        child.ask("die")
    assert not child.alive
    with pytest.raises(FullarcError, match="other ended"):
        child.ask("echo")


def test_the_process_ends_with_the_block(child):
    pid = child._process.pid
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --- environments -------------------------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """The commands that would be run; the one whose words include `steps.fails` fails."""
    seen = SimpleNamespace(commands=[], fails=None)

    def run(command, log):
        seen.commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / "bin").mkdir(parents=True)
        if seen.fails in command:
            raise FullarcError("no")

    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setattr(environments, "_cpu_index", lambda: ["--index-url", "cpu"])
    return seen


def test_an_environment_is_made_once_and_again_when_its_packages_change(steps, tmp_path):
    python = environments.python_of("vllm_cpu", tmp_path)
    assert python == tmp_path / "vllm_cpu" / "bin" / "python"
    assert any("torch==2.13.0" in command and "cpu" in command for command in steps.commands)
    assert "torchvision" in steps.commands[-1]
    made = len(steps.commands)
    environments.python_of("vllm_cpu", tmp_path)
    assert len(steps.commands) == made
    (tmp_path / "vllm_cpu" / "ready").write_text("torch==1.0\n")
    environments.python_of("vllm_cpu", tmp_path)
    assert len(steps.commands) == 2 * made


def test_a_half_made_environment_is_made_again(steps, tmp_path):
    steps.fails = "-r"
    with pytest.raises(FullarcError):
        environments.python_of("compressors", tmp_path)
    steps.fails = None
    environments.python_of("compressors", tmp_path)
    assert sum("venv" in command for command in steps.commands) == 2


def test_without_a_compiler_it_says_which_tool_is_missing(steps, tmp_path, monkeypatch):
    environments.python_of("llamacpp", tmp_path)
    (tmp_path / "llamacpp" / "lib" / "python3" / "site-packages").mkdir(parents=True)
    monkeypatch.setattr(environments.shutil, "which", lambda tool: None if tool == "c++" else tool)
    with pytest.raises(FullarcError, match=r"c\+\+ is missing. apt-get install cmake g\+\+"):
        environments.llama_cpp(tmp_path)


def test_a_step_that_fails_is_quoted(tmp_path):
    command = [sys.executable, "-c", "import sys; print('disk is full'); sys.exit(3)"]
    with pytest.raises(FullarcError, match="ended with 3: disk is full All of it is in"):
        environments._run(command, tmp_path / "log")


# --- llama.cpp's variants -----------------------------------------------------------------------------------------

SECONDS = {"f32": 4.0, "bf16": 3.0, "q8_0": 2.0, "q4_0": 5.0}


class Pretended:
    """llama.cpp's process: repacked q8_0 is the fastest and ends it, fused attention takes longer for prompts."""

    started = 0

    def __init__(self, name, command, environment):
        Pretended.started += 1
        self.alive = True

    def ask(self, do, **order):
        if do == "open":
            self.open = order
            if order["repack"] and "q8_0" in order["file"]:
                self.alive = False
                raise FullarcError("llama.cpp ended with -4 at the order 'open'.")
        seconds = (
            SECONDS[Path(self.open["file"]).stem.rpartition("-")[2]] if do in ("decode", "prefill") else 0
        )
        return {"seconds": seconds + self.open["flash"] * (1 if do == "prefill" else -1)} if seconds else {}

    def close(self):
        self.alive = False


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "llama_cpp", lambda root: (root, root))
    monkeypatch.setattr(llama, "Child", Pretended)
    monkeypatch.setattr(llama.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0))
    monkeypatch.setattr(Pretended, "open", {"file": "x-f32.gguf", "flash": 0}, raising=False)
    return Llama(tmp_path / "model", tmp_path, tmp_path, STEPS)


def test_each_kind_of_work_has_its_fastest_variant_and_one_that_dies_is_left_out(pretended):
    batch, started = prompts(2, 64, 100), Pretended.started
    assert Variant("q8_0", repack=True) in VARIANTS
    assert pretended.fastest("decode", batch) == Variant("q8_0", flash=True)
    assert pretended.fastest("prefill", batch) == Variant("q8_0", flash=False)
    assert Pretended.started == started + 2  # one for each variant that died
    pretended.fastest("decode", batch)
    assert Pretended.started == started + 2


# --- the real ones ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = bench_engine_peers.TINY.model_copy(
        update={"num_hidden_layers": 2, "max_position_embeddings": 2048}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_engine_peers, "TINY", small)
        return saved("tiny", tmp_path_factory.mktemp("peers"))


@needs_peers
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_llama_cpp_computes_what_our_engine_does(folder, tmp_path):
    with Llama(folder, Path(PEERS), tmp_path, STEPS) as other:
        told = bench_engine_peers._agreement("tiny", "llama.cpp", folder, other)
        assert told["ok"] and told["detail"][0].startswith("32 of 32")
        engine, batch = Engine(folder, 4, 256, prefix_tokens=0), prompts(4, 64, 4096)
        for weights, within in (("bf16", 0.02), ("q8_0", 0.05), ("q4_0", 0.5)):
            other.open(Variant(weights), 1, 64)
            logits = torch.tensor(other._child.ask("logits", ids=batch[0])["logits"])
            [output] = engine.generate(batch[:1], 1, temperature=0.0, stop_ids=(), top_logprobs=5)
            near = [abs(float(logits.log_softmax(-1)[i]) - p) for p, i in output.top_logprobs[0]]
            assert 1e-6 < max(near) < within


@needs_peers
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["rtn", "gptq", "auto-round"])
def test_others_checkpoints_load_here_and_rounding_to_nearest_is_the_same_to_the_bit(
    folder, tmp_path, method, monkeypatch
):
    monkeypatch.setattr(bench_quantize, "_rows", lambda checkpoint: prompts(16, 64, 4096))
    plan = bench_quantize.plan_of(4)
    bench_quantize.by_others(folder, tmp_path / "theirs", method, Path(PEERS))
    quantize_checkpoint(folder, tmp_path / "ours", plan, True)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    packed = [name for name in ours if name.endswith("_packed")]
    differ = [name for name in theirs if name in ours and not torch.equal(theirs[name], ours[name])]
    assert {name for name in ours if "layers.2." not in name} - theirs.keys() <= {
        part for name in packed for part in (name, name.replace("_packed", "_shape"))
    }
    assert (not differ) if method == "rtn" else differ
    ids = prompts(2, 64, 4096)
    near, base = (Engine(at, 2, 128).score(ids) for at in (tmp_path / "theirs", folder))
    assert max(abs(a - b) for x, y in zip(near, base, strict=True) for a, b in zip(x, y, strict=True)) < 0.5


@needs_peers
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "scheme,bits,wide,experts",
    [(plan_of(4), 8, True, "W4A8Int8"), (plan_of(8), 8, False, "W8A8Int8"),
     ({"experts": QuantScheme(4, 32)}, 0, False, "WNA16")],
)  # fmt: skip
def test_vllms_loader_reads_our_exports(tmp_path, scheme, bits, wide, experts):
    save_model(GlmMoeDsa(preset("tiny-std")).init_weights(0), tmp_path / "model")
    Tokenizer.train(["one two one two"], 320).save(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out", scheme, wide)
    python = environments.python_of("vllm_cpu", Path(PEERS))
    command = [
        str(python),
        str(Path(environments.__file__).with_name("vllm_loads.py")),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET, check=True)
    told = json.loads(done.stdout)
    assert told["model"] == "GlmMoeDsaForCausalLM"
    assert told["schemes"][f"CompressedTensors{experts}MoEMethod"] == 3
    assert told["schemes"].get("CompressedTensorsW8A8Int8", 0) == (20 if bits else 0)
    assert all(name.endswith(("w13_weight_packed", "w2_weight_packed")) for name in told["missing"])
    assert len(told["missing"]) == (6 if wide else 0)  # what it packs by itself, later
    in_parameters, in_file = told["integers"]
    assert in_parameters == in_file and in_file[0] > 0
