"""A tiny tokenizer, a scripted engine behind a real socket, and a gateway in-process."""

import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fullarc.agent.tools import SHELL_TOOL
from fullarc.chat import Tokenizer
from fullarc.rollout.engine_client import EngineClient
from fullarc.rollout.fake import FakeEngine
from fullarc.rollout.gateway import Gateway

sys.path.insert(0, str(Path(__file__).parent))  # replies.py
from replies import Say, random_reply

WORDS = "the file holds a number so list it then print hello done 12 30 ls cat a.txt echo"


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return Tokenizer.train([WORDS * 4, str(SHELL_TOOL) * 3], 400)


@pytest.fixture(scope="session")
def say(tok: Tokenizer) -> Say:
    """Ids of a reply from text in which names of special tokens are special."""

    def build(text: str, stop: str = "<|user|>") -> list[int]:
        ids: list[int] = []
        text += stop
        while text:
            found = [(text.find(n), n) for n in map(tok.name, tok.special_ids) if n and n in text]
            at, name = min(found, default=(len(text), ""))
            ids += tok.encode(text[:at]) + ([tok.id(name)] if name else [])
            text = text[at + len(name) :]
        return ids

    return build


@pytest.fixture
def engine(say: Say, tok: Tokenizer) -> FakeEngine:
    """Its replies are a function of the prompt and the seed."""

    def script(prompt: list[int], params: dict[str, Any]) -> list[int]:
        return random_reply(say, random.Random(f"{prompt}{params.get('sampling_seed')}"), tok)

    return FakeEngine(script, tok.stop_ids)


@pytest.fixture
async def gateway(engine: FakeEngine, tok: Tokenizer) -> AsyncIterator[Gateway]:
    async with EngineClient("http://engine", transport=httpx.ASGITransport(engine.app)) as client:
        yield Gateway(client, tok)


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(gateway.app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
