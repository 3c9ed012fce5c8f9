"""Tiny random models for fast tests, written as the folders that users bring."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from echo_rl.config import EngineConfig, from_mapping
from echo_rl.runtime.drafters.folder import DrafterConfig, save_drafter
from echo_rl.runtime.engine import Engine

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 256, 32, 4, 4, 2, 16, 48
COMMON = range(65, 89)
"""Token ids that carry almost all of the tiny target's probability: a random drafter hits them often."""


def device() -> str:
    """The device that tiny engines run on: ``ECHO_RL_TEST_DEVICE``, by default the CPU whatever the machine has."""
    return os.environ.get("ECHO_RL_TEST_DEVICE", "cpu")


def target_folder(folder: Path, architecture: str = "LlamaForCausalLM", seed: int = 0) -> Path:
    """A random target whose likely tokens are COMMON; token 0 is EOS (and practically never drawn)."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.15) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * scale

    head = torch.zeros(VOCAB, HIDDEN)
    head[list(COMMON)] = random(len(COMMON), HIDDEN, scale=1.5)
    tensors = {"model.embed_tokens.weight": random(VOCAB, HIDDEN, scale=1.0), "lm_head.weight": head}
    tensors["model.norm.weight"] = 1 + random(HIDDEN)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
            ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
            ("mlp.up_proj", INTERMEDIATE, HIDDEN),
            ("mlp.down_proj", HIDDEN, INTERMEDIATE),
        ):
            tensors[f"{p}{name}.weight"] = random(rows, columns, scale=0.3)
            if architecture.startswith("Qwen2") and name[10:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{p}{name}.bias"] = random(rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{p}{name}.weight"] = 1 + random(HIDDEN)
        if architecture.startswith("Qwen3"):
            for name in ("q_norm", "k_norm"):
                tensors[f"{p}self_attn.{name}.weight"] = 1 + random(HEAD_DIM)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(architecture)))
    _tokenizer().save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def _config(architecture: str) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": architecture.split("For")[0].lower(),
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def drafter_config(hidden: int = HIDDEN, taps: tuple[int, ...] = (0, 1, 2)) -> DrafterConfig:
    return DrafterConfig(
        hidden=hidden, target_hidden=hidden, taps=taps, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
        intermediate=INTERMEDIATE, target_vocab=VOCAB, draft_vocab=len(COMMON), max_positions=512,
    )  # fmt: skip


def drafter_tensors(config: DrafterConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(*shape, generator=g) * 0.3 for n, shape in config.shapes().items() if n != "d2t"}
    tensors["d2t"] = torch.full((config.draft_vocab,), COMMON[0], dtype=torch.int64)
    return tensors


def drafter_folder(folder: Path, hidden: int = HIDDEN, taps: tuple[int, ...] = (0, 1, 2)) -> Path:
    config = drafter_config(hidden, taps)
    save_drafter(folder, config, drafter_tensors(config))
    return folder


def engine(root: Path, **settings: object) -> Engine:
    """A tiny engine in float32 on `device`; `settings` override the configuration."""
    values: dict[str, object] = {
        "model": str(target_folder(root / "target")),
        "drafter": str(drafter_folder(root / "drafter")),
        "device": device(), "dtype": "float32", "kv_tokens": 4096, "max_context": 256, "max_nodes": 24,
        "max_expanded": 40,
    }  # fmt: skip
    return Engine.load(from_mapping(EngineConfig, {**values, **settings}))
