"""Speculative decoding: the MTP layer drafts, the trunk checks all drafts at once (GLM-5 section 2.1, Table 2).

    draft    d_1 from the MTP layer's row of the last token; d_2, d_3, … from rows that carry its own states on
    verify   the trunk computes the last token and its drafts as one run; each row samples as it would without drafts
    commit   as many drafts as equal what the trunk sampled, and the first token that does not, or one more

Invariants: the tokens are those of decoding without drafts, for every seed; what an MTP layer says only changes how
many come at once. With `rejection` (more drafts are accepted at temperatures above 0) they are not the same ones, but
of the same distribution. The MTP layer's rows of committed tokens are computed from the trunk's states. Drafts are
chosen as tokens are: by the request's own temperature, truncation and penalties.

Drafts cost time. `Pace` measures what up to n drafts take and bring for batches of about the present size, and chooses
n; and a sequence's drafts end where the MTP layer itself holds it for too unlikely (below `LEAST`) that all are right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.engine.backend import ForwardPass
from fullarc.engine.core import Chunk
from fullarc.engine.native import NativeCore
from fullarc.engine.penalties import penalised
from fullarc.engine.sampling import SamplingParams, draft

MAX_DRAFTS = 4
KEPT_STATES = 64
LEAST = 0.4
"""A further draft is worth its time from about here on (docs/log.md)."""
SMOOTHING, LOOK_SMOOTHING = 0.1, 0.5
TRIALS = 3
FIRST_LOOK, RAREST_LOOK = 32, 512


@dataclass
class Speculation:
    """A sequence's drafts and what became of them.

    Attributes:
        drafts: of the tokens that follow the last known one; probabilities: what each was drawn from, with rejection.
        rows: the MTP layer has rows 1 … rows - 1.
        verified: steps in which drafts were checked. proposed, accepted: drafts.
        histogram: how many of these steps accepted 0, 1, … drafts.
    """

    drafts: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    rows: int = 1
    verified: int = 0
    proposed: int = 0
    accepted: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))

    def count(self, proposed: int, accepted: int) -> None:
        """Note one checked run of drafts."""
        self.verified += 1
        self.proposed += proposed
        self.accepted += accepted
        self.histogram[accepted] += 1

    def add(self, other: "Speculation") -> None:
        """Count what another one has counted."""
        self.verified += other.verified
        self.proposed += other.proposed
        self.accepted += other.accepted
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]

    @property
    def accept_length(self) -> float:
        """Tokens committed per verify step, the trunk's own included; 0 without a step."""
        return 1 + self.accepted / self.verified if self.verified else 0.0

    @property
    def accept_rate(self) -> float:
        """Share of the drafts that were accepted."""
        return self.accepted / self.proposed if self.proposed else 0.0

    def per_position(self, drafts: int) -> list[int]:
        """How many verify steps accepted at least 1, 2, … `drafts` drafts."""
        return [sum(self.histogram[i + 1 :]) for i in range(drafts)]

    def told(self, tokens: int) -> dict[str, float | int | list[int]]:
        """SGLang's fields for a completion of `tokens`, in its present and its former names."""
        return {
            "spec_verify_ct": self.verified,
            "spec_accept_length": tokens / self.verified,
            "spec_accept_rate": self.accept_rate,
            "spec_num_correct_drafts": self.accepted,
            "spec_num_proposed_drafts": self.proposed,
            "spec_correct_drafts_histogram": list(self.histogram),
            "spec_accept_token_num": self.accepted,
            "spec_draft_token_num": self.proposed,
        }


