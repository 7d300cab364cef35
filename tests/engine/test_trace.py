"""Chosen experts and keys as they are returned, against the trainer's routers and `stable_topk` of its index scores."""

import base64
import concurrent.futures
import io

import numpy as np
import pytest
import torch
from running import Running, wait

from fullarc.engine import Engine
from fullarc.engine.request import Request, RequestError
from fullarc.engine.sampling import SamplingParams
from fullarc.engine.trace import Choices
from fullarc.model.mla import MLA
from fullarc.model.moe import Router
from fullarc.model.ops import stable_topk

IDS = [int(t) for t in torch.randint(1, 90, (100,), generator=torch.Generator().manual_seed(5))]


def trainers(model, ids):
    """Experts [T, L, K] and keys [T, L, topk] that the trainer's model chooses, in the form that is returned."""
    c = model.config
    experts = np.zeros((len(ids), c.num_hidden_layers, c.num_experts_per_tok), np.int32)
    keys = np.full((len(ids), c.num_hidden_layers, c.index_topk), -1, np.int32)
    hooks = []

    def on_router(layer):
        def hook(_module, _inputs, outputs):
            experts[:, layer] = outputs[1]

        return hook

    def on_attention(layer):
        def hook(module: MLA, inputs):
            h, seen = inputs[0], inputs[1]
            q_latent, _, _ = module.queries(h, seen.cos, seen.sin)
            index = module.indexer
            scores = index.scores(
                index.queries(q_latent, seen.cos, seen.sin),
                index.keys(h, seen.cos, seen.sin),
                index.head_weights(h),
            )[0]
            for t in range(len(ids)):
                chosen = stable_topk(scores[t, : t + 1], c.index_topk)
                keys[t, layer, : len(chosen)] = chosen

        return hook

    for layer, block in enumerate(model.layers):
        router = next((m for m in block.modules() if isinstance(m, Router)), None)
        attention = next(m for m in block.modules() if isinstance(m, MLA))
        if router:
            hooks.append(router.register_forward_hook(on_router(layer)))
        if attention.indexer:
            hooks.append(attention.register_forward_pre_hook(on_attention(layer)))
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    for layer in range(c.num_hidden_layers):  # shared indexers
        if not c.has_indexer(layer):
            keys[:, layer] = keys[:, layer - 1]
    return experts, keys


def run(engine, prompt, count, choices, **params):
    """One request to its end."""
    request = Request("r", prompt, SamplingParams(max_new_tokens=count, **params), choices=choices)
    engine.scheduler.check(request)
    engine.scheduler.submit(request)
    while not engine.scheduler.idle:
        engine.scheduler.step()
    return request


@pytest.mark.parametrize("drafts", [0, 3])
def test_choices_are_the_trainers(shaped, drafts, kernels):
    """Prefilled in chunks, decoded one by one or with drafts of which some are wrong, below and beyond the top-k."""
    model, folder = shaped
    dense = model.config.dense_attention
    engine = Engine(folder, max_batch=2, max_len=256, chunk_tokens=48, draft_steps=drafts, kernels=kernels)
    choices = Choices(0, keys=not dense)
    request = run(engine, IDS, 30, choices, seed=3)
    read = choices.read(len(request.ids) - 1)
    experts, keys = trainers(model, request.ids[:-1])
    assert np.array_equal(read.experts_NLK.numpy(), experts) and read.experts_NLK.dtype == torch.int32
    assert read.keys_NLS is None if dense else np.array_equal(read.keys_NLS.numpy(), keys)


def test_a_model_without_an_indexer_says_so(shaped):
    model, folder = shaped
    if model.config.dense_attention:
        with pytest.raises(RequestError, match="no indexer"):
            run(Engine(folder, max_batch=1, max_len=256), IDS, 1, Choices(None, keys=True))


def test_cached_prefixes_are_used_only_before_what_is_asked_for(shaped):
    model, folder = shaped
    engine = Engine(folder, max_batch=2, max_len=256)
    engine.generate([IDS], 5, seed=1, stop_ids=())
    whole, part, plain = Choices(0), Choices(64), None
    cached = []
    for choices in (whole, part, plain):
        cached.append(run(engine, IDS, 5, choices, seed=3).cached_tokens)
    assert cached[0] == 0 < cached[1] <= 64 < cached[2]
    everything, some = whole.read(104), part.read(104)
    assert torch.equal(everything.experts_NLK[64:], some.experts_NLK)
    assert Choices(0).read(5) is None


