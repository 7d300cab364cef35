"""Output that must follow a form: a JSON schema, a regular expression, a grammar or structural tags, token by token.

llguidance (compiled code) says which tokens keep the text a beginning of one that the form allows; it works on bytes,
so half a character is no exception. Here are its borders: a form is compiled once and kept; special tokens never belong
to it, but for structural tags (`tags`); the turn may end where the form is complete, and only there; a turn that begins
inside its thoughts thinks freely first; and one that may call tools may do so instead, or between structural tags.

Invariants: what ended by itself follows the form; whatever a client sends ends as a guide or as a `BadRequest` that
names the parameter; compiling and each step are bounded by `_limits`.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fullarc.chat import special as S
from fullarc.chat.ebnf import to_lark
from fullarc.chat.forced import CallGuide, bits, text_ids
from fullarc.chat.openai import BadRequest
from fullarc.chat.tags import TagMatcher, read_tags, tags_to_lark
from fullarc.chat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    Matcher = LLMatcher | TagMatcher

MAX_TEXT = 2**16
KEPT = 64
# JSON between its parts; without a bound a weak model may never leave it
SPACE = r"[\x20\x0A\x0D\x09]{1,32}"
# otherwise llguidance follows what is forced to its end, and some forms have none
_OPTIONS = '%llguidance {"no_forcing": true}'


@dataclass(frozen=True)
class Grammar:
    """A form as its text; `name` is the parameter that it came in."""

    kind: Literal["json_schema", "regex", "ebnf", "structural_tag"]
    text: str
    name: str = field(compare=False)


def json_grammar(schema: Any, name: str, **options: Any) -> Grammar:
    """The form of a JSON schema, given as an object or as its text; `options` as in llguidance's `x-guidance`."""
    return Grammar("json_schema", _dumped(_schema(schema, name, **options), name), name)


def tags_grammar(given: Any, name: str) -> Grammar:
    """The form of structural tags, given as an object or as its text."""
    return Grammar("structural_tag", _dumped(read_tags(_decoded(given, name), name, _schema), name), name)


def choice_grammar(choices: Sequence[str], name: str) -> Grammar:
    """One of the texts, as a regular expression."""
    if not choices:
        raise BadRequest(f"{name} must have at least one text.", name)
    escaped = ("".join(f"\\x{{{ord(c):x}}}" if not c.isalnum() else c for c in text) for text in choices)
    return Grammar("regex", "|".join(escaped), name)


def read_format(given: Any, name: str) -> Grammar | None:
    """OpenAI's `response_format`, or its `text.format`, whose schema is not wrapped; None for plain text."""
    kind = given.get("type") if isinstance(given, dict) else None
    if given is None or kind == "text":
        return None
    if kind == "json_object":
        return json_grammar({"type": "object"}, name)
    if kind == "structural_tag":
        return tags_grammar(given, name)
    if kind != "json_schema":
        raise BadRequest(f"{name}.type must be text, json_object, json_schema or structural_tag.", name)
    wrapped = given.get("json_schema", given)
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if not isinstance(schema, dict):
        raise BadRequest(f"{name}: schema must be a JSON schema: an object.", name)
    return json_grammar(schema, name)


class Grammars:
    """Makes guides for one tokenizer. Compiled forms are kept, the latest KEPT of them; any thread may ask.

    One form is compiled at a time; who asks for one that is kept does not wait for that.
    """

    def __init__(self, tok: Tokenizer) -> None:
        self._tok, self._lock, self._compiling = tok, threading.Lock(), threading.Lock()
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None
        self._texts, self._special = bits(text_ids(tok)), bits(tok.special_ids)

    def guide(
        self, grammar: Grammar, ends: Iterable[int], thinking: bool, instead: CallGuide | None = None
    ) -> "GrammarGuide":
        """A guide of its own. Raises BadRequest where the form is wrong, too large or has no text at all.

        Args:
            ends: the tokens that end a turn.
            thinking: whether the turn begins inside its thoughts.
            instead: what holds for a turn that calls a tool instead, if it may.
        """
        matcher = self._copy(grammar)
        if matcher is None:
            with self._compiling:  # where somebody else has compiled it meanwhile it is there now
                matcher = self._copy(grammar) or self._keep(grammar, self._compile(grammar))
        if grammar.kind == "structural_tag":  # calls are part of its free text
            instead = None
        return GrammarGuide(self._tok, matcher, self._alphabet(grammar), ends, thinking, instead)

    def _alphabet(self, grammar: Grammar) -> int:
        """The tokens that a form may have."""
        return self._texts | (self._special if grammar.kind == "structural_tag" else 0)

    def _copy(self, grammar: Grammar) -> "Matcher | None":
        """A copy of one that is kept, the latest one now."""
        with self._lock:
            if grammar not in self._compiled:
                return None
            self._compiled.move_to_end(grammar)
            return self._compiled[grammar].deep_copy()

    def _keep(self, grammar: Grammar, matcher: "Matcher") -> "Matcher":
        """Keep it; a copy of it."""
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _compile(self, grammar: Grammar) -> "Matcher":
        from llguidance import LLMatcher

        _check_length(grammar.text, grammar.name)
        self._vocabulary = self._vocabulary or _vocabulary(self._tok)
        try:
            lark = f"{_lark(grammar, self._tok)}\n{_OPTIONS}"
            matcher = LLMatcher(self._vocabulary, lark, log_level=0, limits=_limits())
        except (ValueError, OverflowError) as error:
            raise BadRequest(f"{grammar.name}: {error}.", grammar.name) from None
        first = matcher.compute_bitmask() if not matcher.is_error() else b""
        if matcher.is_error():
            raise BadRequest(f"{grammar.name}: {_problem(matcher.get_error())}", grammar.name)
        if not int.from_bytes(first, "little") & self._alphabet(grammar) and not matcher.is_accepting():
            raise BadRequest(f"{grammar.name}: no text at all can follow this.", grammar.name)
        if grammar.kind == "structural_tag":
            return TagMatcher(matcher, grammar.text, self._tok)
        return matcher


