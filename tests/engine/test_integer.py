"""Integer products against int64, however they are computed and whatever else is; engines that use them."""

import random

import pytest
import torch

from fullarc.engine import Engine
from fullarc.engine import integer as engine_integer
from fullarc.engine.core import Chunk, Core
from fullarc.engine.integer import Integer, IntegerExperts, packs, round_tokens
from fullarc.engine.products import FP8, FP8Experts, round_fp8
from fullarc.engine.weights import prepare
from fullarc.model import GlmMoeDsa, QuantScheme, load_model, quantize_checkpoint
from fullarc.model.quant import PER_TOKEN, dequantize, quantize

SHAPES = [(128, 176), (96, 33), (17, 5), (1024, 48), (1500, 20)]
BY_TOKEN = {bits: QuantScheme(bits, 0, tokens=True) for bits in (4, 8)}


def matrix(inputs: int, outputs: int, bits: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, I] that is scale times integers, and its scales; its extremes are in use."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    q, scale = quantize(weight, BY_TOKEN[bits])
    q[0], q[-1] = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    return dequantize(q, scale), scale


def reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The product in int64, scaled in fp32, first by outputs and then by tokens."""
    q_x, s_x = quantize(x, PER_TOKEN)
    q_w = (weight.double() / scale.double()).round().long()
    return (q_x.long() @ q_w.T).float() * scale.T * s_x


def inputs(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    """Rows of very different sizes; one is constant (all of it the extreme), one is zero."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    x *= 10.0 ** torch.linspace(-3, 3, rows)[:, None]
    x[0] = -0.3
    if rows > 1:
        x[1] = 0
    return x


def test_tokens_are_rounded_as_weights_are() -> None:
    x = torch.cat((inputs(40, 65), torch.tensor([[127.5, -127.5, 0.5, -1.5, 2.5] * 13])))
    q, scale = quantize(x, PER_TOKEN)
    ours, s = round_tokens(x)
    assert torch.equal(ours, q.float()) and torch.equal(s, scale)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_int64(shape: tuple[int, int], bits: int, packed: bool) -> None:
    weight, scale = matrix(*shape, bits)
    if not packed and shape[0] * 2 ** (bits - 1) * 128 > 2**24:
        with pytest.raises(AssertionError):
            Integer(weight, scale, packed)
        return
    product, x = Integer(weight, scale, packed), inputs(64, shape[0])
    whole = product(x)
    assert torch.equal(whole, reference(x, weight, scale))
    for rows in range(1, 65) if shape[1] == 48 else (1, 2, 7, 16, 33):  # a row is the same in any company
        assert torch.equal(product(x[:rows]), whole[:rows])
    assert torch.equal(product(x[37:38]), whole[37:38])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_are_those_of_int64(bits: int, packed: bool) -> None:
    parts = [matrix(48, 40, bits, seed) for seed in range(4)]
    product = IntegerExperts(torch.stack([w for w, _ in parts]), torch.stack([s for _, s in parts]), packed)
    ends, x = [16, 16, 64, 80], inputs(80, 48)
    expected = [
        reference(x[a:b], *part) for a, b, part in zip([0, *ends], ends, parts, strict=False) if b > a
    ]
    assert torch.equal(product(x, torch.tensor(ends, dtype=torch.int32)), torch.cat(expected))


def test_without_exact_sums_in_onednn_there_is_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scale = matrix(1500, 24, 8)
    x = inputs(40, 1500)
    expected = Integer(weight, scale)(x)
    monkeypatch.setattr(engine_integer, "packs", lambda: False)
    assert torch.equal(Integer(weight, scale)(x), expected)
    assert torch.equal(Integer(weight, scale)(x[:3]), expected[:3])


def test_large_matrices_are_packed_and_small_ones_are_not() -> None:
    assert Integer(*matrix(1024, 512, 8)).packed and not Integer(*matrix(1024, 511, 8)).packed
    assert Integer(*matrix(1025, 8, 8)).packed and not Integer(*matrix(1025, 8, 4)).packed


@pytest.mark.skipif(not packs(), reason="this processor's oneDNN sums may saturate")
def test_int8_takes_a_quarter_of_the_memory() -> None:
    packed, floats = (Integer(*matrix(1024, 512, 8), packed=way).q for way in (True, False))
    assert isinstance(packed, torch.Tensor) and packed.is_mkldnn and floats.nbytes == 4 * 1024 * 512


# --- engines --------------------


@pytest.fixture(scope="module")
def quantised(shaped, tmp_path_factory):
    """A W4A8 checkpoint of each shape: routed experts in 4 bits, the rest in 8."""
    folder = tmp_path_factory.mktemp("w4a8") / "w4a8"
    plan = {kind: BY_TOKEN[8] for kind in ("shared", "dense", "attention")} | {"experts": BY_TOKEN[4]}
    quantize_checkpoint(shaped[1], folder, plan)
    return folder


LONG = [3 + (i * i) % 80 for i in range(150)]


def logprobs(net: GlmMoeDsa) -> torch.Tensor:
    with torch.no_grad():
        rows = net(torch.tensor([LONG])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor(LONG[1:])[:, None])[:, 0]


