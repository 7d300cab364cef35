"""The row of a checkpoint in the stage table: every bench, on the same held-out questions for every stage.

Invariants: instances and sampling seeds are the same for every stage and every run, so stages may be compared pair
by pair; `scores.json` is written once, whole, after everything it speaks of; a bench that cannot run is named in
`skipped` with its reason. A model that has not seen a chat yet is asked less (BASE_SHARE of the questions, short
answers): enough to fill its cells honestly, with a larger standard error.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fullarc.chat import Tokenizer
from fullarc.config.context import StageContext
from fullarc.config.errors import FullarcError
from fullarc.config.seeds import derive
from fullarc.config.stages import SFT, EvalSettings, SandboxSettings
from fullarc.data import longctx
from fullarc.data.corpus import read_heldout
from fullarc.engine import Engine
from fullarc.evals import language
from fullarc.evals.episodes import Question, ask_all
from fullarc.evals.scores import Score, Scores
from fullarc.rollout.episodes import Limits
from fullarc.rollout.trajectory import Trajectory, write_trajectories
from fullarc.tasks import families

BASE_SHARE = 4
BASE_NEW_TOKENS = 48
BASE_TURNS = 2
MAX_LEN = 1024
SPARE = 16  # answers of the needle tests run past their document by less
SORTS = ("needle", "multi_key", "multi_value")
SEED = derive(0, "eval", "needles")


@dataclass(frozen=True)
class Job:
    """What to evaluate and how.

    Attributes:
        stage: name of the stage that made the checkpoint.
        model_dir: the checkpoint.
        settings: sizes of the benches.
        sandbox: where agents work.
        heldout: folder of held-out documents (see data.stage); None = no bits per byte.
        chats: whether the model has learnt to chat.
        families: the families of each kind that it was trained on; a kind not named: all that may be trained on.
    """

    stage: str
    model_dir: Path
    settings: EvalSettings = field(default_factory=EvalSettings)
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    heldout: Path | None = None
    chats: bool = True
    families: Mapping[str, Sequence[str]] = field(default_factory=dict)


def run(ctx: StageContext) -> dict[str, Any]:
    """Evaluate the checkpoint of stage `ctx.name`; called after every model stage."""
    assert ctx.model_in is not None, "an evaluation follows a model stage"
    job = replace(job_of(ctx.recipe, ctx.name, ctx.model_in), settings=ctx.stage)
    scores = evaluate(job, ctx.out)
    return {key: score.value for key, score in scores.scores.items()}


def job_of(recipe: Any, stage: str, model_dir: Path) -> Job:
    """The evaluation of a stage's checkpoint as its recipe says."""
    names = list(recipe.stages)
    so_far = names[: names.index(stage) + 1]
    return Job(
        stage, model_dir, recipe.eval, recipe.sandbox, heldout_of(model_dir),
        chats=any(isinstance(recipe.stages[name], SFT) for name in so_far), families=recipe.tasks.families,
    )  # fmt: skip


def run_of(model_dir: Path) -> Path:
    """Where the run folder of a checkpoint `<run>/stages/<stage>/checkpoint` is, if it belongs to one."""
    return Path(model_dir).resolve().parent.parent.parent


def heldout_of(model_dir: Path) -> Path | None:
    """The held-out documents of the run that a checkpoint belongs to, if any."""
    folder = run_of(model_dir) / "data" / "heldout"
    return folder if folder.is_dir() else None


def trained_rows(model_dir: Path, count: int, length: int) -> list[list[int]]:
    """Beginnings of about `count` rows that the run of a checkpoint is trained on, as many of each kind; [] without."""
    folders = sorted((run_of(model_dir) / "data" / "rows").glob("*/ids.npy"))
    each = count // max(1, len(folders))
    return [row for file in folders for row in np.load(file, mmap_mode="r")[:each, :length].tolist()]


def evaluate(job: Job, out: Path) -> Scores:
    """Run every bench and write `out`/scores.json and `out`/trajectories.jsonl; returns the scores."""
    scores = Scores(job.stage)
    tok = Tokenizer.load(job.model_dir)
    with _threads(1):
        longest = max(MAX_LEN, *(length + SPARE for length in job.settings.needle_lengths), 0)
        engine = Engine(job.model_dir, max_len=longest, dtype=job.settings.dtype)
        with _timed(scores, "language"):
            texts = _language(job, engine, tok, scores)
        with _timed(scores, "needles"):
            _needles(job, engine, tok, texts, scores)
        with _timed(scores, "mtp"):
            accepted = language.accept_length(job.model_dir, [tok.encode(text) for text in texts])
        with _timed(scores, "episodes"):
            asked = questions(job.settings, job.chats, job.families)
            episodes = ask_all(
                engine, tok, asked, _limits(job, engine), job.settings.temperature, job.sandbox
            )
    if accepted is None:
        scores.skipped["mtp_accept"] = "no MTP layer or no held-out documents"
    else:
        scores.scores["mtp_accept"] = accepted
    add_episodes(scores, episodes, job.families)
    write_trajectories(out / "trajectories.jsonl", episodes)
    scores.save(out / "scores.json")
    return scores


