"""Output in a form, from a model that says anything: by the engine alone, by OpenAI's client, and by every dialect."""

import json
import math
import random
import re
import threading
import time
from collections import Counter

import anthropic
import httpx
import jsonschema_rs
import openai
import pytest
from running import Running

from fullarc.chat.grammar import Grammar, Grammars, choice_grammar, json_grammar, tags_grammar
from fullarc.engine import Engine
from fullarc.engine.api.sglang import finish_reason
from fullarc.engine.request import Request
from fullarc.engine.sampling import SamplingParams

HELLO = [{"role": "user", "content": "hello"}]
SIZE = {"type": "integer", "minimum": 0, "maximum": 999}
FILE = {"type": "object", "required": ["path", "size"], "additionalProperties": False,
        "properties": {"path": {"type": "string", "maxLength": 8}, "size": SIZE,
                       "kind": {"enum": ["text", "文本", None]}}}  # fmt: skip
VALID = jsonschema_rs.validator_for(FILE)
DATE, PAIRS = r"\d{4}-[01]\d", 'root ::= "(" root ")" | "ab"'
# a trigger that a model which says anything soon says, and no name of a special token that is shown holds
BEGINS = {"w:": (FILE, "."), "job ": (SIZE, ""), "zip ": (SIZE, ";")}
TAGS = {"type": "structural_tag", "triggers": [*"wjz"], "structures": [
    {"begin": begin, "schema": schema, "end": end} for begin, (schema, end) in BEGINS.items()]}  # fmt: skip
FORMAT = {"type": "triggered_tags", "triggers": [*"wjz"], "tags": [
    {"begin": begin, "content": {"type": "json_schema", "json_schema": schema}, "end": end}
    for begin, (schema, end) in BEGINS.items()]}  # fmt: skip
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}


def prompt_of(tok, name="</think>"):
    return [tok.id("<|user|>"), *tok.encode("hello"), tok.id("<|assistant|>"), tok.id(name)]


def tagged(text):
    """The begins of a text's tags, all of them good."""
    found = []
    while trigger := re.search("[wjz]", text):
        text = text[trigger.start() :]
        begin = next(begin for begin in BEGINS if text.startswith(begin))
        value, length = json.JSONDecoder().raw_decode(text[len(begin) :])
        schema, end = BEGINS[begin]
        jsonschema_rs.validator_for(schema).validate(value)
        text = text[len(begin) + length :]
        assert text.startswith(end)
        text = text[len(end) :]
        found.append(begin)
    return found


# --- the engine alone -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grammars(talking):
    return Grammars(talking[1])


def drain(scheduler):
    while not scheduler.idle:
        scheduler.step()


def test_tokens_are_drawn_from_what_is_allowed_of_the_models_own_distribution(talking, grammars):
    """One token each of many seeds: chances, log-probs and counts against the softmax over what may come."""
    folder, tok = talking
    words = ["list", "print", "then", "我们"]
    grammar, scheduler = choice_grammar(words, "choice"), Engine(folder, max_batch=64, max_len=64).scheduler
    everything = tuple(range(tok.vocab_size))
    requests = []
    for seed in range(600):
        params = SamplingParams(
            max_new_tokens=1, seed=seed, temperature=1.5, support=not seed, logprob_ids=everything
        )
        guide = grammars.guide(grammar, tok.stop_ids, False)
        requests.append(Request(str(seed), prompt_of(tok), params, guide=guide))
        scheduler.submit(requests[-1])
    drain(scheduler)
    model = {token: value for value, token in requests[0].ids_logprobs[0]}
    assert math.isclose(sum(map(math.exp, model.values())), 1, rel_tol=1e-4), "the log-probs are the model's"
    begins = [
        t
        for t in everything
        if t not in tok.special_ids and any(w.encode().startswith(tok.token_bytes(t)) for w in words)
    ]
    total = sum(math.exp(model[token]) for token in begins)
    expected = {token: math.exp(model[token]) / total for token in begins}
    told = {token: math.exp(value) for value, token in requests[0].supports[0]}
    assert told == pytest.approx(expected, rel=1e-4) and len(expected) > 3
    counts = Counter(request.output[0] for request in requests)
    assert set(counts) <= set(expected)
    assert all(r.logprobs[0] == pytest.approx(model[r.output[0]], abs=1e-5) for r in requests)
    chi = sum((counts[t] - 600 * p) ** 2 / (600 * p) for t, p in expected.items() if p > 0.01)
    assert chi < 3 * len(expected) + 10


