"""What a checkpoint may be wrong in: one sentence names the file, the tensor or the field."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fullarc.config.errors import FullarcError
from fullarc.config.model import preset
from fullarc.model import GlmMoeDsa, load_model, save_model


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim must be even"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": -1}, "num_attention_heads"),
        ({"index_topk": 0}, "index_topk"),
        ({"index_head_dim": 8}, "index_head_dim must be at least qk_rope_head_dim"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok exceeds n_routed_experts"),
        ({"n_group": 3}, "n_routed_experts must be a multiple of n_group"),
        ({"n_group": 4, "topk_group": 5}, "topk_group exceeds n_group"),
        ({"n_group": 8, "num_experts_per_tok": 2}, "num_experts_per_tok exceeds the experts of topk_group"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace exceeds num_hidden_layers"),
        ({"indexer_types": ("full",)}, "indexer_types must name every one"),
        ({"indexer_types": ("shared",) * 4}, "indexer_types must begin with full"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_sizes_that_cannot_be_name_their_field(wrong: dict, message: str, tmp_path: Path) -> None:
    """From a recipe or a call, and from a checkpoint's config.json."""
    with pytest.raises(FullarcError, match=message):
        preset("2m", **wrong)
    save_model(GlmMoeDsa(preset("nano")).init_weights(1), tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    eight = {"n_routed_experts": 8, "num_hidden_layers": 4}
    rope = {"rope_parameters": {"rope_type": "default"} | wrong}
    (tmp_path / "m" / "config.json").write_text(json.dumps(content | eight | rope | wrong))
    with pytest.raises(FullarcError, match=f"config.json: .*{message}"):
        load_model(tmp_path / "m")


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    save_model(GlmMoeDsa(preset("nano")).init_weights(1), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FullarcError, match="model.safetensors is damaged"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    weights.write_bytes(content[:100])
    with pytest.raises(FullarcError, match="cannot be read"):
        load_model(tmp_path / "m")
    with pytest.raises(FullarcError, match="no config.json"):
        load_model(tmp_path / "nothing")
    for content in ("[1]", "{", "3"):
        (tmp_path / "m" / "config.json").write_text(content)
        with pytest.raises(FullarcError, match="config.json is not a JSON object"):
            load_model(tmp_path / "m")


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save_model(GlmMoeDsa(preset("nano")).init_weights(1), tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    path = tmp_path / "m" / "model.safetensors"
    good = load_file(path)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    copies = "model.layers.{}.embed_tokens.weight", good["model.embed_tokens.weight"].clone()
    for bad, message in [
        ({k: v for k, v in good.items() if k != name}, f"{name} is missing"),
        (good | {"model.layers.9.foo.weight": torch.zeros(1)}, "unexpected tensor model.layers.9.foo.weight"),
        (good | {name: torch.zeros(3, 3)}, f"{name} has shape"),
        (good | {copies[0].format(1): copies[1]}, "unexpected tensor model.layers.1.embed_tokens.weight"),
        (good | {copies[0].format(3): copies[1]}, "unexpected tensor model.layers.3.embed_tokens.weight"),
    ]:
        save_file(bad, path)
        with pytest.raises(FullarcError, match=message.replace(".", r"\.")):
            load_model(tmp_path / "m")
    save_file(
        good | {copies[0].format(2): copies[1]}, path
    )  # released checkpoints repeat it beside the MTP layer
    load_model(tmp_path / "m")


def test_an_index_names_files_of_its_own_folder(tmp_path: Path) -> None:
    save_model(GlmMoeDsa(preset("nano")).init_weights(1), tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    weights, index = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "model.safetensors.index.json"
    weights.rename(tmp_path / "elsewhere.safetensors")
    for content, message in [
        ({"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}, "elsewhere.safetensors is missing"),
        ({"weight_map": {"lm_head.weight": "gone.safetensors"}}, "gone.safetensors is missing, although"),
        (["weight_map"], "index.json cannot be read"),
        ({"weight_map": {}}, "holds no .safetensors file"),
    ]:
        index.write_text(json.dumps(content))
        with pytest.raises(FullarcError, match=message):
            load_model(tmp_path / "m")
