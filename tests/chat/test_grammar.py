"""Forms of the output, against languages that are listed, Python's `re` and `json`, and another schema validator."""

import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time

import jsonschema_rs
import pytest

from fullarc.chat.ebnf import to_lark
from fullarc.chat.forced import CallGuide
from fullarc.chat.grammar import (
    KEPT,
    MAX_TEXT,
    Grammar,
    Grammars,
    choice_grammar,
    json_grammar,
    opens_thought,
    read_format,
)
from fullarc.chat.openai import BadRequest
from fullarc.chat.parse import parse_assistant

PERSON = {
    "type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["new", "我们", "é"]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
    },
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "boolean"}, "y": {"const": {"z": [1]}}},
                        "required": ["x"], "additionalProperties": False}},
}  # fmt: skip
ARITHMETIC = r"""
root ::= expr  # with a comment
expr ::= term (("+" | "-") term)*
term ::= num | "(" expr ")"
num ::= [1-9] [0-9]{0,2}
"""


@pytest.fixture(scope="module")
def grammars(tok):
    return Grammars(tok)


def regex(text):
    return Grammar("regex", text, "regex")


def ebnf(text):
    return Grammar("ebnf", text, "ebnf")


def allowed(guide):
    bits = int.from_bytes(guide.allowed(), "little")
    return {at for at in range(bits.bit_length()) if bits >> at & 1}


def walk(tok, guide, rng, most=300):
    """A text of allowed tokens, drawn at random, and whether it came to its end."""
    said = []
    for _ in range(most):
        ids = sorted(allowed(guide))
        ends = [token for token in ids if token in tok.stop_ids]
        assert ids and not set(ids) & tok.special_ids - set(tok.stop_ids)
        if ends and (rng.random() < 0.3 or len(ids) == len(ends)):
            guide.feed(rng.choice(ends))
            assert allowed(guide) == set(tok.stop_ids)
            return tok.decode(said), True
        said.append(rng.choice([token for token in ids if token not in ends]))
        guide.feed(said[-1])
    return tok.decode(said), False


def ended(tok, grammars, grammar, count=40):
    """What random walks say that end."""
    walks = (walk(tok, grammars.guide(grammar, tok.stop_ids, False), random.Random(n)) for n in range(count))
    texts = [text for text, end in walks if end]
    assert len(texts) > count / 4 and len(set(texts)) > 1, "the test says something"
    return texts


@pytest.mark.parametrize("options", [{}, {"whitespace_pattern": None, "whitespace_flexible": False}])
def test_json_follows_its_schema(tok, grammars, options):
    validator, seen = jsonschema_rs.validator_for(PERSON), set()
    for text in ended(tok, grammars, json_grammar(PERSON, "json_schema", **options)):
        value = json.loads(text)
        validator.validate(value)
        seen |= set(value)
        assert (
            not options
            or text == json.dumps(value, separators=(",", ":"), ensure_ascii=False)
            or "\\" in text
        )
    assert seen == {"name", "age", "tags", "more"}
    for text in ended(tok, grammars, read_format({"type": "json_object"}, "response_format")):
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern",
    [
        r"\d{3}-[a-f]+",
        r"(ab|a)*b?c",
        r"[^\x00-\x7f]{2,5}x",
        "^é[我们]+/\\n\n$",
        r"(?i:ok) \w{1,4}",
        "a/b|\\\\{2}",
    ],
)
def test_a_regular_expression_is_matched_as_a_whole(tok, grammars, pattern):
    for text in ended(tok, grammars, regex(pattern)):
        assert re.fullmatch(pattern, text), text


def test_a_grammar_is_followed(tok, grammars):
    def expr(text, at):
        """Where the longest expression that begins at `at` ends."""
        while True:
            number = re.compile("[1-9][0-9]{0,2}").match(text, at)
            at = number.end() if number else expr(text, at + 1) + 1 if text[at] == "(" else len(text) + 9
            assert at <= len(text) and (number or text[at - 1] == ")")
            if text[at : at + 1] not in ("+", "-"):
                return at
            at += 1

    for text in ended(tok, grammars, ebnf(ARITHMETIC)):
        assert expr(text, 0) == len(text)
    for text in ended(tok, grammars, ebnf('start: "(" start ")" | /[a-z]/')):  # Lark
        assert re.fullmatch(r"\(*[a-z]\)*", text) and text.count("(") == text.count(")")