@pytest.mark.parametrize("steps", [0, 3])
def test_an_interrupted_form_goes_on_as_it_would_have(talking, grammars, steps):
    """Sent back to the queue between two tokens, paused, beside free requests, with and without drafts."""
    folder, tok = talking

    def run(interrupt):
        scheduler, rng, requests = (
            Engine(folder, max_batch=3, max_len=512, draft_steps=steps).scheduler,
            random.Random(1),
            [],
        )
        for seed in range(5):
            guide = grammars.guide(json_grammar(FILE, "s"), tok.stop_ids, seed == 0) if seed != 2 else None
            params = SamplingParams(
                max_new_tokens=60 if seed == 2 else 300, seed=seed, stop_ids=frozenset(tok.stop_ids)
            )
            prompt = prompt_of(tok, "<think>" if seed == 0 else "</think>")
            requests.append(Request(str(seed), prompt, params, guide=guide))
            scheduler.submit(requests[-1])
        while not scheduler.idle:
            scheduler.step()
            if interrupt and rng.random() < 0.3:
                scheduler.retract()
        assert not interrupt or sum(request.retractions for request in requests) > 20
        return [(r.output, r.logprobs, r.finish) for r in requests]

    told = run(True)
    assert told == run(False)
    formed = [
        tok.decode(output[:-1])
        for number, (output, _, finish) in enumerate(told)
        if finish == "stop" and number not in (0, 2)
    ]
    for text in formed:
        VALID.validate(json.loads(text))
    assert formed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_no_trigger_comes_a_structural_tag_changes_nothing(talking, grammars, temperature):
    folder, tok = talking
    rare = TAGS | {"triggers": ["@@@"], "structures": [{"begin": "@@@", "schema": FILE, "end": ""}]}

    def run(form):
        scheduler, requests = Engine(folder, max_batch=8, max_len=512).scheduler, []
        for seed in range(8):
            params = SamplingParams(
                max_new_tokens=150, seed=seed, temperature=temperature, stop_ids=frozenset(tok.stop_ids)
            )
            guide = grammars.guide(tags_grammar(rare, "s"), tok.stop_ids, False) if form else None
            prompt = [*prompt_of(tok), *tok.encode(str(seed))]
            requests.append(Request(str(seed), prompt, params, guide=guide))
            scheduler.submit(requests[-1])
        drain(scheduler)
        return [(r.output, r.logprobs, r.finish) for r in requests]

    free = run(False)
    assert run(True) == free
    said = [token for output, _, _ in free for token in output]
    assert set(said) & tok.special_ids - set(tok.stop_ids) and "\ufffd" in tok.decode(said), "anything at all"


class Lost:
    """A guide that knows only two tokens."""

    def __init__(self):
        self.left = [5, 6]

    def allowed(self):
        return bytes([0b100000]) if len(self.left) == 2 else bytes([0b1000000]) if self.left else b""

    def feed(self, token):
        assert token == self.left.pop(0)


