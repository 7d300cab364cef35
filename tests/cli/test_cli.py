"""The command line as a person meets it: light, one sentence for mistakes, exit codes that mean something."""

import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from fullarc import cli, doctor
from fullarc.progress import Progress, short

ROOT = Path(__file__).parents[2]
LIGHT = ["fullarc", "fullarc.config", "fullarc.chat", "fullarc.rollout", "fullarc.agent", "fullarc.tasks"]
LIGHT += ["fullarc.config.recipe", "fullarc.config.show", "fullarc.arc", "fullarc.cli", "fullarc.progress"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_light_rooms_load_neither_torch_nor_transformers() -> None:
    code = f"import sys, importlib\nfor name in {LIGHT!r}:\n    importlib.import_module(name)\n"
    code += "    heavy = {'torch', 'transformers'} & set(sys.modules)\n    assert not heavy, (name, heavy)"
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_help_is_fast_and_light() -> None:
    code = "import sys\nsys.argv = ['fullarc', '--help']\nfrom fullarc.cli import main\ntry:\n    main()\n"
    code += "except SystemExit:\n    print(sorted({'torch', 'pydantic', 'rich'} & set(sys.modules)))"
    seconds = []
    for _ in range(10):  # the best of ten, so that a busy machine does not fail it
        began = time.monotonic()
        result = python(code)
        seconds.append(time.monotonic() - began)
        if seconds[-1] < 0.3:
            break
    assert result.stdout.rstrip().endswith("[]") and "VERB" in result.stdout, result.stderr
    assert min(seconds) < 0.3


def test_dry_run_prints_a_recipe_that_resolves_to_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipe = str(ROOT / "recipes/laptop.toml")
    assert cli.main(["run", recipe, "--dry-run", "stages.sft.steps=3", "--name", "x"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "again.toml").write_text(first)
    assert cli.main(["run", str(tmp_path / "again.toml"), "--dry-run", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["recipe"]
    assert cli.main(["run", recipe, "--set", "stages.sft.steps=3", "name=x", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == again
    assert again["stages"]["sft"]["steps"] == 3 and not (ROOT / "runs/x").exists()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["run", "recipes/nope.toml"], 3, "cannot read recipe recipes/nope.toml"),
        (
            ["run", str(ROOT / "recipes/laptop.toml"), "stages.sft.stepz=1"],
            3,
            "Did you mean stages.sft.steps?",
        ),
        (["run", str(ROOT / "recipes/laptop.toml"), "steps"], 2, "not an override"),
        (["explain", "agentic_rll"], 2, "Did you mean agentic_rl?"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and err.startswith("fullarc: ") and not out


@pytest.mark.parametrize("words", [[], ["nope"], ["run"], ["run", "a.toml", "--nope"], ["doctor", "x=1"]])
def test_usage_errors_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert error.value.code == 2


@pytest.mark.parametrize("what", ["", "dsa", "opd", "stages.sft.lr", "engine", "seed"])
def test_explain_knows_stages_losses_sections_and_keys(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", what] if what else ["explain"]) == 0
    assert len(capsys.readouterr().out) > 20


def test_doctor_says_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert cli.main(["doctor"]) == 3
    assert (
        "MISSING  bubblewrap: bwrap is not installed. Type 'sudo apt-get install bubblewrap'."
        in capsys.readouterr().out
    )
    cli.main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert not checks["chromium"]["ok"] and not checks["chromium"]["required"] and checks["python"]["ok"]


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(sys.stderr) as progress:
        progress.plan(["data", "sft"], ["data"])
        progress.start("sft")
        for step in range(1000):
            progress.log("sft", step, 1000, {"loss": 1.5, "tokens_per_s": 1234.0})
        progress.shown -= 60
        progress.log("sft", 1000, 1000, {"loss": 1.5, "tokens_per_s": 1234.0})
        progress.end("sft", 75.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "1 of 2 steps are done; next: sft" in lines[0]
    assert "step 1000/1000  loss 1.5  1,234 tokens/s  0:00 left" in lines[2] and "done in 1:15" in lines[3]
    assert short(3725) == "1:02:05"


def test_delegated_verbs_get_the_rest_of_the_line_and_give_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def main(argv: list[str]) -> int:
        seen.extend(argv)
        return 7

    monkeypatch.setitem(sys.modules, "fake_verb", types.SimpleNamespace(main=main))  # type: ignore[arg-type]
    monkeypatch.setitem(cli.DELEGATED, "serve", ("fake_verb:main", "help"))
    assert cli.main(["serve", "DIR", "--port", "0", "--help"]) == 7
    assert seen == ["DIR", "--port", "0", "--help"]


def test_nproc_is_the_stages_number_of_processes(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("fullarc.arc.run", lambda resolved, **_: seen.append(resolved.recipe) or tmp_path)
    for words, processes in (([], 1), (["--nproc", "3"], 3)):
        assert cli.main(["train", "pretrain", str(ROOT / "recipes/smoke.toml"), *words]) == 0
        assert seen[-1].stages["pretrain"].processes == processes
        assert seen[-1].stages["sft"].processes == 1


def test_ways_of_several_processes_that_a_model_has_not_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Context parallelism shares latents, which grouped queries have none of; with one process nothing is divided."""
    started: list[object] = []
    monkeypatch.setattr("fullarc.arc.run", lambda *words, **_: started.append(words) or Path())
    words = ["train", "pretrain", str(ROOT / "recipes/smoke.toml"), "stages.pretrain.parallel=cp"]
    grouped = "model.gqa_kv_heads=1"
    assert cli.main([*words, grouped, "--nproc", "2"]) == 3 and not started
    out, err = capsys.readouterr()
    assert "stages.pretrain.parallel = 'cp' (command line)" in err and "model.gqa_kv_heads = 1" in err
    assert err.count("\n") == 1 and not out
    assert cli.main([*words, grouped]) == 0 and cli.main([*words, "--nproc", "2"]) == 0 and len(started) == 2
