"""Hands the live engine and a model's folder to the rest of this room, which knows neither."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from echo_rl.contracts import Request, SamplingParams
from echo_rl.controllers import registry
from echo_rl.drafting.answers import Answers, synthesize_answers
from echo_rl.drafting.features import cache_features
from echo_rl.drafting.synthesize import SMOLLM2_CHAT, SynthesizeConfig, synthesize
from echo_rl.drafting.train import TrainingRun, check, train
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.drafting.warm_start import TargetParts
from echo_rl.errors import ConfigError, WeightsError
from echo_rl.runtime.device import resolve
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.models.architecture import read_architecture
from echo_rl.runtime.models.checkpoint import read_tensors
from echo_rl.utils.result_store import digest
from echo_rl.workloads.datasets import FileOptions, Message
from echo_rl.workloads.datasets.options import notes
from echo_rl.workloads.driver import serve


def synthesize_on(engine: Engine, options: SynthesizeConfig, concurrency: int) -> list[Path]:
    """Lets the engine's SmolLM2 write the conversations; returns the shards. Raises what `synthesize` raises."""
    complete = EngineGenerator(engine, concurrency)
    return synthesize(options, SMOLLM2_CHAT, lambda text: list(engine.tokenizer.encode(text)), complete)


def train_for(folder: Path, options: TrainConfig, taps: tuple[int, ...]) -> TrainingRun:
    """Trains a drafter for the model in `folder`, whose features are computed first where they are absent.

    Raises `ConfigError` before anything runs where the options don't fit the model.
    """
    parts = target_parts(folder)
    check(options, taps, parts, read_architecture(folder).layers)
    model = digest(folder / "config.json", *sorted(folder.glob("*.safetensors")))
    cache_features(options.data, options.features, features_of(folder, taps), taps, model)
    return train(options, parts)


def answer_on(engine: Engine, options: SynthesizeConfig, files: FileOptions, concurrency: int) -> Answers:
    """Lets the engine's target answer the prompts of the files. Raises as `FileOptions.files` and
    `synthesize_answers`."""
    read = files.files()
    conversations = files.conversations(read, options.seed)
    complete = EngineGenerator(engine, concurrency)
    done = synthesize_answers(options, conversations, files.turns, EngineChat(engine), complete, files.facts(read))
    return replace(done, notes=(*notes(read), *done.notes))


class EngineChat:
    """The chat of an engine's target."""

    def __init__(self, engine: Engine) -> None:
        self._tokenizer, arch = engine.tokenizer, engine.runner.target.arch
        self.end_of_turn = self._last(arch.eos)
        self.most = engine.max_context

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Raises `RequestError` where the chat template refuses the messages."""
        return list(self._tokenizer.chat(messages))

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def _last(self, eos: Sequence[int]) -> int:
        """The one of the tokens that end a text with which the chat template ends a turn; the first where none does."""
        if not eos:
            raise ConfigError("the model names no eos_token_id, so its answers have no end; correct its folder")
        turns = self.encode([{"role": role, "content": "Hello."} for role in ("user", "assistant", "user")])
        return next((token for token in reversed(turns) if token in eos), eos[0])


class EngineGenerator:
    """Completes token prompts by plain decoding on the live engine.

    Deterministic: a prompt's seed is its place among the prompts of the call and what they all are.
    """

    def __init__(self, engine: Engine, concurrency: int) -> None:
        self.engine = engine
        self.concurrency = concurrency

    def __call__(
        self, prompts: list[list[int]], temperature: float, max_new: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        """New tokens of each prompt without the stop token. Raises `ConfigError` for a stop the engine lacks."""
        missing = set(stop_ids) - set(self.engine.runner.target.arch.eos)
        if missing:
            raise ConfigError(
                f"the engine does not stop at token ids {sorted(missing)}; use the model's own end of turn"
            )
        base = zlib.crc32(np.array([token for prompt in prompts for token in prompt], dtype=np.int64).tobytes())
        requests = [
            Request(str(i), tuple(prompt), SamplingParams(temperature, seed=base + i, max_new_tokens=max_new))
            for i, prompt in enumerate(prompts)
        ]
        record = serve(self.engine, registry.make("none"), requests, self.concurrency)
        return [[token for token in request.tokens if token not in stop_ids] for request in record.requests]


def features_of(folder: Path, taps: Sequence[int]) -> Callable[[Tensor], tuple[list[Tensor], Tensor]]:
    """Padded ids [B, T] -> (hidden states [B, T, hidden] after each tapped layer, those after the final norm).

    In the precision that the engine serves in, which is also what a drafter will read.
    """
    from transformers import AutoModel

    _, dtype = resolve("cpu", "auto")
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def compute(ids: Tensor) -> tuple[list[Tensor], Tensor]:
        states = model(input_ids=ids, output_hidden_states=True).hidden_states  # [0] is the embedding
        return [states[tap + 1] for tap in taps], states[-1]

    return compute


def target_parts(folder: Path) -> TargetParts:
    """The weights that a drafter starts from; the embedding, which sets the precision of training, in the
    machine's own. Raises `WeightsError`."""
    _, dtype = resolve("cpu", "auto")
    arch, tensors = read_architecture(folder), read_tensors(folder)
    last = f"model.layers.{arch.layers - 1}."
    embedding = tensors["model.embed_tokens.weight"].to(dtype)
    tied = arch.ties("lm_head.weight" in tensors)
    if not tied and "lm_head.weight" not in tensors:
        raise WeightsError(f"{folder} has no lm_head.weight, which its config.json promises; download the model again")
    return TargetParts(
        embedding=embedding,
        output=embedding if tied else tensors["lm_head.weight"].float(),
        norm=tensors["model.norm.weight"].float(),
        attention_norm=tensors[f"{last}input_layernorm.weight"].float(),
        mlp_norm=tensors[f"{last}post_attention_layernorm.weight"].float(),
        q=tensors[f"{last}self_attn.q_proj.weight"].float(),
        k=tensors[f"{last}self_attn.k_proj.weight"].float(),
        v=tensors[f"{last}self_attn.v_proj.weight"].float(),
        o=tensors[f"{last}self_attn.o_proj.weight"].float(),
        gate=tensors[f"{last}mlp.gate_proj.weight"].float(),
        up=tensors[f"{last}mlp.up_proj.weight"].float(),
        head_dim=arch.head_dim,
    )
