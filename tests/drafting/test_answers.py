"""The target answers real prompts: each turn behind what was said before it, by itself where nobody recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from echo_rl.drafting.answers import synthesize_answers
from echo_rl.drafting.conversations import Conversations
from echo_rl.drafting.live import answer_on
from echo_rl.drafting.synthesize import SynthesizeConfig
from echo_rl.errors import ConfigError
from echo_rl.utils.result_store import read_json
from echo_rl.workloads.datasets import FileOptions
from echo_rl.workloads.datasets.conversation import Conversation
from tests import tiny

END = 2
FACTS = {"prompts p": "sha256 0"}


def talk(*turns: str, id: str = "1") -> Conversation:
    """Messages written as ``u:text`` and ``a:text``."""
    roles = {"u": "user", "a": "assistant"}
    return Conversation(id, tuple({"role": roles[turn[0]], "content": turn[2:]} for turn in turns))


class Letters:
    """Tokens are letters; an answer starts after ``>``."""

    end_of_turn, most = END, 60

    def encode(self, messages) -> list[int]:
        return [ord(c) for c in "|".join(message["content"] for message in messages) + ">"]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


class Echoes:
    """Answers with the last turn, in capitals; keeps how it was called."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompts, temperature, max_new, stop_ids):
        texts = ["".join(map(chr, prompt)) for prompt in prompts]
        self.asked += texts
        return [[ord(c) for c in text[:-1].split("|")[-1].upper()][:max_new] for text in texts]


def run(folder: Path, conversations, complete, turns="all", **settings):
    config = SynthesizeConfig(str(folder), **{"per_shard": 2, "answer_tokens": 8, "min_answer": 2, **settings})
    return synthesize_answers(config, conversations, turns, Letters(), complete, FACTS)


def texts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """(prompt, answer) of every item, the token that ends the answer written as a dot."""
    found = []
    for shard in map(Conversations.load, paths):
        for index in range(len(shard)):
            letters = ["." if token == END else chr(token) for token in shard[index]]
            start = int(shard.starts[index])
            found.append(("".join(letters[:start]), "".join(letters[start:])))
    return found


def test_recorded_history_stands_before_each_turn_and_answers_alone_are_written(tmp_path):
    done = run(tmp_path, [talk("u:why", "a:so", "u:really")], Echoes())
    assert sorted(texts(done.shards)) == [("why>", "WHY."), ("why|so|really>", "REALLY.")]
    assert done.conversations == 2 and done.notes == ()
    assert texts(run(tmp_path / "first", [talk("u:why", "a:so", "u:really")], Echoes(), "first").shards) == [
        ("why>", "WHY.")
    ]


def test_the_targets_own_answers_stand_between_turns_that_nobody_answered(tmp_path):
    done = run(tmp_path, [talk("u:one", "u:two", "u:three")], Echoes())
    assert texts(done.shards) == [("one>", "ONE."), ("one|ONE|two>", "TWO."), ("one|ONE|two|TWO|three>", "THREE.")]
    first = run(tmp_path / "first", [talk("u:one", "u:two")], Echoes(), "first")
    assert texts(first.shards) == [("one>", "ONE.")]


def test_an_answer_that_is_cut_off_has_no_end_and_what_does_not_fit_is_counted(tmp_path):
    conversations = [talk("u:" + "x" * 30), talk("u:y"), talk("u:" + "z" * 55), talk("u:long", "u:" + "w" * 50)]
    done = run(tmp_path, conversations, Echoes(), per_shard=9)
    assert sorted(texts(done.shards)) == [("long>", "LONG."), ("x" * 30 + ">", "X" * 8)]
    (note,) = done.notes
    assert note == "turns left out: 3 (longer than 60 tokens with their answers, or answered in fewer than 2)"
    with pytest.raises(ConfigError, match="no answer of at least 2 tokens was written within 60 tokens"):
        run(tmp_path / "none", [talk("u:y")], Echoes())


def test_a_rerun_goes_on_and_other_prompts_are_refused(tmp_path):
    conversations = [talk(f"u:question {n}", id=str(n)) for n in range(5)]
    done = run(tmp_path, conversations, first := Echoes())
    assert len(done.shards) == 3 and len(first.asked) == 5 and read_json(tmp_path / "synthesis.json")["prompts p"]
    before = texts(done.shards)
    done.shards[1].unlink()
    again = run(tmp_path, conversations, second := Echoes())
    assert texts(again.shards) == before and len(second.asked) == 2
    assert len(run(tmp_path / "few", conversations, Echoes(), shards=1).shards) == 1
    config = SynthesizeConfig(str(tmp_path), per_shard=2, answer_tokens=8, min_answer=2)
    with pytest.raises(ConfigError, match="with another prompts p; choose another folder"):
        synthesize_answers(config, conversations, "all", Letters(), Echoes(), {"prompts p": "sha256 1"})


def test_the_share_of_greedy_answers_is_kept(tmp_path):
    conversations = [talk(f"u:question {n}", id=str(n)) for n in range(40)]
    done = run(tmp_path, conversations, Echoes(), per_shard=40, greedy_share=0.5)
    assert 8 < Conversations.load(done.shards[0]).greedy.sum() < 32


def test_the_engine_answers_the_prompts_of_a_file(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "hello"}\n{"messages": []}\n{"turns": ["hi", "again"]}\n')
    config = SynthesizeConfig(str(tmp_path / "out"), answer_tokens=9, min_answer=1)
    engine = tiny.engine(tmp_path)
    done = answer_on(engine, config, FileOptions((path,)), concurrency=2)
    assert done.conversations == 3 and done.notes[0].startswith("asked.jsonl: conversations left out: 1")
    (shard,) = map(Conversations.load, done.shards)
    hello = engine.tokenizer.chat([{"role": "user", "content": "hello"}])
    starts = [shard[index][: shard.starts[index]].tolist() for index in range(3)]
    assert list(hello) in starts
    assert "sha256" in read_json(tmp_path / "out" / "synthesis.json")["prompts asked"]
