"""A model of a few thousand weights, and packed rows to feed it. Helpers of this room can be imported by name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fullarc.config.files import atomic_dir
from fullarc.config.model import ModelConfig, preset
from fullarc.model import GlmMoeDsa

sys.path.insert(0, str(Path(__file__).parent))  # new processes look here too
VOCAB, LENGTH = 64, 32


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config() -> ModelConfig:
    """Dense attention, two layers, one of them MoE."""
    return preset("nano", vocab_size=VOCAB, max_position_embeddings=128, index_topk=128)


@pytest.fixture
def model(config: ModelConfig) -> GlmMoeDsa:
    return GlmMoeDsa(config).init_weights(1)


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[..., Path]:
    """make_rows(name, n=…, isolate=…): a rows folder of counting documents, 0 = padding at each row's end."""

    def make(name: str = "rows", n: int = 12, length: int = LENGTH, isolate: bool = True, **replace) -> Path:
        rng = np.random.Generator(np.random.PCG64(n))
        ids = np.zeros((n, length), np.uint16)
        docs = np.zeros((n, length), np.uint16)
        for row in range(n):
            cut = int(rng.integers(length // 4, length // 2))
            for number, (start, stop) in enumerate([(0, cut), (cut, length - 3)], 1):
                docs[row, start:stop] = number
                ids[row, start:stop] = (int(rng.integers(VOCAB)) + np.arange(stop - start)) % VOCAB
        loss = ((docs > 0) & (rng.random(docs.shape) < 0.8)).astype(np.uint8)
        arrays = {"ids": ids, "loss": loss, "docs": docs} | replace
        arrays.setdefault("parents", np.zeros_like(arrays["docs"]))
        with atomic_dir(tmp_path / name) as folder:
            for key, value in arrays.items():
                np.save(folder / f"{key}.npy", value)
            meta = {"T": length, "n_rows": n, "isolate": isolate}
            (folder / "meta.json").write_text(json.dumps(meta))
        return tmp_path / name

    return make
