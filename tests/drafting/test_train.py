from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from echo_rl.drafting.conversations import SYNTHESIS, Conversations
from echo_rl.drafting.features import CLAIM, cache_features
from echo_rl.drafting.train import STATE_FILE, TrainingRun, check, train
from echo_rl.drafting.train_config import TrainConfig
from echo_rl.drafting.warm_start import TargetParts
from echo_rl.errors import ConfigError, WeightsError
from echo_rl.runtime.drafters.folder import load_drafter
from echo_rl.utils.result_store import digest
from tests.drafting.conftest import HEADS

TargetCall = Callable[[Tensor], tuple[list[Tensor], Tensor]]


def test_overfits_a_counting_target(world: TrainConfig, parts: TargetParts) -> None:
    run = train(replace(world, updates=90, evaluate_every=45, draft_vocab=40, columns=40, lr=2e-2), parts)
    first, last = run.curve[0], run.curve[-1]
    assert first["chain_mat"] < 1.5
    assert last["chain_mat"] > 3.0, run.curve
    assert last["top1"][0] > 0.9 and last["top8"][0] >= last["top1"][0]


def test_warm_start_beats_random_weights_at_once(world: TrainConfig, parts: TargetParts, tmp_path: Path) -> None:
    config = replace(world, draft_vocab=40, out=str(tmp_path / "warm"), regression_rows=500)
    warm, cold = TrainingRun(config, parts), TrainingRun(replace(config, regression_rows=0), parts)
    assert warm.measure().top1[0] > max(0.5, cold.measure().top1[0] + 0.3)


@pytest.mark.parametrize("vocabulary", [36, 40])
def test_goes_on_from_a_trained_drafter(
    world: TrainConfig, parts: TargetParts, tmp_path: Path, vocabulary: int
) -> None:
    """The new one is as good at once; tokens that it couldn't say don't start from nothing."""
    trained = train(replace(world, updates=90, evaluate_every=90, lr=2e-2), parts)
    config = replace(world, out=str(tmp_path / "on"), start=world.out, draft_vocab=vocabulary)
    found, before = TrainingRun(config, parts).measure(), trained.measure()
    assert found.top1[0] >= before.top1[0] > 0.6
    if vocabulary == 36:
        assert found.chain_mat == pytest.approx(before.chain_mat, abs=0.2)  # saved in bfloat16


def test_a_resumed_run_knows_what_it_went_on_from(world: TrainConfig, parts: TargetParts, tmp_path: Path) -> None:
    train(world, parts)
    began = digest(Path(world.out) / "model.safetensors")
    on = replace(world, out=str(tmp_path / "on"), start=world.out, updates=3)
    train(on, parts)
    shutil.rmtree(world.out)
    train(replace(on, updates=6), parts)
    assert json.loads((Path(on.out) / "manifest.json").read_text())["started_from"] == began


def test_a_drafter_of_other_sizes_is_not_gone_on_from(world: TrainConfig, parts: TargetParts, tmp_path: Path) -> None:
    train(world, parts)
    on = replace(world, out=str(tmp_path / "on"), start=world.out)
    with pytest.raises(ConfigError, match="intermediate 24"):
        TrainingRun(replace(on, intermediate=8), parts)
    with pytest.raises(ConfigError, match="rope_theta"):
        TrainingRun(replace(on, rope_theta=9.0), parts)
    features = tmp_path / "others"
    shutil.copytree(world.features, features)
    (features / CLAIM).write_text('{"taps": [0, 3, 4], "model": "counting"}')
    with pytest.raises(ConfigError, match="taps"):
        TrainingRun(replace(on, features=str(features)), parts)


@pytest.mark.parametrize(("checkpoint_every", "kept"), [(50, 3), (1, 5), (2, 4)])
def test_resume_gives_the_weights_of_an_uninterrupted_run(
    world: TrainConfig,
    parts: TargetParts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_every: int,
    kept: int,
) -> None:
    whole = train(world, parts)
    cut = replace(world, out=str(tmp_path / "cut"), checkpoint_every=checkpoint_every)
    step = TrainingRun.step

    def dies_at_five(self: TrainingRun, batch: object) -> float:
        if self.update == 5:
            raise KeyboardInterrupt
        return step(self, batch)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "step", dies_at_five)
        train(cut, parts)
    assert TrainingRun(cut, parts).update == kept
    resumed = train(cut, parts)
    assert resumed.update == whole.update == world.updates
    for name, value in whole.net.named_parameters():
        assert torch.equal(value, resumed.net.get_parameter(name)), name
    assert [point["update"] for point in resumed.curve] == [0, 3, 6]


def test_output_folder(world: TrainConfig, parts: TargetParts) -> None:
    (Path(world.data) / SYNTHESIS).write_text('{"seed": 0, "prompts asked": "sha256 57"}')
    run = train(world, parts)
    config, tensors = load_drafter(world.out)
    config.check_target(hidden=16, vocab=40, layers=6)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    manifest = json.loads((Path(world.out) / "manifest.json").read_text())
    assert manifest["data"]["synthesis"] == {"seed": 0, "prompts asked": "sha256 57"}
    assert manifest["config"]["updates"] == 6 and "out" not in manifest["config"]
    assert manifest["best"]["chain_mat"] == max(point["chain_mat"] for point in run.curve)
    assert manifest["data"]["conversations"] == len(run.corpus.training)
    assert list((Path(world.out) / "tensorboard").iterdir())


def test_another_config_does_not_resume(world: TrainConfig, parts: TargetParts) -> None:
    train(world, parts)
    with pytest.raises(ConfigError, match="another hard_share"):
        train(replace(world, hard_share=0.5), parts)


