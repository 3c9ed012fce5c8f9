"""Reads traces of arrivals: when requests came, and the tokens of their prompts and answers.

- Mooncake's JSON lines: ``{"timestamp": milliseconds, "input_length": ..., "output_length": ..., "hash_ids": [...]}``;
- Azure's CSV of LLM inference: ``TIMESTAMP,ContextTokens,GeneratedTokens``, the first a date and time;
- plain CSV or JSON lines of ``time`` (seconds), ``prompt_tokens`` and ``output_tokens``.

Which prefixes requests shared (Mooncake's ``hash_ids``) is not read.
"""

from __future__ import annotations

import csv
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from echo_rl.errors import DatasetError
from echo_rl.workloads.datasets.rows import Malformed, lines, parsed

FORMS: Mapping[str, tuple[str, str, str]] = {
    "Mooncake": ("timestamp", "input_length", "output_length"),
    "Azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "plain": ("time", "prompt_tokens", "output_tokens"),
}
"""The fields of each form: the time, the prompt's tokens and the answer's."""
MILLISECONDS = "timestamp"
"""The field whose times are in milliseconds."""
EXPECTED = "expected the fields " + ", or ".join(f"{', '.join(names)} ({form})" for form, names in FORMS.items())
NAMED = 3
"""Bad lines that an error names; it counts the others."""


@dataclass(frozen=True)
class Arrival:
    """One request: seconds since the trace's first one, and its lengths in tokens."""

    time: float
    prompt_tokens: int
    output_tokens: int

    def clipped(self, context: int | None) -> Arrival:
        """With lengths that fit a context together: the answer gets half of it at most, the prompt what is left."""
        if context is None or self.prompt_tokens + self.output_tokens <= context:
            return self
        output = min(self.output_tokens, context // 2)
        return Arrival(self.time, min(self.prompt_tokens, context - output), output)


@dataclass(frozen=True)
class ArrivalTrace:
    """The requests of a file, in the order of their times, the first at 0."""

    sha256: str
    arrivals: tuple[Arrival, ...]

    @property
    def period(self) -> float:
        """Seconds after which the trace starts again: its length and a mean gap; one where all come at once."""
        last = self.arrivals[-1].time
        return last * len(self.arrivals) / (len(self.arrivals) - 1) if last else 1.0

    def order(self, seed: int) -> ArrivalOrder:
        """The arrivals from a place that the seed draws, at time 0, to the end, then from the start again, for ever."""
        return ArrivalOrder(self, random.Random(f"{seed}/trace").randrange(len(self.arrivals)))

    def remarks(self, context: int | None) -> list[str]:
        """Says how many requests are clipped to a context."""
        count = sum(arrival != arrival.clipped(context) for arrival in self.arrivals)
        share = f"{count} of {len(self.arrivals)} requests of the arrivals' trace"
        return [f"{share} are longer than the context of {context} tokens and clipped to it"] if count else []


class ArrivalOrder:
    """An iterator over the times and requests of a trace that can be copied."""

    def __init__(self, trace: ArrivalTrace, place: int) -> None:
        self._trace, self._place = trace, place
        self._begin = trace.arrivals[place].time

    def __next__(self) -> tuple[float, Arrival]:
        laps, place = divmod(self._place, len(self._trace.arrivals))
        self._place += 1
        arrival = self._trace.arrivals[place]
        return arrival.time + laps * self._trace.period - self._begin, arrival


def read_arrivals(path: Path) -> ArrivalTrace:
    """The trace of a file, which is read once for as long as it doesn't change.

    Raises `DatasetError` where it can't be read, holds nothing or a malformed line.
    """
    status = path.stat() if path.is_file() else None
    return _read(path, status and (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=8)
def _read(path: Path, version: object) -> ArrivalTrace:
    found: list[Arrival] = []
    bad: list[str] = []
    wrong = total = 0
    for number, row in _rows(path):
        total += 1
        try:
            found.append(_arrival(row))
        except Malformed as error:
            wrong += 1
            bad += [f"line {number} {error}"] if len(bad) < NAMED else []
    if wrong:
        more = f"; and {wrong - NAMED} more" if wrong > NAMED else ""
        raise DatasetError(f"{path}: {wrong} of {total} arrivals cannot be read: {'; '.join(bad)}{more}")
    if not found:
        raise DatasetError(f"{path} holds no arrival; {EXPECTED}")
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    found.sort(key=lambda arrival: arrival.time)
    first = found[0].time
    return ArrivalTrace(sha256, tuple(Arrival(a.time - first, a.prompt_tokens, a.output_tokens) for a in found))


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and fields of every line: of JSON where the first is, else of CSV below the first, which names them."""
    read: Callable[[str], Any] | None = None
    for number, text in lines(path):
        if isinstance(text, Malformed):
            yield number, text
        elif read is not None:
            yield number, read(text)
        elif text.startswith("{"):
            read = parsed
            yield number, read(text)
        else:
            names = [name.strip() for name in _cells(text)]
            if not any({*form} <= {*names} for form in FORMS.values()):
                raise DatasetError(f"line {number} of {path} names {text[:80]!r}; {EXPECTED}")
            read = partial(_named, names)


def _named(names: list[str], text: str) -> Any:
    """The cells of a line by their names."""
    cells = _cells(text)
    if len(cells) != len(names):
        return Malformed(f"has {len(cells)} cells, expected {len(names)}")
    return dict(zip(names, cells, strict=True))


def _cells(text: str) -> list[str]:
    """The cells of a line of CSV; none where it is no CSV."""
    try:
        return next(csv.reader([text]))
    except csv.Error:
        return []


def _arrival(row: Any) -> Arrival:
    if isinstance(row, Malformed):
        raise row
    fields = next((names for names in FORMS.values() if isinstance(row, dict) and {*names} <= row.keys()), None)
    if fields is None:
        raise Malformed(f"has {'the fields ' + ', '.join(row) if isinstance(row, dict) else 'no fields'}; {EXPECTED}")
    time, *lengths = fields
    seconds = _seconds(row[time], time)
    prompt, output = (_count(row[name], name) for name in lengths)
    return Arrival(seconds / 1_000 if time == MILLISECONDS else seconds, prompt, max(1, output))


def _seconds(value: Any, name: str) -> float:
    """A number, or a date and time of ISO 8601 (of UTC where no zone is given)."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = _moment(value, name)
    if isinstance(value, bool) or not math.isfinite(number):
        raise Malformed(f"has {value!r} as {name}, expected a time")
    return number


def _moment(value: Any, name: str) -> float:
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError) as error:
        raise Malformed(f"has {value!r} as {name}, expected a number or a date and time") from error


def _count(value: Any, name: str) -> int:
    """A whole number of tokens; an answer of none counts as one token, since a request asks for one at least."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    least = 0 if name in (form[2] for form in FORMS.values()) else 1
    if isinstance(value, bool) or not least <= number < 2**31 or number != int(number):
        raise Malformed(f"has {value!r} as {name}, expected a whole number of tokens from {least}")
    return int(number)
