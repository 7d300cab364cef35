"""`fullarc agent`, `chat` and `serve` as a person meets them, on a scripted engine (and once on a real one)."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from fullarc.agent import cli
from fullarc.agent.tools import SHELL_TOOL
from fullarc.chat import Tokenizer
from fullarc.cli import main
from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.serve import resolve_model, serving


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train(
        ["the file holds a number so list it then print hello done", str(SHELL_TOOL) * 3], 400
    )


@pytest.fixture
def run_dir(tmp_path: Path, tok: Tokenizer) -> Path:
    """A run with two finished checkpoints and an unfinished one."""
    for age, stage in ((200, "sft"), (100, "agentic_rl")):
        checkpoint = tmp_path / "runs/demo/stages" / stage / "checkpoint"
        with atomic_dir(checkpoint) as folder:
            tok.save(folder)
            (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 600}))
        stamp = (checkpoint / "manifest.json").stat().st_mtime - age
        os.utime(checkpoint / "manifest.json", (stamp, stamp))
    torn = tmp_path / "runs/demo/stages/general_rl/checkpoint"
    torn.mkdir(parents=True)
    (torn / "config.json").write_text("{}")
    return tmp_path / "runs/demo"


def test_a_run_means_its_newest_complete_checkpoint(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = run_dir / "stages/agentic_rl/checkpoint"
    assert resolve_model(run_dir) == newest and resolve_model(newest) == newest
    monkeypatch.chdir(tmp_path)
    assert resolve_model(None) == newest.relative_to(tmp_path)
    (newest / "tokenizer.json").write_text("damaged")
    assert resolve_model(run_dir) == run_dir / "stages/sft/checkpoint"
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FullarcError):
            resolve_model(missing)


@pytest.fixture
def engine(tok: Tokenizer) -> FakeEngine:
    """Says hello, with thinking."""
    ids = [*tok.encode("so"), tok.id("</think>"), *tok.encode("hello"), tok.id("<|user|>")]
    return FakeEngine(lambda prompt, params: ids, tok.stop_ids)


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine.app) as url:
        yield url


def worker(tok: Tokenizer, *commands: str) -> Any:
    """A script that runs the commands one after the other and then is done."""
    queue = list(commands)

    def script(prompt: list[int], params: dict[str, Any]) -> list[int]:
        if not queue:
            return [tok.id("</think>"), *tok.encode("done"), tok.id("<|user|>")]
        names = ("<tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")
        call, key, end_key, value, end_value, end = map(tok.id, names)
        head = [
            *tok.encode("then"),
            tok.id("</think>"),
            call,
            *tok.encode("shell"),
            key,
            *tok.encode("command"),
            end_key,
        ]
        return [*head, value, *tok.encode(queue.pop(0)), end_value, end, tok.id("<|observation|>")]

    return script


def test_agent_works_shows_and_copies_back(
    run_dir: Path,
    engine: FakeEngine,
    url: str,
    tok: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "a.txt").write_text("12\n")
    (work / "link").symlink_to("/etc/passwd")
    (work / "inner_link").symlink_to(work / "a.txt")
    common = [
        "agent",
        "--model",
        str(run_dir),
        "--engine",
        url,
        "--sandbox",
        "unsafe-local",
        "--workdir",
        str(work),
    ]
    engine.script = worker(tok, "ls", "echo 30 > b.txt; printf '\\033[2J'; exit 3")
    assert main([*common, "--show-files", "add a file"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "then",
        "$ ls",
        "a.txt",
        "[exit 3]",
        "done",
        "── b.txt",
        "changed b.txt",
        "Nothing was copied back",
    ):
        assert part in shown
    assert "\x1b[2J" not in shown and "link" not in shown and not (work / "b.txt").exists()
    engine.script = worker(tok, "echo 30 > b.txt")
    assert main([*common, "--yes", "add a file"]) == 0
    assert (work / "b.txt").read_text() == "30\n" and (work / "a.txt").read_text() == "12\n"
    engine.script = worker(tok, *["ls"] * 5)
    assert main([*common, "--max-turns", "2", "look"]) == 1
    assert "all its turns" in capsys.readouterr().out


def test_copying_back_never_leaves_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "work/link").symlink_to(tmp_path / "out")
    for name in ("link/x", "../x", "link"):
        with pytest.raises(FullarcError, match="leads out"):
            cli.write_folder(tmp_path / "work", {"fine": b"", name: b""})
    assert not (tmp_path / "work/fine").exists() and list((tmp_path / "out").iterdir()) == []


def test_chat_answers_piped_lines(
    run_dir: Path,
    url: str,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nthen\n/reset\nagain\n/exit\nnever\n"))
    assert main(["chat", str(run_dir), "--engine", url, "--hide-thinking"]) == 0
    assert capsys.readouterr().out == "hello\n" * 3
    first, second, third = engine.prompts
    assert second[: len(first)] == first and len(third) < len(second)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n" + "list " * 700 + "\n"))
    assert main(["chat", str(run_dir), "--engine", url]) == 0
    assert "so\nhello\n" in (out := capsys.readouterr().out) and "/reset" in out


@pytest.mark.parametrize("argv", [
    ["chat", "nowhere"], ["serve", "nowhere"], ["agent", "--model", "nowhere", "--sandbox", "unsafe-local", "x"],
    ["agent", "--workdir", "nowhere", "x"], ["serve", "--host", "0.0.0.0"],
])  # fmt: skip
def test_bad_input_is_one_sentence(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) in (2, 3)
    assert re.fullmatch(r"fullarc: .+\n", capsys.readouterr().err)


def start(*argv: str) -> tuple[subprocess.Popen[str], str]:
    """`fullarc serve` as a process; (process, base URL of its API)."""
    env = {**os.environ, "PYTHONPATH": "src"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fullarc.cli", "serve", "--port", "0", *argv],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+/v1", line)
    assert found, line
    return process, found[0]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_answers_and_ends_cleanly(run_dir: Path, url: str, how: int) -> None:
    process, base = start(str(run_dir), "--engine", url)
    try:
        client = openai.OpenAI(base_url=base, api_key="any", max_retries=0)
        reply = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "hi"}])
        assert reply.choices[0].message.content == "hello" and reply.model == "agentic_rl"
        client.close()
        process.send_signal(how)
        assert process.wait(10) == 0
    finally:
        process.kill()


def save(folder: Path, tok: Tokenizer, positions: int = 256) -> Path:
    """A nano model of random weights."""
    pytest.importorskip("torch")
    from fullarc.config.model import preset
    from fullarc.model import GlmMoeDsa, save_model

    size = preset("nano", vocab_size=tok.vocab_size, eos_token_id=tok.stop_ids, pad_token_id=tok.stop_ids[0],
                  max_position_embeddings=positions, index_topk=64)  # fmt: skip
    tok.save(folder / "tok")
    save_model(GlmMoeDsa(size).init_weights(0), folder / "m", tokenizer_dir=folder / "tok")
    return folder / "m"


@pytest.mark.slow
def test_serve_is_one_server_for_every_client(tmp_path: Path, tok: Tokenizer) -> None:
    """The engine's routes, both chats, what only the engine can (stops, forced tools), and recorded sessions."""
    options = ("--dtype", "bf16", "--max-batch", "3", "--speculative-num-steps", "2", "--weight-version", "7")
    process, base = start(str(save(tmp_path, tok, 2048)), "--api-key", "k", "--max-len", "1024", *options)
    try:
        root, auth = base.removesuffix("/v1"), {"authorization": "Bearer k"}
        with httpx.Client(base_url=root, headers=auth, timeout=60, trust_env=False) as web:
            assert "<!doctype html>" in httpx.get(root + "/", trust_env=False).text
            assert httpx.get(root + "/server_info", trust_env=False).status_code == 401
            info = web.get("/server_info").json()
            known = ("max_running_requests", "context_length", "weight_version")
            assert [info[name] for name in known] == [3, 1024, "7"]
            assert info["dtype"] == "bf16" and info["speculative_num_steps"] == 2
            ask = {
                "input_ids": [1, 2, 3],
                "sampling_params": {"max_new_tokens": 4},
                "return_routed_experts": True,
            }
            assert web.post("/generate", json=ask).json()["meta_info"]["routed_experts"]
            assert "sglang:prompt_tokens_total 3" in web.get("/metrics").text
            assert web.post("/update_weight_version", json={"new_version": "8"}).status_code == 200
        gpt = openai.OpenAI(base_url=base, api_key="k", max_retries=0)
        claude = anthropic.Anthropic(base_url=root, api_key="k", max_retries=0)
        hello: list[Any] = [{"role": "user", "content": "hi"}]
        for seed in range(30):  # it says anything, and some of that is short
            ask: Any = {"model": "m", "messages": hello, "max_tokens": 8, "seed": seed}
            text = gpt.chat.completions.create(**ask, logprobs=True).choices[0]
            if text.finish_reason == "length":
                break
        stopped = gpt.chat.completions.create(
            **ask, stop=[text.logprobs.content[4].token], logprobs=True
        ).choices[0]
        assert stopped.finish_reason == "stop" and len(stopped.logprobs.content) <= 5
        tool: Any = {"name": "f", "input_schema": {"type": "object", "required": ["n"],
                                                   "properties": {"n": {"type": "integer"}}}}  # fmt: skip
        forced = claude.messages.create(
            model="m", max_tokens=200, messages=hello, tools=[tool], tool_choice={"type": "any"},
            thinking={"type": "disabled"},
        )  # fmt: skip
        assert forced.content[0].name == "f" and isinstance(forced.content[0].input["n"], int)
        session = {"X-Session-ID": "s"}
        first = claude.messages.create(model="m", max_tokens=9, messages=hello, extra_headers=session)
        record = httpx.get(f"{root}/sessions/s/trajectory", headers=auth, trust_env=False).json()
        assert len(record["steps"][1]["metrics"]["completion_token_ids"]) == first.usage.output_tokens == 9
        chunks = gpt.chat.completions.create(model="m", messages=hello, max_tokens=9, seed=1, stream=True)
        assert list(chunks)[-1].choices[0].finish_reason
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_serve_says_what_is_wrong_with_the_engines_options(
    tmp_path: Path, tok: Tokenizer, run_dir: Path
) -> None:
    for argv, says in (
        ([str(save(tmp_path, tok)), "--dtype", "int3"], "invalid choice: 'int3'"),
        (
            [str(run_dir), "--engine", "http://127.0.0.1:1", "--dtype", "bf16"],
            "--dtype is for an engine that",
        ),
    ):
        command = [sys.executable, "-m", "fullarc.cli", "serve", "--port", "0", *argv]
        env = {**os.environ, "PYTHONPATH": "src"}
        told = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
        assert told.returncode in (2, 3) and says in told.stderr and "Traceback" not in told.stderr


@pytest.mark.slow
def test_serve_starts_two_real_engines_and_reports_the_death_of_one(tmp_path: Path, tok: Tokenizer) -> None:
    process, base = start(str(save(tmp_path, tok)), "--engines", "2")
    client = openai.OpenAI(base_url=base, api_key="any", max_retries=0)
    ask: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}
    whole = client.chat.completions.create(**ask, seed=3, extra_body={"return_token_ids": True}).choices[0]
    chunks = list(
        client.chat.completions.create(**ask, seed=3, stream=True, extra_body={"return_token_ids": True})
    )
    streamed = [t for c in chunks for t in getattr(c.choices[0], "token_ids", None) or []]
    assert streamed == whole.token_ids and len(streamed) > 0
    workers = httpx.get(base.removesuffix("/v1") + "/workers", trust_env=False).json()["workers"]
    assert [(worker["id"], worker["is_healthy"]) for worker in workers] == [("0", True), ("1", True)]
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(20) == 3
