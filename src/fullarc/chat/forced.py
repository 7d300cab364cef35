"""A turn that must call a tool (`tool_choice`), or may call one only (no parallel calls), token by token.

After the thinking, which is free, a forced turn is

    (<tool_call>NAME (<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>)* </tool_call>)+ <|observation|>

NAME is one of the functions; KEY a property of its schema that was not given yet; `</tool_call>` is allowed once all
that are required were given. VALUE is held to the schema's `enum` or `const`, and to booleans, null, integers and
numbers. Not held: what strings, arrays, objects and values of several types contain, and ranges, patterns and
formats. Names, keys and listed values are said in the tokenizer's own encoding of them, as they are rendered.

Invariant: while allowed tokens are fed some are allowed, and what was fed parses without a format error once it ends.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from fullarc.chat import special as S
from fullarc.chat.messages import dumps
from fullarc.chat.tokenizer import Tokenizer

T = TypeVar("T")
Steps = Generator[frozenset[int], int, T]
Option = tuple[int, ...]
# JSON's numbers: where a character leads from a state, and the states in which a number may end
_WHOLE = dict.fromkeys("123456789", "whole")
_INTEGER = {
    "": {"-": "minus", "0": "zero"} | _WHOLE,
    "minus": {"0": "zero"} | _WHOLE,
    "zero": {},
    "whole": {"0": "whole"} | _WHOLE,
}
_POWER, _ANY = {"e": "power", "E": "power"}, "0123456789"
_NUMBER = _INTEGER | {
    "zero": {".": "point"} | _POWER,
    "whole": _INTEGER["whole"] | {".": "point"} | _POWER,
    "point": dict.fromkeys(_ANY, "fraction"),
    "fraction": dict.fromkeys(_ANY, "fraction") | _POWER,
    "power": dict.fromkeys(_ANY, "exponent") | {"+": "sign", "-": "sign"},
    "sign": dict.fromkeys(_ANY, "exponent"),
    "exponent": dict.fromkeys(_ANY, "exponent"),
}
_NUMBERS = {"integer": _INTEGER, "number": _NUMBER}
_NUMBER_ENDS = ("zero", "whole", "fraction", "exponent")
_WORDS = {"boolean": ("true", "false"), "null": ("null",)}


class CallGuide:
    """Says which tokens may come next.

    Args:
        names: functions of `tools` of which one must be called; None = none has to.
        thinking: whether the turn begins inside its thoughts.
        several: whether another call may follow one.
    """

    def __init__(
        self, tok: Tokenizer, tools: Sequence[Mapping[str, Any]], names: Sequence[str] | None, thinking: bool,
        several: bool,
    ) -> None:  # fmt: skip
        self._tok, self._text, self._several = tok, text_ids(tok), several
        functions = [tool.get("function", tool) for tool in tools]
        self._schemas = {
            f["name"].strip(): f.get("parameters") or {} for f in functions if f["name"] in (names or ())
        }
        self._steps = self._turn(names is not None, thinking)
        self._allowed = next(self._steps)

    def allowed(self) -> frozenset[int]:
        """The tokens that may come next."""
        return self._allowed

    def feed(self, token: int) -> None:
        """Take the next token, one of those."""
        self._allowed = self._steps.send(token)

    # --- the grammar ------------------------------------------------------------------------------------------

    def _turn(self, forced: bool, thinking: bool) -> Steps[None]:
        anything, call, end = (
            self._text | self._tok.special_ids,
            self._ids(S.TOOL_CALL),
            self._ids(S.OBSERVATION),
        )
        if thinking:
            yield from self._until(S.END_THINK, self._text if forced else anything)
        if forced:
            token = yield call
            while token in call:
                yield from self._call()
                token = yield call | end if self._several else end
        else:
            yield from self._until(S.END_TOOL_CALL, anything)
            if not self._several:
                yield end
        while True:
            yield anything

    def _call(self) -> Steps[None]:
        """From the function's name to `</tool_call>`."""
        names = {self._option(name): name for name in self._schemas}
        said, token = yield from _one_of(
            {o: self._next(self._schemas[name], ()) for o, name in names.items()}
        )
        schema, given = self._schemas[names[said]], list[str]()
        while token == self._tok.id(S.ARG_KEY):
            keys = {self._option(key): key for key in _keys(schema) if key not in given}
            said, _ = yield from _one_of(dict.fromkeys(keys, self._ids(S.END_ARG_KEY)))
            given.append(keys[said])
            yield self._ids(S.ARG_VALUE)
            yield from self._value((schema.get("properties") or {}).get(keys[said]))
            token = yield self._next(schema, given)

    def _next(self, schema: Mapping[str, Any], given: Sequence[str]) -> frozenset[int]:
        """What may follow the name or an argument."""
        more = [S.ARG_KEY] if set(_keys(schema)) - set(given) else []
        return self._ids(*more, *([] if set(_required(schema)) - set(given) else [S.END_TOOL_CALL]))

    def _value(self, schema: Any) -> Steps[None]:
        """A value and `</arg_value>`."""
        schema, end = schema if isinstance(schema, Mapping) else {}, self._ids(S.END_ARG_VALUE)
        kind = schema.get("type") if isinstance(schema.get("type"), str) else ""
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(listed, list) and listed:
            words: Iterable[str] = (v if isinstance(v, str) else dumps(v) for v in listed)
        else:
            words = _WORDS.get(kind, ())
        options = {self._option(word) for word in words}
        if options:
            yield from _one_of(dict.fromkeys(options, end))
        elif kind in _NUMBERS:
            yield from self._number(_NUMBERS[kind], end)
        else:
            yield from self._until(S.END_ARG_VALUE, self._text)

    def _number(self, table: Mapping[str, Mapping[str, str]], end: frozenset[int]) -> Steps[None]:
        state, text = "", dict(_numerals(self._tok))
        while True:
            leads = {token: _run(table, state, said) for token, said in text.items()}
            token = yield frozenset(t for t, s in leads.items() if s) | (
                end if state in _NUMBER_ENDS else frozenset()
            )
            if token in end:
                return
            state = leads[token]

    def _until(self, name: str, free: frozenset[int]) -> Steps[None]:
        last = self._tok.id(name)
        allowed = free | {last}
        while (yield allowed) != last:
            pass

    def _option(self, text: str) -> Option:
        return tuple(self._tok.encode(text))

    def _ids(self, *names: str) -> frozenset[int]:
        return frozenset(self._tok.id(name) for name in names)


