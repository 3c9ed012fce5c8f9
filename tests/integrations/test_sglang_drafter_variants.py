"""EAGLE-3 folders as other makers write them, read here."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_rl.errors import WeightsError
from echo_rl.runtime.drafters.folder import load_drafter
from tests import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.drafter_folder(tmp_path / "drafter")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def same(folder, expected, rtol=0.0):
    config, tensors = load_drafter(folder, target_layers=8)
    assert config == expected[0]
    assert tensors.keys() >= expected[1].keys() - {"t2d"}
    for name, tensor in expected[1].items():
        if name != "t2d":
            torch.testing.assert_close(tensors[name].to(tensor.dtype), tensor, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("prefix", ["layers.0.", "model.layers.0."])
def test_another_name_of_the_layer(folder, prefix):
    expected = load_drafter(folder)
    rewrite(folder, lambda ts: {name.replace("midlayer.", prefix): t for name, t in ts.items()})
    same(folder, expected)


def test_a_prefix_of_every_name(folder):
    expected = load_drafter(folder)
    rewrite(folder, lambda ts: {f"model.{name}": t for name, t in ts.items()})
    same(folder, expected)


def test_the_target_vocabulary_mask_may_be_absent(folder):
    expected = load_drafter(folder)
    rewrite(folder, lambda ts: {name: t for name, t in ts.items() if name != "t2d"})
    same(folder, expected)


def test_an_embedding_table_is_dropped(folder):
    expected = load_drafter(folder)
    rewrite(folder, lambda ts: {**ts, "embed_tokens.weight": torch.ones(tiny.VOCAB, tiny.HIDDEN)})
    same(folder, expected)
    assert "embed_tokens.weight" not in load_drafter(folder)[1]


def test_an_embedding_table_of_another_target_is_refused(folder):
    rewrite(folder, lambda ts: {**ts, "embed_tokens.weight": torch.ones(tiny.VOCAB + 1, tiny.HIDDEN)})
    with pytest.raises(WeightsError, match="this target's drafter"):
        load_drafter(folder)


def test_half_precision(folder):
    expected = load_drafter(folder)
    rewrite(folder, lambda ts: {name: t.half() if t.is_floating_point() else t for name, t in ts.items()})
    same(folder, expected, rtol=1e-3)


def test_shards(folder):
    expected = load_drafter(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(folder, expected)


def test_explicit_taps_and_the_usual_ones(folder):
    taps = [0, 2, 5]
    reconfigure(folder, eagle_config={"eagle_aux_hidden_state_layer_ids": taps})
    assert load_drafter(folder)[0].taps == tuple(taps)
    reconfigure(folder, eagle_config=None)
    assert load_drafter(folder, target_layers=8)[0].taps == (1, 3, 4)  # 8 layers: enters 2, 4 and 5


def test_without_d2t_both_vocabularies_are_the_same(folder):
    whole = torch.randn(tiny.VOCAB, tiny.HIDDEN)
    keep = {"d2t", "t2d"}
    rewrite(folder, lambda ts: {**{k: v for k, v in ts.items() if k not in keep}, "lm_head.weight": whole})
    reconfigure(folder, draft_vocab_size=tiny.VOCAB)
    assert not load_drafter(folder)[1]["d2t"].any()
    reconfigure(folder, draft_vocab_size=tiny.VOCAB - 1)
    with pytest.raises(WeightsError, match="missing.*d2t"):
        load_drafter(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "drafter.pt"])
def test_pickles_are_refused_with_the_remedy(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(WeightsError, match="weights_only=True"):
        load_drafter(folder)


def test_one_tensor_under_two_names(folder):
    rewrite(folder, lambda ts: {**ts, "model.norm.weight": ts["norm.weight"].clone()})
    with pytest.raises(WeightsError, match="two tensors mean norm.weight"):
        load_drafter(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_output": True},
        {"eagle_config": {"norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]}},
        {"use_aux_norm": True},
        {"bias": True},
        {"tie_word_embeddings": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"hidden_act": "gelu"},
        {"eagle_config": {"use_aux_hidden_state": False}},
    ],
    ids=str,
)
def test_other_arithmetic_is_refused(folder, change):
    reconfigure(folder, **change)
    with pytest.raises(WeightsError, match=r"supported|silu|EAGLE-3"):
        load_drafter(folder, target_layers=8)
