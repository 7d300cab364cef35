"""Quantised weights against loops over single numbers and against compressed-tensors 0.20; training with them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa
from fullarc.model.quant import Linear, QuantScheme, dequantize, pack, quantize, quantize_best, unpack

# pack_to_int32 and calculate_qparams of compressed-tensors 0.20.0 for `fixture()`: (bits, group) -> words, scales
COMPRESSED = {
    (4, 4): (
        [[-1577636768, 7007], [-95518506, 28853], [1873053832, 59148]],
        [
            [0.1041666641831398, 0.07083333283662796, 0.09791667014360428],
            [0.15416666865348816, 0.19583334028720856, 0.18333333730697632],
            [1.1920928955078125e-07, 0.3125, 0.2562499940395355],
        ],
    ),
    (4, 0): (
        [[-1797772192, 7007], [-95518010, 29109], [1873053832, 55083]],
        [[0.1041666641831398], [0.19583334028720856], [0.3125]],
    ),
    (8, 4): (
        [
            [448618240, -1710162059, 11422455],
            [-2147361442, -6604828, 1811987023],
            [-2139062144, 1560256835, -411828024],
        ],
        [
            [0.006127451080828905, 0.004166666883975267, 0.005759804043918848],
            [0.009068627841770649, 0.011519608087837696, 0.010784314014017582],
            [1.1920928955078125e-07, 0.018382353708148003, 0.015073529444634914],
        ],
    ),
    (8, 0): (
        [
            [448618240, -1842030728, 145444336],
            [-2145597083, -6604828, 1829353042],
            [-2139062144, 1560256835, -730458181],
        ],
        [[0.006127451080828905], [0.011519608087837696], [0.018382353708148003]],
    ),
}


def fixture() -> Tensor:
    """[3, 12], not a whole number of 4-bit words; one group of four is zero."""
    n = torch.arange(36)
    weight = ((n * 37 % 101 - 50) * (1 + n // 12)).view(3, 12).float() / 64
    weight[2, :4] = 0
    return weight


def ties(bits: int) -> Tensor:
    """One row of 16 whose scale is 1, with every kind of tie, and the extremes."""
    top = 2 ** (bits - 1) - 0.5
    return torch.tensor(
        [[top, -top, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 0.0, -0.0, 0.49, 0.51, 3, -3, 6.5, 5.5]]
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [4, 0])
def test_quantisation_equals_a_loop_over_numbers(bits: int, group: int) -> None:
    weight = torch.cat((torch.randn(5, 16, generator=torch.Generator().manual_seed(bits)), ties(bits)))
    q, scale = quantize(weight, QuantScheme(bits, group))
    restored = dequantize(q, scale)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for row in range(len(weight)):
        for column in range(16):
            start = column // (group or 16) * (group or 16)
            largest = max(abs(float(w)) for w in weight[row, start : start + (group or 16)])
            s = np.float32(largest) / np.float32((high - low) / 2)
            exact = float(np.float32(weight[row, column]) / s)
            assert int(q[row, column]) == min(max(round(exact), low), high)
            assert float(restored[row, column]) == pytest.approx(int(q[row, column]) * s, rel=1e-6)
            assert abs(float(weight[row, column] - restored[row, column])) <= s * (0.5 + 1e-4)
    if not group:
        assert q[-1, :8].tolist() == [high, low, 0, 0, 2, -2, 2, -2]


@pytest.mark.parametrize("bits,group", COMPRESSED)
def test_words_and_scales_are_those_of_compressed_tensors(bits: int, group: int) -> None:
    q, scale = quantize(fixture(), QuantScheme(bits, group))
    words, scales = COMPRESSED[bits, group]
    assert pack(q, bits).tolist() == words and pack(q, bits).dtype == torch.int32
    assert torch.equal(scale, torch.tensor(scales))
    assert torch.equal(unpack(torch.tensor(words, dtype=torch.int32), bits, 12), q)
    assert torch.equal(dequantize(q, scale)[2, :4], torch.zeros(4))


def test_the_first_value_lies_in_the_lowest_bits() -> None:
    q = torch.tensor([[-8, -7, 7, 0, 1, -1, 2, 6, 3]], dtype=torch.int8)
    fields = [0x0, 0x1, 0xF, 0x8, 0x9, 0x7, 0xA, 0xE]
    word = sum(field << 4 * place for place, field in enumerate(fields))
    assert pack(q, 4).tolist() == [[word - 2**32, 0xB]]
    assert torch.equal(unpack(pack(q, 4), 4, 9), q)


def test_every_integer_survives_packing() -> None:
    for bits in (4, 8):
        q = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8).repeat(3, 1)[:, 1:]
        assert torch.equal(unpack(pack(q, bits), bits, q.shape[-1]), q)


def test_a_group_that_does_not_divide_the_row_is_named() -> None:
    with pytest.raises(FullarcError, match="group of 5 does not divide a row of 12"):
        quantize(fixture(), QuantScheme(4, 5))


# --- quantisation-aware training --------------------


def network() -> GlmMoeDsa:
    return GlmMoeDsa(preset("nano", vocab_size=64, initializer_range=0.2)).init_weights(3)


def loss_of(model: GlmMoeDsa) -> Tensor:
    """A number that every weight of trunk and MTP layer bears on."""
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(5))
    out = model.trunk(ids)
    logits = [model.lm_head(h) for h in (out.hidden_BTD, *model.mtp(out.hidden_BTD, ids, steps=2).hidden)]
    return sum(part.log_softmax(-1)[..., 7].sum() for part in logits)


def quantised_offline(model: GlmMoeDsa, scheme: QuantScheme, shared: bool) -> GlmMoeDsa:
    """A copy whose experts were taken out one by one, packed, unpacked and put back."""
    copy = GlmMoeDsa(model.config)
    copy.load_state_dict(model.state_dict())
    for name, weight in copy.named_parameters():
        if ".experts." in name or (shared and "shared_experts" in name):
            matrices = weight.data.unbind() if ".experts." in name else [weight.data]
            for matrix in (part for whole in matrices for part in whole.chunk(2)):
                q, scale = quantize(matrix.clone(), scheme)
                matrix.copy_(dequantize(unpack(pack(q, scheme.bits), scheme.bits, matrix.shape[1]), scale))
    return copy


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_computes_exactly_with_the_weights_that_are_exported(bits: int, shared: bool) -> None:
    scheme = QuantScheme(bits, 16)
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = loss_of(model)
    offline = quantised_offline(model, scheme, shared)
    aware = model.quantize_experts(scheme, shared)

    loss, expected = loss_of(aware), loss_of(offline)
    assert torch.equal(loss, expected) and not torch.equal(loss, plain)

    # straight through: the gradient at w is the gradient at w', of every weight, to the bit
    loss.backward()
    expected.backward()
    for (name, weight), other in zip(aware.named_parameters(), offline.parameters(), strict=True):
        assert (weight.grad is None) == (other.grad is None), name
        assert weight.grad is None or torch.equal(weight.grad, other.grad), name
    assert list(before) == list(aware.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in aware.state_dict().items())
    assert torch.equal(loss_of(model.quantize_experts(None)), plain)


def test_gradients_of_a_product_by_hand() -> None:
    linear = Linear(8, 2)
    linear.scheme = QuantScheme(4, 4)
    with torch.no_grad():  # the last of each row is clamped: 7.5 -> 7
        linear.weight.copy_(torch.tensor([[0.4, -1.2, 2.5, 7.5, 0.0, 0.0, 0.0, 0.0], [1.0] * 7 + [15.0]]))
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]], requires_grad=True)
    y = linear(x)
    rounded = [[0, -1, 2, 7, 0, 0, 0, 0], [7 / 7.5] * 4 + [0, 0, 0, 14]]
    assert y.tolist()[0] == pytest.approx([2 * -1 + 3 * 2 + 4 * 7, 10 * 7 / 7.5 + 8 * 14])
    (y * torch.tensor([[10.0, -1.0]])).sum().backward()
    assert linear.weight.grad.tolist() == [[10.0 * n for n in range(1, 9)], [-1.0 * n for n in range(1, 9)]]
    assert torch.allclose(x.grad[0], 10 * torch.tensor(rounded[0]) - torch.tensor(rounded[1]))


def test_a_group_that_does_not_divide_the_experts_is_refused() -> None:
    with pytest.raises(FullarcError, match="group of 32 does not divide a row of 16"):
        network().quantize_experts(QuantScheme(4, 32))


def test_searched_scales_are_the_best_of_the_grid() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(2)) ** 3
    weight[0] = 0
    for scheme in (QuantScheme(4, 0), QuantScheme(4, 8), QuantScheme(8, 0)):
        q, scale = quantize_best(weight, scheme)
        error = (dequantize(q, scale) - weight).square().unflatten(-1, (scale.shape[1], -1)).sum(-1)
        groups = weight.unflatten(-1, (scale.shape[1], -1))
        half = 2 ** (scheme.bits - 1)
        for row in range(6):
            for group in range(scale.shape[1]):
                w = groups[row, group].double()
                tried = []
                for part in np.arange(0.5, 1.001, 0.02):
                    s = max(float(w.abs().max()) / (half - 0.5) * part, 1e-12)
                    tried.append(float(((w / s).round().clamp(-half, half - 1) * s - w).square().sum()))
                assert float(error[row, group]) == pytest.approx(min(tried), rel=1e-3, abs=1e-9)
        plain = (dequantize(*quantize(weight, scheme)) - weight).square().sum()
        assert error.sum() < plain if scheme.bits == 4 else error.sum() <= plain * 1.0001


def test_the_search_goes_down_to_half_the_scale() -> None:
    """A single outlier of twelve sigma among many is clamped to half of itself, the least that there is."""
    weight = torch.randn(1, 8192, generator=torch.Generator().manual_seed(2))
    weight[0, 7] = 12
    _, scale = quantize_best(weight, QuantScheme(4, 0))
    assert float(scale) == pytest.approx(12 / 7.5 / 2, rel=1e-5)
