"""The small operations against their formulas written out, in double precision."""

import pytest
import torch

from fullarc.model.ops import RMSNorm, causal_attention


def test_rms_norm_has_the_gradients_of_its_formula() -> None:
    """Against autograd in double precision, on a slice whose rows are not contiguous and on rows of zeros."""
    norm = RMSNorm(24, 1e-5)
    both = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(0))
    both[:, -1] = 0.0
    x = both.split((24, 16), -1)[0].requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    exact_x, exact_w = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    exact = exact_x * (exact_x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * exact_w
    expected = exact, *torch.autograd.grad(exact, (exact_x, exact_w), grad.double())
    out = norm(x)
    for found, wanted in zip((out, *torch.autograd.grad(out, (x, norm.weight), grad)), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [5, 128, 129, 300, 512, 513])
def test_causal_attention_is_its_formula(length: int) -> None:
    """Rows around the lengths at which a block, and a whole row, ends; widths of values and keys equal and not."""
    generator = torch.Generator().manual_seed(length)
    for width in (8, 6):
        q, k, v, grad = (
            torch.randn(2, length, 3, d, generator=generator, dtype=torch.float64).transpose(1, 2)
            for d in (8, 8, width, width)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        scores = q @ k.mT * 0.4
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        expected = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        out = causal_attention(q, k, v, 0.4)
        assert torch.allclose(out, expected, atol=1e-10)
        grads = (torch.autograd.grad(y, leaves, grad) for y in (out, expected))
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))
