"""The calls of TRL's `VLLMClient`, as it makes them, against the model's own logits (weights: test_transfer)."""

import base64
import math
import re

import numpy as np
import pytest
import torch
from running import Running

from fullarc.chat import Tokenizer, render
from fullarc.chat.openai import read_messages, read_tools
from fullarc.engine import Engine
from fullarc.model import load_config, load_model

IDS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9]]


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


@pytest.fixture(scope="module")
def model(talking):
    return load_model(talking[0])


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def post(http, path, body):
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def generate(http, prompts, **more):
    """`VLLMClient.generate` sends all fields."""
    fields = {"n": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
              "max_tokens": 16, "logprobs": 0, "structured_outputs_regex": None, "images": None,
              "generation_kwargs": {"ignore_eos": True, "seed": 7}}  # fmt: skip
    return post(http, "/generate/", {"prompts": prompts} | fields | more)


def test_the_client_finds_the_server(http):
    assert http.get("/health/").status_code == 200
    assert http.get("/get_world_size/").json() == {"world_size": 1}


def test_prompts_are_sampled_with_the_log_probs_of_their_tokens(http, talking):
    told = generate(http, IDS, n=2)
    assert told["prompt_ids"] == IDS and len(told["completion_ids"]) == 6
    engine = Engine(talking[0], max_batch=6, max_len=64)
    twice = [ids for ids in IDS for _ in range(2)]
    expected = engine.generate(twice, 16, seeds=[7, 8] * 3, stop_ids=())
    assert told["completion_ids"] == [one.token_ids for one in expected]
    assert told["logprobs"] == [[[value] for value in one.logprobs] for one in expected]
    assert told["logprob_token_ids"] == [[[token] for token in one.token_ids] for one in expected]
    texts = generate(http, ["hello", "list it"], logprobs=None)
    assert texts["prompt_ids"] == [talking[1].encode(text) for text in ("hello", "list it")]
    assert texts["logprobs"] is None and texts["logprob_token_ids"] is None


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.8, "top_k": 9}, {"temperature": 0.0}]
)
def test_log_probs_are_those_that_tokens_are_drawn_with(http, model, how):
    """Written out: temperature, then top-k, then top-p, renormalised; the best three and the token itself."""
    told = generate(http, IDS[:1], logprobs=3, **how)
    output, temperature = told["completion_ids"][0], how.get("temperature", 1.0) or 1.0
    logits = logits_of(model, IDS[0] + output)[len(IDS[0]) - 1 : -1]
    for at, token in enumerate(output):
        p, order = (logits[at] / temperature).softmax(-1).sort(descending=True)
        p = p[: how.get("top_k") or None] / p[: how.get("top_k") or None].sum()
        p = p[: int((p.cumsum(0) - p < how.get("top_p", 1.0)).sum())]
        p = p / p.sum()
        ranked = order[: len(p)].tolist()
        best = ranked[:3]
        ids = best if token in best else [*best, token]
        assert told["logprob_token_ids"][0][at] == ids
        assert told["logprobs"][0][at] == pytest.approx(
            [float(p[ranked.index(i)].log()) for i in ids], abs=1e-4
        )


def test_generation_kwargs_override_the_other_fields(http):
    plain = generate(http, IDS[:1], temperature=0.0)["completion_ids"][0]
    kwargs = {"ignore_eos": True, "logit_bias": {str(plain[0]): -100}, "max_tokens": 9}
    other = generate(http, IDS[:1], temperature=0.0, generation_kwargs=kwargs)["completion_ids"][0]
    assert len(other) == 9 and other[0] != plain[0]


def test_conversations_are_rendered(http, talking):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    chats = [[{"role": "user", "content": "hello"}], [{"role": "user", "content": "list it"}]]
    body = {"messages": chats, "n": 2, "max_tokens": 4, "logprobs": 0, "tools": [tool],
            "chat_template_kwargs": {"enable_thinking": False}, "generation_kwargs": {"ignore_eos": True}}  # fmt: skip
    told = post(http, "/chat/", body)
    assert told["prompt_ids"] == [
        render(
            talking[1], read_messages(chat), read_tools([tool]), add_generation_prompt=True, thinking=False
        ).ids
        for chat in chats
    ]
    assert [len(ids) for ids in told["completion_ids"]] == [4] * 4
    assert [[row[0] for row in rows] for rows in told["logprob_token_ids"]] == told["completion_ids"]


