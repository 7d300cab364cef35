"""Terminal tasks, run for real: oracles pass, doing nothing and cheating do not."""

import os
import re
from collections import defaultdict, deque

import pytest

from fullarc.sandbox import InfraError, Sandbox
from fullarc.tasks import EnvError, Invalid, Reward, families, get, instance_seed
from fullarc.tasks.check import check
from fullarc.tasks.terminal import verify as verify_module
from fullarc.tasks.terminal.verify import hidden_tests, parse_reward, verify
from fullarc.tasks.words import WORDS

FAMILIES = families("terminal", "all")
ANSWERED = ["count_lines", "count_files", "sum_column", "search", "value", "pair", "largest"]


def instance_of(family: str, i: int = 0):
    return get(family).sample(instance_seed("train", family, i))


def reward_after(instance, *commands: str) -> float:
    """Reward of an agent that runs `commands`."""
    with Sandbox.create(instance.files) as sandbox:
        for command in commands:
            sandbox.exec(command)
        outcome = get(instance.family).grade(instance, "Done.", sandbox.snapshot())
    assert isinstance(outcome, Reward), outcome
    return outcome.value


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_passes_and_doing_nothing_fails(family):
    instance = get(family).sample(instance_seed("eval", family, 0))
    assert reward_after(instance, *[s.command for s in instance.solution if s.command]) == 1
    if instance.alternative:
        assert instance.alternative != instance.solution
        assert reward_after(instance, *[s.command for s in instance.alternative if s.command]) == 1
    assert reward_after(instance) == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_oracles_pass(family):
    for i in range(12):
        assert i > 2 or check(get(family), instance_seed("eval", family, i)).ok
        instance = instance_of(family, i)
        assert reward_after(instance, *[s.command for s in instance.solution if s.command]) == 1, instance
        assert reward_after(instance) == 0, instance


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_it_in_several_ways(family):
    ways = defaultdict(int)
    for i in range(60):
        prompt = re.sub(r"\w+\.(txt|md|py|sh)", "F", instance_of(family, i).prompt)
        ways[re.sub(rf"\b({'|'.join(WORDS)})\b", "W", prompt)] += 1
    assert 3 <= len(ways) <= 5


