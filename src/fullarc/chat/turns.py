"""A sampled turn as a client is told it: whole (`read_turn`), and while it grows (`partial_text`, `GrowingTurn`).

Invariants: a malformed tool call makes the whole turn plain content with a format error; what is shown of an
unfinished turn is a prefix of what the finished one will say.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from fullarc.chat import special as S
from fullarc.chat.messages import Message
from fullarc.chat.parse import Parsed, parse_assistant
from fullarc.chat.render import Tools
from fullarc.chat.tokenizer import Tokenizer

MALFORMED = ("malformed_tool_call", "unclosed_tool_call")
_CUT_OFF = ("no_stop", "unclosed_think", "unclosed_tool_call")  # consequences of a length limit, not mistakes


@dataclass(frozen=True)
class Turn:
    """What the model said. finish: "stop" | "tool_calls" | "length"; format_errors: names as in `parse`."""

    message: Message
    finish: str
    format_errors: list[str]


def read_turn(
    tok: Tokenizer, ids: Sequence[int], thinking: bool, tools: Tools | None, call_prefix: str
) -> Turn:
    """Parse what was sampled; the n-th tool call gets the id `{call_prefix}_{n}`."""
    parsed = parse_assistant(tok, ids, thinking, tools)
    cut = parsed.stop == "length"
    errors = [error for error in parsed.errors if not (cut and error in _CUT_OFF)]
    if any(error in MALFORMED for error in parsed.errors):
        parsed = Parsed(parsed.reasoning, _raw_content(tok, ids, thinking), [], parsed.stop)
    message = parsed.message()
    for number, call in enumerate(message.tool_calls):
        call.id = f"{call_prefix}_{number}"
    return Turn(message, "length" if cut else "tool_calls" if message.tool_calls else "stop", errors)


def stopped(turn: Turn) -> Turn:
    """A turn that a stop of the client's own has ended."""
    if turn.finish != "length":
        return turn
    return replace(turn, finish="tool_calls" if turn.message.tool_calls else "stop")


def before(tok: Tokenizer, ids: Sequence[int], size: int) -> list[int]:
    """The first `size` bytes of what was sampled.

    A token that goes on behind them is spelled out up to there, byte by byte (a special one is left out).
    """
    kept, room = list[int](), size
    for token in ids:
        data = tok.token_bytes(token)
        if len(data) > room:
            letters = b"" if token in tok.special_ids else data[:room]
            return kept + [_letters(tok)[letter] for letter in letters]
        kept.append(token)
        room -= len(data)
    return kept


def begins(tok: Tokenizer, ids: Sequence[int], string: str) -> int:
    """The byte of what was sampled where the stop string begins that the last token completed; its end if none did."""
    data, stop = b"".join(map(tok.token_bytes, ids)), string.encode("utf-8", "replace")
    last = len(tok.token_bytes(ids[-1])) if ids else 0
    start = data.find(stop, max(0, len(data) - last - len(stop) + 1))
    return len(data) if start < 0 else start


@lru_cache(maxsize=2)
def _letters(tok: Tokenizer) -> dict[int, int]:
    """The token of each single byte."""
    texts = ((token, tok.token_bytes(token)) for token in range(tok.vocab_size))
    return {data[0]: token for token, data in texts if len(data) == 1}


def _raw_content(tok: Tokenizer, ids: Sequence[int], thinking: bool) -> str:
    end_think = tok.id(S.END_THINK)
    start = ids.index(end_think) + 1 if thinking and end_think in ids else 0
    end = next((i for i, token in enumerate(ids) if token in tok.stop_ids), len(ids))
    return tok.decode(ids[start:end]).strip()


def partial_text(tok: Tokenizer, ids: Sequence[int], thinking: bool) -> tuple[str, str]:
    """(reasoning, content) that can safely be shown of an unfinished turn.

    White space at the end, half characters, and everything after the first special token of the content (a tool
    call, or a mistake) are held back.
    """
    turn = GrowingTurn(tok, thinking)
    turn.feed(ids)
    return turn.reasoning, turn.content


class GrowingTurn:
    """`partial_text` token by token, at a cost that does not grow with what was said before."""

    def __init__(self, tok: Tokenizer, thinking: bool) -> None:
        self._tok, self._thinking, self._first = tok, thinking, True
        self._end_think, self._think = tok.id(S.END_THINK), tok.id(S.THINK)
        self._closed = False
        self._parts = (_GrowingText(), _GrowingText())

    @property
    def reasoning(self) -> str:
        """What was thought so far."""
        return self._parts[0].text

    @property
    def content(self) -> str:
        """What was said so far."""
        return self._parts[1].text

    def feed(self, ids: Sequence[int]) -> tuple[str, str]:
        """Take the next tokens; returns what they add to reasoning and content."""
        before = len(self.reasoning), len(self.content)
        for token in ids:
            self._take(token)
        return self.reasoning[before[0] :], self.content[before[1] :]

    def _take(self, token: int) -> None:
        first, self._first = self._first, False
        if first and token == self._think:
            self._thinking = True
        elif self._closed:
            return
        elif self._thinking:
            if token == self._end_think:
                self._thinking = False
            elif token in self._tok.stop_ids:
                self._closed = True
            else:
                self._parts[0].feed(self._tok.token_bytes(token))
        elif token in self._tok.special_ids:
            self._closed = True
        else:
            self._parts[1].feed(self._tok.token_bytes(token))


class _GrowingText:
    """Bytes to text without white space at either end; half characters wait for their other half."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def feed(self, data: bytes) -> None:
        self._held += self._decoder.decode(data)
        if not self._shown:
            self._held = self._held.lstrip()
        # a replacement character is held back: the finished text may be cut elsewhere
        steady = self._held.rstrip().rstrip("\ufffd").rstrip()
        if steady:
            self._shown.append(steady)
            self._held = self._held[len(steady) :]
