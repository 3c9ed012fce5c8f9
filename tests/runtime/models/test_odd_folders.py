"""Damaged and odd model folders end `generate` with one line that names the file and what is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from echo_rl.cli import main
from tests import tiny

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    tiny.target_folder(root / "target")
    tiny.drafter_folder(root / "drafter")
    return root


def generate(folders: Path, *more: str) -> int:
    model = ["--model", str(folders / "target"), "--drafter", str(folders / "drafter"), "--controller", "none"]
    sizes = ["--device", "cpu", "--dtype", "float32", "--kv-tokens", "1024", "--max-context", "64"]
    return main(["generate", "ab", "--max-new-tokens", "4", *model, *sizes, *more])


@contextmanager
def altered(path: Path, damage: str | dict[str, Any]) -> Iterator[None]:
    """Other text in the file, or other values for some of its keys; as it was afterwards."""
    whole = path.read_text() if path.is_file() else None
    path.write_text(damage if isinstance(damage, str) else json.dumps({**json.loads(whole or "{}"), **damage}))
    try:
        yield
    finally:
        path.unlink() if whole is None else path.write_text(whole)


def refusal(folders: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str | dict[str, Any]) -> str:
    """The one line that a damaged file gives."""
    with altered(folders / file, damage):
        assert generate(folders) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
@pytest.mark.parametrize(
    "file",
    ["target/config.json", "target/generation_config.json", "target/tokenizer_config.json", "drafter/config.json"],
)
def test_files_that_hold_no_object(folders, capsys, file, text):
    assert f"{folders / file} is damaged" in refusal(folders, capsys, file, text)


@pytest.mark.parametrize(
    ("file", "change", "field"),
    [
        ("target/config.json", {"num_attention_heads": None}, "num_attention_heads"),
        ("target/config.json", {"num_attention_heads": "4"}, "num_attention_heads"),
        ("target/config.json", {"vocab_size": True}, "vocab_size"),
        ("target/config.json", {"max_position_embeddings": "512"}, "max_position_embeddings"),
        ("target/config.json", {"rope_theta": "big"}, "rope_theta"),
        ("target/config.json", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("target/config.json", {"rope_scaling": "llama3"}, "rope_scaling"),
        ("target/config.json", {"rope_scaling": LLAMA3}, "original_max_position_embeddings"),
        ("target/config.json", {"rope_scaling": {"type": "llama3"}}, "factor"),
        ("target/config.json", {"eos_token_id": ["0"]}, "eos_token_id"),
        ("target/generation_config.json", {"eos_token_id": "0"}, "eos_token_id"),
        ("target/tokenizer_config.json", {"bos_token": {}, "eos_token": {"text": "x"}}, "eos_token"),
        ("drafter/config.json", {"eagle_config": "none"}, "eagle_config"),
        ("drafter/config.json", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "all"}}, "layer_ids"),
        ("drafter/config.json", {"rope_scaling": "linear"}, "rope_scaling"),
        ("drafter/config.json", {"intermediate_size": None}, "intermediate_size"),
    ],
)
def test_values_of_the_wrong_kind(folders, capsys, file, change, field):
    line = refusal(folders, capsys, file, change)
    assert str(folders / file) in line and field in line


def test_nulls_count_as_absent(folders, capsys):
    nulls = dict.fromkeys(("rope_theta", "max_position_embeddings", "rope_scaling", "eos_token_id"))
    with altered(folders / "target" / "config.json", nulls):
        assert generate(folders) == 0


@pytest.mark.parametrize(
    "template", ["{% for %}", "{% generation %}{% endgeneration %}", [{"name": "default", "template": "x"}], {"a": 1}]
)
def test_a_damaged_chat_template_concerns_conversations_only(folders, capsys, template):
    damage = {"chat_template": template}
    assert "chat" in refusal(folders, capsys, "target/tokenizer_config.json", damage)
    with altered(folders / "target" / "tokenizer_config.json", damage):
        assert generate(folders, "--raw") == 0