def test_an_engine_of_integers_agrees_with_the_model(shaped, quantised, kernels) -> None:
    """Both round the inputs of every product, and a value on the edge between two integers may fall on either side.

    So they differ as the model differs from itself when its embeddings are changed in their last bits, and by far less
    than rounding changes.
    """
    model = load_model(quantised)
    assert all(layer.self_attn.o_proj.scale is not None for layer in model.layers)
    ours = torch.tensor(Engine(quantised, max_batch=2, max_len=256, kernels=kernels).score([LONG])[0][1:])
    theirs = logprobs(model)
    weight, edges = model.embed_tokens.weight.detach().clone(), []
    for change in (1e-6, -1e-6, 2e-6, -2e-6, 3e-6):
        with torch.no_grad():
            model.embed_tokens.weight.copy_(weight * (1 + change))
        edges.append((logprobs(model) - theirs).abs().median())
    close, edge = (ours - theirs).abs().median(), torch.stack(edges).median()
    assert close < 3 * edge and close < 0.15 * (logprobs(shaped[0]) - theirs).abs().median()


@pytest.mark.parametrize("packed", [False, True])
def test_rows_keep_their_bits_in_any_company(
    quantised, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if packed:
        monkeypatch.setattr(engine_integer, "PAYS", 0)
    rng = random.Random(1)
    core = Core(prepare(load_model(quantised)), 40, 256)
    whole = core.logits(core.forward([Chunk(0, 0, LONG)]), list(range(len(LONG))))
    done = 0
    while done < len(LONG):
        size = min(rng.choice([1, 1, 2, 3, 17, 40]), len(LONG) - done)
        crowd = [
            Chunk(s, rng.randrange(100), [rng.randrange(90)])
            for s in rng.sample(range(20), rng.randrange(20))
        ]
        mine = Chunk(39, done, LONG[done : done + size])
        chunks = [*crowd, mine]
        logits = core.logits(core.forward(chunks), list(range(len(crowd), len(crowd) + size)))
        assert torch.equal(logits, whole[done : done + size])
        done += size


def test_both_ways_give_the_same_engine(quantised, monkeypatch: pytest.MonkeyPatch) -> None:
    floats = Engine(quantised, max_batch=2, max_len=256, kernels="torch").score([LONG])
    monkeypatch.setattr(engine_integer, "PAYS", 0)
    assert Engine(quantised, max_batch=2, max_len=256, kernels="torch").score([LONG]) == floats


@pytest.mark.parametrize(
    "dtype,kernels,bound", [("bf16", "torch", 0.1), ("bf16", "native", 0.1), ("fp8", "torch", 0.5)]
)
def test_lower_precision_stays_close_and_keeps_its_bits(
    shaped, dtype: str, kernels: str, bound: float
) -> None:
    exact = torch.tensor(Engine(shaped[1], max_batch=2, max_len=256).score([LONG])[0])
    engine = Engine(shaped[1], max_batch=8, max_len=256, dtype=dtype, prefix_tokens=0, kernels=kernels)
    scores = engine.score([LONG])
    difference = (torch.tensor(scores[0]) - exact).abs()
    assert 1e-4 < difference[:24].mean() < bound
    assert engine.score([LONG[:40], LONG, LONG[3:70]])[1] == scores[0]
    weights = engine.scheduler.core.weights
    if kernels == "torch":
        assert weights.embed.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)


def test_fp8_rounds_as_e4m3_does() -> None:
    x = torch.tensor([[448.0, 447.0, 17.0, 19.0, 0.0009, -240.0, 0.0] + [0.0] * 121 + [0.875, 0.8]])
    rounded = round_fp8(x, 1, 128)
    # 3 bits of mantissa; the step near 448 is 32, near 17 it is 2; below 2^-9 of the scale nothing is left
    assert rounded[0, :7].tolist() == [448.0, 448.0, 16.0, 20.0, 0.0, -240.0, 0.0]
    assert rounded[0, 128:].tolist() == pytest.approx([0.875, 0.8125])
    block = torch.ones(130, 3)
    block[129, 0] = 448
    assert torch.equal(round_fp8(block, 128, 128), block)


def test_fp8_products_round_weights_and_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(3, 136, 200, generator=generator), torch.randn(48, 200, generator=generator)
    ends = torch.tensor([16, 16, 48], dtype=torch.int32)
    rounded = round_fp8(x, 1, 128)
    assert not torch.equal(rounded, x)
    by_hand = [rounded @ round_fp8(w, 128, 128).T for w in weight]
    assert torch.allclose(FP8(weight[2])(x), by_hand[2], atol=1e-4)
    expected = torch.cat((by_hand[0][:16], by_hand[2][16:]))
    assert torch.allclose(FP8Experts(weight)(x, ends), expected, atol=1e-4)


def test_an_unknown_precision_is_a_sentence(shaped) -> None:
    from fullarc.config.errors import FullarcError

    with pytest.raises(FullarcError, match="does not compute in 'fp4'"):
        Engine(shaped[1], dtype="fp4")
