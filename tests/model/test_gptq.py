"""Integers that make up for each other's errors, against least squares solved anew for every column."""

import json

import numpy as np
import pytest
import torch

from fullarc import cli
from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa, QuantScheme, load_model, quantize_checkpoint, save_model
from fullarc.model.gptq import DAMPING, compensated, grams_of
from fullarc.model.quant import dequantize, quantize

VOCAB, LENGTH = 64, 32


def correlated(inputs, seed):
    """A Gram matrix of inputs that know of each other, some of them much larger than others."""
    x = torch.randn(3 * inputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x @ torch.randn(
        inputs, inputs, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    return x.T @ x


def by_least_squares(weight, scale, bits, gram):
    """The column of the largest inputs first; after each, the rest is set to what leaves the least error."""
    half, inputs = 2 ** (bits - 1), weight.shape[1]
    h = gram.numpy() + DAMPING * gram.diagonal().mean().item() * np.eye(inputs)
    original, left, lost = weight.double().numpy(), weight.double().numpy().copy(), np.zeros(weight.shape)
    q, done = np.zeros(weight.shape), list[int]()
    for i in sorted(range(inputs), key=lambda i: -gram[i, i].item()):
        q[:, i] = np.clip(
            np.round(left[:, i].astype(np.float32) / scale[:, i].astype(np.float32)), -half, half - 1
        )
        lost[:, i] = original[:, i] - q[:, i] * scale[:, i]
        done.append(i)
        rest = [j for j in range(inputs) if j not in done]
        shift = np.linalg.solve(h[np.ix_(rest, rest)], h[np.ix_(rest, done)] @ lost[:, done].T).T
        left[:, rest] = original[:, rest] + shift
    return q


@pytest.mark.parametrize("bits, group", [(4, 0), (8, 0), (4, 4)])
def test_each_column_is_rounded_from_what_least_squares_leaves(bits, group):
    weight, gram = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)), correlated(12, 3)
    scheme = QuantScheme(bits, group)
    nearest, scale = quantize(weight, scheme)
    found = compensated(weight, scale, scheme, gram)
    wide = np.repeat(scale.double().numpy(), 12 // scale.shape[1], axis=1)
    assert np.array_equal(found.numpy(), by_least_squares(weight, wide, bits, gram))
    errors = [weight.double() - dequantize(q, scale).double() for q in (nearest, found)]
    before, after = (float((error @ gram * error).sum()) for error in errors)
    assert after < 0.7 * before


def test_inputs_that_know_nothing_of_each_other_leave_the_nearest():
    weight, scheme = torch.randn(5, 12, generator=torch.Generator().manual_seed(2)), QuantScheme(4, 0)
    nearest, scale = quantize(weight, scheme)
    for gram in (torch.eye(12), torch.arange(12.0).diag(), torch.zeros(12, 12)):
        assert torch.equal(compensated(weight, scale, scheme, gram.double()), nearest)


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, VOCAB, (6, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def test_grams_are_of_what_each_matrix_reads(rows):
    """Every token goes to k experts and to the shared one, so theirs add up to k times that one's."""
    model = GlmMoeDsa(preset("nano", vocab_size=VOCAB)).init_weights(2)
    grams, c = grams_of(model, rows), model.config
    first = model.layers[0]
    x = first.input_layernorm(model.embed_tokens(torch.tensor(rows))).flatten(0, 1).double()
    assert torch.allclose(grams["model.layers.0.self_attn.q_a_proj"], (x.T @ x).detach())
    moe = f"model.layers.{c.num_hidden_layers - 1}.mlp"
    shared = grams[f"{moe}.shared_experts.gate_proj"]
    sent = [grams.get(f"{moe}.experts.{e}.gate_proj", 0 * shared) for e in range(c.n_routed_experts)]
    assert torch.allclose(sum(sent), c.num_experts_per_tok * shared)
    inner = {grams[name].shape for name in grams if ".experts." in name and "down_proj" in name}
    assert inner == {(c.moe_intermediate_size,) * 2}
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_an_expert_hands_to_its_last_matrix_is_what_it_computes(monkeypatch):
    """Of one token: all rows of an expert are that token's, so the matrix is the outer product of any."""
    model, handed = GlmMoeDsa(preset("nano", vocab_size=VOCAB)).init_weights(2), []
    product = torch.nn.functional.grouped_mm

    def recorded(x, weights, offs):
        handed.append((x, offs.tolist()))
        return product(x, weights, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", recorded)
    grams, last = grams_of(model, [[7]]), model.config.num_hidden_layers - 1
    x, ends = handed[-1]
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        gram = grams.get(f"model.layers.{last}.mlp.experts.{expert}.down_proj")
        assert (gram is None) == (start == end)
        if gram is not None:
            assert torch.allclose(gram, torch.outer(x[start], x[start]).double(), rtol=1e-4, atol=1e-9)


def test_a_calibrated_model_is_nearer_to_the_one_it_was_made_of(rows, tmp_path):
    model = GlmMoeDsa(preset("nano", vocab_size=VOCAB)).init_weights(2)
    save_model(model, tmp_path / "source")
    plan = {"experts": QuantScheme(4, 0), "shared": QuantScheme(4, 0), "attention": QuantScheme(4, 0)}
    lost = {}
    for name, given in (("nearest", []), ("calibrated", rows)):
        quantize_checkpoint(tmp_path / "source", tmp_path / name, plan, rows=given)
        with torch.inference_mode():
            read = torch.tensor(rows)
            difference = load_model(tmp_path / name)(read).logits - model(read).logits
        lost[name] = float(difference.square().mean())
    assert lost["calibrated"] < 0.8 * lost["nearest"]


def test_the_command_calibrates_on_the_rows_of_the_run(rows, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "stages" / "sft" / "checkpoint"
    save_model(GlmMoeDsa(preset("nano", vocab_size=VOCAB)).init_weights(2), checkpoint)
    command = ["quantize", str(checkpoint), str(tmp_path / "out"), "--group", "16", "--json", "--calibrate"]
    assert cli.main(command) != 0 and "Give a run's checkpoint" in capsys.readouterr().err
    (tmp_path / "run/data/rows/sft").mkdir(parents=True)
    np.save(tmp_path / "run/data/rows/sft/ids.npy", np.array(rows, np.uint16))
    assert cli.main(command) == 0
    calibrated = json.loads(capsys.readouterr().out)["kinds"][0]["error"]
    assert cli.main([*command[:2], str(tmp_path / "nearest"), *command[3:-1]]) == 0
    assert calibrated > json.loads(capsys.readouterr().out)["kinds"][0]["error"], "each weight is further off"
