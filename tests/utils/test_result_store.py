"""Results in a file or a folder: what is kept, read back and refused."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from echo_rl.errors import ConfigError
from echo_rl.utils.result_store import ResultStore


@dataclass(frozen=True)
class Setting:
    seed: int = 0


@dataclass(frozen=True)
class Number:
    value: int

    def to_json(self):
        return {"value": self.value}

    @classmethod
    def from_json(cls, data):
        return cls(**data)


def test_a_file_keeps_plain_values_as_they_are_read_back(tmp_path):
    path = tmp_path / "made" / "cells.jsonl"
    store = ResultStore.in_file(path, {"seed": 0})
    assert store.get({"b": 1, "a": 2}, lambda: (1, 2)) == [1, 2]
    again = ResultStore.in_file(path, {"seed": 0})
    assert {"a": 2, "b": 1} in again and again.get({"a": 2, "b": 1}, lambda: 0) == [1, 2]
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"settings": {"seed": 0}} and second == {"key": '{"a": 2, "b": 1}', "value": [1, 2]}
    with pytest.raises(ConfigError, match="other settings"):
        ResultStore.in_file(path, {"seed": 1})


def test_a_folder_keeps_records_and_says_what_they_are_of(tmp_path):
    store = ResultStore.in_folder(tmp_path, Setting(), {"cpu": "x"}, Number)
    store.add(Setting(5), Number(7))
    assert Setting(5) in store and Setting(6) not in store
    assert json.loads((tmp_path / "blocks.jsonl").read_text()) == {"unit": {"seed": 5}, "record": {"value": 7}}
    assert ResultStore.in_folder(tmp_path, Setting(), {"cpu": "x"}, Number)[Setting(5)] == Number(7)
    with pytest.raises(ConfigError, match="another seed"):
        ResultStore.in_folder(tmp_path, Setting(1), {"cpu": "x"}, Number)


def test_without_a_path_nothing_reaches_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = ResultStore.in_file(None, {})
    assert store.get({"a": 1}, lambda: 3) == store.get({"a": 1}, lambda: 4) == 3
    assert not list(tmp_path.iterdir())
