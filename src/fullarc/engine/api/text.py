"""What the tokens of a request say, as they come, and what is left of them without the stop that ended it.

Invariants: the texts of a growing request are prefixes of each other; nothing is shown that could still turn out to be
half a character or the beginning of a stop string.
"""

import codecs

from fullarc.chat import Tokenizer
from fullarc.chat.turns import before
from fullarc.engine.api.fields import SamplingBody
from fullarc.engine.request import Request


class GrowingText:
    """The text of one request, read forward at a cost that does not grow with its length."""

    def __init__(self, tok: Tokenizer, request: Request, sampling: SamplingBody) -> None:
        self._tok, self._request = tok, request
        self._hidden = tok.special_ids if sampling.skip_special_tokens else frozenset[int]()
        self._trim = not sampling.no_stop_trim
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[
            tuple[int, bytes]
        ] = []  # not shown yet: where it begins in the output's bytes, and itself
        self._length = 0
        self.tokens = 0
        self.text = ""

    def read(self) -> str:
        """What is new and certain since the last call; `text` holds all of it."""
        request = self._request
        ended = bool(request.finish)  # read first: when it is set, all tokens are there
        start, stops = len(request.prompt), request.stops
        count = min(request.told, len(stops.certain)) if stops else request.told
        for token in request.ids[start + self.tokens : start + count]:
            data = self._tok.token_bytes(token)
            self._pieces.append((self._length, b"" if token in self._hidden else data))
            self._length += len(data)
        self.tokens = count
        certain = self._length
        if ended:
            certain = self._end()
        elif count and self._trim:
            last = request.ids[start + count - 1]
            if last in request.params.stop_ids:
                certain -= len(self._tok.token_bytes(last))
            if stops:
                certain = min(certain, stops.certain[count - 1])
        new = self._decoder.decode(self._take(certain), ended)
        self.text += new
        return new

    def _end(self) -> int:
        """Where the finished text ends, in bytes of the output."""
        request, stops = self._request, self._request.stops
        if not self._trim or request.finish != "stop":
            return self._length
        if isinstance(request.matched, str):
            return stops.start if stops and stops.start is not None else self._length
        return self._length - len(self._tok.token_bytes(request.ids[-1]))

    def _take(self, certain: int) -> bytes:
        out = b""
        while self._pieces and self._pieces[0][0] < certain:
            begin, data = self._pieces.pop(0)
            keep = certain - begin
            out += data[:keep]
            if keep < len(data):
                self._pieces.insert(0, (certain, data[keep:]))
                break
        return out


def whole_text(tok: Tokenizer, request: Request, sampling: SamplingBody) -> str:
    """The text of a finished request."""
    return GrowingText(tok, request, sampling).read()


def trimmed(tok: Tokenizer, request: Request) -> list[int]:
    """The output of a finished request without the stop that its client named; the model's own end is left in place."""
    ids, stops = request.output, request.stops
    if request.finish != "stop" or request.matched in tok.stop_ids:
        return ids
    if isinstance(request.matched, int) or not stops or stops.start is None:
        return ids[:-1]
    return before(tok, ids, stops.start)
