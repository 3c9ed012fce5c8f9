from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from echo_rl.drafting.conversations import Conversations, choose_vocabulary, shards, token_counts
from echo_rl.drafting.features import CLAIM, batches_by_length, cache_features, features_claim, open_features
from echo_rl.drafting.synthesize import SMOLLM2_CHAT, SynthesizeConfig, opening, synthesize
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.errors import ConfigError

TargetCall = Callable[[Tensor], tuple[list[Tensor], Tensor]]


def test_shard_round_trip(tmp_path: Path) -> None:
    talk = Conversations.of([([1, 2, 70000], 1, True), ([5, 6], 2, False)])
    talk.save(tmp_path / "a.npz")
    again = Conversations.load(tmp_path / "a.npz")
    assert again[0][again.starts[0] :].tolist() == [2, 70000] and again[1].tolist() == [5, 6]
    assert again.greedy.tolist() == [True, False] and again.lengths.tolist() == [3, 2]
    assert shards(tmp_path) == [tmp_path / "a.npz"]


def test_bad_shards(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run the synthesis"):
        shards(tmp_path)
    Conversations.of([([999, 2, 3], 1, True)]).save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    np.savez(tmp_path / "a.npz", tokens=np.zeros(3))
    with pytest.raises(ConfigError, match="lacks"):
        Conversations.load(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", tokens=np.zeros(3), offsets=np.array([0, 2]), starts=np.array([1]))
    with pytest.raises(ConfigError, match="damaged"):
        Conversations.load(tmp_path / "a.npz")
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2], whole.replace(b"\xe7\x03", b"\xe7\x04")):
        (tmp_path / "a.npz").write_bytes(damaged)
        with pytest.raises(ConfigError, match="a.npz is damaged"):
            Conversations.load(tmp_path / "a.npz")


def test_vocabulary_is_the_most_frequent_tokens() -> None:
    talk = Conversations.of([([9, 9, 9, 3, 3, 3, 4, 4, 6], 3, True)])
    counts = token_counts([talk], 10)
    assert counts.tolist() == [0, 0, 0, 3, 2, 0, 1, 0, 0, 3]
    ids, coverage = choose_vocabulary(counts, 3, always=[8])
    assert ids.tolist() == [3, 8, 9] and coverage == pytest.approx(6 / 9)
    with pytest.raises(ConfigError, match="draft vocabulary"):
        choose_vocabulary(counts, 11)


def test_groups_hold_every_conversation_once() -> None:
    lengths = [5, 100, 3, 3, 8, 2]
    groups = batches_by_length(lengths, 20)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 20 for group in groups)


def test_features_are_the_targets_and_resume(world: TrainConfig, target: TargetCall) -> None:
    found = open_features(world.data, world.features)
    for shard in found:
        for index in range(len(shard.conversations)):
            taps, final = shard.rows(index)
            expected, last = target(torch.from_numpy(shard.conversations[index])[None])
            assert torch.equal(taps, torch.cat(expected, -1)[0].bfloat16())
            assert torch.equal(final, last[0].bfloat16())

    def forbidden(ids: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        raise AssertionError("a cached shard must not be computed again")

    cache_features(world.data, world.features, forbidden, (1, 3, 4), "counting")
    for taps, model, changed in (((0, 3, 4), "counting", "taps"), ((1, 3, 4), "other", "model")):
        with pytest.raises(ConfigError, match=f"with another {changed}; choose another folder"):
            cache_features(world.data, world.features, target, taps, model)


def test_features_of_an_unknown_model_are_refused(world: TrainConfig, target: TargetCall) -> None:
    (Path(world.features) / CLAIM).unlink()
    with pytest.raises(ConfigError, match="of unknown settings"):
        cache_features(world.data, world.features, target, (1, 3, 4), "counting")
    with pytest.raises(ConfigError, match="doesn't say what its features are of"):
        features_claim(world.features)


def test_features_of_other_conversations_are_refused(world: TrainConfig) -> None:
    Conversations.of([([1, 2, 3], 1, True)]).save(Path(world.data) / "shard_1.npz")
    with pytest.raises(ConfigError, match="cache again"):
        open_features(world.data, world.features)


class Scripted:
    """Completes each prompt with tokens that tell how it was called."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def __call__(
        self, prompts: list[list[int]], temperature: float, max_new: int, stop_ids: Sequence[int]
    ) -> list[list[int]]:
        self.calls.append(temperature)
        return [[50 + len(prompt) % 10] * (max_new if len(prompt) % 2 else 9) for prompt in prompts]


def test_synthesis(tmp_path: Path) -> None:
    config = SynthesizeConfig(str(tmp_path), shards=2, per_shard=12, user_tokens=5, answer_tokens=20, greedy_share=0.5)
    engine = Scripted()

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    paths = synthesize(config, SMOLLM2_CHAT, encode, engine)
    assert set(engine.calls) == {1.0, 0.0, 0.7} and len(engine.calls) == 6
    tail = [2, *encode(SMOLLM2_CHAT.before_answer)]
    for path in paths:
        talk = Conversations.load(path)
        assert len(talk) == 12 and 0 < talk.greedy.sum() < 12
        for index in range(len(talk)):
            tokens, start = talk[index].tolist(), int(talk.starts[index])
            assert tokens[: len(SMOLLM2_CHAT.before_user)] == encode(SMOLLM2_CHAT.before_user)
            assert tokens[start - len(tail) : start] == tail
            assert len(tokens) - start == 20 or tokens[-1] == 2  # cut off, or ended by the end-of-turn token
    saved, calls = paths[0].read_bytes(), len(engine.calls)
    paths[1].unlink()
    synthesize(config, SMOLLM2_CHAT, encode, engine)
    assert len(engine.calls) == calls + 3 and paths[0].read_bytes() == saved


def test_synthesis_goes_on_with_the_same_settings_alone(tmp_path: Path) -> None:
    config = SynthesizeConfig(str(tmp_path), shards=1, per_shard=4, user_tokens=5, answer_tokens=20)
    synthesize(config, SMOLLM2_CHAT, lambda text: [ord(letter) for letter in text], Scripted())
    for change in ({"seed": 1}, {"per_shard": 5}, {"answer_tokens": 30}):
        with pytest.raises(ConfigError, match=f"with another {next(iter(change))}; choose another folder"):
            synthesize(replace(config, **change), SMOLLM2_CHAT, lambda text: [1], Scripted())
    assert len(synthesize(replace(config, shards=2), SMOLLM2_CHAT, lambda text: [1], Scripted())) == 2
    (tmp_path / "synthesis.json").unlink()
    with pytest.raises(ConfigError, match="of unknown settings"):
        synthesize(config, SMOLLM2_CHAT, lambda text: [1], Scripted())


def test_openings_are_seeded_and_varied() -> None:
    import random

    one, other = ([opening(random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert one == other and len(set(one)) > 40 and "" in one
    assert not any("{" in text for text in one)


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        SynthesizeConfig(str(tmp_path), shards=0)
    with pytest.raises(ConfigError, match="greedy_share"):
        SynthesizeConfig(str(tmp_path), greedy_share=2.0)