HEADS, TAILS = ["ab", "a", "我们", "我的", "é", "the quick", ""], ["", "x", "xx", " fox\n", '"\\']
FINITE = [head + tail for head, tail in itertools.product(HEADS, TAILS)]
LISTED = {
    "choice": (FINITE, choice_grammar(FINITE, "choice")),
    "regex": (FINITE, regex(r'(ab|a|我[们的]|\x{e9}|the quick|)(x{0,2}| fox\n|"\\)')),
    "ebnf": (FINITE, ebnf(r"""root ::= (head | "the quick" |
                                        "") tail
                              head ::= "a" "b"? | "我" [们\u7684] | "\xe9"
                              tail ::= [x]{0,2} | " fox\n" | "\"\\" """)),
    # what a scanner that takes the longest piece gets wrong
    "greedy": (["ab", "aab", "a", "abb", "abbb"], ebnf('root ::= as "ab" | ("a" | "ab") "bb"?\nas ::= "a"{0,1}')),
    "empty": (["", "b", "c"], ebnf('root ::= (("" | ) ""* ()? x) | ("b") ""* | "c" ""{2}\nx ::= | ("")\ny ::=')),
    "enum": ([json.dumps(v, ensure_ascii=False) for v in FINITE if v.isalnum()],
             json_grammar({"enum": [v for v in FINITE if v.isalnum()]}, "json_schema")),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTED)
def test_allowed_is_exactly_what_goes_on(tok, grammars, name):
    """At every place of every text: each token behind which some text goes on, and an end where one is complete."""
    texts, grammar = LISTED[name]
    language = {text.encode() for text in texts}
    beginnings = {text[:n] for text in language for n in range(len(text) + 1)}
    rng, seen = random.Random(1), set()
    for _ in range(60):
        guide, said = grammars.guide(grammar, tok.stop_ids, False), b""
        while True:
            expected = {
                i
                for i in range(tok.vocab_size)
                if i not in tok.special_ids and said + tok.token_bytes(i) in beginnings
            }
            expected |= set(tok.stop_ids) if said in language else set()
            assert allowed(guide) == expected, said
            seen.add(said)
            token = rng.choice(sorted(expected))
            guide.feed(token)
            if token in tok.stop_ids:
                break
            said += tok.token_bytes(token)
    assert seen & language and len(seen) >= len(texts)


def test_thoughts_are_free_and_come_first(tok, grammars):
    guide = grammars.guide(regex("ab?"), tok.stop_ids, thinking=True)
    for token in tok.encode("我 think {"):
        assert token in allowed(guide) and allowed(guide) & tok.special_ids == {tok.id("</think>")}
        guide.feed(token)
    guide.feed(tok.id("</think>"))
    [a], [b] = tok.encode("a"), tok.encode("b")
    assert {a} <= allowed(guide) <= {a, *tok.encode("ab")}
    guide.feed(a)
    assert allowed(guide) == {b, *tok.stop_ids}
    prompt = [tok.id("<|user|>"), *tok.encode("x"), tok.id("<|assistant|>")]
    for more, opens in (
        (["<think>"], True),
        (["</think>"], False),
        ([], False),
        (["<think>", "</think>"], False),
    ):
        assert opens_thought(tok, prompt + [tok.id(name) for name in more] + [a]) is opens
    assert not opens_thought(tok, [tok.id("<think>"), *prompt])


@pytest.mark.parametrize("several", [True, False])
def test_a_call_may_come_instead(tok, grammars, several):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]

    def guide():
        return grammars.guide(regex("ab"), tok.stop_ids, False, CallGuide(tok, tools, None, False, several))

    held = guide()
    assert tok.id("<tool_call>") in allowed(held)
    held.feed(tok.encode("a")[0])
    assert tok.id("<tool_call>") not in allowed(held), "it is too late"
    held = guide()
    call = tok.encode_raw("<tool_call>f</tool_call>")
    for token in call:
        held.feed(token)
    assert (tok.id("<tool_call>") in held.allowed()) is several and tok.id(
        "<|observation|>"
    ) in held.allowed()
    assert parse_assistant(tok, [*call, tok.id("<|observation|>")], False, tools).tool_calls[0].name == "f"


