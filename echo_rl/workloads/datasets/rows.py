"""Reads the rows of a JSON file one by one: lines of JSON, or the entries of one JSON array, plain or gzipped.

A row that is no JSON does not end the reading: what is wrong with it is yielded in its place.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echo_rl.errors import DatasetError

MOST_LINE = 1 << 24
"""Bytes of the longest line that is read."""


class Malformed(ValueError):
    """Says what is wrong with a row and what was expected."""


def opened(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """The bytes of a file, unzipped where it is gzip. Raises `DatasetError` where there is no such file."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
        raise DatasetError(f"{path} {what}; give a file")
    try:
        with open(path, "rb") as stream:
            zipped = stream.read(2) == b"\x1f\x8b"
        return gzip.open(path) if zipped else open(path, "rb")
    except OSError as error:
        raise DatasetError(f"cannot read {path} ({error.strerror}); give a file that you may read") from error


def lines(path: Path) -> Iterator[tuple[int, str | Malformed]]:
    """The number and text of every line that isn't blank. Raises `DatasetError` where the file is not UTF-8 text."""
    number = 0
    try:
        with opened(path) as stream:
            while line := stream.readline(MOST_LINE + 1):
                number += 1
                if len(line) > MOST_LINE:
                    while line and not line.endswith(b"\n"):
                        line = stream.readline(MOST_LINE)
                    yield number, Malformed(f"is longer than {MOST_LINE >> 20} MiB; give one conversation a line")
                elif text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text ({error.reason} in line {number}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} is damaged ({error}); get it anew") from error


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The place and value of every row; the value is a `Malformed` where the row is no JSON.

    Raises `DatasetError` where the file cannot be read at all.
    """
    if _whole(path):
        yield from ((f"entry {number}", row) for number, row in enumerate(_entries(path), 1))
    else:
        yield from ((f"line {n}", text if isinstance(text, Malformed) else parsed(text)) for n, text in lines(path))


def parsed(text: str) -> Any:
    """The JSON value of a text, or what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return Malformed(f"is no JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Malformed(f"is no JSON ({said})")


def _whole(path: Path) -> bool:
    """True where a file is one JSON value rather than one a line: an array, or one that its first line only opens."""
    first = next((text for _, text in lines(path)), "")
    if isinstance(first, Malformed):
        with opened(path) as stream:
            return stream.read(64).lstrip().startswith(b"[")
    return first.startswith("[") or (first.startswith("{") and isinstance(parsed(first), Malformed) and _pretty(path))


def _pretty(path: Path) -> bool:
    """True for a file that is called JSON: its one object is spread over its lines."""
    return path.name.removesuffix(".gz").endswith(".json")


def _entries(path: Path) -> list[Any]:
    """The entries of a file that is one array, or its one object."""
    try:
        with opened(path) as stream:
            found = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} is damaged ({error}); get it anew") from error
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DatasetError(f"{path} is no JSON ({said}); give an array of conversations, or one a line") from error
    return found if isinstance(found, list) else [found]