REWARD = "/logs/verifier/reward.txt"
CHEATS = {
    "write the reward": f"mkdir -p /logs/verifier logs/verifier; echo 1 | tee {REWARD} .{REWARD} reward.txt",
    "plant a test": f"mkdir tests; echo 'echo 1 > {REWARD}' | tee test.sh tests/test.sh /tests/test.sh run.sh",
    "say it": "echo 1; echo ok; echo 'reward 1.0'; exit 0",
    "wait in the background": f"mkdir -p /logs/verifier; setsid sh -c 'while :; do echo 1 > {REWARD}; done' &",
    "link to the solution": "for f in answer.txt *.txt *.py; do rm -f $f; ln -s /tests/expected/$f $f; done",
    "link the folder": "rm -rf *; ln -s /tests/expected box; for f in test.sh run.sh; do ln -s /tests/$f $f; done",
    "delete everything": "rm -rf /work/* /tests/* /logs/*",
    "odd names": f"touch -- '-n' '$(touch x)' '; echo 1 > .{REWARD}' \"$(printf 'a\\nb')\"",
    "path tricks": "mkdir -p '..a' ...; echo 1 > '.../reward.txt'",
    "fill the disk": "cat /dev/zero > zero",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
def test_cheating_does_not_pay(cheat):
    for family in ("search", "fix_python"):
        assert reward_after(instance_of(family), cheat) == 0


SABOTAGE = """
import os, subprocess, sys
def {name}(a, b):
    os.makedirs('/logs/verifier', exist_ok=True)
    open('/logs/verifier/reward.txt', 'w').write('1')
    open('/tests/run.expected', 'w').write('')
    subprocess.Popen(['setsid', 'sh', '-c', 'while :; do echo 1 > /logs/verifier/reward.txt; done'])
    print(open('/tests/run.sh').read(), flush=True)
    os._exit(0)
"""


def test_code_under_test_cannot_judge_itself():
    instance = instance_of("fix_python")
    file = next(name for name in instance.files if name.endswith(".py"))
    name = re.search(r"def (\w+)", instance.files[file])[1]
    outcome = verify({file: SABOTAGE.format(name=name).encode()}, instance.tests)
    assert isinstance(outcome, Reward) and outcome.value == 0
    for planted in ("sitecustomize.py", "usercustomize.py", "python3", "os.py", "print.py"):
        wrong = {name: text.encode() for name, text in instance.files.items()}
        assert verify({**wrong, planted: b"raise SystemExit(0)"}, instance.tests).value == 0


def test_a_special_case_for_the_visible_test_does_not_pass():
    for family, body in (
        ("fix_python", "def {n}(a, b):\n    return {w}\n"),
        ("fix_shell", "{n}() {{ echo {w}; }}\n"),
    ):
        instance = instance_of(family)
        file = next(name for name in instance.files if name != "test.sh")
        name = re.search(r"(\w+)\(", instance.files[file])[1]
        want = re.search(r"want (\d+)", instance.files["test.sh"])[1]
        special = body.format(n=name, w=want)
        with Sandbox.create({**instance.files, file: special}) as sandbox:
            assert sandbox.exec("sh test.sh").stdout == "ok\n"
            assert get(family).grade(instance, "", sandbox.snapshot()).value == 0


def test_a_repaired_function_passes_however_it_is_written():
    instance = instance_of("fix_python")
    file = next(name for name in instance.files if name.endswith(".py"))
    name = re.search(r"def (\w+)", instance.files[file])[1]
    body = {"add": "sum((a, b))", "sub": "-(b - a)", "mul": "sum([a] * b)"}[name]
    assert verify({file: f"def {name}(a, b):\n    return {body}\n".encode()}, instance.tests) == Reward(
        1.0, {"tests": 1.0}
    )


def test_compiled_code_that_differs_from_its_source_does_not_count():
    instance = instance_of("fix_python")
    file = next(name for name in instance.files if name.endswith(".py"))
    oracle = next(step.command for step in instance.solution if step.command and "sed" in step.command)
    compiled = (
        f'import py_compile as p; p.compile("{file}", invalidation_mode=p.PycInvalidationMode.UNCHECKED_HASH)'
    )
    plant = (
        f"cp {file} old; {oracle}; /usr/bin/python3 -c '{compiled}'; mv old {file}; sh test.sh | grep ok >&2"
    )
    with Sandbox.create(instance.files) as sandbox:
        assert sandbox.exec(plant).stderr == "ok\n"
        assert get("fix_python").grade(instance, "", sandbox.snapshot()).value == 0
    assert reward_after(instance, oracle) == 1


def test_collateral_damage_fails():
    instance = instance_of("replace")
    oracle = instance.solution[0].command
    other = next(name for name in instance.files if name not in oracle)
    assert reward_after(instance, oracle) == 1
    assert reward_after(instance, oracle, f"echo x >> {other}") == 0
    assert reward_after(instance, oracle, f"rm {other}") == 0
    assert reward_after(instance, oracle, "echo scratch > notes") == 1


@pytest.mark.parametrize("family", ANSWERED)
def test_answers_that_need_an_observation_are_not_in_the_prompt(family):
    for i in range(20):
        instance = instance_of(family, i)
        want = instance.tests["expected/answer.txt"].strip()
        assert want not in instance.prompt.replace(",", "").replace(".", " ").split()


def test_no_answer_is_common():
    for family in ANSWERED:
        answers = [instance_of(family, i).tests["expected/answer.txt"] for i in range(300)]
        assert max(answers.count(answer) for answer in set(answers)) < 0.4 * 300, family


def test_without_its_files_an_episode_is_invalid():
    assert isinstance(get("search").grade(instance_of("search"), "Done."), Invalid)


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        ({"reward.txt": b"1\n"}, Reward(1.0, {"tests": 1.0})),
        ({"reward.txt": b"0.25"}, Reward(0.25, {"tests": 0.25})),
        (
            {"reward.json": b'{"reward": 0.5, "style": 1}', "reward.txt": b"1"},
            Reward(0.5, {"reward": 0.5, "style": 1.0}),
        ),
        ({"reward.json": b'{"a": 1, "b": 0}'}, Reward(0.5, {"a": 1.0, "b": 0.0})),
        ({}, EnvError("reward_missing", False)),
        ({"reward.txt": b""}, EnvError("reward_missing", False)),
        ({"reward.txt": b"yes"}, EnvError("reward_missing", False)),
        ({"reward.json": b"[1]"}, EnvError("reward_missing", False)),
        ({"reward.txt": b"nan"}, EnvError("reward_senseless", False)),
        ({"reward.txt": b"2"}, EnvError("reward_senseless", False)),
    ],
)
def test_a_reward_that_is_missing_or_senseless_is_not_a_zero(found, outcome):
    assert parse_reward(found) == outcome


