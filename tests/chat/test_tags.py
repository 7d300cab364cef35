"""Structural tags against a reader of their texts that knows nothing of grammars, and against another validator."""

import json
import random
import re

import jsonschema_rs
import pytest

from fullarc.chat.forced import CallGuide
from fullarc.chat.grammar import MAX_TEXT, Grammars, read_format, tags_grammar
from fullarc.chat.openai import BadRequest

POINT = {"type": "object", "required": ["x"], "additionalProperties": False,
         "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99},
                        "y": {"enum": ["文本", "<f=", None]}}}  # fmt: skip
TEXT = {"type": "string", "maxLength": 5}
TAGS = [("<f=a>", POINT, "</f>"), ("<f=文>", TEXT, "\n</f>"), ("<tool_call>go ", POINT, "</tool_call>"),
        ("说", POINT, "")]  # fmt: skip
TRIGGERS = ["<f=", "<tool_call>", "说"]


def old(tags=TAGS, triggers=TRIGGERS):
    structures = [{"begin": begin, "schema": schema, "end": end} for begin, schema, end in tags]
    return {"type": "structural_tag", "structures": structures, "triggers": triggers}


def new(tags=TAGS, triggers=TRIGGERS, **more):
    made = [{"type": "tag", "begin": begin, "content": {"type": "json_schema", "json_schema": schema}, "end": end}
            for begin, schema, end in tags]  # fmt: skip
    return {
        "type": "structural_tag",
        "format": {"type": "triggered_tags", "triggers": triggers, "tags": made} | more,
    }


@pytest.fixture(scope="module")
def grammars(tok):
    return Grammars(tok)


def allowed(guide):
    bits = int.from_bytes(guide.allowed(), "little")
    return {at for at in range(bits.bit_length()) if bits >> at & 1}


def marked(tok, ids):
    """What ids say, special tokens as characters that no text here has."""
    return b"".join(chr(0xF0000 + i).encode() if i in tok.special_ids else tok.token_bytes(i) for i in ids)


def mark(tok, text):
    return marked(tok, tok.encode_raw(text))


def check(tok, said, tags=TAGS, triggers=TRIGGERS):
    """The tags of a text that has ended, each read with `json` and validated."""
    tags = [(mark(tok, begin), schema, mark(tok, end)) for begin, schema, end in tags]
    found, pattern = [], re.compile(b"|".join(re.escape(mark(tok, trigger)) for trigger in triggers))
    while match := pattern.search(said):
        said = said[match.start() :]
        begin, schema, end = next(tag for tag in tags if said.startswith(tag[0]))
        rest = said[len(begin) :].decode(errors="surrogateescape")
        value, length = json.JSONDecoder().raw_decode(rest)
        jsonschema_rs.validator_for(schema).validate(value)
        said = rest[length:].encode(errors="surrogateescape")
        assert said.startswith(end)
        said = said[len(end) :]
        found.append(begin)
    return found


@pytest.mark.parametrize("made", [old, new])
def test_free_text_and_tags_that_hold_their_schemas(tok, grammars, made):
    """Random tokens, now and then a trigger or a part of one, until a walk ends in its free text."""
    begins, ended, lengths = {mark(tok, begin) for begin, _, _ in TAGS}, 0, set()
    seen, everything = set(), set(range(tok.vocab_size))
    for seed in range(60):
        rng, said = random.Random(seed), []
        guide = grammars.guide(tags_grammar(json.dumps(made()), "structural_tag"), tok.stop_ids, False)
        for _ in range(250):
            now = allowed(guide)
            if set(tok.stop_ids) <= now:
                lengths.add(len(now))
                if rng.random() < 0.06:
                    ended += 1
                    seen |= set(found := check(tok, marked(tok, said)))
                    assert len(found) < 40
                    break
                hint = rng.choice(["<f=", "<", "<tool_call>", "说", "x<f=文"])
                new_ids = tok.encode_raw(hint) if rng.random() < 0.3 else [rng.choice(sorted(now))]
            else:
                assert not now & set(tok.stop_ids), "inside a tag a turn does not end"
                new_ids = [rng.choice(sorted(now))]
            for token in new_ids:
                if token not in allowed(guide) or token in tok.stop_ids:
                    break
                guide.feed(token)
                said.append(token)
    assert seen == begins and ended > 20
    assert max(lengths) == len(everything), "free text may have every token"