def test_a_form_that_is_lost_ends_its_request_alone(talking):
    scheduler = Engine(talking[0], max_batch=2, max_len=64).scheduler
    params = SamplingParams(max_new_tokens=9, seed=1)
    lost, cut = (Request(name, [3, 4], params, guide=Lost()) for name in ("lost", "cut"))
    cut.params = SamplingParams(max_new_tokens=2, seed=1, guided=True)
    free = Request("free", [3, 4], params)
    for request in (lost, cut, free):
        scheduler.submit(request)
    drain(scheduler)
    assert (lost.output, lost.finish, lost.lost) == (
        [5, 6],
        "abort",
        True,
    ) and scheduler.counters.aborted == 1
    assert finish_reason(lost, "", 2) is None, "a stream that looks between the loss and the end"
    assert "too complex" in finish_reason(lost, lost.finish, 2)["message"]
    assert (cut.output, cut.finish, cut.lost) == ([5, 6], "length", False)
    assert (len(free.output), free.finish) == (9, "length") and len(scheduler.free) == 2


# --- over HTTP ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0], max_len=1024)
    yield running
    running.stop()


def wrapped(schema):
    return {"type": "json_schema", "json_schema": {"name": "file", "schema": schema, "strict": True}}


def test_chat_answers_follow_a_schema_whole_and_streamed(gpt):
    ended = 0
    for seed in range(6):
        ask = dict(
            model="m",
            messages=HELLO,
            seed=seed,
            n=3,
            max_tokens=300,
            response_format=wrapped(FILE),
            extra_body=QUIET,
        )
        whole = gpt.chat.completions.create(**ask)
        texts = ["", "", ""]
        for chunk in gpt.chat.completions.create(**ask, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        for choice, streamed in zip(whole.choices, texts, strict=True):
            assert streamed == choice.message.content
            if choice.finish_reason == "stop":
                VALID.validate(json.loads(choice.message.content))
                ended += 1
        assert len(set(texts)) > 1
    assert ended > 9
    free = gpt.chat.completions.create(
        model="m",
        messages=HELLO,
        seed=1,
        max_tokens=300,
        response_format={"type": "json_object"},
        extra_body=QUIET,
    ).choices[0]
    assert free.message.content.startswith("{")
    assert free.finish_reason == "length" or isinstance(json.loads(free.message.content), dict)
    text = gpt.chat.completions.create(
        model="m", messages=HELLO, seed=1, max_tokens=9, response_format={"type": "text"}, extra_body=QUIET
    )
    assert not text.choices[0].message.content.startswith("{")


def test_thoughts_come_before_the_form(gpt, talking):
    tok = talking[1]
    for seed in range(30):
        reply = gpt.chat.completions.create(
            model="m", messages=HELLO, seed=seed, max_tokens=900, response_format=wrapped(FILE),
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        choice = reply.choices[0]
        thought = (
            choice.token_ids[: choice.token_ids.index(tok.id("</think>"))] if choice.message.content else []
        )
        assert not set(thought) & tok.special_ids
        if thought and choice.finish_reason == "stop":
            VALID.validate(json.loads(choice.message.content))
            break
    assert choice.message.reasoning_content and choice.finish_reason == "stop"


def test_a_tool_may_be_called_instead(gpt, says):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ask = dict(
        model="m",
        messages=HELLO,
        tools=[tool],
        response_format=wrapped(FILE),
        max_tokens=300,
        extra_body=QUIET,
    )
    called = gpt.chat.completions.create(
        **ask, seed=says(9, "<tool_call>f</tool_call><|observation|>")
    ).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.tool_calls[0].function.name == "f"
    with pytest.raises(openai.BadRequestError, match="contradict"):
        gpt.chat.completions.create(**ask, tool_choice="required")
    for seed in range(9):
        choice = gpt.chat.completions.create(**ask | {"tools": openai.NOT_GIVEN}, seed=seed).choices[0]
        if choice.finish_reason == "stop":
            return VALID.validate(json.loads(choice.message.content))
    raise AssertionError("none ended")


def test_responses_follow_a_schema_whole_and_streamed(gpt):
    form = {"type": "json_schema", "name": "file", "schema": FILE, "strict": True}
    statuses = set()
    for seed in range(4):
        ask = dict(model="m", input="hello", text={"format": form}, max_output_tokens=300, reasoning={"effort": "none"},
                   extra_body={"seed": seed})  # fmt: skip
        whole = gpt.responses.create(**ask)
        events = list(gpt.responses.create(**ask, stream=True))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
        assert whole.text.format.type == "json_schema"
        statuses.add(whole.status)
        if whole.status == "completed":
            VALID.validate(json.loads(whole.output_text))
    assert "completed" in statuses


def test_anthropics_client_gets_its_schema(server):
    claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    ask = dict(model="m", max_tokens=300, messages=HELLO, thinking={"type": "disabled"},
               output_config={"format": {"type": "json_schema", "schema": FILE}})  # fmt: skip
    made = [claude.messages.create(**ask, extra_body={"seed": seed}) for seed in range(4)]
    texts = [reply.content[0].text for reply in made if reply.stop_reason == "end_turn"]
    assert texts and all(VALID.is_valid(json.loads(text)) for text in texts)
    with claude.messages.stream(**ask, extra_body={"seed": 0}) as stream:
        assert stream.get_final_text() == made[0].content[0].text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{"structural_tag": json.dumps(TAGS)}, {"structured_outputs": {"structural_tag": json.dumps(TAGS)}},
     {"response_format": TAGS}, {"response_format": {"type": "structural_tag", "format": FORMAT}}],
)  # fmt: skip
def test_structural_tags_in_everybodys_names(gpt, fields, stream):
    found, ended = Counter(), 0
    for seed in range(6):
        made = gpt.chat.completions.create(
            model="m",
            messages=HELLO,
            max_tokens=250,
            seed=seed,
            n=4,
            stream=stream,
            extra_body=QUIET | fields,
        )
        texts, ends = Counter(), {}
        for chunk in made if stream else [made]:
            for choice in chunk.choices:
                said = choice.delta if stream else choice.message
                texts[choice.index] = (texts[choice.index] or "") + (said.content or "")
                ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        for index, end in ends.items():
            if end == "stop":
                found.update(tagged(texts[index]))
                ended += 1
    assert ended > 8 and set(found) == set(BEGINS), (ended, found)


