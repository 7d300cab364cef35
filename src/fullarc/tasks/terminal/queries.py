"""Families that find something out and write it to answer.txt. The oracles of the last three take the answer from what
they read in an earlier turn; `count_lines`, `sum_column` and `search` show that way and the redirect."""

import random

from fullarc.tasks.base import Step
from fullarc.tasks.terminal.base import ANSWER, Job, Shell, distractors, lines, names, text
from fullarc.tasks.words import ANIMALS, COLORS, FOODS, NATURE, THINGS


def _ways(thought: str, command: str, result: object) -> tuple[list[Step], list[Step]]:
    """Two ways to write down what a command prints: in the same command, or after reading it."""
    write = Step(f"It is {result}.", f"echo {result} > {ANSWER}")
    return [Step(thought, f"{command} > {ANSWER}")], [Step(thought, command), write]


def count_lines(rng: random.Random) -> Job:
    """How many lines contain a word."""
    [file] = names(rng, 1)
    word, *pool = rng.sample(ANIMALS, 7)
    n = rng.randint(1, 5)
    rows = [f"{word} {rng.choice(pool)}" for _ in range(n)] + lines(rng, pool, rng.randint(1, 3))
    rng.shuffle(rows)
    ask = rng.choice(
        [
            "How many lines of {f} contain {w}? Write the number to answer.txt.",
            "Count the lines with {w} in {f} and write the number to answer.txt.",
            "Write to answer.txt how many lines of {f} have the word {w}.",
            "In {f}, count the lines that contain {w}. Put the number in answer.txt.",
        ]
    ).format(f=file, w=word)
    at_once, in_turn = _ways(f"I count {word} in {file}.", f"grep -c {word} {file}", n)
    files = {file: text(rows), **distractors(rng, [file], 1)}
    return Job(ask, files, {ANSWER: f"{n}\n"}, at_once, in_turn)


def count_files(rng: random.Random) -> Job:
    """How many files are in a folder."""
    folder, other = rng.sample(THINGS, 2)
    n = rng.randint(1, 6)
    files = {f"{folder}/{name}": text(lines(rng, COLORS, 1)) for name in names(rng, n)}
    files |= {f"{other}/{name}": text(lines(rng, COLORS, 1)) for name in names(rng, rng.randint(1, 3))}
    ask = rng.choice(
        [
            "How many files are in {d}? Write the number to answer.txt.",
            "Count the files in the folder {d} and write the number to answer.txt.",
            "Write to answer.txt how many files the folder {d} has.",
        ]
    ).format(d=folder)
    return Job(
        ask,
        files,
        {ANSWER: f"{n}\n"},
        [Step(f"I count files in {folder}.", f"ls {folder} | wc -l > {ANSWER}")],
    )


def sum_column(rng: random.Random) -> Job:
    """Total of the second column."""
    [file] = names(rng, 1)
    keys = rng.sample(FOODS, rng.randint(3, 5))
    values = [rng.randint(1, 19) for _ in keys]
    rows = [f"{key} {value}" for key, value in zip(keys, values, strict=True)]
    ask = rng.choice(
        [
            "Add the numbers in {f} and write the sum to answer.txt.",
            "What is the sum of the numbers in {f}? Write it to answer.txt.",
            "Write the total of {f} to answer.txt.",
            "Sum up {f}. Put the total in answer.txt.",
        ]
    ).format(f=file)
    command = f"awk '{{s+=$2}} END {{print s}}' {file}"
    at_once, in_turn = _ways(f"I add column 2 of {file}.", command, sum(values))
    files = {file: text(rows), **distractors(rng, [file], 1)}
    return Job(ask, files, {ANSWER: f"{sum(values)}\n"}, at_once, in_turn)