FINITE = {"<f=": ['<f=a>"<f="</f>', "<f=a>1</f>", '<f="é">1;', '<f="é">"<f=";'],
          "<g": ["<g1", '<g"<f="', "<g\n1", '<g\n"<f="']}  # fmt: skip
ONE = {"enum": ["<f=", 1]}
LISTED = [("<f=a>", ONE, "</f>"), ('<f="é">', ONE, ";"), ("<g", ONE, ""), ("<g\n", ONE, "")]


def follows(said, texts):
    """Whether a text may begin so, and whether it may end there; `texts`: all tags of each trigger."""
    while True:
        hits = [(said.index(t) + len(t), said.index(t), t) for t in texts if t in said]
        if not hits:
            return True, True
        _, at, trigger = min(hits)
        said = said[at:]
        whole = next((text for text in texts[trigger] if said.startswith(text)), None)
        if whole is None:
            return any(text.startswith(said) for text in texts[trigger]), False
        said = said[len(whole) :]


def test_allowed_is_exactly_what_goes_on(tok, grammars):
    """Each token at every place, by all texts that tags may have."""
    texts = {t.encode(): [text.encode() for text in its] for t, its in FINITE.items()}
    grammar, rng, places = tags_grammar(old(LISTED, [*FINITE]), "structural_tag"), random.Random(3), [0, 0]
    plain = [i for i in range(tok.vocab_size) if i not in tok.special_ids]
    for _ in range(20):
        guide, said = grammars.guide(grammar, tok.stop_ids, False), b""
        for _ in range(25):
            now, (_, ends) = allowed(guide), follows(said, texts)
            assert now & set(plain) == {i for i in plain if follows(said + tok.token_bytes(i), texts)[0]}, (
                said
            )
            assert now & tok.special_ids == (tok.special_ids if ends else set()), said
            places[ends] += 1
            text = rng.choice(sum(texts.values(), []))
            rest = next(text[n:] for n in range(len(text) - 1, -1, -1) if said.endswith(text[:n]))
            wanted = [i for i in now & set(plain) if rest.startswith(tok.token_bytes(i))]
            token = rng.choice(sorted(wanted if wanted and rng.random() < 0.8 else now - set(tok.stop_ids)))
            guide.feed(token)
            # a special token parts what is on its two sides
            said = said + tok.token_bytes(token) if token in plain else b"" if ends else said
    assert min(places) > 50


def test_a_trigger_in_pieces_of_characters_and_behind_broken_ones(tok, grammars):
    grammar = tags_grammar(old(), "structural_tag")
    bytes_of = {tok.token_bytes(i): i for i in range(tok.vocab_size)}
    for said in (b"\xff<f=", b"\xe8\xaf\xb4", b"\xe8\xaf\xe8\xaf\xb4", b"\xc3<<f="):
        guide = grammars.guide(grammar, tok.stop_ids, False)
        for at in range(len(said)):
            assert set(tok.stop_ids) <= allowed(guide)
            guide.feed(bytes_of[said[at : at + 1]])
        assert not allowed(guide) & tok.special_ids, said


def test_names_of_special_tokens_mean_the_tokens(tok, grammars):
    grammar = tags_grammar(old(), "structural_tag")
    guide = grammars.guide(grammar, tok.stop_ids, False)
    for token in tok.encode("<tool_call>") + tok.encode_raw("<tool_response>"):
        guide.feed(token)
    assert set(tok.stop_ids) <= allowed(guide), "as it is spelled it is text, and other tokens are free"
    for token in tok.encode_raw('<tool_call>go {"x":1'):
        assert token in allowed(guide)
        guide.feed(token)
        assert not allowed(guide) & tok.special_ids
    for token in tok.encode_raw("}</tool_call>"):
        assert token in allowed(guide)
        guide.feed(token)
    assert set(tok.stop_ids) <= allowed(guide)


def test_thoughts_come_first_and_calls_are_free_text(tok, grammars):
    instead = CallGuide(tok, [{"type": "function", "function": {"name": "f"}}], None, False, True)
    grammar = tags_grammar(old(TAGS[:1], TRIGGERS[:1]), "structural_tag")
    guide = grammars.guide(grammar, tok.stop_ids, True, instead)
    for token in tok.encode_raw("<f=so</think><tool_call>f</tool_call> and <f="):
        assert token in allowed(guide)
        guide.feed(token)
    assert {tok.token_bytes(i)[:1] for i in allowed(guide)} == {b"a"}


