"""What was chosen, and what could have been, as SGLang, vLLM, prime-rl and slime write it: routed experts and indexer
sets (see `trace`), and the tokens that truncation left to draw from.

SGLang: base64 of int32 [rows, layers * k]. vLLM: base64 of an .npy file [rows, layers, k]. prime-rl ("compact"):
base64 of the smallest unsigned integers that hold them, with their shape. Rows are the positions from the asked-for
start to the last token but one, the last that was computed. Where one of them never was (an aborted request), nothing
is told.
"""

import base64
import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from fullarc.engine.request import Request
from fullarc.engine.trace import Choices

Form = Literal["npy", "compact"]
MaskMode = Literal["selected", "support"]


class ExpertsBody(BaseModel):
    """What vLLM's routes add. Its own servers decide by a flag alone; here the flag is the default."""

    return_routed_experts: bool | Form | None = None

    def form(self, default: Form | None) -> Form | None:
        """How the experts are to be told; None = not at all."""
        asked = self.return_routed_experts
        return default if asked is None else (default or "npy") if asked is True else asked or None


def collector(start: int, experts: bool, keys: bool = False) -> Callable[[], Choices | None]:
    """Makes what each sample of a prompt collects its choices in; experts are told from position `start` on."""
    return lambda: Choices(start if experts else None, keys) if experts or keys else None


def sglang_choices(request: Request) -> dict[str, Any]:
    """The fields of SGLang's `meta_info`."""
    read = request.choices.read(len(request.ids) - 1) if request.choices else None
    if not request.choices or read is None:
        return {}
    told: dict[str, Any] = {}
    if read.experts_NLK is not None:
        told["routed_experts"] = _packed(read.experts_NLK)
        told["routed_experts_start_len"] = request.choices.experts_from
    if read.keys_NLS is not None:
        told["indexer_topk"] = _packed(read.keys_NLS)
    return told


def vllm_choices(request: Request, form: Form | None) -> dict[str, Any]:
    """The field of vLLM's choice; none if it was not asked for."""
    if form is None or request.choices is None:
        return {}
    read = request.choices.read(len(request.ids) - 1)
    if read is None or read.experts_NLK is None:
        return {"routed_experts": None}
    experts = read.experts_NLK.numpy()
    if form == "compact":
        small = experts.astype(np.uint8 if experts.max(initial=0) < 256 else np.uint16)
        told = {"data": _base64(small.tobytes()), "shape": list(small.shape), "start": request.choices.experts_from,
                "dtype": small.dtype.name}  # fmt: skip
        return {"routed_experts": told}
    file = io.BytesIO()
    np.save(file, experts, allow_pickle=False)
    return {"routed_experts": _base64(file.getvalue())}


def sglang_support(request: Request, count: int, mode: MaskMode) -> dict[str, Any]:
    """The tokens that could be drawn at each of `count` output tokens, and the log-probs of the draw."""
    rows = request.supports[:count]
    output = request.ids[len(request.prompt) :]
    if mode == "support":
        values: list[Any] = [[value for value, _ in row] for row in rows]
    else:
        values = [
            next((v for v, t in row if t == token), None) for row, token in zip(rows, output, strict=False)
        ]
    ids = [[token for _, token in row] for row in rows]
    return {"output_token_sampling_mask": ids, "output_token_sampling_mask_length": len(ids),
            "output_token_sampling_logprobs": values}  # fmt: skip


def slime_support(request: Request) -> dict[str, Any]:
    """The same ids as slime's SGLang tells them: one run of int32 and where each token's own begin."""
    ids = [token for row in request.supports for _, token in row]
    offsets = np.cumsum([0, *map(len, request.supports)], dtype=np.int32)
    return {"top_p_token_ids": _base64(np.array(ids, np.int32).tobytes()),
            "top_p_token_offsets": _base64(offsets.tobytes())}  # fmt: skip


def _packed(rows: Tensor) -> str:
    return _base64(rows.numpy().tobytes())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
