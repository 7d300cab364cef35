"""The SGLang dialect, failures and retries."""

import asyncio

import httpcore
import httpx
import pytest
from replies import Say

from fullarc.rollout.engine_client import Completion, EngineClient, EngineError, Sampling
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.serve import serving


async def test_generate_batch_and_n_carry_ids_logprobs_and_version(engine: FakeEngine) -> None:
    engine.version = 3
    with serving(engine.app) as url:
        async with EngineClient(url) as client:
            one = (await client.generate([1, 2], Sampling(seed=1)))[0]
            two = await client.generate([1, 2], Sampling(seed=1), n=2)
            batch = await client.generate_batch([[1, 2], [3]], [Sampling(seed=1), Sampling(seed=2)])
            assert await client.generate_batch([], []) == []
            assert two == [one, one] and batch[0] == one
            assert batch[1].logprobs == [engine.logprob([3], i, t) for i, t in enumerate(batch[1].token_ids)]
            assert set(one.versions) == {3} and len(one.versions) == len(one.token_ids) > 0
            streamed = [c async for c in client.stream([1, 2], Sampling(seed=1))]
            assert streamed[-1] == one and [len(c.token_ids) for c in streamed] == list(
                range(1, len(one.token_ids) + 1)
            )


async def test_many_requests_in_flight_do_not_make_each_of_them_dear(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, original = 0, httpcore.AsyncHTTPConnection.is_idle

    def is_idle(connection: httpcore.AsyncHTTPConnection) -> bool:
        nonlocal looks
        looks += 1
        return original(connection)

    monkeypatch.setattr(httpcore.AsyncHTTPConnection, "is_idle", is_idle)
    with serving(engine.app) as url:
        async with EngineClient(url) as client:
            for _ in range(3):
                await asyncio.gather(*(client.generate([1, 2], Sampling(seed=1)) for _ in range(64)))
    assert looks < 3 * 64 * 64


async def test_score_and_control(engine: FakeEngine) -> None:
    async with EngineClient("http://e", transport=httpx.ASGITransport(engine.app)) as client:
        scores = await client.score([[5, 6, 7], [8]])
        assert scores == [[0.0, engine.logprob([5], 0, 6), engine.logprob([5, 6], 0, 7)], [0.0]]
        await client.update_weights("/somewhere", 7)
        await client.pause()
        assert engine.paused and await client.info() == {"weight_version": "7"}
        await client.resume()
        assert not engine.paused and await client.health()


async def test_an_aborted_reply_is_continued_with_the_versions_of_its_parts(
    engine: FakeEngine, say: Say
) -> None:
    whole = say("list it then</think>done")
    head: list[int] = [1, 2]

    def script(prompt: list[int], params: dict[str, object]) -> list[int]:
        engine.version += 1
        return whole[len(prompt) - len(head) :]

    engine.script, engine.aborts = script, 1
    async with EngineClient("http://e", transport=httpx.ASGITransport(engine.app)) as client:
        sampling = Sampling(50)
        done = await client.finish(head, sampling, (await client.generate(head, sampling))[0])
    assert done.token_ids == whole and done.finish == "stop"
    cut = len(whole) // 2
    assert done.versions == [1] * cut + [2] * (len(whole) - cut)


def test_version_spans_of_a_reply_that_met_a_weight_update() -> None:
    from fullarc.rollout.engine_client import _completion

    meta = {"output_token_logprobs": [[-1.0, t, None] for t in (4, 5, 6)], "weight_version": "2",
            "weight_versions": [["1", 0, 2], ["2", 2, 3]], "finish_reason": {"type": "stop"}}  # fmt: skip
    assert _completion({"output_ids": [4, 5, 6], "meta_info": meta}) == Completion(
        [4, 5, 6], [-1.0] * 3, [1, 1, 2], "stop"
    )


class Flaky(httpx.AsyncBaseTransport):
    """Refuses the first connections."""

    def __init__(self, engine: FakeEngine, refusals: int) -> None:
        self.inner = httpx.ASGITransport(engine.app)
        self.refusals = refusals

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.refusals -= 1
        if self.refusals >= 0:
            raise httpx.ConnectError("refused")
        return await self.inner.handle_async_request(request)


async def test_connections_are_retried_a_bounded_number_of_times(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fullarc.rollout.engine_client.BACKOFF_S", (0.0,))
    async with EngineClient("http://e", retries=2, transport=Flaky(engine, 2)) as client:
        assert (await client.generate([1], Sampling()))[0].token_ids
    async with EngineClient("http://e", retries=2, transport=Flaky(engine, 3)) as client:
        with pytest.raises(EngineError) as caught:
            await client.generate([1], Sampling())
    assert caught.value.kind == "unreachable"


async def test_errors_have_kinds(engine: FakeEngine) -> None:
    with serving(engine.app) as url:
        async with EngineClient(url, timeout_s=0.05) as client:
            for status, kind in ((400, "rejected"), (500, "failed")):
                engine.fail = [status]
                with pytest.raises(EngineError) as caught:
                    await client.generate([1], Sampling())
                assert caught.value.kind == kind
            engine.delay = lambda prompt: 0.3
            with pytest.raises(EngineError) as caught:
                await client.generate([1], Sampling())
            assert caught.value.kind == "timeout"
            with pytest.raises(EngineError) as caught:
                _ = [c async for c in client.stream([1], Sampling())]
            assert caught.value.kind == "timeout"


async def test_a_stream_that_fails_says_what_failed() -> None:
    """A refusal stays one, and a wrong number of log-probs, though all of them are ValueErrors."""
    meta = {"output_token_logprobs": [[-1.0, 4, None]], "finish_reason": {"type": "stop"}}
    answers = [
        (httpx.Response(400, json={"error": {"message": "no"}}), "rejected", "http://e answered 400"),
        (
            httpx.Response(200, json={"output_ids": [4, 5], "meta_info": meta}),
            "protocol",
            "different number of tokens",
        ),
        (httpx.Response(200, json={"output_ids": [4]}), "protocol", "is not SGLang's"),
        (httpx.Response(200, text="{"), "protocol", "not JSON"),
    ]
    for response, kind, message in answers:
        transport = httpx.MockTransport(lambda _, response=response: response)
        async with EngineClient("http://e", transport=transport) as client:
            with pytest.raises(EngineError, match=message) as caught:
                _ = [done async for done in client.stream([1], Sampling())]
        assert caught.value.kind == kind and "SGLang's: EngineError" not in str(caught.value)
