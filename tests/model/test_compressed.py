"""Quantised checkpoints, read by a few lines of numpy that share nothing with the code."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fullarc import cli
from fullarc.config.errors import FullarcError
from fullarc.config.files import atomic_dir, verify_manifest
from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa, QuantScheme, load_model, quantize_checkpoint, save_model

MIXED = {"experts": QuantScheme(4, 16), "attention": QuantScheme(8, 0), "dense": QuantScheme(8, 0)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer's files and a trainer's state beside it."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer.json").write_text("{}")
    model = GlmMoeDsa(preset("nano", vocab_size=64)).init_weights(2)
    save_model(model, tmp_path / "source", tmp_path / "tokenizer")
    (tmp_path / "source/trainer").mkdir()
    (tmp_path / "source/trainer/state.json").write_text("{}")
    return tmp_path / "source"


def restore(tensors: dict[str, np.ndarray], name: str, bits: int) -> np.ndarray:
    """The matrix that three tensors stand for: `bits` bits at a time, the lowest first, minus half the range."""
    rows, columns = tensors[f"{name}_shape"]
    stream = np.unpackbits(tensors[f"{name}_packed"].view(np.uint8), axis=1, bitorder="little")
    digits = stream[:, : columns * bits].reshape(rows, columns, bits)
    integers = (digits * 2 ** np.arange(bits)).sum(-1) - 2 ** (bits - 1)
    scale = tensors[f"{name}_scale"]
    return integers.astype(np.float32) * np.repeat(scale, columns // scale.shape[1], axis=1)


def test_what_is_loaded_is_what_is_on_disk_and_what_training_sees(source: Path, tmp_path: Path) -> None:
    reports = quantize_checkpoint(source, tmp_path / "out", MIXED)
    verify_manifest(tmp_path / "out")
    disk = load_file(tmp_path / "out/model.safetensors")
    before = load_file(source / "model.safetensors")
    save_model(load_model(tmp_path / "out"), tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model.safetensors")

    assert set(plain) == set(before)
    packed = {name.removesuffix("_packed") for name in disk if name.endswith("_packed")}
    assert len(packed) == sum(report.matrices for report in reports) == 2 * 4 * 3 + 3 * 5 + 3
    for name in before:
        if name in packed:
            assert np.array_equal(plain[name], restore(disk, name, 4 if ".experts." in name else 8)), name
        else:
            assert np.array_equal(disk[name], before[name]) and np.array_equal(plain[name], before[name]), (
                name
            )
    for report in reports:
        names = [
            n
            for n in packed
            if {"experts": ".experts.", "attention": "attn", "dense": "0.mlp"}[report.kind] in n
        ]
        lost = sum(np.square(before[n].astype(float) - plain[n]).sum() for n in names)
        assert report.error == pytest.approx(
            (lost / sum(np.square(before[n].astype(float)).sum() for n in names)) ** 0.5
        )
        assert report.bytes_before == 4 * sum(before[n].size for n in names)
        assert report.bytes_after == sum(
            disk[f"{n}_{part}"].nbytes for n in names for part in ("packed", "scale", "shape")
        )

    experts_only = quantize_checkpoint(source, tmp_path / "experts", {"experts": QuantScheme(4, 16)})
    assert [report.kind for report in experts_only] == ["experts"]
    ids = torch.arange(20)[None]
    aware = load_model(source).quantize_experts(QuantScheme(4, 16))
    assert torch.equal(load_model(tmp_path / "experts")(ids).logits, aware(ids).logits)


def test_the_config_names_every_matrix_once(source: Path, tmp_path: Path) -> None:
    quantize_checkpoint(source, tmp_path / "out", MIXED)
    config = json.loads((tmp_path / "out/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "pack-quantized")
    groups = quantization["config_groups"].values()
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name in load_file(source / "model.safetensors"):
        module = name.removesuffix(".weight")
        if module == name or "norm" in name:
            continue

        def fits(patterns: list[str], module: str = module) -> bool:
            return any(re.match(pattern.removeprefix("re:"), module) for pattern in patterns)

        found = [group["weights"] for group in groups if fits(group["targets"])]
        assert len(found) + fits(quantization["ignore"]) == 1, name
        assert bool(found) == (f"{name}_packed" in tensors)
        if found:
            columns, words = tensors[f"{name}_shape"][1], tensors[f"{name}_packed"].shape[1]
            assert found[0]["num_bits"] == words * 32 // columns
            assert (found[0]["group_size"] or columns) == columns // tensors[f"{name}_scale"].shape[1]
            assert found[0]["strategy"] == ("group" if found[0]["group_size"] else "channel")


def test_the_verb(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(source), str(tmp_path / "out"), "--group", "16"]
    assert cli.main([*words, "--rest", "8", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert said["bytes_after"] == size < said["bytes_before"] == (source / "model.safetensors").stat().st_size
    kinds = {kind["kind"]: kind for kind in said["kinds"]}
    assert set(kinds) == {"experts", "shared", "dense", "attention"}
    assert [kinds[kind]["bits"] for kind in ("experts", "shared")] == [4, 8]
    assert 0.05 < kinds["experts"]["error"] < 0.15 and 0.002 < kinds["attention"]["error"] < 0.01
    files = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert files == expected

    assert cli.main(words) == 3
    assert "exists" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    assert "experts" in capsys.readouterr().out
    assert load_model(tmp_path / "out").config == load_model(source).config


def test_mistakes_are_sentences_and_change_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with atomic_dir(tmp_path / "rows") as rows:  # whole, but not a model
        (rows / "ids.npy").write_text("1 2 3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    done = tmp_path / "done"
    quantize_checkpoint(source, done, {"experts": QuantScheme(4, 16)})
    cases = [
        ([tmp_path / "absent", tmp_path / "new"], "does not exist"),
        (
            [source, tmp_path / "new"],
            "model.layers.1.mlp.experts.0.down_proj.weight: A quantisation group of 32",
        ),
        ([source, tmp_path / "mine", "--overwrite"], "is not a checkpoint"),
        ([source, tmp_path / "rows", "--overwrite"], "is not a checkpoint"),
        ([source, tmp_path / "mine/letter.txt", "--overwrite"], "is not a checkpoint"),
        ([source, source, "--overwrite"], "is the checkpoint itself"),
        ([done, tmp_path / "new"], "is quantised already"),
    ]
    for words, message in cases:
        assert cli.main(["quantize", *map(str, words)]) == 3, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and (tmp_path / "mine/letter.txt").read_text() == "dear"
    verify_manifest(source)


@pytest.mark.parametrize("part", ["scale", "shape"])
def test_an_incomplete_matrix_is_named(source: Path, tmp_path: Path, part: str) -> None:
    quantize_checkpoint(source, tmp_path / "out", {"experts": QuantScheme(4, 16)})
    (tmp_path / "out/manifest.json").unlink()
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    lost = f"model.layers.1.mlp.experts.2.up_proj.weight_{part}"
    save_file({name: value for name, value in tensors.items() if name != lost}, file)
    with pytest.raises(FullarcError, match=f"{re.escape(lost)} is missing"):
        load_model(tmp_path / "out")
    save_file(tensors | {lost: tensors[lost][:1]}, file)
    with pytest.raises(FullarcError, match=r"experts.2.up_proj.weight_packed .* is not a matrix"):
        load_model(tmp_path / "out")
    save_file(tensors | {"model.layers.1.mlp.experts.2.up_proj.weight_zero_point": tensors[lost]}, file)
    with pytest.raises(FullarcError, match="unexpected tensor .*weight_zero_point"):
        load_model(tmp_path / "out")


def test_a_checkpoint_in_several_files_becomes_one(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    quantize_checkpoint(source, tmp_path / "whole", {"experts": QuantScheme(4, 16)})
    for file in ("manifest.json", "model.safetensors"):
        (source / file).unlink()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, source / f"model-{number}-of-2.safetensors")
    (source / "model.safetensors.index.json").write_text("{}")
    quantize_checkpoint(source, tmp_path / "parts", {"experts": QuantScheme(4, 16)})
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert set(whole) == set(parts) and all(np.array_equal(whole[name], parts[name]) for name in whole)


# --- products of integers --------------------


def by_token(bits: int) -> QuantScheme:
    return QuantScheme(bits, 0, tokens=True)


W8A8 = {kind: by_token(8) for kind in ("experts", "shared", "dense", "attention")}
W4A8 = W8A8 | {"experts": by_token(4)}


@pytest.mark.parametrize("plan,wide", [(W8A8, False), (W4A8, False), (W4A8, True)])
def test_what_rounds_its_inputs_is_stored_and_loaded_so(
    source: Path, tmp_path: Path, plan: dict[str, QuantScheme], wide: bool
) -> None:
    quantize_checkpoint(source, tmp_path / "out", plan, wide)
    disk, before = (load_file(path / "model.safetensors") for path in (tmp_path / "out", source))
    loaded = load_model(tmp_path / "out")
    save_model(loaded, tmp_path / "plain")
    plain = load_file(tmp_path / "plain/model.safetensors")
    assert set(plain) == set(before)
    seen = {"int8": 0, "packed": 0}
    for name, weight in before.items():
        if f"{name}_packed" in disk:
            bits = 4 if ".experts." in name else 8
            assert bits == 4 and plan is W4A8 and not wide or "kv_b_proj" in name
            expected = restore(disk, name, bits)
            seen["packed"] += 1
        elif f"{name}_scale" in disk:
            assert disk[name].dtype == np.int8 and disk[f"{name}_scale"].shape == (len(weight), 1)
            expected = disk[name].astype(np.float32) * disk[f"{name}_scale"]
            low = -8 if plan is W4A8 and ".experts." in name else -128
            assert disk[name].min() >= low and disk[name].max() <= -low - 1
            seen["int8"] += 1
        else:
            expected = weight
        assert np.array_equal(plain[name], expected), name
    assert seen == {
        "int8": 21 if plan is W4A8 and not wide else 45,
        "packed": 27 if plan is W4A8 and not wide else 3,
    }

    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    for name in before:
        module = name.removesuffix(".weight")
        fits = [g for g in groups if any(re.match(target[3:], module) for target in g["targets"])]
        assert len(fits) == (f"{name}_scale" in disk), name
        if fits:
            assert (fits[0]["input_activations"] is None) == ("kv_b_proj" in name), name
            packed = f"{name}_packed" in disk
            assert fits[0]["format"] == ("pack-quantized" if packed else "int-quantized")

    attention, moe = loaded.layers[1].self_attn, loaded.layers[1].mlp

    def rounded(x: torch.Tensor) -> torch.Tensor:
        steps = x.abs().amax(-1, keepdim=True) / 127.5
        return (x / steps).round().clamp(-128, 127) * steps

    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    for linear in (attention.q_a_proj, moe.shared_experts.gate_proj):
        assert torch.equal(linear(x), rounded(x) @ linear.weight.T)
    assert isinstance(attention.kv_b_proj, torch.nn.Linear) and attention.kv_b_proj.scale is None
    gate, up, down = (
        torch.tensor(plain[f"model.layers.1.mlp.experts.2.{part}_proj.weight"])
        for part in ("gate", "up", "down")
    )
    inner = torch.nn.functional.silu(rounded(x) @ gate.T) * (rounded(x) @ up.T)
    only_2 = torch.tensor([0, 0, 16, 16], dtype=torch.int32)
    assert torch.allclose(moe.experts(x, only_2), rounded(inner) @ down.T, atol=1e-8)


@pytest.mark.parametrize("plan,wide", [(MIXED, False), (W8A8, False), (W4A8, False), (W4A8, True)])
def test_compressed_tensors_reads_the_same(
    source: Path, tmp_path: Path, plan: dict[str, QuantScheme], wide: bool
) -> None:
    """The library itself (not one of our dependencies): same matrices, same weights, same products."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    quantize_checkpoint(source, tmp_path / "out", plan, wide)
    loaded = load_model(tmp_path / "out")
    save_model(loaded, tmp_path / "plain")
    disk, plain = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("out", "plain"))
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    tree = torch.nn.Module()
    for name, weight in plain.items():
        at = tree
        *path, leaf = name.removesuffix(".weight").split(".")
        for step in path:
            if not hasattr(at, step):
                at.add_module(step, torch.nn.Module())
            at = getattr(at, step)
        if name.endswith(".weight") and weight.ndim == 2:
            at.add_module(leaf, torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    config = QuantizationConfig.model_validate(said)
    apply_quantization_config(tree, config, show_progress=False)
    compressor = ModelCompressor(config)
    compressor.compress_model(tree)
    assert {n for n in tree.state_dict() if "packed" in n} == {n for n in disk if "packed" in n}
    wanted = {name: torch.tensor(value) for name, value in disk.items() if name in tree.state_dict()}
    tree.load_state_dict(wanted)
    compressor.decompress_model(tree)
    quantised = [n for n in plain if f"{n}_scale" in disk]
    assert len(quantised) == sum(hasattr(module, "quantization_scheme") for module in tree.modules()) > 20
    for name in quantised:
        module = tree.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(module.weight, torch.tensor(plain[name])), name
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0))  # tokens are its second dimension
    for name in ("model.layers.1.self_attn.q_a_proj", "model.layers.0.mlp.up_proj"):
        ours = loaded.get_submodule(name.removeprefix("model."))
        assert torch.allclose(tree.get_submodule(name)(x), ours(x), atol=1e-6), name
    expert = tree.get_submodule("model.layers.1.mlp.experts.2.down_proj")
    assert (expert.quantization_scheme.input_activations is not None) == (plan is not MIXED)


