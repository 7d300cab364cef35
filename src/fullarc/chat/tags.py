"""Structural tags (SGLang's and vLLM's `structural_tag`): free text, in which a trigger begins a tag that holds JSON.

    {"structures": [{"begin": "<f=a>", "schema": {…}, "end": "</f>"}, …], "triggers": ["<f="]}
    {"format": {"type": "triggered_tags", "triggers": ["<f="],
                "tags": [{"begin": "<f=a>", "content": {"type": "json_schema", "json_schema": {…}}, "end": "</f>"}, …]}}

The first is the older form, the second xgrammar's, of which this type alone is built. llguidance follows the tags; free
text is followed here, because the library takes characters only and a model may say any bytes. Names of special tokens
mean these tokens, never their spelling. Free text has all special tokens but triggers and those that end a turn.

Invariants: every tag begins with exactly one trigger, and no trigger can hide another; who has said a trigger is inside
a tag, and a turn ends outside of them only.
"""

import json
import re
from collections.abc import Callable, Iterable
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

from fullarc.chat.forced import bits, text_ids
from fullarc.chat.openai import BadRequest
from fullarc.chat.special import SPECIAL_TOKENS, STOP_TOKENS
from fullarc.chat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_TAGS, MAX_TRIGGER = 256, 128
_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
ReadSchema = Callable[[Any, str], dict[str, Any]]


def read_tags(given: Any, name: str, schema: ReadSchema) -> dict[str, Any]:
    """A request's structural tag in the older form; `schema` reads a schema of it. Raises BadRequest."""
    if not isinstance(given, dict):
        raise BadRequest(f"{name} must be an object.", name)
    old = "format" not in given
    form = given if old else given["format"]
    kind = form.get("type") if isinstance(form, dict) else None
    if not old:
        _only(given, {"type", "format"}, name, name)
    if not old and kind != "triggered_tags":
        raise BadRequest(f"{name}.format.type must be triggered_tags; others are not built.", name)
    of, where = ("structures", name) if old else ("tags", f"{name}.format")
    _only(form, {"type", "triggers", of}, where, name)
    triggers, tags = (_few(form.get(part), f"{where}.{part}", name) for part in ("triggers", of))
    if not all(trigger and isinstance(trigger, str) for trigger in triggers):
        raise BadRequest(f"{where}.triggers must be texts that are not empty.", name)
    triggers = list(dict.fromkeys(triggers))
    _check_triggers(triggers, where, name)
    found, used = list[dict[str, Any]](), set[str]()
    for number, data in enumerate(tags):
        found.append(_read_tag(data, old, f"{where}.{of}[{number}]", name, schema))
        begins = {trigger for trigger in triggers if found[-1]["begin"].startswith(trigger)}
        if not begins:
            raise BadRequest(f"{where}.{of}[{number}].begin starts with none of the triggers.", name)
        used |= begins
    unused = next((trigger for trigger in triggers if trigger not in used), None)
    if unused is not None:
        raise BadRequest(f"{where}.triggers: no tag begins with {unused[:50]!r}.", name)
    return {"type": "structural_tag", "structures": found, "triggers": triggers}


def tags_to_lark(text: str, tok: Tokenizer) -> str:
    """What `read_tags` has read, in JSON, as a grammar: text up to a trigger is one lazy terminal."""
    given = json.loads(text)
    lark, tags = ["TEXT: /(?s:.)*/"], list[str]()
    for number, trigger in enumerate(given["triggers"]):
        its = (tag for tag in given["structures"] if tag["begin"].startswith(trigger))
        bodies = (
            f"{_said(tag['begin'][len(trigger) :], tok)} %json {json.dumps(tag['schema'])} {_said(tag['end'], tok)}"
            for tag in its
        )
        lazy = "" if trigger in SPECIAL_TOKENS else "[lazy]"
        lark += [f"trigger{number}{lazy}: TEXT {_said(trigger, tok)}", f"body{number}: {' | '.join(bodies)}"]
        tags.append(f"trigger{number} body{number}")
    return "\n".join([*lark, f"start: ({' | '.join(tags)})* TEXT"])