# --- over HTTP ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(talking):
    running = Running(talking[0])
    yield running
    running.stop()


def ints(text):
    return np.frombuffer(base64.b64decode(text), np.int32)


def generate(http, **body):
    params = {"max_new_tokens": 9, "ignore_eos": True, "sampling_seed": 1}
    answer = http.post("/generate", json={"input_ids": IDS, "sampling_params": params} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_sglangs_fields(http, talking):
    from fullarc.model import load_model

    model = load_model(talking[0])
    answer = generate(http, return_routed_experts=True, return_indexer_topk=True)
    experts, keys = trainers(model, IDS + answer["output_ids"][:-1])
    meta = answer["meta_info"]
    # AReaL: reshape(prompt_tokens + completion_tokens - 1, -1)
    rows = meta["prompt_tokens"] + meta["completion_tokens"] - 1
    assert np.array_equal(ints(meta["routed_experts"]).reshape(rows, -1), experts.reshape(rows, -1))
    assert np.array_equal(ints(meta["indexer_topk"]).reshape(keys.shape), keys)
    later = generate(http, return_routed_experts=True, routed_experts_start_len=64)["meta_info"]
    assert np.array_equal(ints(later["routed_experts"]).reshape(-1, *experts.shape[1:]), experts[64:])
    assert later["routed_experts_start_len"] == 64 and "indexer_topk" not in later
    ask = {"return_routed_experts": True, "routed_experts_start_len": 64, "return_indexer_topk": True}
    both = generate(http, **ask)["meta_info"]
    assert both["routed_experts"] == later["routed_experts"] and both["indexer_topk"] == meta["indexer_topk"]
    assert "routed_experts" not in generate(http)["meta_info"]
    last = generate(http, return_routed_experts=True, routed_experts_start_len=100)["meta_info"]
    assert np.array_equal(ints(last["routed_experts"]).reshape(-1, *experts.shape[1:]), experts[100:])
    for wrong in (-1, 101):
        body = {"input_ids": IDS, "return_routed_experts": True, "routed_experts_start_len": wrong}
        assert http.post("/generate", json=body).status_code == 400


def test_vllms_fields_whole_and_compact(http, talking):
    from fullarc.model import load_model

    params = {"max_tokens": 9, "seed": 1, "ignore_eos": True}
    body = {"token_ids": IDS, "sampling_params": params, "return_routed_experts": True}
    choice = http.post("/inference/v1/generate", json=body).json()["choices"][0]
    experts, _ = trainers(load_model(talking[0]), IDS + choice["token_ids"][:-1])
    told = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)
    assert np.array_equal(told, experts)
    compact = body | {"return_routed_experts": "compact",
                      "sampling_params": params | {"routed_experts_prompt_start": 40}}  # fmt: skip
    told = http.post("/inference/v1/generate", json=compact).json()["choices"][0]["routed_experts"]
    assert told["start"] == 40 and told["dtype"] == "uint8"
    assert np.array_equal(
        np.frombuffer(base64.b64decode(told["data"]), told["dtype"]).reshape(told["shape"]), experts[40:]
    )
    ask = {"return_routed_experts": True, "seed": 1, "ignore_eos": True, "max_tokens": 9}
    chat = {"input_ids": IDS, "messages": []}
    for path, more in (("/v1/completions", {"prompt": IDS}), ("/v1/chat/completions", chat)):
        choice = http.post(path, json=ask | more).json()["choices"][0]
        told = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])), allow_pickle=False)
        assert np.array_equal(told, experts), path


def test_what_was_never_computed_is_not_told(http, server):
    http.post("/pause_generation", json={"mode": "in_place"})
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(generate, http, return_routed_experts=True)
        wait(lambda: server.engine.scheduler.waiting)
        http.post("/abort_request", json={"abort_all": True})
        meta = future.result(30)["meta_info"]
    http.post("/continue_generation")
    assert meta["finish_reason"]["type"] == "abort" and "routed_experts" not in meta
