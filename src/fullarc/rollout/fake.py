"""An engine without a model that speaks SGLang's dialect: for tests, and for trying a gateway or an agent alone.

What it samples is a pure function of the prompt ids and the sampling parameters, so that a run on it is exactly
repeatable whatever the timing; the log-probs are a hash of (prompt, position, token, weight version).
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Script = Callable[[list[int], dict[str, Any]], list[int]]


class FakeEngine:
    """`script(prompt_ids, sampling_params) -> ids` decides what is sampled (cut at max_new_tokens).

    Attributes:
        prompts: every prompt served, in order.  version: the weight version.  paused: between pause and continue.
        delay: seconds before an answer, or a function of the prompt.  aborts: how many of the next requests end
        after half of their tokens with finish "abort".  fail: status codes of the next answers (429 says to wait 7 s).
    """

    def __init__(self, script: Script, stop_ids: tuple[int, ...]) -> None:
        self.script = script
        self.stop_ids = stop_ids
        self.prompts: list[list[int]] = []
        self.version = 0
        self.paused = False
        self.delay: Callable[[list[int]], float] = lambda prompt: 0.0
        self.aborts = 0
        self.fail: list[int] = []
        self.app = Starlette(
            routes=[
                Route("/generate", self._generate, methods=["POST"]),
                Route("/update_weights_from_disk", self._update, methods=["POST"]),
                Route("/pause_generation", self._pause, methods=["POST"]),
                Route("/continue_generation", self._continue, methods=["POST"]),
                Route("/health", self._health),
                Route("/model_info", self._info),
            ]
        )

    def logprob(self, prompt: list[int], position: int, token: int) -> float:
        """The log-prob that this engine reports."""
        text = f"{prompt}{position}{token}{self.version}".encode()
        return -int.from_bytes(hashlib.sha256(text).digest()[:4], "big") / 2**32

    def sample(self, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
        """SGLang's answer for one prompt."""
        self.prompts.append(prompt)
        ids = self.script(prompt, params)[: params["max_new_tokens"]]
        finish = "stop" if ids and ids[-1] in self.stop_ids else "length"
        if self.aborts and len(ids) > 1:
            self.aborts -= 1
            ids, finish = ids[: len(ids) // 2], "abort"
        return self.answer(prompt, ids, finish)

    def answer(self, prompt: list[int], ids: list[int], finish: str) -> dict[str, Any]:
        """SGLang's reply object; finish "" = still running."""
        pairs = [[self.logprob(prompt, i, token), token, None] for i, token in enumerate(ids)]
        meta = {
            "id": "0",
            "finish_reason": {"type": finish} if finish else None,
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "cached_tokens": 0,
            "weight_version": str(self.version),
            "output_token_logprobs": pairs,
        }
        return {"text": "", "output_ids": ids, "meta_info": meta}

    async def _generate(self, http: Request) -> Response:
        body = await http.json()
        prompts = body["input_ids"]
        batched = bool(prompts) and isinstance(prompts[0], list)
        prompts = prompts if batched else [prompts]
        await asyncio.sleep(max(self.delay(prompt) for prompt in prompts))
        if self.fail:
            status = self.fail.pop(0)
            headers = {"Retry-After": "7"} if status == 429 else {}
            return JSONResponse({"error": "told to fail"}, status, headers)
        if body.get("logprob_start_len") == 0:
            scores = [
                [[None if i == 0 else self.logprob(p[:i], 0, t), t, None] for i, t in enumerate(p)]
                for p in prompts
            ]
            return JSONResponse(
                [{"output_ids": [], "meta_info": {"input_token_logprobs": s}} for s in scores]
            )
        params = body["sampling_params"]
        per_prompt = params if isinstance(params, list) else [params] * len(prompts)
        answers = [
            self.sample(p, s) for p, s in zip(prompts, per_prompt, strict=True) for _ in range(s.get("n", 1))
        ]
        if body.get("stream"):
            return StreamingResponse(self._events(prompts[0], answers[0]), media_type="text/event-stream")
        return JSONResponse(answers if batched or len(answers) > 1 else answers[0])

    async def _events(self, prompt: list[int], final: dict[str, Any]) -> AsyncIterator[str]:
        for end in range(1, len(final["output_ids"])):
            yield f"data: {json.dumps(self.answer(prompt, final['output_ids'][:end], ''))}\n\n"
        yield f"data: {json.dumps(final)}\n\ndata: [DONE]\n\n"

    async def _update(self, http: Request) -> Response:
        self.version = int((await http.json())["weight_version"])
        return JSONResponse({"success": True, "message": "", "num_paused_requests": 0})

    async def _pause(self, http: Request) -> Response:
        self.paused = True
        return JSONResponse({})

    async def _continue(self, http: Request) -> Response:
        self.paused = False
        return JSONResponse({})

    async def _health(self, http: Request) -> Response:
        return Response()

    async def _info(self, http: Request) -> Response:
        return JSONResponse({"weight_version": str(self.version)})