class TagMatcher:
    """The part of `LLMatcher` that guides use, for a matcher of `tags_to_lark`'s grammar at its start."""

    def __init__(self, matcher: "LLMatcher", text: str, tok: Tokenizer) -> None:
        triggers = json.loads(text)["triggers"]
        self._special = frozenset(tok.id(trigger) for trigger in triggers if trigger in SPECIAL_TOKENS)
        self._triggers = [trigger.encode() for trigger in triggers if trigger not in SPECIAL_TOKENS]
        self._begun = {t[:length] for t in self._triggers for length in range(1, len(t))}
        self._tok, self._start = tok, matcher
        self._bytes = {tok.token_bytes(i): i for i in range(tok.vocab_size) if len(tok.token_bytes(i)) == 1}
        self._masks = lru_cache(maxsize=64)(self._mask)
        self._tag: LLMatcher | None = None
        self._tail = b""  # in free text: its longest end that begins a trigger

    def deep_copy(self) -> Self:
        """Another one, at its start as this one is."""
        return copy(self)

    def is_accepting(self) -> bool:
        """Whether this is free text."""
        return self._tag is None

    def compute_bitmask(self) -> bytes:
        """What may come next but for the end, as a bit for each id."""
        return self._tag.compute_bitmask() if self._tag else self._masks(self._tail)

    def consume_token(self, token: int) -> None:
        """Take the next token."""
        if token in self._tok.special_ids:
            self._tail = b""
            if not self._tag and token in self._special:
                self._tag = self._start.deep_copy()
            if self._tag:
                self._feed(self._tag, token)
            return
        for byte in self._tok.token_bytes(token):
            said = bytes([byte])
            if self._tag:
                self._feed(self._tag, self._bytes[said])
                continue
            said = self._tail + said
            if any(map(said.endswith, self._triggers)):
                self._tag, self._tail = self._at(said), b""
            else:
                ends = (said[at:] for at in range(len(said)))
                self._tail = next((end for end in ends if end in self._begun), b"")

    def _feed(self, tag: "LLMatcher", token: int) -> None:
        tag.consume_token(token)
        if tag.is_accepting():
            self._tag = None

    def _at(self, said: bytes) -> "LLMatcher":
        """The matcher behind the beginning of a trigger, or a whole one."""
        matcher = self._start.deep_copy()
        for byte in said:
            matcher.consume_token(self._bytes[bytes([byte])])
        return matcher

    def _mask(self, tail: bytes) -> bytes:
        """What may follow in free text: tokens with no trigger, and those that go on with a tag behind one."""
        tok = self._tok
        texts = (i for i in text_ids(tok) if not any(t in tail + tok.token_bytes(i) for t in self._triggers))
        free = bits(texts) | bits(tok.special_ids - self._special - set(tok.stop_ids))
        free |= int.from_bytes(self._at(tail).compute_bitmask(), "little")
        return free.to_bytes((free.bit_length() + 7) // 8, "little")


def _read_tag(data: Any, old: bool, where: str, name: str, schema: ReadSchema) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BadRequest(f"{where} must be an object.", name)
    begin, end = data.get("begin"), data.get("end")
    if not isinstance(begin, str) or not isinstance(end, str):
        raise BadRequest(f"{where}: begin and end must be texts.", name)
    _only(data, {"begin", "end"} | ({"schema"} if old else {"type", "content"}), where, name)
    stop = next((token for token in STOP_TOKENS if token in begin or token in end), None)
    if stop:
        raise BadRequest(f"{where}: {stop} ends the turn, so no tag can hold it.", name)
    if any("\ud800" <= char <= "\udfff" for char in begin + end):
        raise BadRequest(f"{where}: a lone surrogate is no character.", name)
    if old:
        read = schema(data.get("schema"), f"{where}.schema")
        return {"begin": begin, "schema": read, "end": end}
    content = data.get("content")
    if not isinstance(content, dict) or content.get("type") != "json_schema":
        raise BadRequest(f"{where}.content.type must be json_schema; others are not built.", name)
    _only(content, {"type", "json_schema"}, f"{where}.content", name)
    read = schema(content.get("json_schema"), f"{where}.content.json_schema")
    return {"begin": begin, "schema": read, "end": end}


def _few(values: Any, where: str, name: str) -> list[Any]:
    if not isinstance(values, list) or not 0 < len(values) <= MAX_TAGS:
        raise BadRequest(f"{where} must be a list of 1 to {MAX_TAGS}.", name)
    return values


def _check_triggers(triggers: Iterable[str], where: str, name: str) -> None:
    for trigger in triggers:
        if len(trigger) > MAX_TRIGGER:
            raise BadRequest(f"{where}.triggers: one is longer than {MAX_TRIGGER} characters.", name)
        within = next((t for t in triggers if t != trigger and t in trigger), None)
        if within is not None:
            said = f"{trigger[:50]!r} contains {within[:50]!r}, so which one it is stays open"
            raise BadRequest(f"{where}.triggers: {said}.", name)
        if trigger not in SPECIAL_TOKENS and (special := _SPECIAL.search(trigger)):
            said = f"{special[0]} is a token of its own and can only be the whole of a trigger"
            raise BadRequest(f"{where}.triggers: {said}.", name)


def _only(data: dict[str, Any], known: set[str], where: str, name: str) -> None:
    """Refuse fields that are not known and ask for something."""
    other = next((key for key, value in data.items() if key not in known and value), None)
    if other is not None:
        raise BadRequest(f"{where}: {other[:50]!r} is not supported.", name)


def _said(text: str, tok: Tokenizer) -> str:
    """A text as terminals: special tokens by their ids, what is between them as it is."""
    parts, at = list[str](), 0
    for match in [*_SPECIAL.finditer(text), None]:
        between = text[at : match.start() if match else None]
        parts += [json.dumps(between, ensure_ascii=False)] if between else []
        if match:
            parts.append(f"<[{tok.id(match[0])}]>")
            at = match.end()
    return " ".join(parts)
