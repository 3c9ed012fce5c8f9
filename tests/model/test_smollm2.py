"""The embedded default, for real: parity with `transformers`, losslessness, and a drafter that earns its keep."""

from __future__ import annotations

import time

import pytest
import torch

from echo_rl.calibrate.live import calibration_prompts
from echo_rl.config import EngineConfig
from echo_rl.contracts import Request, SamplingParams
from echo_rl.controllers import registry
from echo_rl.runtime.engine import Engine
from echo_rl.runtime.tokenizer import Tokenizer
from echo_rl.workloads import metrics
from echo_rl.workloads.driver import serve

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engine(model_folder) -> Engine:
    return Engine.load(EngineConfig(dtype="float32", kv_tokens=8192))


def requests(engine: Engine, count: int, tokens: int, temperature: float = 0.0) -> list[Request]:
    return [
        Request(
            str(i),
            engine.tokenizer.chat([{"role": "user", "content": turn}]),
            SamplingParams(max_new_tokens=tokens, temperature=temperature, seed=i),
        )
        for i, turn in enumerate(calibration_prompts(count))
    ]


def test_logits_match_transformers(model_folder, engine):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    prompt = requests(engine, 2, 1)[1].prompt
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0, -1]
    seen: list[torch.Tensor] = []
    original = engine.runner.target.logits

    def spy(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(original(hidden))
        return seen[-1]

    engine.runner.target.logits = spy
    try:
        serve(engine, registry.make("none"), [Request("p", prompt, SamplingParams(max_new_tokens=1))], 1)
    finally:
        engine.runner.target.logits = original
    assert (seen[0][-1] - expected).abs().max() < 1e-3


def test_the_tokenizer_matches_transformers(model_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(model_folder)
    ours = Tokenizer.load(model_folder)
    for text in ("Hello, world! 12345", "def f(x):\n    return x ** 2\n", "Grüße, 世界 🙂"):
        assert list(ours.encode(text)) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
    messages = [{"role": "user", "content": "Hi"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == ours.encode(text)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_speculation_changes_no_token(engine, temperature):
    todo = requests(engine, 4, 24, temperature)
    plain = [r.tokens for r in serve(engine, registry.make("none"), todo, 4).requests]
    for name in ("chain", "static", "eagle3", "echo"):
        assert [r.tokens for r in serve(engine, registry.make(name), todo, 4).requests] == plain
        engine.check_integrity()


def test_the_shipped_drafter_is_accepted(engine):
    record = serve(engine, registry.make("eagle3"), requests(engine, 6, 48), 2)
    assert metrics.mean_accepted_tokens(record.steps) > 2.3


def test_a_warm_start_is_quick(model_folder):
    begin = time.perf_counter()
    Engine.load(EngineConfig(kv_tokens=1024))
    assert time.perf_counter() - begin < 3.0
