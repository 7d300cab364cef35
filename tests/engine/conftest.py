"""Tiny checkpoints whose selections are real: sequences are several times longer than index_topk."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from fullarc.chat import Tokenizer
from fullarc.chat.template import TOOLS_HEAD, TOOLS_TAIL
from fullarc.config.model import ModelConfig
from fullarc.engine import sampler
from fullarc.model import GlmMoeDsa, save_model

if TYPE_CHECKING:
    from running import Running

sys.path.insert(0, str(Path(__file__).parent))  # running.py

TINY = dict(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=48,
    num_attention_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=16, index_n_heads=8,
    index_head_dim=16, index_topk=24, max_position_embeddings=512, rope_theta=10_000.0, eos_token_id=(0,),
    pad_token_id=0,
)  # fmt: skip
# nothing here is a multiple of anything a kernel likes
ODD = TINY | dict(
    vocab_size=101, hidden_size=36, num_attention_heads=1, q_lora_rank=20, kv_lora_rank=74, qk_rope_head_dim=6,
    qk_nope_head_dim=10, n_routed_experts=5, num_experts_per_tok=3, moe_intermediate_size=20, intermediate_size=28,
    index_head_dim=14,
)  # fmt: skip
SHAPES = {
    "sparse": TINY,
    "gathered": TINY | dict(index_topk=12),  # of 150 tokens, the last 54 gather their keys
    "dense": TINY | dict(index_topk=512),
    "odd": ODD,
    "shared": TINY | dict(indexer_types=("full", "shared", "full")),  # IndexShare
}


def build_model(shape: str = "sparse", seed: int = 1, std: float = 0.25) -> GlmMoeDsa:
    """A random model with perturbed norms and router biases, so that no weight is without effect."""
    model = GlmMoeDsa(ModelConfig(**SHAPES[shape], initializer_range=std)).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if "bias" in name:
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
    return model


@pytest.fixture(scope="session", params=list(SHAPES))
def shaped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[GlmMoeDsa, Path]:
    """Each shape of model, in memory and on disk."""
    folder = tmp_path_factory.mktemp("models") / request.param
    model = build_model(request.param)
    save_model(model, folder)
    return model, folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of one shape ("v0", "v1") and another shape ("other")."""
    root = tmp_path_factory.mktemp("checkpoints")
    save_model(build_model(seed=1), root / "v0")
    save_model(build_model(seed=2), root / "v1")
    save_model(build_model("odd"), root / "other")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def build() -> Callable[..., GlmMoeDsa]:
    """`build_model`, for tests that change what it returns."""
    return build_model


@pytest.fixture(scope="session")
def likely(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose MTP layer guesses well: its layers add little, so both see mostly the last token."""
    model = build_model()
    with torch.no_grad():
        for layer in (*model.layers, model.mtp_layer):
            layer.self_attn.o_proj.weight *= 0.2
            for name, weight in layer.mlp.named_parameters():
                weight *= 0.05 if "down" in name else 1.0
        half = model.config.hidden_size
        model.mtp_layer.eh_proj.weight.zero_()
        model.mtp_layer.eh_proj.weight[:, :half] = torch.eye(half) * 2
        model.lm_head.weight *= 3
    folder = tmp_path_factory.mktemp("likely")
    save_model(model, folder)
    return folder


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Both forward passes."""
    return str(request.param)


WORDS = "the file holds a number so list it then print hello done 12 30 ls cat a.txt echo 我们的模型从文本学习语言 "


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tokenizer]:
    """A checkpoint with a tokenizer, whose model says anything."""
    folder = tmp_path_factory.mktemp("talking")
    tok = Tokenizer.train([WORDS * 4, *[TOOLS_HEAD + TOOLS_TAIL] * 3], 600)
    tok.save(folder / "tok")
    shape = TINY | dict(
        max_position_embeddings=1024,
        vocab_size=tok.vocab_size,
        eos_token_id=tok.stop_ids,
        pad_token_id=tok.stop_ids[0],
    )
    model = GlmMoeDsa(ModelConfig(**shape, initializer_range=0.25)).init_weights(3).eval()
    save_model(model, folder / "talking", tokenizer_dir=folder / "tok")
    return folder / "talking", tok


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, talking: tuple[Path, Tokenizer]) -> Callable[[int, str], int]:
    """says(seed, text): requests with that seed sample exactly this text."""
    tok, real = talking[1], sampler.sample
    scripts: dict[int, list[int]] = {}
    first: dict[int, int] = {}

    def sample(logits: Any, params: Any, positions: Any, *rest: Any) -> Any:
        tokens, logprobs = real(logits, params, positions, *rest)
        for row, (p, position) in enumerate(zip(params, positions, strict=True)):
            if p.seed in scripts:
                tokens[row] = scripts[p.seed][position - first.setdefault(p.seed, position)]
        return tokens, logprobs

    monkeypatch.setattr(sampler, "sample", sample)

    def say(seed: int, text: str) -> int:
        scripts[seed] = tok.encode_raw(text)
        first.pop(seed, None)
        return seed

    return say


@pytest.fixture
def server(checkpoints: dict[str, Path]) -> Iterator["Running"]:
    """A server of "v0"; several files have another one."""
    from running import Running

    running = Running(checkpoints["v0"])
    yield running
    running.stop()


@pytest.fixture
def http(server: "Running") -> Iterator[httpx.Client]:
    """A client of the server."""
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture
def gpt(server: "Running") -> Any:
    """OpenAI's client of the server."""
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(server: "Running") -> Any:
    """Anthropic's client of the server."""
    import anthropic

    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