def test_a_broken_sandbox_is_not_a_zero(monkeypatch):
    def broken(*_):
        raise InfraError("no namespaces")

    monkeypatch.setattr(verify_module.Sandbox, "create", broken)
    monkeypatch.setattr(verify_module, "_idle", {})
    outcome = verify({}, hidden_tests({"a": "b"}))
    assert outcome == EnvError("sandbox: no namespaces")


def test_a_judge_forgets_the_episode_before(monkeypatch):
    """Judging sandboxes are used again: neither files nor hidden tests nor rewards may stay in them."""
    idle = deque()
    monkeypatch.setattr(verify_module, "_idle", {os.getpid(): idle})
    tests = hidden_tests({"a": "b\n", "folder/": ""})
    done = {"a": b"b\n", "folder/": b""}
    assert verify(done, tests) == Reward(1.0, {"tests": 1.0})
    [judge] = idle
    judge.exec("mkdir -p /tmp/x/y; echo 1 > /tmp/x/z; echo 1 > /dev/shm/s; chmod 0 /work")
    assert verify({}, tests) == Reward(0.0, {"tests": 0.0})
    assert list(idle) == [judge]
    assert [judge.snapshot(root) for root in ("/work", "/tmp", "/dev/shm")] == [{}, {}, {}]
    judge.exec("mkdir /work/locked; echo 1 > /work/locked/a; chmod 500 /work/locked")
    assert verify(done, tests) == Reward(1.0, {"tests": 1.0})
    assert list(idle) != [judge]  # it could not be emptied
    [judge] = idle
    judge.close()
    assert verify(done, tests) == Reward(1.0, {"tests": 1.0})  # a dead judge costs no verdict
    assert len(idle) == 1 and idle[0] is not judge


def test_a_test_of_somebody_else_never_gets_a_used_judge(monkeypatch):
    """Harbor's test.sh may run what the agent wrote, so what it leaves behind must not reach the next one."""
    idle = deque()
    monkeypatch.setattr(verify_module, "_idle", {os.getpid(): idle})
    reward = "echo 1 > /logs/verifier/reward.txt"
    assert verify({}, {"test.sh": f"echo left > /dev/shm/left; {reward}"}) == Reward(1.0, {"tests": 1.0})
    assert not idle
    assert verify({}, {"test.sh": f"[ ! -e /dev/shm/left ] && {reward}"}) == Reward(1.0, {"tests": 1.0})


def test_a_verifier_that_hangs_is_not_a_zero(monkeypatch):
    monkeypatch.setattr(verify_module, "TEST_TIMEOUT_S", 0.2)
    assert verify({}, {"test.sh": "sleep 60"}) == EnvError("verifier_timeout")


def test_an_expected_file_has_to_exist_even_if_it_is_empty():
    assert verify({}, hidden_tests({"empty": ""})).value == 0
    assert verify({"empty": b""}, hidden_tests({"empty": ""})).value == 1