def test_what_others_write_is_read(source: Path, tmp_path: Path) -> None:
    """llm-compressor's form of W8A8: one group for class Linear, scales in bf16, some modules ignored."""
    quantize_checkpoint(source, tmp_path / "out", W8A8)
    config = json.loads((tmp_path / "out/config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"] | {"targets": ["Linear"]}
    config["quantization_config"] |= {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    (tmp_path / "out/manifest.json").unlink()
    loaded = load_model(tmp_path / "out")
    assert (
        loaded.layers[0].mlp.up_proj.scale is not None and loaded.mtp_layer.self_attn.o_proj.scale is not None
    )

    group["input_activations"] |= {"strategy": "tensor", "dynamic": False}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(FullarcError, match="inputs rounded as .*'strategy': 'tensor'"):
        load_model(tmp_path / "out")


def test_schemes_of_the_verb(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {}
    for scheme in ("w4a16", "w8a8", "w4a8"):
        more = ["--group", "16"] if scheme == "w4a16" else ["--search", "--rotate"]
        words = ["quantize", str(source), str(tmp_path / scheme), "--scheme", scheme, *more, "--json"]
        assert cli.main(words) == 0
        kinds[scheme] = {kind["kind"]: kind for kind in json.loads(capsys.readouterr().out)["kinds"]}
    assert set(kinds["w4a16"]) == {"experts"} and not kinds["w4a16"]["experts"]["tokens"]
    for scheme, bits in (("w8a8", 8), ("w4a8", 4)):
        assert {kind: (told["bits"], told["tokens"]) for kind, told in kinds[scheme].items()} == {
            kind: (bits if kind == "experts" else 8, True) for kind in W8A8
        }
    told = kinds["w8a8"]["dense"]
    assert told["ratio"] == pytest.approx(told["bytes_after"] / (told["bytes_before"] / 2))

    cases = [
        (["--scheme", "w8a8", "--bits", "4"], 2, "--scheme says what"),
        (["--wide"], 2, "--wide is for"),
        (["--scheme", "w4a8", "--group", "16"], 3, "A group of 16 does not go with 8-bit inputs"),
    ]
    for words, code, message in cases:
        words = ["quantize", str(source), str(tmp_path / "new"), *words]
        if code == 2:
            with pytest.raises(SystemExit) as stop:
                cli.main(words)
            assert stop.value.code == 2
        else:
            assert cli.main(words) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