def test_other_conversations_do_not_resume(world: TrainConfig, parts: TargetParts, target: TargetCall) -> None:
    """More of them would give draft ids another meaning than the saved weights have, and another held-out set."""
    train(world, parts)
    talk = [([30] * 20, 4, True)] * 8
    Conversations.of(talk).save(Path(world.data) / "shard_2.npz")
    cache_features(world.data, world.features, target, (1, 3, 4), "counting")
    with pytest.raises(ConfigError, match=f"other conversations .* another out folder, and --start {world.out}"):
        train(replace(world, updates=9), parts)


def test_other_features_do_not_resume(world: TrainConfig, parts: TargetParts, target: TargetCall) -> None:
    train(world, parts)
    shutil.rmtree(world.features)
    cache_features(world.data, world.features, target, (1, 3, 4), "another")
    with pytest.raises(ConfigError, match="other conversations or features"):
        train(replace(world, updates=9), parts)


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_a_damaged_state_is_named(world: TrainConfig, parts: TargetParts, keep: int) -> None:
    train(world, parts)
    state = Path(world.out) / STATE_FILE
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=f"{STATE_FILE} is damaged; delete it"):
        train(world, parts)


def test_a_state_of_no_known_conversations_does_not_resume(world: TrainConfig, parts: TargetParts) -> None:
    """Earlier releases saved such states."""
    train(world, parts)
    state = torch.load(Path(world.out) / STATE_FILE, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "data"}, Path(world.out) / STATE_FILE)
    with pytest.raises(ConfigError, match="other conversations"):
        train(world, parts)


def test_what_training_would_stumble_over_is_refused_before_features(world: TrainConfig, parts: TargetParts) -> None:
    check(world, (1, 3, 4), parts, 6)
    for taps in ((1, 3, 5), (1, 3, 60), (3, 1, 4), (-1, 3, 4), (3, 3, 4), ()):
        with pytest.raises(WeightsError, match="tap"):
            check(world, taps, parts, 6)
    with pytest.raises(ConfigError, match="a conversation has 23 tokens; raise max_positions"):
        check(replace(world, max_positions=22), (1, 3, 4), parts, 6)
    Conversations.of([([1, 2, 40], 1, True)]).save(Path(world.data) / "shard_9.npz")
    with pytest.raises(ConfigError, match="hold token 40, the target's are 0..39"):
        check(world, (1, 3, 4), parts, 6)


def test_heads_that_a_warm_start_cannot_make_are_refused(world: TrainConfig, parts: TargetParts) -> None:
    few = replace(world, kv_heads=HEADS // 2)
    check(few, (1, 3, 4), parts, 6)  # nothing is made of the target's
    with pytest.raises(ConfigError, match="kv_heads is 1, but a warm start repeats the target's 2"):
        check(replace(few, regression_rows=64), (1, 3, 4), parts, 6)


def test_no_more_heads_attend_to_themselves_than_there_are(world: TrainConfig, parts: TargetParts) -> None:
    warm = replace(world, regression_rows=500, self_heads=HEADS)
    all_heads, too_many = (TrainingRun(replace(warm, self_heads=n), parts).net.state_dict() for n in (HEADS, HEADS + 5))
    assert all(torch.equal(all_heads[name], too_many[name]) for name in all_heads)


def test_an_empty_shard_is_passed_over(world: TrainConfig, parts: TargetParts, target: Any) -> None:
    """Every answer was too short."""
    whole = train(replace(world, out=f"{world.out}-whole"), parts)
    Conversations.of([]).save(Path(world.data) / "shard_0_empty.npz")
    cache_features(world.data, world.features, target, (1, 3, 4), "counting")
    found = train(world, parts)
    assert [{**point, "seconds": 0} for point in found.curve] == [{**point, "seconds": 0} for point in whole.curve]


def test_the_longest_conversation_may_fill_the_context(world: TrainConfig, parts: TargetParts) -> None:
    deep = replace(world, unroll=6, final_unroll=6)  # the last steps stand past the end of the conversation
    whole, tight = train(deep, parts), train(replace(deep, out=f"{world.out}-tight", max_positions=23), parts)
    assert [{**point, "seconds": 0} for point in tight.curve] == [{**point, "seconds": 0} for point in whole.curve]
    with pytest.raises(ConfigError, match="raise max_positions"):
        train(replace(world, out=f"{world.out}-short", max_positions=22), parts)


def test_bfloat16_learns_too(world: TrainConfig, parts: TargetParts) -> None:
    config = replace(world, updates=60, evaluate_every=60, draft_vocab=40, columns=40, lr=2e-2, precision="bfloat16")
    run = train(config, parts)
    assert run.curve[-1]["top1"][0] > 0.8
    assert all(value.dtype == torch.float32 for value in run.net.parameters())


def test_schedule() -> None:
    config = TrainConfig("d", "f", "o", updates=100, warmup=10, unroll=3, final_unroll=5, final_share=0.4)
    assert [config.levels_at(update) for update in (0, 59, 60, 99)] == [3, 3, 5, 5]
    rates = [config.rate_at(update) for update in range(100)]
    assert rates[0] < rates[9] and rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.05


@pytest.mark.parametrize(
    "change",
    [
        *({"updates": 0}, {"hard_share": 1.5}, {"level_decay": 0.0}, {"precision": "half"}),
        *({"lr": -1.0}, {"output_lr": 0.0}, {"lr": float("nan")}, {"validation": 0}, {"warmup": -1}, {"kv_heads": 0}),
        *({"evaluate_every": 0}, {"checkpoint_every": 0}),
    ],
)
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must"):
        TrainConfig("d", "f", "o", **change)
