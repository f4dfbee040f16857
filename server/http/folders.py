"""A small folder that a client sends as one archive: tar, gzipped tar or zip.

Nothing is ever written to disk and no name in the archive is opened: the wanted files are read into
memory by their last names, and everything else is passed over unread.
"""

import gzip
import io
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from polyhead.server.http.errors import ArchiveTooLarge, BadArchive, shown

MAX_MEMBERS = 64
ZIP_MAGIC, GZIP_MAGIC = b"PK\x03\x04", b"\x1f\x8b"
ZIP_ENTRY = b"PK\x01\x02"
PLAIN_ZIP = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
    NotImplementedError,
)
"""What the standard library raises on archives that are none."""


@dataclass(frozen=True)
class Member:
    """One entry of an archive, before a byte of it is unpacked."""

    name: str
    size: int  # as the archive states it
    plain: bool  # an ordinary file
    folder: bool


def read_folder(data: bytes, wanted: Collection[str], max_bytes: int) -> dict[str, bytes]:
    """The files called `wanted`, which must lie in one folder of the archive.

    max_bytes: what all members together may unpack to. Raises `ArchiveTooLarge` before anything
    over a limit is unpacked, `BadArchive` for links, devices, paths that lead elsewhere, names that
    come twice, wanted files that are missing and data that is no archive.
    """
    read = _read_zip if data.startswith(ZIP_MAGIC) else _read_tar
    try:
        found = read(data, wanted, max_bytes)
    except BROKEN as exc:
        raise BadArchive(f"not a whole tar, tar.gz or zip file: {exc}"[:200]) from exc
    missing = sorted(set(wanted) - {path.name for path in found})
    if missing:
        raise BadArchive(f"{missing[0]} is not in it; expected {' and '.join(sorted(wanted))}")
    if len({path.parent for path in found}) > 1 or len(found) > len(wanted):
        raise BadArchive(f"expected {' and '.join(sorted(wanted))} in one folder, found several")
    return {path.name: content for path, content in found.items()}


class Checked:
    """Holds members to the limits as they come, before their contents do."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._seen: set[PurePosixPath] = set()

    def path(self, member: Member) -> PurePosixPath:
        """Where the member lies. Raises `ArchiveTooLarge` and `BadArchive`."""
        if len(self._seen) == MAX_MEMBERS:
            raise ArchiveTooLarge(f"it holds more than {MAX_MEMBERS} members")
        if not (member.plain or member.folder):
            raise BadArchive(f"{shown(member.name)} is neither a file nor a folder")
        path = _inside(member.name)
        if path in self._seen:
            raise BadArchive(f"{shown(member.name)} is in it twice")
        self._seen.add(path)
        self._left -= member.size
        if member.size < 0 or self._left < 0:
            raise ArchiveTooLarge(f"it unpacks to more than {self._max_bytes} bytes")
        return path


class Bounded(io.RawIOBase):
    """A stream of which at most `most` bytes are read, whatever the archive says of itself."""

    def __init__(self, stream: io.BufferedIOBase | IO[bytes], most: int) -> None:
        self._stream = stream
        self._left = most

    def read(self, size: int = -1) -> bytes:
        """Raises `ArchiveTooLarge`."""
        asked = self._left + 1 if size < 0 else min(size, self._left + 1)
        data = self._stream.read(asked)
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveTooLarge("it unpacks to more than is accepted")
        return data


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts
    if outside or "\\" in name or ":" in name or "\0" in name or len(name) > 512:
        raise BadArchive(f"{shown(name)} is not a path inside the archive")
    return path


def _read_tar(data: bytes, wanted: Collection[str], max_bytes: int) -> dict[PurePosixPath, bytes]:
    checked, found = Checked(max_bytes), {}
    raw = io.BytesIO(data)
    plain: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if data.startswith(GZIP_MAGIC) else raw
    # Beside its members' bytes a tar file has headers, padding and an end.
    stream = Bounded(plain, max_bytes + 4 * MAX_MEMBERS * tarfile.RECORDSIZE)
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            described = Member(
                member.name,
                member.size,
                plain=member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse(),
                folder=member.isdir(),
            )
            path = checked.path(described)
            if path.name in wanted and described.plain:
                content = tar.extractfile(member)
                found[path] = content.read() if content is not None else b""
                if len(found[path]) != member.size:
                    raise BadArchive(f"{shown(member.name)} is cut off")
    return found


def _read_zip(data: bytes, wanted: Collection[str], max_bytes: int) -> dict[PurePosixPath, bytes]:
    if data.count(ZIP_ENTRY) > 16 * MAX_MEMBERS:  # before `zipfile` makes an object of each
        raise ArchiveTooLarge(f"it holds more than {MAX_MEMBERS} members")
    checked, found = Checked(max_bytes), {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(checked.path(_described(entry)), entry) for entry in archive.infolist()]
        for path, entry in entries:
            if path.name in wanted and not entry.is_dir():
                with archive.open(entry) as content:
                    # Without a size `zipfile` unpacks first and then cuts to what was stated.
                    found[path] = Bounded(content, entry.file_size).read()
    return found


def _described(entry: zipfile.ZipInfo) -> Member:
    if entry.flag_bits & 1 or entry.compress_type not in PLAIN_ZIP:
        raise BadArchive(f"{shown(entry.filename)} is encrypted, or compressed by another way")
    # `filename` ends at the first NUL; what was written there is `orig_filename`.
    kind = stat.S_IFMT(entry.external_attr >> 16)
    return Member(
        entry.orig_filename,
        entry.file_size,
        plain=kind in (0, stat.S_IFREG) and not entry.is_dir(),
        folder=kind in (0, stat.S_IFDIR) and entry.is_dir(),
    )
