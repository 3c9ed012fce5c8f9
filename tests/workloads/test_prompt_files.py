"""Prompt files: every form that serving benchmarks take is read, and what can't be read is named by its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_rl.errors import ConfigError, DatasetError
from echo_rl.workloads.datasets import FileOptions, PromptOptions
from echo_rl.workloads.datasets import rows as rows_module
from echo_rl.workloads.datasets.files import PromptFile
from echo_rl.workloads.datasets.formats import conversation
from echo_rl.workloads.datasets.rows import Malformed

USER, ANSWER, SYSTEM = ({"role": role, "content": role.upper()} for role in ("user", "assistant", "system"))


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(path: Path, **options):
    return FileOptions((path,), **options).load_files().prompts


SHAREGPT = {
    "id": "QWJhYvA_0",
    "conversations": [
        {"from": "human", "value": "Why?"},
        {"from": "gpt", "value": "Because."},
        {"from": "human", "value": "Really?"},
        {"from": "gpt", "value": "Yes."},
    ],
}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [SYSTEM, USER]}, (SYSTEM, USER)),  # OpenAI; sglang.bench_serving --dataset-name openai
        ({"messages": [USER], "max_tokens": 7, "temperature": 0.3, "tools": []}, (USER,)),
        ({"kind": "math", "source": "gsm8k:train", "messages": [USER]}, (USER,)),
        ({"messages": [said("developer", "x"), USER]}, (said("system", "x"), USER)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
         (said("user", "ab"),)),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}, said("tool", "4")]},
         (USER, said("assistant", ""), said("tool", "4"))),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
         (said("user", "Why?"), said("assistant", "So."))),  # ShareGPT
        ({"conversation": [{"content": "Why?"}, {"content": "So."}]},  # sglang.bench_serving --dataset-name custom
         (said("user", "Why?"), said("assistant", "So."))),
        ({"conversations": [{"role": "user", "content": "Why?"}]}, (said("user", "Why?"),)),
        ({"prompt": "What is the capital of India?"}, (said("user", "What is the capital of India?"),)),  # vLLM custom
        ({"prompt": [SYSTEM, USER]}, (SYSTEM, USER)),
        ({"question_id": 81, "category": "writing", "turns": ["a", "b"]}, (said("user", "a"), said("user", "b"))),
    ],
)  # fmt: skip
def test_every_form_is_read(row, messages):
    assert conversation(row, "1").messages == messages


@pytest.mark.parametrize("name", ["output_tokens", "output_len", "max_tokens", "max_completion_tokens"])
def test_the_length_of_the_answer_and_the_kind_are_kept(name):
    found = conversation({"prompt": "Hi", name: 12, "kind": "chat"}, "1")
    assert (found.max_new_tokens, found.category) == (12, "chat")
    assert conversation({"prompt": "Hi", name: None}, "1").max_new_tokens is None
    for wrong in (0, -3, "12", True, 1.5):
        with pytest.raises(Malformed, match=f"as {name}, expected a whole number of tokens above 0"):
            conversation({"prompt": "Hi", name: wrong}, "1")


def test_a_recorded_conversation_is_one_prompt_for_each_turn_behind_the_recorded_ones(tmp_path):
    path = written(tmp_path / "talk.jsonl", {**SHAREGPT, "output_tokens": 5}, {"messages": [USER]})
    found = {prompt.id: prompt for prompt in prompts(path)}
    history = (said("user", "Why?"), said("assistant", "Because."), said("user", "Really?"))
    assert found.keys() == {"1.1", "1.2", "2"}
    assert found["1.1"].messages == history[:1] and found["1.2"].messages == history
    assert (found["1.1"].max_new_tokens, found["1.2"].max_new_tokens) == (None, 5)  # it is the last answer's
    assert {prompt.id for prompt in prompts(path, turns="first")} == {"1.1", "2"}
    assert {prompt.id for prompt in prompts(path, turns="last")} == {"1.2", "2"}


def test_an_agents_loop_is_asked_after_the_tools_answer_too():
    loop = [USER, said("assistant", "call"), said("tool", "42"), said("assistant", "It is 42."), USER]
    assert conversation({"messages": loop}, "1").ends == (1, 3, 5)
    assert conversation({"messages": [said("assistant", "Hello!"), USER, ANSWER]}, "1").ends == (2,)
    assert conversation({"messages": [USER, USER, ANSWER]}, "1").ends == (2,)  # two messages, one turn


def test_turns_that_reply_to_what_nobody_knows_are_left_out_and_counted(tmp_path):
    path = written(tmp_path / "turns.jsonl", {"turns": ["a", "b", "c"]}, {"messages": [ANSWER]}, {"messages": []})
    found = FileOptions((path,)).load_files()
    assert [prompt.messages for prompt in found.prompts] == [(said("user", "a"),)]
    assert found.notes == (
        "turns.jsonl: conversations left out: 2 (no turn of a user)",
        "turns.jsonl: later turns left out: 2 (the answers before them are not recorded)",
    )


def test_arrays_gzip_and_byte_order_marks_are_read(tmp_path):
    array = tmp_path / "ShareGPT V3 (split).json"
    array.write_text(json.dumps([SHAREGPT, SHAREGPT], indent=2))
    assert len(prompts(array)) == 4 and prompts(array)[0].suite == "ShareGPT_V3_split"
    single = tmp_path / "one.json"
    single.write_text("\ufeff" + json.dumps(SHAREGPT, indent=2), encoding="utf-8")
    assert len(prompts(single)) == 2
    zipped = tmp_path / "lines.jsonl.gz"
    zipped.write_bytes(gzip.compress(b'\n{"prompt": "a"}\r\n\n{"prompt": "b"}'))
    assert sorted(prompt.messages[0]["content"] for prompt in prompts(zipped)) == ["a", "b"]
    assert prompts(zipped)[0].suite == "lines"


def test_each_file_is_a_suite_of_its_own_and_never_called_as_one_that_is_built_in(tmp_path):
    (tmp_path / "more").mkdir()
    files = [tmp_path / "gsm8k.jsonl", tmp_path / "mine.jsonl", tmp_path / "more" / "mine.json", tmp_path / "all.txt"]
    for path in files:
        written(path, {"prompt": "a"}, {"prompt": "b"})
    found = FileOptions(tuple(files)).load_files()
    assert [prompt.suite for prompt in found.prompts[:4]] == ["gsm8k_2", "mine", "mine_2", "all_2"]  # in turn
    assert found.suite == "gsm8k_2+mine+mine_2+all_2" and len(found.facts) == 4


def test_the_order_depends_on_the_seed_and_the_facts_tell_the_file_and_the_choice(tmp_path):
    path = written(tmp_path / "many.jsonl", *({"prompt": str(i)} for i in range(30)))
    first, again, other = (FileOptions((path,), limit=9).load_files(seed) for seed in (1, 1, 2))
    assert first.prompts == again.prompts != other.prompts and len(first.prompts) == 9
    assert first.facts == {"prompts many": f"sha256 {PromptFile.read(path).sha256}", "limit": "9"}
    assert FileOptions((path,), turns="last").load_files().facts["turns"] == "last"


def test_a_suite_and_a_file_together_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--suite gsm8k and --prompts are given; give one"):
        PromptOptions((written(tmp_path / "a.jsonl", {"prompt": "x"}),), suite="gsm8k").load()
    with pytest.raises(ConfigError, match="at least 1"):
        FileOptions(limit=0)
    with pytest.raises(ConfigError, match="--prompts 60 names no file; --limit 60"):
        FileOptions((Path("60"),)).load_files()


def test_bad_rows_are_named_by_their_lines_the_others_counted(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        '{"prompt": "fine"}',
        "",
        "{not json",
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"text": "where?"}',
        "[]",
        '"word"',
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(DatasetError) as caught:
        prompts(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 5 of 6 rows cannot be read: line 3 is no JSON (Expecting property name")
    assert " enclosed in double quotes at column 2); line 4" in text
    assert "; line 4 has a number as messages[0].content, expected a text; " in text
    assert "line 5 has the fields 'text'; expected {\"messages\"" in text and "; and 2 more. " in text
    assert "\n" not in text and "line 6" not in text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "hello"}, "has a text as messages, expected a list"),
        ({"messages": ["hello"]}, r"has a text as messages\[0\], expected an object"),
        ({"messages": [{"role": "user"}]}, r"has no content \(or value\) in messages\[0\]"),
        ({"messages": [{"role": "user", "content": None}]}, r"has null as messages\[0\].content, expected a text"),
        ({"messages": [{"role": "queen", "content": "x"}]}, r"has the speaker 'queen' in messages\[0\], expected one"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"has the speaker \['user'\]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"has a text as messages\[0\].content\[0\]"),
        ({"prompt": 5}, "has a number as prompt"),
        ({"prompt": [1, 2]}, r"has a number as prompt\[0\]"),
        ({"prompt": "\ud800"}, "half of a character in prompt"),
        ({"turns": [None]}, r"has null as turns\[0\]"),
        ({}, "has the fields none"),
        (None, "is null; expected"),
    ],
)
def test_what_is_wrong_is_said(row, said):
    with pytest.raises(Malformed, match=said):
        conversation(row, "1")


def test_files_that_cannot_be_read_at_all_are_typed_errors(tmp_path, monkeypatch):
    empty, blank, latin, image, cut, array = (tmp_path / name for name in "abcdef")
    empty.write_bytes(b"")
    blank.write_bytes(b"\n \n")
    latin.write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    image.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    cut.write_bytes(gzip.compress(b'{"prompt": "a"}' * 100)[:-12])
    array.write_text('[{"prompt": "a"},\n{"prompt": ]')
    cases = {
        tmp_path: "is a folder",
        tmp_path / "none": "does not exist",
        empty: "holds nothing; expected",
        blank: "holds nothing; expected",
        latin: "is not UTF-8 text .* in line 2",
        image: "is not UTF-8 text",
        cut: "is damaged",
        array: "is no JSON .*line 2 column 12",
    }
    for path, told in cases.items():
        with pytest.raises(DatasetError, match=told):
            PromptFile.read(path)


def test_endless_lines_and_deep_nests_are_bad_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MOST_LINE", 1 << 20)
    path = tmp_path / "big.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "' + "x" * (1 << 21) + '"}\n' + "[" * 100_000 + "\n")
    with pytest.raises(DatasetError, match="2 of 3 .* line 2 is longer than 1 MiB.*line 3 is no JSON .*deeply"):
        PromptFile.read(path)
    whole = tmp_path / "big.json"
    whole.write_text(json.dumps([{"prompt": "x" * (1 << 21)}]))
    assert len(PromptFile.read(whole).conversations) == 1  # an array of one long line is no long line
    whole.write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="nested too deeply"):
        PromptFile.read(whole)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant", "system", "tool")), "content": TEXT}),
    max_size=8,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ("messages", "conversations", "prompt", "turns", "role", "from", "content", "value", "type")
            )
            | TEXT,
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_json_is_a_conversation_or_malformed(row):
    try:
        found = conversation(row, "1")
    except Malformed as error:
        assert str(error)
    else:
        assert all(isinstance(message["content"], str) for message in found.messages)


@given(MESSAGES)
def test_every_prompt_ends_before_an_answer_and_none_is_missed(messages):
    """The rule of `Conversation.ends` said once more: a prompt is a prefix that holds a user's turn and no answer is
    its last message; after it comes an answer or nothing."""
    found = conversation({"messages": messages}, "1")
    assert found.messages == tuple(messages)
    roles = [message["role"] for message in messages]
    for prompt in found.prompts("suite"):
        end = len(prompt.messages)
        assert prompt.messages == found.messages[:end] and "user" in roles[:end] and roles[end - 1] != "assistant"
        assert found.one_sided or end == len(roles) or roles[end] == "assistant"
    answers = [place for place, role in enumerate(roles) if role == "assistant" and "user" in roles[:place]]
    first_of_run = [place for place in answers if roles[place - 1] != "assistant"]
    assert set(first_of_run) <= {len(prompt.messages) for prompt in found.prompts("suite")}
    assert bool(found.ends) == ("user" in roles)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_a_typed_error_of_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("bytes") / "file.jsonl"
    path.write_bytes(data)
    with pytest.raises(DatasetError) as caught:
        PromptFile.read(path)
    assert "\n" not in str(caught.value)