def unpacked(told):
    """`VLLMClient._decode_binary_logprobs`, in few words."""
    batch, longest, top = told["shape"]

    def arrays(name, kind, width):
        flat = np.frombuffer(base64.b64decode(told[name]), dtype=kind).reshape(batch, longest, width)
        return [rows[:count].tolist() for rows, count in zip(flat, told["completion_lengths"], strict=True)]

    return (arrays("logprobs_b64", np.float32, top), arrays("token_ids_b64", np.int32, top),
            arrays("actual_logprobs_b64", np.float32, 1), arrays("actual_token_ids_b64", np.int32, 1))  # fmt: skip


@pytest.mark.parametrize("top", [100, 1, 0])
def test_a_teacher_scores_sequences(http, model, top):
    lengths = [3, 0, 4]
    body = {"sequences": IDS, "prompt_lengths": lengths, "top_logprobs": top, "temperature": 1.0}
    rows = post(http, "/get_sequence_logprobs/", body | {"response_format": "json"})
    best, best_ids, own, own_ids = unpacked(
        post(http, "/get_sequence_logprobs/", body | {"response_format": "binary"})
    )
    for n, (ids, length) in enumerate(zip(IDS, lengths, strict=True)):
        assert len(best[n]) == len(own[n]) == len(rows["logprobs"][n]) == len(ids) - length
        for at in range(length, len(ids)):
            place = at - length
            if at == 0:
                assert rows["logprobs"][n][0] == [] and own[n][0] == [-np.inf], "nothing comes before it"
                continue
            values, order = logits_of(model, ids)[at - 1].log_softmax(-1).sort(descending=True)
            told = order[:top].tolist()
            assert best_ids[n][place] == told and best[n][place] == pytest.approx(
                values[:top].tolist(), abs=1e-4
            )
            assert own_ids[n][place] == [ids[at]]
            rank = order.tolist().index(ids[at])
            assert own[n][place] == pytest.approx([float(values[rank])], abs=1e-4)
            assert rows["logprob_token_ids"][n][place] == (told if rank < top else [*told, ids[at]])


def test_a_form_is_followed_and_the_log_probs_are_those_within_it(http, talking):
    told = generate(http, IDS, structured_outputs_regex="[ab]{3}", logprobs=5, generation_kwargs={"seed": 7})
    tok, end = Tokenizer.load(talking[0]), load_config(talking[0]).eos_token_id
    for ids, columns, drawable in zip(
        told["completion_ids"], told["logprobs"], told["logprob_token_ids"], strict=True
    ):
        assert re.fullmatch("[ab]{3}", tok.decode([token for token in ids if token not in end]))
        for row, tokens in zip(columns, drawable, strict=True):
            if len(set(tokens)) < 5:  # all that could be drawn there
                alike = dict(zip(tokens, row, strict=True))
                assert sum(math.exp(value) for value in alike.values()) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_is_refused(http):
    long = {"messages": [[{"role": "user", "content": "a"}]]}
    score = {"sequences": IDS, "prompt_lengths": [1, 1, 1]}
    for path, body, says in (
        ("/generate/", {"prompts": []}, "prompts"), ("/generate/", {"prompts": [[10**6]]}, "outside"),
        ("/generate/", {"prompts": IDS, "generation_kwargs": {"wrong": 1}}, "'wrong' is not known"),
        ("/generate/", {"prompts": IDS, "generation_kwargs": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ("/generate/", {"prompts": IDS, "generation_kwargs": {"n": "x"}}, "n:"),
        ("/generate/", {"prompts": IDS, "logprobs": 1000}, "logprobs"),
        ("/generate/", {"prompts": ["a"], "images": [["x"]]}, "images"),
        ("/generate/", {"prompts": IDS, "structured_outputs_regex": "a("}, "structured_outputs.regex"),
        ("/chat/", {"messages": [[]]}, "messages"), ("/chat/", long | {"chat_template_kwargs": {"enable_thinking": 3}},
                                                     "enable_thinking"),
        ("/get_sequence_logprobs/", score | {"prompt_lengths": [1, 1]}, "prompt_lengths"),
        ("/get_sequence_logprobs/", score | {"prompt_lengths": [1, 4, 1]}, "prompt_lengths"),
        ("/get_sequence_logprobs/", score | {"temperature": 0.5}, "temperature"),
        ("/get_sequence_logprobs/", score | {"response_format": "pickle"}, "response_format"),
    ):  # fmt: skip
        answer = http.post(path, json=body)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"], (
            path,
            body,
            answer.text,
        )
