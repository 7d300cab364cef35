"""Fixing a bug that a test shows: run the test, read the code, repair it, run the test again.

The hidden test calls the repaired function with other numbers than the visible one, so a special case for
the visible test does not pass.
"""

import random
from collections.abc import Callable

from fullarc.tasks.base import Step
from fullarc.tasks.terminal.base import Job, Shell
from fullarc.tasks.words import NATURE, THINGS

FUNCTIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", lambda a, b: a + b),
    "sub": ("-", lambda a, b: a - b),
    "mul": ("*", lambda a, b: a * b),
}
ASKS = [
    "sh test.sh fails. Fix {f}.",
    "The test test.sh fails. Repair {f}.",
    "There is a bug in {f}. Make test.sh pass.",
    "Fix {f} so that sh test.sh says ok.",
]


def _bug(rng: random.Random, right: str, second: str) -> tuple[str, str, str, str]:
    """(wrong operator, wrong second name, sed expression, thought): one of the two is wrong."""
    if rng.random() < 0.4:
        wrong = "x" if second == "b" else "$3"
        return right, wrong, f"s/{wrong}/{second}/", f"{wrong} must be {second}."
    bad = rng.choice([op for op in "+-*" if op != right])
    pattern = "[*]" if bad == "*" else bad
    return bad, second, f"s/{pattern}/{right}/", f"{bad} must be {right}."


def _job(ask: str, file: str, code: str, test: str, fix: tuple[str, str], run: tuple[str, str]) -> Job:
    expression, thought = fix
    steps = [
        Step("I run the test.", "sh test.sh"),
        Step("I read the code.", f"cat {file}"),
        Step(thought, f"sed -i '{expression}' {file}"),
        Step("I test again.", "sh test.sh"),
    ]
    return Job(ask.format(f=file), {file: code, "test.sh": test}, {}, steps, run=run, level=3)


def _cases(rng: random.Random, name: str) -> list[tuple[int, int, int]]:
    """One visible case and three hidden ones: (a, b, result); the numbers tell the three functions apart."""
    cases = [
        (a, b, FUNCTIONS[name][1](a, b))
        for a, b in zip(rng.sample(range(4, 10), 4), (3, 2, 4, 5), strict=True)
    ]
    rng.shuffle(cases)
    return cases


def fix_python(rng: random.Random) -> Job:
    """A Python function with a wrong operator or a wrong name."""
    name = rng.choice(list(FUNCTIONS))
    module = rng.choice(THINGS + NATURE)
    operator, second, expression, thought = _bug(rng, FUNCTIONS[name][0], "b")
    (a, b, want), *hidden = _cases(rng, name)
    code = f"def {name}(a, b):\n    return a {operator} {second}\n"
    verdict = f"print('ok' if r == {want} else f'{name}({a}, {b}) is {{r}}, want {want}')"
    check = f"from {module} import {name}; r = {name}({a}, {b}); {verdict}"
    test = f'python3 -BES -c "{check}" 2>&1 | tail -n 1\n'
    calls = "; ".join(f"print({name}({x}, {y}))" for x, y, _ in hidden)
    # Compiled files of the agent do not count; those of Python itself do, so this is no option of its start.
    prefix = 'import sys; sys.pycache_prefix = "/tmp/none"'
    run = f"cd /work\npython3 -BES -c '{prefix}; from {module} import {name}; {calls}'\n"
    expected = "".join(f"{z}\n" for _, _, z in hidden)
    return _job(rng.choice(ASKS), f"{module}.py", code, test, (expression, thought), (run, expected))


def fix_shell(rng: random.Random) -> Job:
    """A shell function with a wrong operator or a wrong parameter."""
    name = rng.choice(list(FUNCTIONS))
    module = rng.choice(THINGS + NATURE)
    operator, second, expression, thought = _bug(rng, FUNCTIONS[name][0], "$2")
    (a, b, want), *hidden = _cases(rng, name)
    code = f"{name}() {{\n    echo $(($1 {operator} {second}))\n}}\n"
    verdict = f'[ "$r" = {want} ] && echo ok || echo "{name} {a} {b} is $r, want {want}"'
    test = f". ./{module}.sh\nr=$({name} {a} {b} 2>&1)\n{verdict}\n"
    run = f"cd /work\n. ./{module}.sh\n" + "".join(f"{name} {x} {y}\n" for x, y, _ in hidden)
    expected = "".join(f"{z}\n" for _, _, z in hidden)
    return _job(rng.choice(ASKS), f"{module}.sh", code, test, (expression, thought), (run, expected))


FIXES = [Shell("fix_python", fix_python), Shell("fix_shell", fix_shell)]
