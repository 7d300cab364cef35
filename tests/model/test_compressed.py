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