def _one_of(options: Mapping[Option, frozenset[int]]) -> Steps[tuple[Option, int]]:
    """The tokens of one option, then a token that may follow it, never one of another option's; both are returned."""
    said: Option = ()
    while True:
        follow = options.get(said, frozenset[int]())
        longer = {o[len(said)] for o in options if len(o) > len(said) and o[: len(said)] == said}
        token = yield follow | longer
        if token in follow:
            return said, token
        said = (*said, token)


def _required(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required")
    names = required if isinstance(required, list) else []
    return [name for name in names if isinstance(name, str) and name.strip() == name != ""]


def _keys(schema: Mapping[str, Any]) -> list[str]:
    """Arguments that may be given; names with white space around them cannot be said."""
    names = [name for name in schema.get("properties") or {} if name.strip() == name != ""]
    return names + [name for name in _required(schema) if name not in names]


def _run(table: Mapping[str, Mapping[str, str]], state: str, text: str) -> str:
    """The state after `text`; "" if it cannot be."""
    for char in text:
        state = table[state].get(char, "")
        if not state:
            return ""
    return state


@lru_cache(maxsize=4)
def text_ids(tok: Tokenizer) -> frozenset[int]:
    """All ids that are text."""
    return frozenset(i for i in range(tok.vocab_size) if tok.token_bytes(i)) - tok.special_ids


def bits(ids: Iterable[int]) -> int:
    """Ids as a number that has a bit for each."""
    data = bytearray()
    for i in ids:
        data.extend(bytes(max(0, i // 8 + 1 - len(data))))
        data[i // 8] |= 1 << i % 8
    return int.from_bytes(data, "little")


@lru_cache(maxsize=4)
def _numerals(tok: Tokenizer) -> tuple[tuple[int, str], ...]:
    """The ids of which numbers consist, and what they say."""
    said = ((token, tok.token_bytes(token).decode("latin-1")) for token in sorted(text_ids(tok)))
    return tuple((token, text) for token, text in said if not set(text) - set("+-.eE0123456789"))