def test_structural_tags_of_each_prompt_and_of_tools(http, gpt):
    forms = [{"structural_tag": json.dumps(TAGS)}, {"structural_tag": json.dumps({"format": FORMAT})}, {}]
    params = [{"max_new_tokens": 250, "sampling_seed": 4, "n": 12} | form for form in forms]
    answers = http.post("/generate", json={"text": ["hello"] * 3, "sampling_params": params}).json()
    ended = [
        answer["text"] for answer in answers[:24] if answer["meta_info"]["finish_reason"]["type"] == "stop"
    ]
    assert len(ended) > 8 and sum(map(len, map(tagged, ended))) > 8
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    with pytest.raises(openai.BadRequestError, match="response_format cannot bar parallel"):
        gpt.chat.completions.create(
            model="m",
            messages=HELLO,
            tools=[tool],
            parallel_tool_calls=False,
            extra_body={"response_format": TAGS},
        )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "good"),
    [
        ({"guided_json": FILE}, lambda text: VALID.is_valid(json.loads(text))),
        ({"guided_json": json.dumps(FILE)}, lambda text: VALID.is_valid(json.loads(text))),
        ({"guided_regex": DATE}, lambda text: re.fullmatch(DATE, text)),
        ({"guided_choice": ["list it", "list", "我们"]}, lambda text: text in ["list it", "list", "我们"]),
        ({"guided_grammar": PAIRS}, lambda text: text == "(" * text.count("(") + "ab" + ")" * text.count("(")),
        ({"structured_outputs": {"regex": DATE}}, lambda text: re.fullmatch(DATE, text)),
        ({"structured_outputs": {"json": FILE, "disable_any_whitespace": True}},
         lambda text: VALID.is_valid(json.loads(text)) and ", " not in text),
        ({"structured_outputs": {"choice": ["a", "b"]}}, lambda text: text in "ab"),
        ({"structured_outputs": {"grammar": PAIRS}}, lambda text: "ab" in text),
        ({"json_schema": json.dumps(FILE)}, lambda text: VALID.is_valid(json.loads(text))),
        ({"regex": DATE}, lambda text: re.fullmatch(DATE, text)),
        ({"ebnf": PAIRS}, lambda text: "ab" in text),
    ],
)  # fmt: skip
def test_completions_in_vllms_and_sglangs_names(gpt, fields, good, stream):
    made = gpt.completions.create(
        model="m", prompt=["hello", "so"], n=2, max_tokens=250, seed=5, extra_body=fields, stream=stream
    )
    texts, ends = Counter(), {}
    for chunk in made if stream else [made]:
        for choice in chunk.choices:
            texts[choice.index] = (texts[choice.index] or "") + choice.text
            ends[choice.index] = choice.finish_reason
    finished = [texts[index] for index, end in ends.items() if end == "stop"]
    assert len(ends) == 4 and finished and all(map(good, finished)), (texts, ends)