NESTED = '{"type":"array","items":' * 500 + "{}" + "}" * 500
BAD = [
    (regex("("), "unclosed group"), (regex("a(?=b)"), "look-around"), (regex(r"(a)\1"), "backreferences"),
    (regex("(" * 30_000 + "a" + ")" * 30_000), "nest"), (regex("a" * (MAX_TEXT + 1)), "longer than"),
    (regex("(\\w|.a)" * 8000), "too big"), (regex("\ud800"), "surrogates"),
    (ebnf("root ::= ("), "not closed"), (ebnf('rot ::= "a"'), "no rule 'root'"), (ebnf("root ::= a"), "no rule 'a'"),
    (ebnf('root ::= "a" |\n\n "b" %'), "line 3"), (ebnf('root ::= "a"**'), r"'\*'"), (ebnf(""), "start"),
    (ebnf('root ::= "\\Uffffffff"'), "too large"), (ebnf('root ::= "a"\nroot ::= "b"'), "cannot stand here"),
    (ebnf("root ::= " + "(" * 30_000), "not closed"), (ebnf("root ::= root"), "not supported"),
    (ebnf("root ::= [z-a]"), "invalid"), (ebnf("start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "deeply nested"),
    (ebnf("start: <[9999999]>"), "too large"), (ebnf("root ::= " + "(" * 300 + '"a"' + ")" * 300), "deeply nested"),
    (ebnf('start: <|user|> "a"'), "not supported"), (ebnf("root ::= \ud800"), "cannot stand here"),
]  # fmt: skip
BAD_SCHEMAS = [
    ("{", "not JSON"), ("[]", "an object"), (True, "an object"), ("1" * 9999, "not JSON"), ("[" * 60_000, "not JSON"),
    (NESTED, "recursion"), ({"type": "strin"}, "Invalid type"), ({"if": {}, "then": {}}, "Unimplemented"),
    ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"), ({"enum": ["x" * MAX_TEXT]}, "longer than"),
    ({"type": "string", "format": "?"}, "Unknown format"), ({"type": "string", "pattern": "("}, "unclosed"),
    ({"$ref": "http://example.com/x"}, "not present"), ({"x-guidance": {"whitespace_pattern": "("}}, "unclosed"),
    ({"const": "\ud800"}, "escape"), ({"minimum": float("nan")}, "expected value"),
]  # fmt: skip


@pytest.mark.parametrize(("grammar", "says"), BAD)
def test_what_is_no_form_is_refused_by_name(tok, grammars, grammar, says):
    with pytest.raises(BadRequest, match=says) as caught:
        grammars.guide(grammar, tok.stop_ids, False)
    assert caught.value.body["error"]["param"] == grammar.name and len(str(caught.value)) < 400
    assert str(caught.value).startswith(grammar.name) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("schema", "says"), BAD_SCHEMAS, ids=range(len(BAD_SCHEMAS)))
def test_what_is_no_schema_is_refused_by_name(tok, grammars, schema, says):
    with pytest.raises(BadRequest, match=says) as caught:
        grammars.guide(json_grammar(schema, "json_schema"), tok.stop_ids, False)
    assert caught.value.body["error"]["param"] == "json_schema" and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "given",
    [[], {}, {"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "schema": 1},
     {"type": "json_schema", "json_schema": {"schema": "{}"}}],
)  # fmt: skip
def test_what_is_no_format_is_refused(given):
    with pytest.raises(BadRequest, match="text.format"):
        read_format(given, "text.format")


DOUBLED = "root ::= r0\n" + "".join(f"r{n} ::= r{n + 1} r{n + 1}\n" for n in range(30)) + 'r30 ::= "a"?'


@pytest.mark.parametrize(
    "text",
    ['start: "a" start', 'start: "a" start\n%llguidance {"no_forcing": false}', 'start: A "ab"\nA: "a"*',
     'root ::= "a" root', 'root ::= root root | "a"', DOUBLED],
)  # fmt: skip
def test_a_form_without_an_end_holds_nobody_up(tok, grammars, text):
    guide = grammars.guide(ebnf(text), tok.stop_ids, False)
    for _ in range(300):
        if not guide.allowed():
            return  # too complex to go on
        guide.feed(tok.encode("a")[0])


@pytest.mark.parametrize(
    "text", ["root ::= root root | [ -~]", "root ::= root root root | root root | [ -~]"]
)
def test_an_ambiguous_form_is_given_up_before_a_step_of_it_takes_long(tok, grammars, text):
    """A text has as many readings as there are trees over it; whoever follows them takes up to a second for a step."""
    guide, rng, worst, steps = grammars.guide(ebnf(text), tok.stop_ids, False), random.Random(1), 0.0, 0
    while found := allowed(guide) - {*tok.stop_ids}:
        begun = time.thread_time()
        guide.feed(rng.choice(sorted(found)))
        worst, steps = max(worst, time.thread_time() - begun), steps + 1
        assert worst < 0.1, f"step {steps}: {worst} s"
    assert steps > 5


LARGE = {
    "left out": {"properties": {f"option_{n}": {"type": ["string", "null", "integer"]} for n in range(180)}},
    "either": {"properties": {"all": {"type": "array", "items": {"anyOf": [
        {"type": "object", "properties": {"kind": {"const": f"k{n}"}, "size": {"type": "number"}}, "required": ["kind"]}
        for n in range(100)]}}}, "required": ["all"]},
    "deep": {"$ref": "#/$defs/9", "$defs": {"0": {"type": "string"}} | {str(n): {
        "type": "object", "properties": {f"p{m}": {"$ref": f"#/$defs/{n - 1}"} for m in range(30)}, "required": ["p7"]}
        for n in range(1, 10)}},
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_a_large_schema_is_followed(tok, grammars, name):
    """Several times larger than what is sent in earnest; few readings cost little, however long the text is."""
    for seed in range(4):
        guide = grammars.guide(json_grammar({"type": "object"} | LARGE[name], "s"), tok.stop_ids, False)
        walk(tok, guide, random.Random(seed))
        assert guide.allowed(), "given up"


def test_a_grammar_is_read_in_time_that_grows_as_its_length():
    """Twenty times longer than is let in; where all is written anew at each `*` it takes minutes."""
    start = time.process_time()
    assert to_lark("root ::= " + '"a"* ' * 250_000).count("*") == 250_000
    assert time.process_time() - start < 20


def test_white_space_in_json_is_bounded(tok, grammars):
    guide, [space] = (
        grammars.guide(json_grammar({"type": "object"}, "s"), tok.stop_ids, False),
        tok.encode(" "),
    )
    guide.feed(tok.encode("{")[0])
    count = 0
    while space in allowed(guide) and count < 99:
        guide.feed(space)
        count += 1
    assert count == 32


def test_guides_are_independent_and_few_forms_are_kept(tok, grammars):
    first, second = (grammars.guide(regex("a{3}"), tok.stop_ids, False) for _ in range(2))
    before = allowed(second)
    first.feed(tok.encode("a")[0])
    assert allowed(second) == before == allowed(grammars.guide(regex("a{3}"), tok.stop_ids, False))
    for n in range(2 * KEPT):
        grammars.guide(regex(f"a{{{n}}}"), tok.stop_ids, False)
    assert len(grammars._compiled) == KEPT


def test_threads_that_ask_for_one_form_compile_it_once(tok, monkeypatch):
    compiled, grammars, asked = Grammars._compile, Grammars(tok), []

    def slowly(self, grammar):
        asked.append(grammar)
        time.sleep(0.1)
        return compiled(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    threads = [
        threading.Thread(target=grammars.guide, args=(regex("ab"), tok.stop_ids, False)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [regex("ab")]


def test_who_asks_for_a_form_that_is_kept_waits_for_no_other(tok, monkeypatch):
    compiled, grammars, begun, go_on = Grammars._compile, Grammars(tok), threading.Event(), threading.Event()
    grammars.guide(regex("ab"), tok.stop_ids, False)

    def held(self, grammar):
        begun.set()
        assert go_on.wait(60)
        return compiled(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", held)
    other = threading.Thread(target=grammars.guide, args=(regex("cd"), tok.stop_ids, False))
    same = threading.Thread(target=grammars.guide, args=(regex("ab"), tok.stop_ids, False), daemon=True)
    other.start()
    assert begun.wait(60)
    same.start()
    same.join(20)
    waits = same.is_alive()
    go_on.set()
    other.join(60)
    assert not waits and not other.is_alive() and {*grammars._compiled} == {regex("ab"), regex("cd")}


def test_the_library_is_not_loaded_before_a_form_comes():
    code = "import sys, fullarc.engine.server; print('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
