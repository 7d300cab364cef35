"""Tokens in, numbers out: probabilities of labels (POST /v1/score) and embeddings (POST /v1/embeddings, /encode).

An embedding is the last hidden state of the sequence's last token, after the final norm. POST /classify, which asks
reward models for the output of a classification head, is refused: no model here has one.
"""

import base64
import math
import struct
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fullarc.engine.api.fields import AskedIds, Ids, SamplingBody, build, fits
from fullarc.engine.api.guard import Endpoint, answer, aside, read_body
from fullarc.engine.api.service import Service
from fullarc.engine.api.whose import WhoseBody, assign
from fullarc.engine.request import Request, RequestError


class ScoreBody(BaseModel):
    """POST /v1/score: the log-probs of `label_token_ids` behind query + item, for each item."""

    model_config = ConfigDict(extra="ignore")

    query: str | Ids
    items: str | list[str] | list[Ids]
    label_token_ids: AskedIds = Field(min_length=1)
    apply_softmax: bool = False
    item_first: bool = False
    model: str | None = None


class EmbeddingsBody(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="ignore")

    input: str | list[str] | Ids | list[Ids]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    truncate_prompt_tokens: None = None


class EncodeBody(BaseModel):
    """POST /encode, SGLang's form."""

    model_config = ConfigDict(extra="ignore")

    text: str | list[str] | None = None
    input_ids: Ids | list[Ids] | None = None


class Scores:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def endpoints(self) -> list[Endpoint]:
        """The routes."""
        return [
            Endpoint("/v1/score", self.score, body=ScoreBody),
            Endpoint("/v1/embeddings", self.embeddings, body=EmbeddingsBody),
            Endpoint("/encode", self.encode, body=EncodeBody),
            Endpoint("/classify", self.classify),
        ]

    async def score(self, http: HttpRequest) -> Response:
        """How likely are some tokens behind each item?"""
        body = await read_body(http, ScoreBody)
        prompts = await aside(http, lambda: self._pairs(body))
        wire = SamplingBody(max_new_tokens=1, temperature=0.0, ignore_eos=True)
        name = self.service.next_id("score")
        fits(self.service, len(prompts))
        requests = [
            build(self.service, prompt, wire, [f"{name}-{n}"], logprob_ids=body.label_token_ids)[0]
            for n, prompt in enumerate(prompts)
        ]
        assign(self.service, http, WhoseBody(model=body.model), requests)
        if requests:
            await self.service.answer(http, requests)
        if any(request.finish == "abort" for request in requests):
            raise RequestError("The scoring was aborted.", "Send it again.")
        rows = [[math.exp(value) for value, _ in request.ids_logprobs[0]] for request in requests]
        if body.apply_softmax:
            rows = [[value / (sum(row) or 1.0) for value in row] for row in rows]
        used = sum(map(len, prompts))
        return answer({"object": "scoring", "scores": rows, "model": self.service.name,
                       "usage": {"prompt_tokens": used, "total_tokens": used}})  # fmt: skip

    def _pairs(self, body: ScoreBody) -> list[list[int]]:
        encode = self._encode
        items = [body.items] if isinstance(body.items, str) else body.items
        query = encode(body.query)
        return [encode(item) + query if body.item_first else query + encode(item) for item in items]

    def _encode(self, text: Any) -> list[int]:
        return self.service.encode(text) if isinstance(text, str) else list(text)

    async def embeddings(self, http: HttpRequest) -> Response:
        """Embed one or many texts or token lists."""
        body = await read_body(http, EmbeddingsBody)
        prompts = await aside(http, lambda: self._prompts(body.input))
        requests = await self._embed(http, prompts, body.model)
        data = []
        for index, request in enumerate(requests):
            vector: Any = request.hidden
            if body.encoding_format == "base64":
                vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        used = sum(len(request.prompt) for request in requests)
        usage = {"prompt_tokens": used, "total_tokens": used}
        return answer({"object": "list", "data": data, "model": self.service.name, "usage": usage})

    async def encode(self, http: HttpRequest) -> Response:
        """Embed, in SGLang's form."""
        body = await read_body(http, EncodeBody)
        given: Any = body.text if body.text is not None else body.input_ids
        if given is None:
            raise RequestError("Give either input_ids or text.")
        prompts = await aside(http, lambda: self._prompts(given))
        answers = [
            {
                "embedding": request.hidden,
                "meta_info": {
                    "id": request.rid,
                    "prompt_tokens": len(request.prompt),
                    "weight_version": request.weight_version,
                },
            }
            for request in await self._embed(http, prompts)
        ]
        single = isinstance(given, str) or not isinstance(given[0], (list, str))
        return answer(answers[0] if single else answers)

    async def classify(self, _http: HttpRequest) -> Response:
        """There is nothing that could be told."""
        raise RequestError(
            "This model has no classification head.", "POST /v1/score gives the probabilities of labels."
        )

    def _prompts(self, given: Any) -> list[list[int]]:
        if not given:
            raise RequestError("The input is empty.", "Send at least one token.")
        several = isinstance(given, list) and isinstance(given[0], (list, str))
        return [self._encode(one) for one in (given if several else [given])]

    async def _embed(
        self, http: HttpRequest, prompts: list[list[int]], model: str | None = None
    ) -> list[Request]:
        fits(self.service, len(prompts))
        wire, name = SamplingBody(max_new_tokens=0), self.service.next_id("embd")
        requests = [
            build(self.service, prompt, wire, [f"{name}-{n}"], wants_hidden=True)[0]
            for n, prompt in enumerate(prompts)
        ]
        assign(self.service, http, WhoseBody(model=model), requests)
        await self.service.answer(http, requests)
        if any(request.hidden is None for request in requests):
            raise RequestError("The embedding was aborted.", "Send it again.")
        return requests