def test_generate_takes_forms_of_each_prompt(http):
    forms = [{"json_schema": json.dumps(FILE)}, {"regex": DATE}, {"ebnf": PAIRS, "n": 3}, {}]
    params = [{"max_new_tokens": 300, "sampling_seed": 4} | form for form in forms]
    answers = http.post("/generate", json={"text": ["hello"] * 4, "sampling_params": params}).json()
    texts = [answer["text"] for answer in answers]
    reasons = [answer["meta_info"]["finish_reason"]["type"] for answer in answers]
    assert len(texts) == 6 and reasons[1] == "stop" and re.fullmatch(DATE, texts[1])
    assert reasons[0] == "length" or VALID.is_valid(json.loads(texts[0]))
    assert all(
        re.fullmatch(r"\(*ab\)*", text)
        for text, reason in zip(texts[2:5], reasons[2:5], strict=True)
        if reason == "stop"
    )
    cut = {"max_new_tokens": 3, "regex": "a{9}", "sampling_seed": 1}
    short = http.post("/generate", json={"text": "hello", "sampling_params": cut}).json()
    assert short["meta_info"]["finish_reason"]["type"] == "length" and re.fullmatch("a+", short["text"])


@pytest.mark.parametrize(
    "more", [{"ignore_eos": True}, {"min_new_tokens": 20}, {"skip_special_tokens": False}]
)
def test_a_form_ends_where_it_is_complete(http, more):
    params = {"regex": DATE, "max_new_tokens": 60, "sampling_seed": 3, "temperature": 2.0} | more
    made = http.post("/generate", json={"text": "hello", "sampling_params": params}).json()
    assert made["meta_info"]["finish_reason"]["type"] == "stop" and re.match(DATE, made["text"])
    assert made["meta_info"]["completion_tokens"] == (21 if "min_new_tokens" in more else 8)


def test_ids_in_ids_out(http, talking):
    tok = talking[1]
    params = {"max_tokens": 250, "seed": 3, "structured_outputs": {"regex": DATE}}
    body = {"token_ids": prompt_of(tok), "sampling_params": params}
    [choice] = http.post("/inference/v1/generate", json=body).json()["choices"]
    assert choice["finish_reason"] == "stop" and re.fullmatch(DATE, tok.decode(choice["token_ids"][:-1]))
    body["token_ids"] = prompt_of(tok, "<think>")
    [choice] = http.post("/inference/v1/generate", json=body).json()["choices"]
    assert not re.match(DATE, tok.decode(choice["token_ids"])), "a thought was open"


