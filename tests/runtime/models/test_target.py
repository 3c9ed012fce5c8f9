"""Logits equal those of `transformers` for every supported architecture, through the paged cache."""

from __future__ import annotations

import functools
import json
import operator

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_rl.errors import WeightsError
from echo_rl.runtime.block_manager import BlockManager
from echo_rl.runtime.kv_cache import KVCache
from echo_rl.runtime.layout import Layout, ragged_rows
from echo_rl.runtime.models.architecture import SUPPORTED, rope_table
from echo_rl.runtime.models.target import Target
from echo_rl.runtime.sequence import Sequence
from tests import tiny


def own_logits(target: Target, prompts: list[list[int]], split: int) -> list[torch.Tensor]:
    """All rows' logits, the prompts processed in two passes: `split` tokens, then the rest."""
    arch, device = target.arch, target.embed.device
    blocks = BlockManager(64, 4, 0)
    cache = KVCache.allocate(256, (arch.layers, arch.kv_heads, arch.head_dim), None, device, target.embed.dtype)
    sequences = [Sequence.__new__(Sequence) for _ in prompts]
    for s, prompt in zip(sequences, prompts, strict=True):
        s.tokens, s.kv_len, s.blocks, s.reserved_blocks = prompt, 0, [], 16
        blocks.grow(s, len(prompt))
    pieces: list[list[torch.Tensor]] = [[] for _ in prompts]
    for begin, end in ((0, split), (split, 99)):
        layout = Layout(sequences, 4, device)
        chunks = [p[begin:end] for p in prompts]
        counts = [len(c) for c in chunks]
        owner, local, starts = ragged_rows(counts)
        positions = layout.host_kv_lens[owner] + local
        mask = torch.from_numpy(local[:, None] >= np.arange(max(counts)))
        slots = layout.host_slots(owner, positions)
        view, positions = layout.host_view(slots, starts, layout.host_kv_lens, counts, mask), layout.tensor(positions)
        hidden, _ = target.forward(torch.tensor(functools.reduce(operator.iadd, chunks, [])), positions, cache, view)
        for s, chunk, piece, out in zip(
            sequences, chunks, pieces, target.logits(hidden).float().split(counts), strict=True
        ):
            s.kv_len += len(chunk)
            piece.append(out)
    return [torch.cat(p) for p in pieces]


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_tiny_models_match_transformers(tmp_path, architecture):
    transformers = pytest.importorskip("transformers")
    folder = tiny.target_folder(tmp_path, architecture)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    target = Target.load(folder, 128, torch.device("cpu"), torch.float32)
    prompts = [[5, 9, 70, 71, 3, 8, 200, 41], [66], [70] * 13]
    for prompt, ours in zip(prompts, own_logits(target, prompts, split=5), strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0]
        assert (ours - expected).abs().max() < 1e-3


def test_llama3_rope_matches_transformers():
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 128
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=1024,
        rope_parameters={**scaling, "rope_theta": 500000.0},
    )  # fmt: skip
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.arange(1024)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1, 64), positions)
    ours = rope_table(32, 500000.0, 1024, scaling)
    torch.testing.assert_close(ours[0], cos[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[1], sin[0], atol=1e-4, rtol=0)


def test_taps_are_the_states_after_their_layers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny.target_folder(tmp_path)
    target = Target.load(folder, 128, torch.device("cpu"), torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = torch.tensor([5, 9, 70, 71])
    with torch.no_grad():
        states = theirs(prompt[None], output_hidden_states=True).hidden_states
    sequence = Sequence.__new__(Sequence)
    sequence.kv_len, sequence.blocks = 0, [0]
    layout = Layout([sequence], 4, torch.device("cpu"))
    local = torch.arange(4)
    count = torch.tensor([4])
    view = layout.view(local, count, layout.kv_lens, count, local[:, None] >= local)
    cache = KVCache.allocate(4, (tiny.LAYERS, tiny.KV_HEADS, tiny.HEAD_DIM), None, torch.device("cpu"), torch.float32)
    _hidden, taps = target.forward(prompt, local, cache, view, (0, 1))
    torch.testing.assert_close(taps, torch.cat([states[1][0], states[2][0]], 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_size": 48}, "shape"),
        ({"num_hidden_layers": 5}, "no tensor"),
        ({"num_hidden_layers": 2}, "ignore"),
    ],
)
def test_models_that_would_run_wrongly_are_refused(tmp_path, change, words):
    folder = tiny.target_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(WeightsError, match=words):
        Target.load(folder, 128, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("architecture", "lost"),
    [
        ("Qwen3ForCausalLM", "self_attn.q_norm.weight"),
        ("Qwen3ForCausalLM", "self_attn.k_norm.weight"),
        ("Qwen2ForCausalLM", "self_attn.k_proj.bias"),
        ("Qwen2ForCausalLM", "proj.bias"),
        ("LlamaForCausalLM", "lm_head.weight"),
    ],
)
def test_lost_tensors_are_refused(tmp_path, architecture, lost):
    path = tiny.target_folder(tmp_path, architecture) / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.endswith(lost)}, path)
    with pytest.raises(WeightsError, match=f"no tensor .*{lost}"):
        Target.load(tmp_path, 128, torch.device("cpu"), torch.float32)


def test_biases_that_a_config_promises_are_not_left_out(tmp_path):
    path = tiny.target_folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": True}))
    with pytest.raises(WeightsError, match=r"no tensor .*q_proj\.bias"):
        Target.load(tmp_path, 128, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_folders_are_refused(tmp_path, file, damage):
    path = tiny.target_folder(tmp_path) / file
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=file):
        Target.load(tmp_path, 128, torch.device("cpu"), torch.float32)
