"""What the README and docs/ say is so: paths and tests exist, links lead somewhere, and every command runs.

Commands are the `fullarc …` lines of ```bash blocks. They run as written, in an empty folder that holds recipes/, the
user's files that the README speaks of (`texts/`, `notes/`, its TOML blocks), and, for those that need one, a finished
run. Only the words of REPLACED differ.
"""

import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fullarc.config.model import preset

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# what the README says -> what the test runs: the small recipe and its run, any free port
REPLACED = {
    "recipes/laptop.toml": "recipes/smoke.toml",
    "runs/laptop": "runs/smoke",
    "--port 8000": "--port 0",
}
# exit codes other than 0 that say something about the model or the machine, not about the command
ALSO_FINE = {"agent": {1}, "bench": {1}, "doctor": {3}}
VERBS = {
    "run",
    "train",
    "data",
    "tasks",
    "agent",
    "chat",
    "serve",
    "eval",
    "quantize",
    "view",
    "bench",
    "explain",
    "doctor",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    """The README's commands without their comments."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("fullarc ")]
    return [re.sub(r"\s+#.*", "", line) for line in lines]


def needs_run(command: str) -> bool:
    """True for a command that trains, or reads a finished run."""
    return "runs/" in command or bool(re.match(r"fullarc (run(?!.*--dry-run)|train) ", command))


QUICK = [command for command in commands() if not needs_run(command)]


def prose(seed: int) -> str:
    """Sentences that pass the corpus's rules."""
    rng, words = (
        random.Random(seed),
        re.findall(r"\w+", "the of and that have with river stone garden market people walk"),
    )
    return "\n".join(" ".join(rng.choices(words, k=11)).capitalize() + "." for _ in range(30))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader of the README sits."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name in ("texts", "notes", "bin"):
        (folder / name).mkdir()
    for number in range(60):
        (folder / f"texts/{number}.txt").write_text(prose(number))
    (folder / "notes/road.txt").write_text("tiger owl\ncat cow\ntiger cat\n")
    for block in blocks("toml"):
        (folder / block.split("\n", 1)[0].removeprefix("# ")).write_text(block)
    shim = folder / "bin/fullarc"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fullarc.cli "$@"\n')
    shim.chmod(0o755)
    return folder


def start(place: Path, command: str) -> subprocess.Popen[str]:
    for said, meant in REPLACED.items():
        command = command.replace(said, meant)
    env = os.environ | {"PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=place, env=env | {"OMP_NUM_THREADS": "1"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def must_run(place: Path, command: str, says: str = "", seconds: float = 100) -> str:
    process = start(place, command)
    try:
        out, err = process.communicate(says, timeout=seconds)
    finally:
        process.kill()
    assert process.returncode in {0} | ALSO_FINE.get(command.split()[1], set()), (
        command,
        out[-999:],
        err[-2000:],
    )
    assert "Traceback" not in err, err
    return out


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.slow) if c.startswith("fullarc bench") else c for c in QUICK],
)
def test_a_quick_command_runs(place: Path, command: str) -> None:
    assert must_run(place, command) or command.startswith("fullarc data")


def test_every_verb_is_shown_and_helps(place: Path) -> None:
    assert {command.split()[1] for command in commands()} == VERBS
    helped = [process for verb in VERBS if (process := start(place, f"fullarc {verb} --help"))]
    assert all("usage: fullarc" in process.communicate(timeout=100)[0] for process in helped)
    assert all(process.returncode == 0 for process in helped)


def test_a_recipe_of_the_readme_is_short() -> None:
    assert [tomllib.loads(block)["name"] for block in blocks("toml")] == ["my"]
    assert all(
        len([li for li in block.splitlines() if li.strip() and li[0] != "#"]) <= 15
        for block in blocks("toml")
    )


@pytest.fixture(scope="module")
def finished(place: Path) -> Iterator[Path]:
    """The place after `fullarc run recipes/smoke.toml`."""
    must_run(place, "fullarc run recipes/smoke.toml runs_dir=runs", seconds=900)
    yield place


def answers(place: Path, command: str) -> None:
    """A server says where it is, answers, and ends cleanly at Ctrl-C."""
    process = start(place, command)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+/v1", line := process.stdout.readline())
        assert found, line
        body = {"model": "any", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        reply = httpx.post(
            f"{found[0]}/chat/completions", json=body, headers={"X-Session-ID": "s"}, timeout=60
        )
        assert reply.status_code == 200 and reply.json()["choices"]
        record = httpx.get(f"{found[0].removesuffix('/v1')}/sessions/s/trajectory", timeout=60)
        assert record.status_code == 200 and record.json()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_arc_and_every_command_that_reads_a_run(finished: Path) -> None:
    assert (finished / "runs/smoke/report.html").exists()
    for command in commands():
        if command in QUICK and not command.startswith("fullarc data"):
            continue
        if command.startswith("fullarc serve"):
            answers(finished, command)
        elif command.startswith("fullarc chat"):
            assert must_run(finished, f"{command} --max-tokens 8", says="hi\n/exit\n")
        else:
            must_run(finished, command, seconds=600)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_python_of_the_readme_runs(finished: Path) -> None:
    for number, block in enumerate(blocks("python")):
        script = finished / f"block{number}.py"
        script.write_text(block.replace("runs/laptop", "runs/smoke"))
        env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run(
            [sys.executable, script],
            cwd=finished,
            env=env,
            text=True,
            capture_output=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for file in DOCUMENTS for name in re.findall(r"[`\n]make ([a-z]+)\b", file.read_text())}
    assert {"demo", "test"} <= named <= targets, named - targets


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a document's headings."""
    titles = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_internal_links_resolve(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (file.parent / path).resolve() if path else file
        assert found.exists() and found.is_relative_to(ROOT), f"{file.name}: {target}"
        assert not anchor or anchor in anchors(found.read_text()), f"{file.name}: {target}"


def function_names(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_the_paper_map_names_files_and_tests_that_exist() -> None:
    rows = [
        row.strip("| ").split(" | ")
        for row in (ROOT / "docs/paper_map.md").read_text().splitlines()
        if row.startswith("| ")
    ]
    built = [row for row in rows[1:] if not row[1].startswith("not built")]
    assert len(built) > 30
    for row in built:
        assert len(row) == 4, row
        for name in re.findall(r"`([^`]+)`", row[2]):
            assert (ROOT / name).is_file(), name
        tests = re.findall(r"`([^`]+)`", row[3])
        assert tests, row
        for name in tests:
            path, _, function = name.partition("::")
            assert (ROOT / path).is_file() and function in function_names(ROOT / path), name


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_paths_and_tests_in_backticks_exist(file: Path) -> None:
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
    known = {name for path in (ROOT / "tests").rglob("test_*.py") for name in function_names(path)}
    for name in re.findall(r"`([^`\s]+)`", text):
        if re.match(r"(src|tests|recipes|docs)/.*\.\w+", name):
            assert (ROOT / name.partition("::")[0]).exists(), f"{file.name}: {name}"
        if re.fullmatch(r"test_\w+", name):
            assert name in known, f"{file.name}: {name}"


def test_numbers_that_the_readme_says() -> None:
    said = re.search(r"with ([\d.]+) M parameters instead of (\d+) B", README)
    assert said is not None
    assert f"{preset('2m').parameter_count(with_mtp=True) / 1e6:.1f}" == said[1]
    assert f"{preset('glm5-744b').parameter_count() / 1e9:.0f}" == said[2]