BAD = [
    ("regex", "("), ("regex", 5), ("regex", "a" * 70_000), ("ebnf", "root ::= ("), ("json_schema", "[]"),
    ("structural_tag", "{"), ("structural_tag", TAGS | {"triggers": ["g"]}),
    ("json_schema", "{"), ("json_schema", {"type": "integer", "minimum": 2, "maximum": 1}),
]  # fmt: skip
BAD_OPENAI = [
    ("response_format", {"type": "xml"}), ("response_format", wrapped([])), ("response_format", 7),
    ("response_format", wrapped({"type": "?"})), ("guided_choice", []), ("guided_choice", "a"), ("guided_json", "["),
    ("guided_regex", "(?=a)"),
    ("guided_grammar", "x"), ("structured_outputs", {"regex": "("}), ("structured_outputs", {"json": []}),
    ("structured_outputs", {"structural_tag": "x"}),
    ("response_format", {"type": "structural_tag"}),  ("structured_outputs", {"grammar": "root ::= root"}),
    ("structured_outputs", {"json": {}, "regex": "a"}), ("structured_outputs", {"disable_additional_properties": True}),
]  # fmt: skip


def test_what_is_no_form_is_a_400_that_names_it(http):
    routes = [("/v1/chat/completions", {"messages": HELLO}), ("/v1/completions", {"prompt": "a"})]
    for path, base in routes:
        for name, value in BAD + BAD_OPENAI:
            refused = http.post(path, json=base | {name: value})
            assert refused.status_code == 400 and name in refused.json()["error"]["message"], (
                name,
                value,
                refused.text,
            )
            assert refused.json()["error"]["param"].startswith(name)
        both = http.post(path, json=base | {"regex": "a", "response_format": {"type": "json_object"}})
        assert both.status_code == 400 and "contradict" in both.json()["error"]["message"]
    for name, value in BAD:
        refused = http.post("/generate", json={"text": "a", "sampling_params": {name: value}})
        assert refused.status_code == 400 and name in refused.json()["error"]["message"], (name, refused.text)
    both = {"json_schema": "{}", "regex": "a"}
    assert (
        "contradict"
        in http.post("/generate", json={"text": "a", "sampling_params": both}).json()["error"]["message"]
    )
    biased = {"regex": "a", "logit_bias": {"5": 1}}
    assert (
        "contradict"
        in http.post("/generate", json={"text": "a", "sampling_params": biased}).json()["error"]["message"]
    )


def test_without_a_tokenizer_there_are_no_forms(checkpoints):
    running = Running(checkpoints["v0"])
    try:
        body = {"input_ids": [5], "sampling_params": {"regex": "a"}}
        refused = httpx.post(running.url + "/generate", json=body, trust_env=False)
        assert refused.status_code == 400 and "regex is about text" in refused.json()["error"]["message"]
    finally:
        running.stop()


def test_others_are_answered_while_a_form_is_compiled(http, server, monkeypatch):
    compiled, begun, gate = Grammars._compile, threading.Event(), threading.Event()

    def slowly(self, grammar: Grammar):
        begun.set()
        gate.wait(10)
        return compiled(self, grammar)

    monkeypatch.setattr(Grammars, "_compile", slowly)
    bodies = [("/generate", {"text": "a", "sampling_params": {"regex": "xy"}}),
              ("/v1/completions", {"prompt": "a", "guided_regex": "xz"}),
              ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"regex": "yz"}}),
              ("/v1/responses", {"input": "a", "max_output_tokens": 5, "text": {"format": {"type": "json_object"}}}),
              ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5, "response_format": wrapped({})}),
             ]  # fmt: skip
    for path, body in bodies:
        begun.clear()
        gate.clear()
        server.server.service.grammars._compiled.clear()
        asking = threading.Thread(target=http.post, args=(path,), kwargs={"json": body})
        asking.start()
        assert begun.wait(20)
        start = time.monotonic()
        assert (
            http.post(
                "/generate", json={"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
            ).status_code
            == 200
        )
        assert time.monotonic() - start < 2 and asking.is_alive(), path
        gate.set()
        asking.join()
