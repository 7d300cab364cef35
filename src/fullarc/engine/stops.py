"""Stop strings: found as soon as their last byte was sampled, wherever token borders fall and however many there are.

All strings of a request are one Aho-Corasick automaton over bytes: a step per byte, whatever their number. Its depth is
also the answer to "how much of the end may be the beginning of a stop string", which a stream must hold back.

Invariant: the first string to be completed ends the completion; of several that end there, the longest.
"""

from collections import deque
from collections.abc import Callable, Sequence

MAX_STRINGS, MAX_BYTES = 4096, 32768


class StopStrings:
    """The automaton of some non-empty strings; shared by all samples of a request.

    Raises ValueError for an empty string, or for more than MAX_STRINGS strings or MAX_BYTES bytes.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if len(strings) > MAX_STRINGS:
            raise ValueError(f"stop has {len(strings)} strings, at most {MAX_STRINGS} are served")
        patterns = [text.encode("utf-8", "replace") for text in strings]
        if not all(patterns):
            raise ValueError("stop contains an empty string")
        if sum(map(len, patterns)) > MAX_BYTES:
            raise ValueError(f"the stop strings have more than {MAX_BYTES} bytes")
        self.strings = list(strings)
        self.next: list[dict[int, int]] = [{}]
        self.depth, self.found, self._fail = [0], [-1], [0]
        for number, pattern in enumerate(patterns):
            self._add(pattern, number)
        self._link()

    def _add(self, pattern: bytes, number: int) -> None:
        node = 0
        for byte in pattern:
            child = self.next[node].get(byte)
            if child is None:
                child = self.next[node][byte] = len(self.next)
                self.next.append({})
                self.depth.append(self.depth[node] + 1)
                self.found.append(-1)
                self._fail.append(0)
            node = child
        self.found[node] = number

    def _link(self) -> None:
        """Failure links, breadth first: the longest proper suffix that is also the beginning of a string."""
        waiting = deque(self.next[0].values())
        while waiting:
            node = waiting.popleft()
            for byte, child in self.next[node].items():
                self._fail[child] = self.step(self._fail[node], byte)
                if self.found[child] < 0:
                    self.found[child] = self.found[self._fail[child]]
                waiting.append(child)

    def step(self, node: int, byte: int) -> int:
        """The state after one more byte."""
        while node and byte not in self.next[node]:
            node = self._fail[node]
        return self.next[node].get(byte, 0)


class StopWatch:
    """One sequence before the automaton.

    Attributes:
        certain: after each token, how many bytes of the output can no longer be part of a stop string.
        start: where the found string begins, in bytes of the output; None until then.
    """

    def __init__(self, strings: StopStrings, token_bytes: Callable[[int], bytes]) -> None:
        self._strings, self._bytes_of = strings, token_bytes
        self._node = self._length = 0
        self.certain: list[int] = []
        self.start: int | None = None

    def feed(self, token: int, armed: bool = True) -> str | None:
        """Take one sampled token; the stop string that it completes, if any (none while not `armed`)."""
        automaton, found = self._strings, -1
        for byte in self._bytes_of(token):
            self._node = automaton.step(self._node, byte)
            self._length += 1
            if armed and found < 0 <= automaton.found[self._node]:
                found = automaton.found[self._node]
                self.start = self._length - len(automaton.strings[found].encode("utf-8", "replace"))
        end = self._length - automaton.depth[self._node] if self.start is None else self.start
        self.certain.append(end)
        return automaton.strings[found] if found >= 0 else None
