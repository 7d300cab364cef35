"""Two engines as one: who is asked, and that both know what changes an engine."""

import asyncio
import json
from pathlib import Path

import pytest

from fullarc.chat import Tokenizer
from fullarc.rollout.engine_client import EngineError, Sampling
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.merged import merged
from fullarc.rollout.replicas import Replicas
from fullarc.rollout.serve import EngineProcess, _missed, serving


@pytest.fixture
def two(engine: FakeEngine, tok: Tokenizer) -> list[FakeEngine]:
    return [FakeEngine(engine.script, tok.stop_ids) for _ in range(2)]


async def test_requests_are_shared_out_and_the_answer_does_not_depend_on_who_gave_it(
    two: list[FakeEngine], engine: FakeEngine
) -> None:
    with serving(two[0].app) as first, serving(two[1].app) as second, serving(engine.app) as alone:
        async with Replicas([first, second]) as both, Replicas([alone]) as single:
            asked = [([1, n], Sampling(seed=n)) for n in range(8)]
            got = await asyncio.gather(*(both.generate_batch([p], [s]) for p, s in asked))
            assert got == [await single.generate_batch([p], [s]) for p, s in asked]
            assert [len(e.prompts) for e in two] == [4, 4]
            assert [c async for c in both.stream([1, 2], Sampling(seed=1))][-1].finish == "stop"


async def test_a_session_stays_where_its_prefix_is(two: list[FakeEngine]) -> None:
    with serving(two[0].app) as first, serving(two[1].app) as second:
        async with Replicas([first, second]) as both:
            for session in ("a", "b", "c", "d", "e"):
                before = [len(e.prompts) for e in two]
                await asyncio.gather(*(both.generate([3], Sampling(seed=n), session) for n in range(4)))
                after = [len(e.prompts) for e in two]
                assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 4]
            assert all(len(e.prompts) for e in two), "not every session went to one engine"


async def test_weights_and_pauses_reach_all_and_one_that_is_gone_is_an_error(two: list[FakeEngine]) -> None:
    with serving(two[0].app) as first, serving(two[1].app) as second:
        async with Replicas([first, second], retries=0) as both:
            await both.update_weights("/somewhere", 5)
            await both.pause()
            assert [(e.version, e.paused) for e in two] == [(5, True), (5, True)]
            await both.resume()
            assert not any(e.paused for e in two) and await both.health()
        async with Replicas([first, "http://127.0.0.1:9"], retries=0) as half:
            with pytest.raises(EngineError, match="No engine answers"):
                await half.update_weights("/elsewhere", 6)
            assert not await half.health()


async def test_only_an_engine_in_use_is_missed_when_it_ends() -> None:
    class Ended(EngineProcess):
        def dead(self) -> bool:
            return True

    process = Ended(Path("model"), 64)
    process.told = {"port": 9}
    async with Replicas([process.url, "http://127.0.0.1:10"]) as both:
        used = both.engines
        assert _missed(process, used)
        await both.remove(used[0])
        assert not _missed(process, used) and both.url == "http://127.0.0.1:10"


def test_of_what_is_not_understood_the_first_answer_is_given() -> None:
    assert merged("/get_load", [b"busy", b"[]"]) == b"busy" and merged("/v1/loads", [b"{}", b"{}"]) == b"{}"
    loads = [b'{"server_load": 2}', b'{"server_load": 3}']
    assert json.loads(merged("/load", loads)) == {"server_load": 5}
