"""Speculative decoding: the MTP layer drafts, the trunk checks all drafts at once (GLM-5 section 2.1, Table 2).

    draft    d_1 from the MTP layer's row of the last token; d_2, d_3, … from rows that carry its own states on
    verify   the trunk computes the last token and its drafts as one run; each row samples as it would without drafts
    commit   as many drafts as equal what the trunk sampled, and the first token that does not, or one more

Invariants: the tokens are those of decoding without drafts, for every seed; what an MTP layer says only changes how
many come at once. With `rejection` (more drafts are accepted at temperatures above 0) they are not the same ones, but
of the same distribution. The MTP layer's rows of committed tokens are computed from the trunk's states. Drafts are
chosen as tokens are: by the request's own temperature, truncation and penalties.

Drafts cost time. A sequence's drafts end where the MTP layer itself holds it for too unlikely (below `LEAST`) that all
are right; and `Pace` measures whether drafts pay at all for batches of about the present size.
"""

from collections import deque
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
KEPT_STATES = 24
LEAST = 0.4
"""A further draft is worth its time from about here on (docs/log.md)."""
LONGEST_REST = 3
MEMORY = 0.95
TRIALS = 8
FIRST_LOOK, RAREST_LOOK = 128, 1024


@dataclass
class Speculation:
    """A sequence's drafts and what became of them.

    Attributes:
        drafts: of the tokens that follow the last known one; probabilities: what each was drawn from, with rejection.
        rows: the MTP layer has rows 1 … rows - 1.
        rest, pause: steps to leave out, and how many were left out after the last try.
        late: the trunk's states of the last KEPT_STATES steps that were not followed, as rows of those steps' results.
        verified: steps in which drafts were checked. proposed, accepted: drafts.
        histogram: how many of these steps accepted 0, 1, … drafts.
    """

    drafts: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    rows: int = 1
    late: deque[Tensor] = field(default_factory=lambda: deque(maxlen=KEPT_STATES))
    rest: int = 0
    pause: int = 0
    verified: int = 0
    proposed: int = 0
    accepted: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))

    def forget(self) -> None:
        """What was drafted."""
        self.drafts.clear()
        self.probabilities.clear()

    def resting(self) -> bool:
        """Whether the next step is to be left out, because the last ones were too unsure for drafts."""
        self.rest -= 1
        return self.rest >= 0

    def tried(self) -> None:
        """Drafts were asked for: rest after none, longer each time."""
        self.pause = 0 if self.drafts else min(2 * self.pause + 1, LONGEST_REST)
        self.rest = self.pause

    def postpone(self, state_D: Tensor) -> None:
        """The trunk has computed one more token, in this state, and the MTP layer is to follow later."""
        self.forget()
        self.late.append(state_D)

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
    """Whether drafts pay: for each size of batch, tokens per second with and without them, of late.

    Nothing is drafted before it has been measured. Both ways are tried for TRIALS steps; then the faster one is kept,
    and the other is looked at again for as many, ever more rarely while that changes nothing.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Measured] = {}

    def choose(self, batch: int, quiet: bool) -> bool:
        """Whether to draft for the next step of `batch` sequences; only `quiet` ones, without prompts, are trials."""
        measured = self._of(batch)
        return measured.next if quiet else measured.best

    def record(self, batch: int, drafted: bool, tokens: int, seconds: float) -> None:
        """A step that checked drafts, and made them, or did neither, took `seconds` for `tokens` in all."""
        self._of(batch).record(drafted, tokens, seconds)

    def _of(self, batch: int) -> "_Measured":
        return self._sizes.setdefault(batch.bit_length(), _Measured())


class _Measured:
    """One size of batch. `best`: whether drafts are faster; `next`: whether to use or to try them."""

    def __init__(self) -> None:
        self.best, self.next = False, True
        self._tokens, self._seconds, self._seen = [0.0, 0.0], [0.0, 0.0], [0, 0]
        self._looking, self._left, self._interval = True, TRIALS, FIRST_LOOK

    def record(self, drafted: bool, tokens: int, seconds: float) -> None:
        self._seen[drafted] += 1
        self._tokens[drafted] = MEMORY * self._tokens[drafted] + tokens
        self._seconds[drafted] = MEMORY * self._seconds[drafted] + seconds
        if min(self._seen) >= TRIALS:
            without, with_drafts = (t / s for t, s in zip(self._tokens, self._seconds, strict=True))
            if self.best != (with_drafts > without):
                self.best, self._interval = not self.best, FIRST_LOOK
        self._left -= 1
        if self._left > 0:
            self.next = self.next if self._looking else self.best
        elif self._looking and min(self._seen) >= TRIALS:
            self._looking, self.next, self._left = False, self.best, self._interval
            self._interval = min(2 * self._interval, RAREST_LOOK)
        else:
            self._looking, self.next, self._left = True, not self.next, TRIALS


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
        adaptive: draft where it is measured to be faster, and end drafts where they are unlikely.

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
            self.pace, self.least = Pace(), LEAST

    def always(self) -> None:
        """From now on make as many drafts as may be."""
        self.pace, self.least = None, 0.0

    def steps_for(self, batch: int, quiet: bool) -> int:
        """Drafts to make for a batch of `batch` decoding sequences; `quiet`: the next step has no prompts."""
        return self.steps if self.pace is None or self.pace.choose(batch, quiet) else 0

    @torch.inference_mode()
    def advance(self, sequences: Sequence[Progress], hidden_ND: Tensor, steps: int) -> None:
        """Bring the MTP layer's rows up to the trunk's and leave up to `steps` drafts with each sequence."""
        for s in sequences:
            s.spec.forget()
        now = [s for s in sequences if s.spec.rows <= min(s.computed, len(s.ids) - 1)]
        if not now:
            return
        chunks, states = list[Chunk](), list[Tensor]()
        for s in now:
            end, late = min(s.computed, len(s.ids) - 1), s.spec.late
            first = max(s.spec.rows, s.start + 1 - len(late))
            if first <= s.start:
                states += list(late)[first - 1 - s.start :]
            states.append(hidden_ND[s.row + max(first - 1 - s.start, 0) : s.row + end - s.start])
            chunks.append(Chunk(s.slot, first, s.ids[first : end + 1]))
            late.clear()
            s.spec.rows = end + 1
        states_ND = torch.cat([state if state.ndim == 2 else state[None] for state in states])
        hidden_ND = self.core.look_ahead(chunks, states_ND)
        ends = [sum(len(chunk.ids) for chunk in chunks[: i + 1]) - 1 for i in range(len(chunks))]
        self._draft([(s, end) for s, end in zip(now, ends, strict=True) if s.room > 0], hidden_ND, steps)
        if self.least and steps:
            for s in now:
                s.spec.tried()

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
