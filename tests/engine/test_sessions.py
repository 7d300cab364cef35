"""SGLang's sessions, called as its own tests call them; what they give is what the whole prompts give."""

import asyncio
import gc
import json
import threading
import time

import pytest
from running import Running, wait

from fullarc.engine.api import sessions
from fullarc.engine.api.sessions import Session, SessionParams, Sessions, Turn
from fullarc.engine.request import Request, RequestError
from fullarc.engine.sampling import SamplingParams

CHUNKS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8], [9, 7, 9], [3, 2, 3, 8, 4]]


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def none_open(server):
    yield
    server.engine.scheduler.__dict__.pop("step", None)  # what `slow_down` has left
    opened(server).clear()


def opened(server):
    found = next(e.handler.__self__ for e in server.server.endpoints if e.path == "/open_session")
    return found.open_ones


def open_session(http, **body):
    answer = http.post("/open_session", json={"capacity_of_str_len": 1000} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def send(http, ids, session=None, room=6, **more):
    params = {"temperature": 0, "max_new_tokens": room, "no_stop_trim": True, "skip_special_tokens": False,
              "ignore_eos": True}  # fmt: skip
    body = {"input_ids": ids, "sampling_params": params, "return_logprob": True, "session_params": session}
    return http.post("/generate", json=body | more)


def generate(http, *args, **more):
    answer = send(http, *args, **more)
    assert answer.status_code == 200, answer.text
    return answer.json()


def logprobs(answer):
    return answer["meta_info"]["output_token_logprobs"]


def refused(answer, says, status=400):
    assert answer.status_code == status and says in answer.json()["error"]["message"], answer.text


def test_a_conversation_in_chunks_equals_whole_prompts(http):
    """SGLang's test_session_control: offset -1 leaves out the last token, replace forgets what came behind."""
    name, rid, whole = open_session(http), None, []
    refused(
        http.post("/open_session", json={"capacity_of_str_len": 1000, "session_id": name}), "open already"
    )
    first, got, expected = None, [], []
    for number, chunk in enumerate(CHUNKS):
        params = {"id": name, "rid": rid, "offset": -1, "replace": True}
        answer = generate(http, chunk, params, room=6 if number else 1)
        rid = answer["meta_info"]["id"]
        first = first or rid
        got.append(logprobs(answer))
        whole = whole[:-1] + chunk
        plain = generate(http, whole, room=6 if number else 1)
        expected.append(logprobs(plain))
        whole = whole + plain["output_ids"]
        assert answer["meta_info"]["prompt_tokens"] == len(whole) - len(plain["output_ids"])
    assert got == expected
    too_far = send(http, CHUNKS[0], params | {"rid": rid}, logprob_start_len=len(whole) + 9)
    refused(too_far, "logprob_start_len")
    back = generate(http, CHUNKS[-1], params | {"rid": first})
    assert logprobs(back) == logprobs(generate(http, CHUNKS[0] + CHUNKS[-1]))
    refused(send(http, CHUNKS[-1], params | {"rid": rid}), "no request")
    assert http.post("/close_session", json={"session_id": name}).status_code == 200
    refused(send(http, CHUNKS[-1], params | {"rid": first}), "no session")
    refused(http.post("/close_session", json={"session_id": name}), "no session")


def test_a_request_can_be_gone_on_from_more_than_once(http):
    """Branches of a tree; `drop_previous_output` goes on from the prompt."""
    name = open_session(http, session_id="tree")
    assert name == "tree"
    root = generate(http, CHUNKS[0], {"id": name}, rid="root")
    begun = CHUNKS[0] + root["output_ids"]
    for number, chunk in enumerate(CHUNKS[1:]):
        answer = generate(http, chunk, {"id": name, "rid": "root"}, rid=f"branch{number}")
        assert logprobs(answer) == logprobs(generate(http, begun + chunk))
    assert logprobs(generate(http, CHUNKS[1], {"id": name, "rid": "root", "offset": 0})) == logprobs(
        generate(http, begun + CHUNKS[1])
    )
    again = generate(http, CHUNKS[1], {"id": name, "rid": "root", "drop_previous_output": True})
    assert logprobs(again) == logprobs(generate(http, CHUNKS[0] + CHUNKS[1]))
    generate(http, CHUNKS[2], {"id": name, "rid": "branch0"}, rid="leaf")
    generate(http, CHUNKS[1], {"id": name, "rid": "branch0", "replace": True}, rid="other")
    refused(send(http, CHUNKS[1], {"id": name, "rid": "leaf"}), "no request")
    generate(http, CHUNKS[1], {"id": name, "rid": "branch1"})
    generate(http, CHUNKS[1], {"id": name, "replace": True}, rid="anew")
    for gone in ("root", "branch1", "other"):
        refused(send(http, CHUNKS[1], {"id": name, "rid": gone}), "no request")
    generate(http, CHUNKS[1], {"id": name, "rid": "anew"})


def test_a_name_is_given_once(http, server):
    """Otherwise what goes on from the older one keeps it, and nobody counts it."""
    name, other, streaming = open_session(http), open_session(http), open_session(http, streaming=True)
    first = generate(http, CHUNKS[0], {"id": name}, rid="a")
    for params in ({}, {"rid": "a"}, {"rid": "a", "replace": True}):
        refused(send(http, CHUNKS[1], {"id": name} | params, rid="a"), "has a request 'a'")
    generate(http, CHUNKS[1], {"id": name, "rid": "a"}, rid="b")
    refused(send(http, CHUNKS[1], {"id": name, "rid": "a"}, rid="b"), "has a request 'b'")
    again = generate(http, CHUNKS[2], {"id": name, "rid": "a", "replace": True}, rid="b")
    assert logprobs(again) == logprobs(generate(http, CHUNKS[0] + first["output_ids"] + CHUNKS[2]))
    assert {*opened(server)[name].turns} == {"a", "b"}
    generate(http, CHUNKS[1], {"id": name, "replace": True}, rid="b")
    assert {*opened(server)[name].turns} == {"b"}
    generate(http, CHUNKS[0], {"id": other}, rid="b")
    generate(http, CHUNKS[0], {"id": streaming}, rid="b")
    refused(send(http, CHUNKS[1], {"id": streaming}, rid="b"), "has a request 'b'")
    for rid in ("a", "b"):
        generate(http, CHUNKS[1], {"id": streaming}, rid=rid)


def test_two_that_come_at_a_time_have_two_names():
    async def both():
        kept, params = Sessions(None), SessionParams(id="s")
        kept.open_ones["s"] = Session(streaming=False, timeout=None)
        async with kept.turn(params) as first:
            first.watch(Request("x", [3], SamplingParams()))
            with pytest.raises(RequestError, match="has a request 'x'"):
                async with kept.turn(params) as second:
                    second.watch(Request("x", [3], SamplingParams()))
        assert kept.open_ones["s"].turns == {"x": first}

    asyncio.run(both())


def running(http, server, session, slow=0.003, **more):
    """A long request that has sampled something; what it sends, in a thread."""
    events = []

    def read():
        params = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
        body = {"input_ids": CHUNKS[0], "sampling_params": params, "stream": True, "session_params": session}
        with http.stream("POST", "/generate", json=body | more) as response:
            events.extend(line[6:] for line in response.iter_lines() if line.startswith("data: {"))

    server.slow_down(slow)
    thread = threading.Thread(target=read)
    thread.start()
    wait(lambda: any(len(r.logprobs) > 3 for r in list(server.engine.scheduler.running.values())))
    return thread, events


def test_replace_ends_a_request_that_runs(http, server):
    """SGLang's backtrack with abort: the first one ends with what it has, the second goes on from some of it."""
    name = open_session(http)
    thread, events = running(http, server, {"id": name, "offset": -1, "replace": True}, slow=0.03, rid="long")
    refused(send(http, CHUNKS[1], {"id": name, "rid": "long"}), "not finished")
    replace = {"id": name, "rid": "long", "replace": True}
    for ids, more, says in (([3] * 300, {}, "up to 256"), ([10**9], {}, "outside"), ([[3], [4]], {}, "one prompt"),
                            ([3], {"rid": "long"}, "has a request"), ([3], {"lora_path": "x"}, "adapter"),
                            ([3], {"sampling_params": {"top_p": 9}}, "top_p")):  # fmt: skip
        refused(send(http, ids, replace, **more), says)
    assert "long" in server.engine.scheduler.running, "what is refused ends nothing"
    second = generate(http, CHUNKS[1], {"id": name, "rid": "long", "offset": 10, "replace": True})
    thread.join(30)
    last = json.loads(events[-1])
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    whole = (CHUNKS[0] + last["output_ids"])[:10] + CHUNKS[1]
    assert logprobs(second) == logprobs(generate(http, whole))


@pytest.mark.parametrize("why", ["queue", "name"])
def test_one_that_cannot_come_now_replaces_nothing(http, server, monkeypatch, why):
    """A full queue, or a name that somebody else's request has, refuses it first; a moment later it is served."""
    scheduler, name = server.engine.scheduler, open_session(http)
    thread, events = running(http, server, {"id": name}, slow=0.03, rid="long")
    other = {"temperature": 0, "max_new_tokens": 240, "ignore_eos": True}
    body = {"input_ids": CHUNKS[0], "sampling_params": other | {"n": 4}, "rid": "others", "stream": True}
    replace = {"id": name, "rid": "long", "offset": 10, "replace": True}
    with http.stream("POST", "/generate", json=body) as others:  # one of the five waits
        others.raise_for_status()
        wait(lambda: len(scheduler.waiting) == 1)
        if why == "queue":
            with monkeypatch.context() as patch:
                patch.setattr(scheduler, "max_queue", 1)
                refused(send(http, CHUNKS[1], replace), "queue", 429)
        else:
            refused(send(http, CHUNKS[1], replace, rid="others_0_3"), "in use")
        assert "long" in scheduler.running and not any(e for e in events if '"abort"' in e)
        assert {*opened(server)[name].turns} == {"long"}
        http.post("/abort_request", json={"rid": "others"})
    second = generate(http, CHUNKS[1], replace)
    thread.join(30)
    last = json.loads(events[-1])
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert logprobs(second) == logprobs(generate(http, (CHUNKS[0] + last["output_ids"])[:10] + CHUNKS[1]))


def test_replace_ends_what_comes_behind_too(http, server):
    name = open_session(http)
    generate(http, CHUNKS[1], {"id": name}, rid="root")
    thread, events = running(http, server, {"id": name, "rid": "root"}, rid="behind")
    generate(http, CHUNKS[2], {"id": name, "rid": "root", "replace": True})
    thread.join(30)
    assert json.loads(events[-1])["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_streaming_session_goes_on_from_what_was_not_aborted(http, server):
    name = open_session(http, streaming=True, capacity_of_str_len=0)
    whole = []
    for chunk in CHUNKS[:2]:
        answer = generate(http, chunk, {"id": name, "rid": "anything"})
        plain = generate(http, whole + chunk)
        assert logprobs(answer) == logprobs(plain)
        whole += chunk + plain["output_ids"]
    thread, _ = running(http, server, {"id": name}, rid="long")
    refused(send(http, CHUNKS[2], {"id": name}), "one request at a time")
    http.post("/abort_request", json={"rid": "long"})
    thread.join(30)
    assert logprobs(generate(http, CHUNKS[2], {"id": name})) == logprobs(generate(http, whole + CHUNKS[2]))
    for field, value in (("replace", True), ("offset", 3), ("drop_previous_output", True)):
        refused(send(http, CHUNKS[2], {"id": name, field: value}), field)
    assert len(opened(server)[name].turns) <= 2


def test_texts_are_gone_on_from_as_their_tokens_are(http, talking):
    name, tok = open_session(http), talking[1]
    params = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    body = {"sampling_params": params, "session_params": {"id": name}}
    first = http.post("/generate", json=body | {"text": "hello", "rid": "a"}).json()
    second = http.post(
        "/generate", json=body | {"text": " list", "session_params": {"id": name, "rid": "a"}}
    ).json()
    ids = tok.encode("hello") + first["output_ids"] + tok.encode(" list")
    assert second["output_ids"] == generate(http, ids, room=3)["output_ids"]


def test_one_that_is_refused_makes_nothing_forgotten(http):
    name = open_session(http)
    generate(http, CHUNKS[0], {"id": name}, rid="root")
    generate(http, CHUNKS[1], {"id": name, "rid": "root"}, rid="leaf")
    replace = {"id": name, "rid": "root", "replace": True}
    refused(send(http, [3] * 300, replace), "up to 256")
    refused(send(http, [10**9], replace), "outside")
    refused(send(http, [[3], [4]], replace), "one prompt")
    refused(send(http, [3], replace, sampling_params={"n": 2}), "n = 1")
    refused(send(http, [3], {"id": name, "rid": "root", "offset": "x"}), "offset")
    refused(send(http, [3], "x"), "session_params")
    refused(http.post("/open_session", json={"session_id": "a", "timeout": -1}), "timeout")
    generate(http, CHUNKS[2], {"id": name, "rid": "leaf"})


def test_nothing_is_kept_without_bound(http, server, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 3)
    monkeypatch.setattr(sessions, "MAX_TURNS", 4)
    names = [open_session(http) for _ in range(3)]
    refused(http.post("/open_session", json={"capacity_of_str_len": 1}), "3 sessions are open", 429)
    for number in range(4):
        generate(http, CHUNKS[0], {"id": names[number % 2]})
    refused(send(http, CHUNKS[0], {"id": names[2]}), "4 requests", 429)
    for name in names:
        assert http.post("/close_session", json={"session_id": name}).status_code == 200
    server.server.service.worker.call(lambda s: None).result(30)  # the last one to have called
    gc.collect()
    assert not opened(server) and not [thing for thing in gc.get_objects() if type(thing) is Turn]


def test_a_session_with_a_timeout_closes_itself(http, server):
    brief, lasting = open_session(http, timeout=0.3), open_session(http)
    generate(http, CHUNKS[0], {"id": brief})
    time.sleep(0.4)
    refused(send(http, CHUNKS[0], {"id": brief}), "no session")
    assert list(opened(server)) == [lasting]