class Pace:
    """How many drafts pay: for each size of batch, tokens per second with 0 … `most` drafts, smoothed.

    Nothing is drafted before it has been measured. Every count is tried TRIALS times; then the best is kept, and the
    others are looked at again, ever more rarely while that changes nothing.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._sizes: dict[int, _Measured] = {}

    def choose(self, batch: int, quiet: bool) -> int:
        """Number of drafts for the next step of `batch` sequences; only `quiet` ones, without prompts, try others."""
        measured = self._of(batch)
        return measured.next if quiet else measured.best

    def record(self, batch: int, drafts: int, tokens: int, seconds: float) -> None:
        """A step that checked `drafts` drafts a sequence, and made as many, took `seconds` for `tokens` in all."""
        self._of(batch).record(drafts, tokens, seconds)

    def _of(self, batch: int) -> "_Measured":
        return self._sizes.setdefault(batch.bit_length(), _Measured(self.most))


class _Measured:
    """One size of batch. `best`: the fastest number of drafts so far; `next`: the one to use or to try."""

    def __init__(self, most: int) -> None:
        self.tokens, self.seconds, self.seen = [0.0] * (most + 1), [0.0] * (most + 1), [0] * (most + 1)
        self.best, self.next = 0, most
        self._wait = self._interval = FIRST_LOOK
        self._other = 0

    def record(self, drafts: int, tokens: int, seconds: float) -> None:
        share = max(SMOOTHING if drafts == self.best else LOOK_SMOOTHING, 1 / (self.seen[drafts] + 1))
        self.seen[drafts] += 1
        self.tokens[drafts] += share * (tokens - self.tokens[drafts])
        self.seconds[drafts] += share * (seconds - self.seconds[drafts])
        best = max((d for d, n in enumerate(self.seen) if n), key=lambda d: self.tokens[d] / self.seconds[d])
        if best != self.best:
            self.best, self._wait, self._interval = best, FIRST_LOOK, FIRST_LOOK
        untried = [d for d, n in enumerate(self.seen) if n < TRIALS]
        self.next = untried[-1] if untried else best
        self._wait -= 1
        if self._wait <= 0 and not untried:
            self._other = (self._other + 1) % len(self.seen)
            if self._other == 0:
                self._interval = min(2 * self._interval, RAREST_LOOK)
            self._wait, self.next = self._interval, self._other


@dataclass(frozen=True)
class Progress:
    """What the drafter must know of a sequence after a step.

    Attributes:
        ids: all known tokens, `prompt` first, of which the trunk has computed `computed`.
        start, row: the step computed its rows from position `start` on, and they begin at `row` of the step's states.
        room: drafts that may follow; 0 where none are wanted.
    """

    spec: Speculation
    params: SamplingParams
    slot: int
    prompt: list[int]
    ids: list[int]
    computed: int
    start: int
    row: int
    room: int


class Drafter:
    """Keeps the MTP layer's rows in step with the trunk's, and drafts.

    Args:
        core: with a cache for the MTP layer.
        steps: drafts per verify step at most, 1 to MAX_DRAFTS.
        rejection: sample by rejection. Then `steps` drafts are always made, because their number decides tokens.
        adaptive: choose the number of drafts by measured speed, and end them where they are unlikely.

    Raises FullarcError if the model has no MTP layer or `steps` is out of range.
    """

    def __init__(self, core: ForwardPass, steps: int, rejection: bool = False, adaptive: bool = True) -> None:
        if not 1 <= steps <= MAX_DRAFTS:
            raise FullarcError(f"{steps} draft steps: 1 to {MAX_DRAFTS} are possible.", "Choose fewer.")
        if not core.weights.has_mtp:
            raise FullarcError("This model has no MTP layer to draft with.", "Start without draft steps.")
        self.core, self.steps, self.rejection = core, steps, rejection
        self.pace: Pace | None = None
        self.least, self.before = 0.0, 0
        if adaptive and not rejection:
            self.pace, self.least = Pace(steps), LEAST
        width = core.weights.config.hidden_size
        self._states = torch.zeros(core.cache.slots, KEPT_STATES, width)

    def always(self) -> None:
        """From now on make as many drafts as may be."""
        self.pace, self.least = None, 0.0

    def steps_for(self, batch: int, quiet: bool) -> int:
        """Drafts to make for a batch of `batch` decoding sequences; `quiet`: the next step has no prompts."""
        return self.pace.choose(batch, quiet) if self.pace else self.steps

    @torch.inference_mode()
    def advance(self, sequences: Sequence[Progress], hidden_ND: Tensor, steps: int) -> None:
        """Bring the MTP layer's rows up to the trunk's and leave up to `steps` drafts with each sequence.

        A decoding sequence without drafts is left for later while `steps` is 0; its last KEPT_STATES states are kept.
        """
        for s in sequences:
            s.spec.drafts.clear()
            s.spec.probabilities.clear()
        late = [s for s in sequences if steps == 0 and s.computed - s.start == 1]
        if late:
            slots, places = [s.slot for s in late], [s.start % KEPT_STATES for s in late]
            self._states[torch.tensor(slots), torch.tensor(places)] = hidden_ND[
                torch.tensor([s.row for s in late])
            ]
        now = [s for s in sequences if not (steps == 0 and s.computed - s.start == 1)]
        now = [s for s in now if s.spec.rows <= min(s.computed, len(s.ids) - 1)]
        if not now:
            return
        chunks, rows, old = list[Chunk](), list[int](), list[tuple[int, int, int]]()
        for s in now:
            end = min(s.computed, len(s.ids) - 1)
            first = max(s.spec.rows, min(s.start + 1, end + 1 - KEPT_STATES))
            for row in range(first, end + 1):
                if row <= s.start:
                    old.append((len(rows), s.slot, (row - 1) % KEPT_STATES))
                rows.append(max(s.row + row - 1 - s.start, 0))
            chunks.append(Chunk(s.slot, first, s.ids[first : end + 1]))
            s.spec.rows = end + 1
        states_ND = hidden_ND.index_select(0, torch.tensor(rows))
        if old:
            at_M, slot_M, place_M = (torch.tensor(part) for part in zip(*old, strict=True))
            states_ND[at_M] = self._states[slot_M, place_M]
        hidden_ND = self.core.look_ahead(chunks, states_ND)
        ends = [sum(len(chunk.ids) for chunk in chunks[: i + 1]) - 1 for i in range(len(chunks))]
        self._draft([(s, end) for s, end in zip(now, ends, strict=True) if s.room > 0], hidden_ND, steps)

    def _draft(self, wanted: list[tuple[Progress, int]], hidden_ND: Tensor, steps: int) -> None:
        if steps and wanted and isinstance(self.core, NativeCore) and not self.rejection:
            plain = [(s, row) for s, row in wanted if s.params.plain]
            self._guess(self.core, plain, hidden_ND, steps)
            wanted = [(s, row) for s, row in wanted if not s.params.plain]
        sure: dict[int, float] = dict.fromkeys((s.slot for s, _ in wanted), 1.0)
        for depth in range(steps):
            wanted = [(s, row) for s, row in wanted if s.room > depth and sure[s.slot] >= self.least]
            if not wanted:
                return
            if depth:
                chunks = [Chunk(s.slot, len(s.ids) - 1 + depth, [s.spec.drafts[-1]]) for s, _ in wanted]
                states_ND = hidden_ND.index_select(0, torch.tensor([row for _, row in wanted]))
                hidden_ND = self.core.look_ahead(chunks, states_ND)
                wanted = [(s, row) for row, (s, _) in enumerate(wanted)]
            logits, params = (
                self.core.logits(hidden_ND, [row for _, row in wanted]),
                [s.params for s, _ in wanted],
            )
            ids = [s.ids + s.spec.drafts for s, _ in wanted]
            steered = penalised(logits, params, [s.prompt for s, _ in wanted], ids)
            tokens, q_NV = draft(steered, params, [len(known) for known in ids], self.rejection)
            for number, (s, _) in enumerate(wanted):
                if self.least:
                    heat = s.params.temperature or 1.0
                    sure[s.slot] *= float((steered[number].double() / heat).softmax(-1).amax())
                    if sure[s.slot] < self.least:
                        continue
                s.spec.drafts.append(tokens[number])
                if q_NV is not None:
                    s.spec.probabilities.append(q_NV[number])

    def _guess(
        self, core: NativeCore, wanted: list[tuple[Progress, int]], hidden_ND: Tensor, steps: int
    ) -> None:
        """`_draft` in one call: each token by the number that will draw the trunk's at its place."""
        if not wanted:
            return
        drafts = core.guess(
            hidden_ND.index_select(0, torch.tensor([row for _, row in wanted])), [s.slot for s, _ in wanted],
            [len(s.ids) for s, _ in wanted],
            [min(s.room, steps) for s, _ in wanted], [s.params.temperature for s, _ in wanted],
            [s.params.seed for s, _ in wanted], steps, self.least,
        )  # fmt: skip
        for (s, _), tokens in zip(wanted, drafts, strict=True):
            s.spec.drafts += tokens