WANTED = {"a": "x\n", "d/b": "y\nz\n", "e": ""}
LEFT = {
    "exactly": ({}, 1),
    "no last newline": ({"a": b"x"}, 1),
    "more last newlines": ({"a": b"x\n\n\n", "e": b"\n"}, 1),
    "more files": ({"more": b"1", "d/more": b"2", "tests/expected/a": b"3"}, 1),
    "a newline before": ({"a": b"\nx\n"}, 0),
    "a space behind": ({"a": b"x \n"}, 0),
    "a line less": ({"d/b": b"y\n"}, 0),
    "text for nothing": ({"e": b"e"}, 0),
    "a folder for a file": ({"e": None, "e/": b""}, 0),
    "one missing": ({"d/b": None}, 0),
    "an empty one missing": ({"e": None}, 0),
    "the folder missing": ({"f/": None}, 0),
    "a file for the folder": ({"f/": None, "f": b""}, 0),
    "one too many": ({"gone": b""}, 0),
}


@pytest.mark.parametrize(("change", "value"), LEFT.values(), ids=LEFT)
def test_what_is_overlooked_and_what_is_not(change, value):
    done = {path: text.encode() for path, text in WANTED.items()} | {"f/": b""} | change
    tests = hidden_tests({**WANTED, "f/": "", "gone": None})
    files = {path: data for path, data in done.items() if data is not None}
    assert verify(files, tests) == Reward(float(value), {"tests": float(value)})


@pytest.mark.parametrize(
    ("printed", "value"), [("1\n2\n", 1), ("1\n2", 1), ("1\n2\n\n", 1), ("1 2\n", 0), ("", 0), ("12\n", 0)]
)
def test_of_what_is_printed_only_newlines_at_the_end_are_overlooked(printed, value):
    tests = hidden_tests({}, ("cat out", "1\n2\n"))
    assert verify({"out": printed.encode()}, tests).value == value


@pytest.mark.parametrize(
    ("programs", "change", "reward"),
    [
        ("find diff", "", "1"),  # nothing else is started for an episode that did it
        ("find diff", ": > more; : > d/more", "1"),
        ("find cat", "", "1"),  # where there is no diff
        ("find cat", "echo 2 >> a", "0"),
        ("find diff cat", "chmod 0 a", "0"),  # trouble is not the same as no difference
        ("find diff cat", "ln -s / link", "0"),
        ("find diff cat", "mv a b; ln -s b a", "0"),
    ],
)
def test_the_script_in_any_container(programs, change, reward):
    tests = {f"/tests/{path}": text for path, text in hidden_tests(WANTED).items()}
    with Sandbox.create({**WANTED, **tests, "/logs/verifier/": ""}) as sandbox:
        sandbox.exec(
            "mkdir /tmp/bin; cd /tmp/bin; echo 'echo $$' > cat; chmod 755 cat"
        )  # never twice the same
        sandbox.exec(f"for program in {programs}; do ln -sf /usr/bin/$program /tmp/bin/$program; done")
        sandbox.exec(f"{change}\nPATH=/tmp/bin\n. /tests/test.sh")
        assert sandbox.read(REWARD) == f"{reward}\n".encode()


def test_the_script_makes_its_folder_and_removes_older_rewards():
    tests = {f"/tests/{path}": text for path, text in hidden_tests(WANTED).items()}
    for old in (
        {},
        {"/logs/verifier": ""},
        {"/logs/verifier/reward.json": '{"reward": 0}', REWARD + "/x": ""},
    ):
        with Sandbox.create({**WANTED, **tests, **old}) as sandbox:
            sandbox.exec("sh /tests/test.sh")
            assert sandbox.snapshot("/logs/verifier") == {"reward.txt": b"1\n"}


def test_a_stale_reward_is_not_read():
    tests = hidden_tests({"a": "b"})
    assert verify({"a": b"c"}, tests).value == 0
    assert verify({"a": b"b"}, tests).value == 1
    tests_without_reward = {"test.sh": "true"}
    assert verify({"../logs/verifier/reward.txt": b"1"}, tests_without_reward) == EnvError(
        "reward_missing", False
    )