def search(rng: random.Random) -> Job:
    """Which file contains a word: grep names it, then it is written down."""
    files = names(rng, rng.randint(3, 4))
    word, *pool = rng.sample(ANIMALS, 7)
    contents = {file: lines(rng, pool, rng.randint(1, 2)) for file in files}
    found = rng.choice(files)
    contents[found].insert(rng.randrange(len(contents[found]) + 1), f"{word} {rng.choice(pool)}")
    ask = rng.choice(
        [
            "Which file contains {w}? Write its name to answer.txt.",
            "Find the file with the word {w} and write its name to answer.txt.",
            "Write to answer.txt the name of the file that has {w} in it.",
            "One file contains {w}. Put its name in answer.txt.",
        ]
    ).format(w=word)
    at_once, in_turn = _ways(f"I search for {word}.", f"grep -l {word} *", found)
    before = {f: text(rows) for f, rows in contents.items()}
    return Job(ask, before, {ANSWER: f"{found}\n"}, in_turn, at_once, level=2)


def value(rng: random.Random) -> Job:
    """The number that belongs to a key: read the line, write the number."""
    [file] = names(rng, 1)
    keys = rng.sample(FOODS, rng.randint(3, 5))
    numbers = rng.sample(range(1, 100), len(keys))
    i = rng.randrange(len(keys))
    rows = [f"{key} {number}" for key, number in zip(keys, numbers, strict=True)]
    ask = rng.choice(
        [
            "What is the number of {k} in {f}? Write it to answer.txt.",
            "Find {k} in {f} and write its number to answer.txt.",
            "Write the number of {k} from {f} to answer.txt.",
        ]
    ).format(k=keys[i], f=file)
    steps = [Step(f"I look for {keys[i]}.", f"grep {keys[i]} {file}")]
    steps += [Step(f"{keys[i]} has {numbers[i]}.", f"echo {numbers[i]} > {ANSWER}")]
    return Job(
        ask, {file: text(rows), **distractors(rng, [file], 1)}, {ANSWER: f"{numbers[i]}\n"}, steps, level=2
    )


def largest(rng: random.Random) -> Job:
    """Held out: the largest number of a file, read and compared by the model itself."""
    [file] = names(rng, 1)
    numbers = rng.sample(range(1, 100), rng.randint(2, 4))
    ask = rng.choice(
        [
            "Write the largest number in {f} to answer.txt.",
            "What is the largest number in {f}? Write it to answer.txt.",
            "Find the largest number of {f}. Put it in answer.txt.",
        ]
    ).format(f=file)
    best = max(numbers)
    steps = [
        Step("I read the file.", f"cat {file}"),
        Step(f"The largest is {best}.", f"echo {best} > {ANSWER}"),
    ]
    files = {file: text([str(n) for n in numbers]), **distractors(rng, [file], 1)}
    return Job(ask, files, {ANSWER: f"{best}\n"}, steps, level=3)


def pair(rng: random.Random) -> Job:
    """Two lookups: a file names the other file that has to be read."""
    first, *others = names(rng, 3)
    word, *pool = rng.sample(NATURE, 3)
    contents = dict(zip(others, [word, *pool], strict=False))
    ask = rng.choice(
        [
            "{f} names a file. Write the word in that file to answer.txt.",
            "Read {f}, then the file that it names. Write the word in it to answer.txt.",
            "Follow {f} to the next file and write its word to answer.txt.",
        ]
    ).format(f=first)
    steps = [
        Step("I read the first file.", f"cat {first}"),
        Step(f"Next is {others[0]}.", f"cat {others[0]}"),
    ]
    steps += [Step(f"The word is {word}.", f"echo {word} > {ANSWER}")]
    files = {first: f"{others[0]}\n", **{name: f"{content}\n" for name, content in contents.items()}}
    return Job(ask, files, {ANSWER: f"{word}\n"}, steps, level=3)


QUERIES = [
    Shell("count_lines", count_lines),
    Shell("count_files", count_files),
    Shell("sum_column", sum_column),
    Shell("search", search),
    Shell("value", value),
    Shell("pair", pair),
    Shell("largest", largest, held_out=True),
]
