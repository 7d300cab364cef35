"""What `fullarc bench paper` trains: every variant of the paper's tables, from a seed to its metrics.

    tables 1, 2      one model a variant, trained from scratch on concatenated rows of text
    tables 3, 4, 6   one dense long-context model a seed (pre-training, mid-training); its variants start from it:
                     as it is, with windows, with the indexer's warm-up, with windows or sparse attention trained on

All variants of a seed see the same rows in the same order, and all seeds the same corpus, tokenizer and questions.
Invariant: a result is a pure function of (scale, variant, seed). It is a JSON file of its own, so a bench that was
interrupted trains only what is missing; the models that variants share are checkpoints beside them.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from fullarc.chat import Tokenizer
from fullarc.config.files import atomic_write, is_complete
from fullarc.config.model import ATTENTIONS, preset
from fullarc.config.runfolder import digest
from fullarc.config.seeds import derive
from fullarc.config.sizes import SIZES
from fullarc.config.stages import DSA, Data, LMStage, Midtrain, Pretrain, Settings
from fullarc.data.corpus import build_corpus, read_documents, read_heldout
from fullarc.data.stage import build_tokenizer, midtrain_rows, pretrain_rows
from fullarc.engine import mtp_accept_length
from fullarc.evals.paper_metrics import bits_per_byte, held_rows, largest_logit, questions, recall
from fullarc.model import GlmMoeDsa, load_model, save_model
from fullarc.train import Rows, Trainer
from fullarc.train.method import method_of, warm_up_of

DRAFTS = 4
PROMPT_TOKENS, NEW_TOKENS = 48, 32
PROBE_EVERY = 10
SEARCH_SEED, QUESTION_SEED = 1, 2
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything that a result depends on beside its variant and its seed.

    Attributes:
        short: training of tables 1 and 2.
        base, long, dsa: the long-context model's pre-training and mid-training, and the adaptation of its variants.
        topk, window: keys that sparse attention and a sliding window leave to a query.
        lengths: of the documents that are asked about; the last one is the training length.
        cases: questions of each sort and length.
        held_rows: rows of held-out text.
        prompts: beginnings of rows of held-out text that MTP goes on from.
    """

    size: str
    data: Data
    short: Pretrain
    base: Pretrain
    long: Midtrain
    dsa: DSA
    topk: int
    window: int
    lengths: tuple[int, ...]
    cases: int
    held_rows: int
    prompts: int

    def plain(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {k: v.model_dump() if isinstance(v, Settings) else v for k, v in vars(self).items()}

    def key(self) -> str:
        """Names the folder of the results: other settings, other results."""
        return digest(self.plain())[:12]


def laptop() -> Scale:
    """What two cores can train in about an hour: the `2m` size and its rates, with fewer steps."""
    stages = SIZES["2m"]["stages"]
    return Scale(
        size="2m",
        data=Data(max_mb=4.0, tokenizer_mb=2.0),
        short=Pretrain(**stages["pretrain"] | {"steps": 60, "mtp_rows": 0.5}),
        base=Pretrain(**stages["pretrain"] | {"steps": 30, "mtp_steps": 0}),
        long=Midtrain(**stages["midtrain"] | {"steps": 70, "mtp_steps": 0, "trajectory_share": 0.0}),
        dsa=DSA(**stages["dsa"] | {"mtp_steps": 0}),
        topk=128,
        window=128,
        lengths=(128, 256, 512, 1024),
        cases=24,
        held_rows=16,
        prompts=24,
    )


class Lab:
    """Trains and measures the variants of one scale below `folder`, each (variant, seed) once.

    Args:
        tell: told in a few words what is being done.
    """

    def __init__(self, folder: Path, scale: Scale, tell: Tell = lambda _: None) -> None:
        self.scale, self.tell = scale, tell
        self.folder = folder / scale.key()

    def path(self, variant: str, seed: int) -> Path:
        """Where the result of a variant and seed is kept."""
        return self.folder / "results" / f"{variant}-seed{seed}.json"

    def result(self, variant: str, seed: int) -> dict[str, Any]:
        """Metrics of a variant trained from `seed`, from its file or from a training now."""
        path = self.path(variant, seed)
        try:
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            pass
        torch.set_num_threads(1)
        began, clock = time.process_time(), time.perf_counter()
        found = VARIANTS[variant](self, seed)
        took = {
            "cpu_s": round(time.process_time() - began, 1),
            "wall_s": round(time.perf_counter() - clock, 1),
        }
        result = {"variant": variant, "seed": seed, **found, **took}
        atomic_write(path, json.dumps(result, indent=1) + "\n")
        return result

    # --- data --------------------

    @cached_property
    def corpus(self) -> Path:
        """The folder of the corpus, made as a run's data stage makes it."""
        folder, scale = self.folder / "data", self.scale
        if not (is_complete(folder / "corpus") and is_complete(folder / "heldout")):
            self.tell("reading the corpus")
            build_corpus(scale.data, folder / "corpus", folder / "heldout")
        return folder

    @cached_property
    def tok(self) -> Tokenizer:
        """The tokenizer of all variants."""
        out = self.corpus / "tokenizer"
        if not is_complete(out):
            self.tell("training the tokenizer")
            documents = read_documents(self.corpus / "corpus")
            size = preset(self.scale.size).vocab_size
            return build_tokenizer(documents, out, size, self.scale.data.tokenizer_mb, 0)
        return Tokenizer.load(out)

    @cached_property
    def held(self) -> list[str]:
        """Documents of the trained sources that were never trained on, in an order of their own."""
        return sorted(read_heldout(self.corpus / "heldout", "seen_source"), key=lambda text: derive(0, text))

    def rows(self, stage: LMStage) -> Path:
        """The packed rows that a stage reads."""
        long = isinstance(stage, Midtrain | DSA)
        out, scale = self.corpus / "rows" / ("long" if long else f"short-{stage.seq_len}"), self.scale
        if is_complete(out):
            return out
        tok, documents = self.tok, read_documents(self.corpus / "corpus")
        self.tell("packing rows")
        if not long:
            pretrain_rows(documents, tok, out, stage.seq_len, 0)
            return out
        extra = (scale.dsa.steps + scale.dsa.indexer_steps) * scale.dsa.batch_tokens
        tokens = scale.long.steps * scale.long.batch_tokens + extra
        midtrain_rows(documents, [], tok, out, scale.long, tokens, 0)
        return out

    # --- training --------------------

    def new_model(self, seed: int, induction: bool, **overrides: Any) -> GlmMoeDsa:
        """A dense model drawn from `seed`."""
        config = preset(self.scale.size, **overrides)
        config = config.model_copy(update={"index_topk": config.max_position_embeddings})
        return GlmMoeDsa(config).init_weights(derive(seed, "init"), induction)

    def train(
        self,
        model: GlmMoeDsa,
        stage: LMStage,
        seed: int,
        what: str,
        *,
        optimizer: str = "",
        mtp_steps: int = 0,
        warm_up: bool = False,
        each: Callable[[int], None] = lambda _: None,
    ) -> GlmMoeDsa:
        """Train as a stage says; `warm_up`: its indexer's warm-up instead. `each` is told the number of every step."""
        indexer = isinstance(stage, DSA) and not model.config.dense_attention
        stage = stage.model_copy(
            update={
                "optimizer": optimizer or stage.optimizer,
                "mtp_steps": mtp_steps,
                "indexer_weight": stage.indexer_weight if indexer else 0.0,
            }
        )
        how = warm_up_of(stage) if warm_up and isinstance(stage, DSA) else method_of(stage)
        rows = Rows(
            self.rows(stage),
            stage.batch_rows,
            derive(seed, type(stage).__name__.lower(), warm_up),
            model.config.vocab_size,
        )
        trainer = Trainer(model.train(), how.optim, how.lr, how.trainable, how.router_bias_rate)
        micro = 1 if indexer else max(1, 2048 // rows.length)
        for step in range(1, how.steps + 1):
            metrics = trainer.step(rows.next().split(min(micro, stage.batch_rows)), how.loss)
            said = metrics.get("loss", metrics.get("index_kl", 0.0))
            self.tell(f"{what}, seed {seed}: step {step} of {how.steps}, loss {said:.3f}")
            each(step)
        return model.eval()

    def base(self, seed: int) -> Path:
        """The dense long-context model of a seed, as a checkpoint."""
        out = self.folder / f"base-seed{seed}"
        if not is_complete(out):
            model = self.new_model(seed, induction=True, num_nextn_predict_layers=0)
            self.train(model, self.scale.base, seed, "pre-training")
            self.train(model, self.scale.long, seed, "mid-training")
            save_model(model, out)
        return out

    def warmed_up(self, seed: int) -> Path:
        """The same with sparse attention, after the warm-up of its indexer."""
        out = self.folder / f"warm-up-seed{seed}"
        if not is_complete(out):
            model = load_model(self.base(seed), index_topk=self.scale.topk)
            save_model(self.train(model, self.scale.dsa, seed, "warm-up of the indexer", warm_up=True), out)
        return out

    # --- measuring --------------------

    def long_metrics(self, model: GlmMoeDsa) -> dict[str, Any]:
        """Recall by length, and the held-out text's loss where at least half a row is behind."""
        scale, metrics = self.scale, dict[str, float]()
        for length in scale.lengths:
            self.tell(f"asking about documents of {length} tokens")
            asked = questions(self.tok, self.held, length, scale.cases, QUESTION_SEED)
            metrics |= {f"{name}@{length}": value for name, value in recall(model, self.tok, asked).items()}
        longest = scale.lengths[-1]
        held = held_rows(self.tok, self.held, longest, scale.held_rows, skip=longest // 2)
        return {"metrics": metrics | {f"bpb@{longest}": bits_per_byte(model, self.tok, held)}}

    def search(self, seed: int) -> str:
        """The pattern of half windows under which the base model answers best, of all there are (2.1.2's search).

        Judged by questions of their own, at half the longest length, by the answers' log-probability.
        """
        layers = preset(self.scale.size).num_hidden_layers
        length = self.scale.lengths[-2]
        asked = questions(self.tok, self.held, length, self.scale.cases, SEARCH_SEED)
        costs = {}
        for places in combinations(range(layers), layers // 2):
            pattern = "".join("S" if layer in places else "F" for layer in range(layers))
            self.tell(f"searching: {pattern}")
            costs[pattern] = recall(self.windowed(seed, pattern), self.tok, asked)["nats"]
        return min(costs, key=lambda pattern: costs[pattern])

    def windowed(self, seed: int, pattern: str) -> GlmMoeDsa:
        """The base model with windows in the layers marked S."""
        return load_model(self.base(seed), attention_pattern=pattern, sliding_window=self.scale.window)

    def interleaved(self, first: str) -> str:
        """Full and window layers in turn, `first` (F or S) first."""
        order = "FS" if first == "F" else "SF"
        layers = preset(self.scale.size).num_hidden_layers
        return (order * layers)[:layers]


# --- variants --------------------


def _attention(lab: Lab, seed: int, shape: str, optimizer: str) -> dict[str, Any]:
    """Table 1: from scratch, without a start that only MLA has; the largest logit of every tenth step's probe."""
    scale = lab.scale
    model = lab.new_model(seed, induction=False, **ATTENTIONS[shape], num_nextn_predict_layers=0)
    held = held_rows(lab.tok, lab.held, scale.short.seq_len, 4 * scale.held_rows)
    probe, curve = held.ids_BT[:4], list[float]()

    def look(step: int) -> None:
        if step % PROBE_EVERY == 0 or step == scale.short.steps:
            curve.append(largest_logit(model, probe))

    lab.train(model, scale.short, seed, f"{shape}, {optimizer}", optimizer=optimizer, each=look)
    metrics = {"bpb": bits_per_byte(model, lab.tok, held), "logit": max(curve), "logit_end": curve[-1]}
    return {"metrics": metrics, "logit_curve": [round(one, 3) for one in curve]}


def _mtp(lab: Lab, seed: int, steps: int, layers: int) -> dict[str, Any]:
    """Table 2: trunk and MTP trained together; accept length at DRAFTS draft steps, greedy."""
    scale = lab.scale
    model = lab.new_model(seed, induction=True, num_nextn_predict_layers=layers)
    what = f"MTP, {steps} steps on {layers} layers"
    lab.train(model, scale.short, seed, what, mtp_steps=steps)
    lab.tell(f"{what}, seed {seed}: drafting")
    held = held_rows(lab.tok, lab.held, scale.short.seq_len, 4 * scale.held_rows)
    prompts = held.ids_BT[: scale.prompts, :PROMPT_TOKENS].tolist()
    accepted = mtp_accept_length(model, prompts, DRAFTS, NEW_TOKENS, full_passes=True)
    return {
        "metrics": {"accept": accepted.mean, "bpb": bits_per_byte(model, lab.tok, held)}
        | {f"draft_{i}": share for i, share in enumerate(accepted.per_position, start=1)},
        "verify_steps": accepted.verify_steps,
    }


def _dense(lab: Lab, seed: int) -> dict[str, Any]:
    return lab.long_metrics(load_model(lab.base(seed)))


def _dense_on(lab: Lab, seed: int) -> dict[str, Any]:
    model = lab.train(load_model(lab.base(seed)), lab.scale.dsa, seed, "dense, trained on")
    return lab.long_metrics(model)


def _windows(lab: Lab, seed: int, first: str, train: bool) -> dict[str, Any]:
    pattern = lab.interleaved(first) if first else lab.search(seed)
    model = lab.windowed(seed, pattern)
    if train:
        model = lab.train(model, lab.scale.dsa, seed, f"windows {pattern}, trained on")
    return {"pattern": pattern} | lab.long_metrics(model)


def _warm_up(lab: Lab, seed: int) -> dict[str, Any]:
    return lab.long_metrics(load_model(lab.warmed_up(seed)))


def _sparse(lab: Lab, seed: int) -> dict[str, Any]:
    model = lab.train(load_model(lab.warmed_up(seed)), lab.scale.dsa, seed, "sparse adaptation")
    return lab.long_metrics(model)


VARIANTS: Mapping[str, Callable[[Lab, int], dict[str, Any]]] = {
    "gqa": partial(_attention, shape="gqa", optimizer="muon"),
    "mla": partial(_attention, shape="mla", optimizer="muon"),
    "mla-split": partial(_attention, shape="mla", optimizer="muon_split"),
    "mla-256-split": partial(_attention, shape="mla-256", optimizer="muon_split"),
    "mtp-1": partial(_mtp, steps=1, layers=1),
    "mtp-3": partial(_mtp, steps=3, layers=1),
    "mtp-3-separate": partial(_mtp, steps=3, layers=3),
    "dense": _dense,
    "dense-on": _dense_on,
    "warm-up": _warm_up,
    "dsa": _sparse,
    "window-f": partial(_windows, first="F", train=False),
    "window-s": partial(_windows, first="S", train=False),
    "window-searched": partial(_windows, first="", train=False),
    "window-f-on": partial(_windows, first="F", train=True),
    "window-s-on": partial(_windows, first="S", train=True),
}
"""Name of a variant -> what trains and measures it."""
