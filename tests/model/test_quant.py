"""Quantised weights against loops over single numbers, and against what compressed-tensors 0.20 makes of them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fullarc.config.errors import FullarcError
from fullarc.model.quant import QuantScheme, dequantize, pack, quantize, unpack

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
