"""Hidden tests: /tests/test.sh writes /logs/verifier/reward.txt (Harbor's contract; envs.md 1.1).

They run in a second, empty sandbox on the files that the episode left behind. The agent's processes are gone by
then, symbolic links were never copied, the tests were never where the agent was, and the judging sandbox runs
nothing that the agent wrote: code of the agent is run by /tests/run.sh in a sandbox of its own, which knows
hidden inputs but no expected output, and only what it prints is passed on. So a reward cannot be written, spoofed or
waited for. And so a sandbox in which our own test.sh judged can be filled anew and judge again, which saves a start:
twice what the judging takes. A test.sh of somebody else (Harbor) may run anything and always gets a new one.
"""

import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fullarc.config.errors import FullarcError
from fullarc.sandbox import WORKDIR, InfraError, Sandbox
from fullarc.tasks.base import EnvError, Outcome, Reward

TEST_TIMEOUT_S = 20.0
RUN_TIMEOUT_S = 5.0
IDLE_JUDGES = 4
REWARDS = "/logs/verifier"
OURS = ". /tests/test.sh"
THEIRS = f"rm -rf {REWARDS}; mkdir {REWARDS}; exec sh /tests/test.sh"
_idle: dict[int, deque[Sandbox]] = {}  # process -> its judging sandboxes that wait for an episode
TEST_SH = r"""#!/bin/sh
# Reward 1 if /work is as /tests/expected, /tests/folders and /tests/absent say, else 0.
# Starting a program takes longer than all its work here, so one diff compares all files, and only where it finds
# a difference does each file get a look that overlooks newlines at its end.
[ -d /logs/verifier ] || { rm -rf /logs/verifier; mkdir -p /logs/verifier; }
set -- /logs/verifier/*
[ "$*" = "/logs/verifier/*" ] || rm -rf "$@"
reward=1 found=
[ -z "$(find /work -type l)" ] || reward=0
status=0
[ ! -d /tests/expected ] || found=$(diff -rq /tests/expected /work 2>&1) || status=$?  # 1: they differ, 2: trouble
case $found in */tests/expected*) status=2 ;; esac  # not just something that only /work has
if [ $status -ge 2 ]; then
    for file in $(cd /tests/expected && find . -type f); do
        [ -f "/work/$file" ] && [ "$(cat "/work/$file")" = "$(cat "/tests/expected/$file")" ] || reward=0
    done
fi
while read -r folder; do [ -d "/work/$folder" ] || reward=0; done < /tests/folders
while read -r gone; do [ ! -e "/work/$gone" ] || reward=0; done < /tests/absent
if [ -f /tests/run.sh ]; then
    # run.out is made in a sandbox of its own where there is one; else run the code here.
    [ -f /tests/run.out ] || (cd /work && timeout 5 sh /tests/run.sh > /tests/run.out 2>/dev/null)
    cmp -s /tests/run.out /tests/run.expected ||
        [ "$(cat /tests/run.out)" = "$(cat /tests/run.expected)" ] || reward=0
fi
echo $reward > /logs/verifier/reward.txt
"""


def hidden_tests(after: Mapping[str, str | None], run: tuple[str, str] | None = None) -> dict[str, str]:
    """Files of /tests that check `after` (see `Job.after`) and the output of `run` = (script, expected output)."""
    tests = {"test.sh": TEST_SH}
    tests |= {
        f"expected/{path}": text for path, text in after.items() if text is not None and path[-1] != "/"
    }
    tests["folders"] = "".join(f"{path}\n" for path in after if path.endswith("/"))
    tests["absent"] = "".join(f"{path}\n" for path, text in after.items() if text is None)
    if run:
        tests |= {"run.sh": run[0], "run.expected": run[1]}
    return tests


def parse_reward(found: Mapping[str, bytes]) -> Outcome:
    """Read reward.json (flat, key "reward") or else reward.txt; a missing or senseless one is an `EnvError`."""
    try:
        if "reward.json" in found:
            parts = {str(name): float(value) for name, value in json.loads(found["reward.json"]).items()}
            value = parts.get("reward", sum(parts.values()) / max(1, len(parts)))
        else:
            parts, value = {}, float(found["reward.txt"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return EnvError("reward_missing", retryable=False)
    if not math.isfinite(value) or not 0 <= value <= 1:
        return EnvError("reward_senseless", retryable=False)
    return Reward(value, parts or {"tests": value})


def verify(files: Mapping[str, bytes], tests: Mapping[str, str]) -> Outcome:
    """Judge the `files` of an episode by `tests` (path below /tests -> content)."""
    work = {f"{WORKDIR}/{path}": data for path, data in files.items()}
    hidden: dict[str, bytes | str] = {f"/tests/{path}": data for path, data in tests.items()}
    ours = tests.get("test.sh") == TEST_SH
    try:
        if "run.sh" in tests:
            with Sandbox.create({**work, "/tests/run.sh": tests["run.sh"]}) as sandbox:
                hidden["/tests/run.out"] = sandbox.exec("exec sh /tests/run.sh", RUN_TIMEOUT_S).stdout
        with _judge({**work, **hidden, f"{REWARDS}/": b""}, ours) as sandbox:
            result = sandbox.exec(OURS if ours else THEIRS, TEST_TIMEOUT_S)
            if result.timed_out:
                return EnvError("verifier_timeout")
            return parse_reward(sandbox.snapshot(REWARDS))
    except InfraError as error:
        return EnvError(f"sandbox: {error.message}")
    except FullarcError:
        return Reward(0.0, {"tests": 0.0, "files_storable": 0.0})


@contextmanager
def _judge(files: Mapping[str, bytes | str], ours: bool) -> Iterator[Sandbox]:
    """A sandbox with `files` and nothing else to judge in; kept for the next episode if only `ours` runs in it."""
    idle = _idle.setdefault(os.getpid(), deque())
    sandbox = (_refilled(idle, files) if ours else None) or Sandbox.create(files)
    keep = False
    try:
        yield sandbox
        keep = ours and len(idle) < IDLE_JUDGES
    finally:
        if keep:
            idle.append(sandbox)
        else:
            sandbox.close()


def _refilled(idle: deque[Sandbox], files: Mapping[str, bytes | str]) -> Sandbox | None:
    """An idle sandbox, with `files` instead of what it held; one that cannot do that is dropped."""
    try:
        sandbox = idle.pop()
    except IndexError:  # there is none, or another thread was faster
        return None
    try:
        sandbox.refill(files)
        return sandbox
    except InfraError:
        sandbox.close()
        return None
