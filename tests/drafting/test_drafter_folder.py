from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from echo_rl.drafting.model import DrafterNet
from echo_rl.errors import DrafterMismatch, WeightsError
from echo_rl.runtime.drafters.folder import DrafterConfig, draft_to_target, load_drafter, offsets_of, save_drafter

CONFIG = DrafterConfig(16, 16, 40, (1, 3, 4), 2, 1, 8, 24, 12, rope_theta=100.0, max_positions=64)
IDS = torch.tensor([0, 2, 3, 5, 8, 13, 21, 22, 30, 37, 38, 39])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_drafter(tmp_path, CONFIG, DrafterNet(CONFIG, IDS).export())
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value != "drop"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_round_trip(folder: Path) -> None:
    torch.manual_seed(0)
    expected = DrafterNet(CONFIG, IDS).export()
    config, tensors = load_drafter(folder)
    assert config == CONFIG
    assert tensors.keys() == expected.keys() | {"t2d"}
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert torch.equal(draft_to_target(tensors["d2t"]), IDS)
    assert torch.equal(tensors["t2d"].nonzero().flatten(), IDS)
    assert not list(folder.glob(".*.part"))


def test_layout_is_the_published_one(folder: Path) -> None:
    data = json.loads((folder / "config.json").read_text())
    assert data["architectures"] == ["LlamaForCausalLMEagle3"] and data["tie_word_embeddings"] is False
    assert data["draft_vocab_size"] == 12 and data["vocab_size"] == 40
    assert data["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    tensors = load_file(folder / "model.safetensors")
    assert tensors["fc.weight"].shape == (16, 48)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (16, 32)
    assert tensors["midlayer.self_attn.k_proj.weight"].shape == (8, 32)


def test_offsets_invert() -> None:
    assert torch.equal(draft_to_target(offsets_of(IDS)), IDS)


def test_usual_taps_where_the_config_names_none(folder: Path) -> None:
    edit_config(folder, eagle_config=None)
    assert load_drafter(folder, target_layers=30)[0].taps == (1, 14, 26)
    with pytest.raises(WeightsError, match="target_layers"):
        load_drafter(folder)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, WeightsError, "architectures"),
        ({"hidden_size": "drop"}, WeightsError, "hidden_size"),
        ({"draft_vocab_size": "drop"}, WeightsError, "draft_vocab_size"),
        ({"draft_vocab_size": 13}, WeightsError, "different drafters"),
        ({"draft_vocab_size": 41}, WeightsError, "exceeds"),
        ({"num_hidden_layers": 2}, WeightsError, "1 layer"),
        ({"num_key_value_heads": 3}, WeightsError, "divisor"),
        ({"attention_bias": True}, WeightsError, "bias"),
        ({"rope_scaling": {"rope_type": "llama3"}}, WeightsError, "rope scaling"),
        ({"intermediate_size": "wide"}, WeightsError, "config.json"),
        ({"target_hidden_size": 32}, DrafterMismatch, "32"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 1, 4]}}, WeightsError, "taps"),
    ],
)
def test_bad_config(folder: Path, change: dict[str, Any], error: type[Exception], says: str) -> None:
    edit_config(folder, **change)
    with pytest.raises(error, match=says):
        load_drafter(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("norm.weight"), "missing.*norm.weight"),
        (lambda t: t.update({"midlayer.extra": torch.ones(1)}), "unknown.*midlayer.extra"),
        (lambda t: t.update({"fc.weight": torch.ones(16, 47)}), "fc.weight is"),
        (lambda t: t["fc.weight"].fill_(float("nan")), "NaN"),
        (lambda t: t["d2t"].fill_(39), "distinct ids"),
        (lambda t: t["d2t"].fill_(-1), "distinct ids"),
        (lambda t: t.update({"d2t": t["d2t"].float()}), "integer"),
        (lambda t: t["t2d"].logical_not_(), "contradicts"),
    ],
)
def test_bad_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], says: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(WeightsError, match=says):
        load_drafter(folder)


def test_broken_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="truncated"):
        load_drafter(folder)
    weights.unlink()
    with pytest.raises(WeightsError, match="no model.safetensors"):
        load_drafter(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="JSON"):
        load_drafter(folder)


def test_a_drafter_of_another_target_is_refused() -> None:
    CONFIG.check_target(hidden=16, vocab=40, layers=6)
    for wrong in ({"hidden": 32}, {"vocab": 41}, {"layers": 5}):
        with pytest.raises(DrafterMismatch, match="trained for this target"):
            CONFIG.check_target(**{"hidden": 16, "vocab": 40, "layers": 6, **wrong})
