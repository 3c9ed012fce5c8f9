"""Reads files out of a zip or tar archive: nothing of it is installed or run."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from echo_rl.utils.archives import PackageUnavailable


def read_member(archive: Path, member: str) -> bytes:
    """The only file of a zip or tar archive whose path ends with `member`, gunzipped where it is gzip."""
    try:
        data = _read_zip(archive, member) if zipfile.is_zipfile(archive) else _read_tar(archive, member)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise _unreadable(archive, error) from error
    return gzip.decompress(data) if member.endswith(".gz") else data


def read_members(wheel: Path, pattern: str) -> dict[str, bytes]:
    """The files of a wheel whose paths match a shell pattern, in the order of their paths."""
    try:
        with zipfile.ZipFile(wheel) as opened:
            names = sorted(name for name in opened.namelist() if fnmatchcase(name, pattern))
            return {name: opened.read(name) for name in names}
    except (zipfile.BadZipFile, OSError) as error:
        raise _unreadable(wheel, error) from error


def _unreadable(archive: Path, error: Exception) -> PackageUnavailable:
    return PackageUnavailable(f"{archive.name} is not a readable archive ({error}); delete it and retry")


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