def test_guides_are_independent(tok, grammars):
    grammar = tags_grammar(old(), "structural_tag")
    first, second = (grammars.guide(grammar, tok.stop_ids, False) for _ in range(2))
    for token in tok.encode("<f="):
        first.feed(token)
    assert allowed(second) == set(range(tok.vocab_size)) != allowed(first)
    assert allowed(grammars.guide(grammar, tok.stop_ids, False)) == allowed(second)


MANY = [(f"<{n}>", {}, "") for n in range(300)]
BAD = [
    ("{", "not JSON"), (7, "an object"), ({}, "triggers must be a list"), (old(triggers=[]), "triggers must be a list"),
    (old(triggers=[""]), "not empty"), (old(triggers=[5]), "not empty"), (old(triggers="<f="), "must be a list"),
    (old(tags=[]), "structures must be a list"), (old() | {"structures": [5]}, r"structures\[0\] must be an object"),
    (old(triggers=["<f=", "<tool_call>"]), r"structures\[3\].begin starts with none"),
    (old(triggers=[*TRIGGERS, "<f=a"]), "'<f=a' contains '<f='"), (old(triggers=[*TRIGGERS, "f"]), "contains 'f'"),
    (old(triggers=[*TRIGGERS, "zz"]), "no tag begins with 'zz'"), (old(triggers=["x" * 200]), "longer than 128"),
    (old([("a<think>", POINT, "")], ["a<think>"]), "<think> is a token of its own"),
    (old([("a<|user|>", POINT, "")], ["a"]), r"<\|user\|> ends the turn"),
    (old([("a", POINT, "<|endoftext|>")], ["a"]), r"<\|endoftext\|> ends the turn"),
    (old([("a", None, "")], ["a"]), "must be a JSON schema"), (old([("a", "[", "")], ["a"]), "not JSON"),
    (old([("a", {"type": "strin"}, "")], ["a"]), "Invalid type"),
    (old([("a", {"if": {}, "then": {}}, "")], ["a"]), "Unimpl"),
    (old([("a", {"type": "integer", "minimum": 2, "maximum": 1}, "")], ["a"]), "minimum"),
    (old([(7, {}, "")], ["a"]), "begin and end must be texts"), (old([("a", {}, ["b"])], ["a"]), "must be texts"),
    (old(MANY, ["<"]), "1 to 256"), (old([("a", {"enum": ["x" * MAX_TEXT]}, "")], ["a"]), "longer than"),
    (old([("\ud800", {}, "")], ["\ud800"]), "lone surrogate"),
    (old() | {"at_least_one": True}, "'at_least_one' is not"),
    (new(stop_after_first=True), "'stop_after_first' is not"), (new() | {"excludes": ["a"]}, "'excludes' is not"),
    (new(type="sequence"), "format.type must be triggered_tags; others"), (new(tags=[]), "format.tags must be"),
    ({"format": 5}, "must be triggered_tags"), (new() | {"format": None}, "must be triggered_tags"),
    ({"format": {"type": "triggered_tags", "triggers": ["a"], "tags": [{"begin": "a", "end": "", "content": {
        "type": "regex", "pattern": "b"}}]}}, "content.type must be json_schema; others"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "says"), BAD, ids=range(len(BAD)))
def test_what_are_no_tags_is_refused_by_name(tok, grammars, given, says):
    with pytest.raises(BadRequest, match=says) as caught:
        grammars.guide(tags_grammar(given, "structural_tag"), tok.stop_ids, False)
    assert caught.value.body["error"]["param"].startswith("structural_tag") and len(str(caught.value)) < 400
    assert str(caught.value).startswith("structural_tag") and "\n" not in str(caught.value)


def test_what_nests_too_deep_is_refused():
    schema: dict = {}
    for _ in range(5000):
        schema = {"not": schema}
    for given in (old([("a", schema, "")], ["a"]), {"type": "json_schema", "schema": schema}):
        with pytest.raises(BadRequest, match="response_format nests too deep"):
            read_format({"type": "structural_tag"} | given, "response_format")


def test_neutral_fields_ask_for_nothing(tok, grammars):
    told = tags_grammar(old(), "structural_tag")
    assert told == read_format(
        new(at_least_one=False, stop_after_first=False, excludes=[]), "response_format"
    )
    assert told == tags_grammar(old() | {"at_least_one": False}, "structured_outputs.structural_tag")
