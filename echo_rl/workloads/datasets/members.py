"""Reads single files out of a zip or tar archive: nothing of it is installed or run."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from echo_rl.utils.archives import PackageUnavailable


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
