"""SGLang's /generate with text: stop strings, penalties, log-probs of chosen tokens, batches, streams, scoring."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Running
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from fullarc.chat import Tokenizer
from fullarc.engine import Engine, SamplingParams
from fullarc.engine.penalties import penalised
from fullarc.engine.stops import StopStrings, StopWatch

PROMPT = "hello 我们"


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


def generate(http, sampling=None, **body):
    params = {"max_new_tokens": 40, "sampling_seed": 1, "ignore_eos": True} | (sampling or {})
    given = {} if "input_ids" in body else {"text": PROMPT}
    answer = http.post("/generate", json=given | {"sampling_params": params} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(http, **body):
    with http.stream("POST", "/generate", json=body | {"stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_text_goes_in_and_comes_out(http, talking):
    tok: Tokenizer = talking[1]
    answer = generate(http)
    assert answer["meta_info"]["prompt_tokens"] == len(tok.encode(PROMPT))
    assert answer["output_ids"] == generate(http, input_ids=tok.encode(PROMPT))["output_ids"]
    assert answer["text"] == tok.decode(answer["output_ids"], skip_special=True)
    raw = generate(http, {"skip_special_tokens": False})
    assert raw["text"] == tok.decode(raw["output_ids"])
    special = generate(http, text="<|user|>hello<|assistant|>")["meta_info"]["prompt_tokens"]
    assert special == 2 + len(tok.encode("hello")), "a rendered template means its special tokens"


def test_stop_strings_cut_where_they_begin_wherever_tokens_end(http, talking):
    tok: Tokenizer = talking[1]
    whole = generate(http, {"skip_special_tokens": False})
    data = b"".join(tok.token_bytes(token) for token in whole["output_ids"])
    borders, at = set(), 0
    for token in whole["output_ids"]:
        at += len(tok.token_bytes(token))
        borders.add(at)
    across = next(
        data[b - 1 : b + 2].decode("ascii")
        for b in sorted(borders)
        if b > 12 and data[b - 1 : b + 2].isascii() and data.find(data[b - 1 : b + 2]) == b - 1
    )
    decoys = [f"{n}-never" for n in range(3000)]
    stop = {"stop": [*decoys, across], "skip_special_tokens": False}
    answer = generate(http, stop)
    end = data.index(across.encode())
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": across}
    assert answer["text"] == data[:end].decode("utf-8", "replace")
    ids = answer["output_ids"]
    assert ids == whole["output_ids"][: len(ids)]
    said = sum(len(tok.token_bytes(token)) for token in ids)
    assert said - len(tok.token_bytes(ids[-1])) < end + 3 <= said, "not one token more than needed"
    kept = generate(http, stop | {"no_stop_trim": True})
    assert across in kept["text"]
    params = {"max_new_tokens": 40, "sampling_seed": 1, "ignore_eos": True} | stop
    events = streamed(http, text=PROMPT, sampling_params=params)
    for event in events:
        assert answer["text"].startswith(event["text"])
    assert events[-1]["text"] == answer["text"]


WORD = st.text("ab", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORD, min_size=1, max_size=6), st.text("abc", max_size=30), st.randoms())
def test_the_automaton_finds_what_searching_finds(stops, text, rng):
    pieces, at = [], 0
    while at < len(text):
        size = rng.randint(1, 4)
        pieces.append(text[at : at + size].encode())
        at += size
    watch, found, said = StopWatch(StopStrings(stops), lambda token: pieces[token]), None, ""
    for token in range(len(pieces)):
        said += pieces[token].decode()
        found = watch.feed(token)
        ends = [said.find(stop) + len(stop) for stop in stops if stop in said]
        if not ends:
            held = [
                n
                for n in range(len(said) + 1)
                if any(stop.startswith(said[len(said) - n :]) for stop in stops)
            ]
            assert found is None and watch.certain[-1] == len(said) - max(held)
            continue
        first = said[: min(ends)]
        longest = max((stop for stop in stops if first.endswith(stop)), key=len)
        assert found == longest and watch.start == len(first) - len(longest)
        break


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_penalties_equal_their_formulas_and_transformers(kernels, monkeypatch):
    if kernels == "torch":
        monkeypatch.setattr("fullarc.engine.penalties.available", lambda: False)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    prompt, ids = [1, 2, 3], [1, 2, 3, 7, 7, 9]
    p = [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((4, 3.0),)),
        SamplingParams(),
    ]
    out = penalised(logits, p, [prompt] * 3, [ids] * 3)
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.7)])
    assert torch.equal(out[0], theirs(torch.tensor([ids]), logits[:1].clone())[0])
    change = (out[1] - logits[1]).tolist()
    assert [round(change[v], 5) for v in (7, 9, 4, 1, 0)] == [-1.25, -0.75, 3.0, 0.0, 0.0]
    assert torch.equal(out[2], logits[2]) and penalised(logits, p[2:], [prompt], [ids]) is logits


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_penalties_of_many_rows_at_once_are_those_of_each(kernels, monkeypatch):
    """Neutral rows between them, rows without output, one token many times; token by token in double precision."""
    if kernels == "torch":
        monkeypatch.setattr("fullarc.engine.penalties.available", lambda: False)
    rng, params, prompts, ids = random.Random(0), [], [], []
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    for row in range(40):
        prompts.append([rng.randrange(50) for _ in range(rng.randrange(1, 60))])
        ids.append(prompts[-1] + [rng.randrange(9) for _ in range(row % 4 * 20)])
        params.append(SamplingParams(
            repetition_penalty=rng.choice([1.0, 0.5, 1.3]), frequency_penalty=rng.choice([0.0, -1.0, 0.7]),
            presence_penalty=rng.choice([0.0, 1.5]), logit_bias=rng.choice([(), ((3, 1.5), (8, -2.0))]),
        ))  # fmt: skip
    expected = logits.double().tolist()
    for row, p, prompt, known in zip(expected, params, prompts, ids, strict=True):
        for v in range(50):
            said, seen = known[len(prompt) :].count(v), v in known
            if seen:
                row[v] = row[v] / p.repetition_penalty if row[v] > 0 else row[v] * p.repetition_penalty
            row[v] += (
                dict(p.logit_bias).get(v, 0.0) - p.frequency_penalty * said - p.presence_penalty * (said > 0)
            )
    before = logits.clone()
    assert torch.allclose(
        penalised(logits, params, prompts, ids).double(), torch.tensor(expected).double(), atol=1e-5
    )
    assert torch.equal(logits, before)


def test_penalties_steer_the_choice_and_not_the_logprobs(http, talking):
    ask = {"temperature": 0.0, "max_new_tokens": 30, "presence_penalty": 2.0, "frequency_penalty": 2.0}
    answer = generate(http, ask, return_logprob=True)
    assert answer["output_ids"] != generate(http, {"temperature": 0.0, "max_new_tokens": 30})["output_ids"]
    prompt = talking[1].encode(PROMPT)
    scores = Engine(talking[0], max_batch=1, max_len=128).score([prompt + answer["output_ids"]])[0]
    told = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    assert told == scores[len(prompt) :]
    wanted = answer["output_ids"][0] + 1
    forced = generate(http, {"temperature": 0.0, "max_new_tokens": 1, "logit_bias": {str(wanted): 100}})
    assert forced["output_ids"] == [wanted]


def test_logprobs_of_chosen_and_likeliest_tokens_in_prompt_and_output(http, talking):
    prompt = talking[1].encode(PROMPT)
    ask = dict(return_logprob=True, logprob_start_len=0, top_logprobs_num=3, input_ids=prompt)
    meta = generate(http, {"max_new_tokens": 5}, token_ids_logprob=[5, 9], **ask)["meta_info"]
    for row, top, told in zip(meta["output_token_logprobs"], meta["output_top_logprobs"],
                              meta["output_token_ids_logprobs"], strict=True):  # fmt: skip
        assert [entry[1] for entry in told] == [5, 9]
        known = {entry[1]: entry[0] for entry in [row, *told]}
        assert all(known.get(token, value) == value for value, token, _ in top)
    assert meta["input_top_logprobs"][0] is None and len(meta["input_top_logprobs"]) == len(prompt)
    engine = Engine(talking[0], max_batch=1, max_len=128)
    other = [*prompt[:2], 9]
    assert meta["input_token_ids_logprobs"][2][1][:2] == [engine.score([other])[0][2], 9]
    named = generate(http, {"max_new_tokens": 2}, return_text_in_logprobs=True, **ask)["meta_info"]
    assert named["output_token_logprobs"][0][2] == talking[1].decode([named["output_token_logprobs"][0][1]])


def test_a_streamed_batch_carries_indices(http, server):
    server.slow_down()
    params = {"max_new_tokens": 7, "sampling_seed": 1, "ignore_eos": True, "n": 2}
    events = streamed(http, text=[PROMPT, "done"], sampling_params=params)
    whole = http.post("/generate", json={"text": [PROMPT, "done"], "sampling_params": params}).json()
    last = {event["index"]: event for event in events}
    assert [last[n]["output_ids"] for n in range(4)] == [answer["output_ids"] for answer in whole]
    assert len(events) > 8


def test_score_is_the_probability_of_labels(http, talking):
    tok = talking[1]
    labels = [tok.encode("12")[0], tok.encode("a")[0]]
    body = {"query": "so list", "items": [" it", " print"], "label_token_ids": labels}
    scores = http.post("/v1/score", json=body).json()["scores"]
    engine = Engine(talking[0], max_batch=1, max_len=128)
    ids = tok.encode_raw("so list") + tok.encode_raw(" it")
    expected = [torch.tensor(engine.score([[*ids, label]])[0][-1]).exp().item() for label in labels]
    assert scores[0] == pytest.approx(expected, rel=1e-6) and scores[1] != scores[0]
    softmax = http.post("/v1/score", json=body | {"apply_softmax": True}).json()["scores"]
    assert sum(softmax[0]) == pytest.approx(1.0)


def test_the_description_names_every_route_and_body(http):
    told = http.get("/openapi.json").json()
    assert "GenerateBody" in told["components"]["schemas"] and "post" in told["paths"]["/generate"]
    assert http.post("/nowhere").json()["error"]["type"] == "not_found_error"
    assert http.get("/generate").status_code == 405