class GrammarGuide:
    """Says which tokens may come next, as a bit for each id; none where the form grew too complex to follow."""

    def __init__(
        self, tok: Tokenizer, matcher: "Matcher", texts: int, ends: Iterable[int], thinking: bool,
        instead: CallGuide | None,
    ) -> None:  # fmt: skip
        self._matcher, self._thinking, self._instead = matcher, thinking, instead
        self._ends = bits(ends)
        self._texts = texts & ~self._ends
        self._end_think, self._call = tok.id(S.END_THINK), tok.id(S.TOOL_CALL)
        self._calling = self._over = False
        self._allowed = self._next()

    def allowed(self) -> frozenset[int] | bytes:
        """The tokens that may come next."""
        return self._instead.allowed() if self._instead and self._calling else self._allowed

    def feed(self, token: int) -> None:
        """Take the next token, one of those."""
        if self._thinking:
            self._thinking = token != self._end_think
        elif self._instead and (self._calling or token == self._call):
            self._calling = True
            self._instead.feed(token)
            return
        elif self._over or self._ends >> token & 1:
            self._over = True
        else:
            self._instead = None
            self._matcher.consume_token(token)
        self._allowed = self._next()

    def _next(self) -> bytes:
        if self._thinking:
            ids = self._texts | 1 << self._end_think
        elif self._over:
            ids = self._ends
        else:
            ids = int.from_bytes(self._matcher.compute_bitmask(), "little") & self._texts
            ids |= self._ends if self._matcher.is_accepting() else 0
            ids |= 1 << self._call if self._instead else 0
        return ids.to_bytes((ids.bit_length() + 7) // 8, "little")


def opens_thought(tok: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside a thought of the turn that it begins."""
    borders = {tok.id(name) for name in (S.THINK, S.END_THINK, S.ASSISTANT, S.SYSTEM, *S.STOP_TOKENS)}
    return next((token for token in reversed(prompt) if token in borders), None) == tok.id(S.THINK)


def _schema(given: Any, name: str, **options: Any) -> dict[str, Any]:
    """A schema that says how its white space is bounded."""
    schema = _decoded(given, name)
    if not isinstance(schema, dict):
        raise BadRequest(f"{name} must be a JSON schema: an object.", name)
    own = schema.get("x-guidance")
    told = {"whitespace_pattern": SPACE} | options | (own if isinstance(own, dict) else {})
    return schema | {"x-guidance": told}


def _decoded(given: Any, name: str) -> Any:
    """What a text says in JSON; anything else as it is."""
    if not isinstance(given, str):
        return given
    _check_length(given, name)
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{name} is not JSON ({error}).", name) from None


def _dumped(value: dict[str, Any], name: str) -> str:
    """The JSON of a form."""
    try:
        return json.dumps(value)
    except RecursionError:
        raise BadRequest(f"{name} nests too deep.", name) from None


def _check_length(text: str, name: str) -> None:
    if len(text) > MAX_TEXT:
        raise BadRequest(f"{name} is longer than {MAX_TEXT} characters.", name)


def _lark(grammar: Grammar, tok: Tokenizer) -> str:
    from llguidance import regex_to_lark

    if grammar.kind == "structural_tag":
        return tags_to_lark(grammar.text, tok)
    if grammar.kind == "json_schema":
        return f"start: %json {grammar.text}"
    if grammar.kind == "regex":
        return f"start: /{regex_to_lark(grammar.text, 'd')}/"
    return to_lark(grammar.text) if "::=" in grammar.text else grammar.text


def _vocabulary(tok: Tokenizer) -> "LLTokenizer":
    """The tokens as bytes; special ones have no name there, so that a grammar cannot speak of them."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Bytes:
        eos_token_id, bos_token_id = tok.stop_ids[0], None
        tokens = [b"" if i in tok.special_ids else tok.token_bytes(i) for i in range(tok.vocab_size)]

        def __call__(self, text: bytes | str) -> list[int]:
            return tok.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)

    return LLTokenizer(TokenizerWrapper(Bytes()))


def _limits() -> "LLParserLimits":
    """What an ambiguous form may cost: an item is a reading of what came, and a row is compared with itself.

    An object has 4 items in a row for each property that may be left out, a choice one for each text; a schema of 100
    such properties needs 430 in a row and 840 in a step, JSON written out as EBNF 1240 in a step (4k tokens). Within
    these limits the costliest step found is 21 ms, the row having most of it.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000, step_lexer_fuel=200_000, step_max_items=6_000, max_items_in_row=900,
        max_grammar_size=100_000, max_lexer_states=20_000, verbose_errors=False,
    )  # fmt: skip


def _problem(told: str) -> str:
    """The library's message in one sentence."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    cause = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "")
    cause = re.sub(r"^error: |^(at )?\d+\(\d+\): (failed to compile JSON schema: )?", "", cause)
    if cause.startswith("panic") or " " not in cause:
        return "this grammar is not supported."
    return f"{cause[:300].rstrip('.')}."