@contextmanager
def _timed(scores: Scores, bench: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    scores.seconds[bench] = round(time.perf_counter() - began, 3)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's thread count, put back at the end: the next stage trains in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _language(job: Job, engine: Engine, tok: Tokenizer, scores: Scores) -> list[str]:
    """Bits per byte of both held-out sets; returns the texts of the seen sources."""
    texts = heldout_texts(job.heldout) if job.heldout else {"seen": [], "unseen": []}
    for name, documents in texts.items():
        score, uniform = language.bits_per_byte(engine, tok, documents, job.settings.heldout_tokens)
        if not score.n:
            scores.skipped[f"bpb_{name}"] = "no held-out documents"
            continue
        scores.scores[f"bpb_{name}"] = score
        if name == "seen":
            scores.references["bpb_uniform"] = uniform
    return texts["seen"]


def heldout_texts(folder: Path) -> dict[str, list[str]]:
    """{"seen": …, "unseen": …}: the held-out documents of trained sources and of sources never trained on.

    In the order of a hash, so that any number of them is a mixture of the sources.
    """
    return {
        name: sorted(read_heldout(folder, f"{name}_source"), key=lambda text: derive(0, "heldout", text))
        for name in ("seen", "unseen")
    }


def _needles(job: Job, engine: Engine, tok: Tokenizer, texts: Sequence[str], scores: Scores) -> None:
    """Recall per length over single, multi-key and multi-value needles, `settings.needles` of each."""
    filler = longctx.Filler(tok, texts)
    for length in job.settings.needle_lengths:
        key = f"needle_{length}"
        if length > engine.scheduler.max_len:
            scores.skipped[key] = f"the model has {engine.scheduler.max_len} positions"
            continue
        hits = list[float]()
        for sort in SORTS:
            try:
                cases = longctx.cases(tok, filler, [length], job.settings.needles, SEED, (sort,))
            except FullarcError as error:  # a coarse tokenizer: the facts alone are longer than the document
                scores.skipped[f"{key} {sort}"] = error.message
                continue
            found = language.find_needles(engine, cases)
            scores.families.setdefault("needles", {})[f"{sort} {length}"] = Score.of_share(found)
            hits += found
        if hits:
            scores.scores[key] = Score.of_share(hits)


def questions(
    settings: EvalSettings, chats: bool, chosen: Mapping[str, Sequence[str]] | None = None
) -> list[Question]:
    """What is asked of trained (`chosen`) and held-out families, in a fixed order, or less of it without a chat."""

    def some(count: int) -> range:
        return range(count if chats else max(1, count // BASE_SHARE))

    counts = {"reasoning": settings.problems, "general": settings.instructions, "terminal": settings.episodes}
    return [
        Question(f, i) for kind, n in counts.items() for f in families(kind, "all", chosen) for i in some(n)
    ]


def _limits(job: Job, engine: Engine) -> Limits:
    tokens, turns = job.settings.max_new_tokens, job.settings.max_turns
    if not job.chats:
        tokens, turns = min(tokens, BASE_NEW_TOKENS), min(turns, BASE_TURNS)
    return Limits(tokens, engine.scheduler.max_len, turns)


def add_episodes(
    scores: Scores, episodes: Sequence[Trajectory], chosen: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Scores of graded episodes. A broken environment counts for nothing; a cut-off or invalid episode is a failure."""
    usable = [episode for episode in episodes if episode.outcome.kind != "env_error"]
    if broken := len(episodes) - len(usable):
        scores.skipped["environment"] = f"{broken} of {len(episodes)} episodes had a broken environment"
    by_family: dict[str, list[float]] = {}
    for episode in usable:
        by_family.setdefault(episode.task, []).append(value(episode))
    for kind, name in (("reasoning", "reasoning"), ("terminal", "agent")):
        for split, seen in (("trained", "seen"), ("held_out", "unseen")):
            names = [family for family in families(kind, split, chosen) if family in by_family]
            wins = {f: [float(v >= 1.0) for v in by_family[f]] for f in names}
            if wins:
                scores.scores[f"{name}_{seen}"] = Score.of_share(
                    [win for family in wins.values() for win in family]
                )
                by_name = {family: Score.of_share(list(results)) for family, results in wins.items()}
                scores.families.setdefault(name, {}).update(by_name)
    general = {
        family: by_family[family] for family in families("general", "all", chosen) if family in by_family
    }
    if general:
        scores.scores["general"] = Score.of_mean([v for values in general.values() for v in values])
        scores.families["general"] = {family: Score.of_mean(values) for family, values in general.items()}
    turns = [turn for episode in usable for turn in episode.turns]
    if turns:
        scores.scores["format_errors"] = Score.of_share(
            [float(bool(turn.format_errors) or turn.finish == "length") for turn in turns]
        )
        scores.scores["response_tokens"] = Score.of_mean([float(len(turn.completion_ids)) for turn in turns])


def value(episode: Trajectory) -> float:
    """The reward; 0 for an episode that was cut off or is invalid."""
    return episode.outcome.value if episode.outcome.kind == "reward" else 0.0
