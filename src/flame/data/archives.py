"""Archives, unpacked safely and completely; and files that have to be placed by hand."""

import json
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from lzma import LZMAError
from pathlib import Path

from flame.runtime.disk import room
from flame.runtime.lease import alone

SOURCE = ".flame-source.json"  # in a folder: the archive that it was made from
EXPANSION = 20  # an archive that expands to more than this factor plus 1 GB is taken for a bomb
GB = 10**9
BLOCK = 1 << 20  # bytes read at a time


def extract(archive: Path, folder: Path, *, max_bytes: int | None = None) -> Path:
    """The files of a tar (of any compression) or zip.

    Links are refused: no data set has any, and they are the usual way out of a folder.

    Args:
        archive: the file.
        folder: to make; left alone if it was made from this archive before.
        max_bytes: the most it may expand to; by default 20 times its size plus 1 GB.

    Returns:
        The folder.

    Raises:
        ValueError: the archive is truncated, has names that lead out of the folder, links or
            devices, or expands to more than it may.
        NoRoomError: the disk is full.
    """
    size = archive.stat().st_size
    origin = {"archive": archive.name, "size": size}
    limit = max_bytes or EXPANSION * size + GB
    record = folder / SOURCE
    with alone(folder.parent):
        if record.exists() and json.loads(record.read_text()) == origin:
            return folder
        aside = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            with room(folder, archive.name):
                if zipfile.is_zipfile(archive):
                    _unzip(archive, aside, limit)
                else:
                    _untar(archive, aside, limit)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, LZMAError) as error:
            raise ValueError(
                f"{archive} is not a complete archive ({error}): delete it and run again"
            ) from error
        (aside / SOURCE).write_text(json.dumps(origin))
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    return folder


def whole_members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Members of a tar in order; `tarfile` alone accepts one that is cut between two members.

    Raises:
        tarfile.ReadError: the end-of-archive marker is missing.
    """
    yield from tar
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"{path} has no end-of-archive marker")
    while tar.fileobj.read(BLOCK):  # up to the checksum of a compressed one
        pass


def refuse_outside(name: str, source: object) -> None:
    """Refuse a file name that would be written outside its folder.

    Raises:
        ValueError: it is absolute or has a `..` in it.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"{source}: the name {name!r} leads out of its folder")


def placed(folder: Path, files: Sequence[str], how: str) -> Path:
    """A folder with files that only a person can get, for example behind a form.

    Args:
        folder: where they have to lie; made if missing.
        files: their names in it.
        how: what to do to get them.

    Raises:
        ValueError: some are missing, with where each belongs and how to get it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [str(folder / name) for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(f"please place {', '.join(missing)}: {how}")
    return folder


def _unzip(archive: Path, folder: Path, limit: int) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        _refuse_bomb(archive, sum(member.file_size for member in members), limit)
        for member in members:
            refuse_outside(member.filename, archive)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{archive}: {member.filename!r} is a link")
            if member.flag_bits & 1:
                raise ValueError(f"{archive}: {member.filename!r} is encrypted")
            file.extract(member, folder)


def _untar(archive: Path, folder: Path, limit: int) -> None:
    total = 0
    with tarfile.open(archive) as file:
        for member in whole_members(file, archive):
            refuse_outside(member.name, archive)
            if not (member.isreg() or member.isdir()):
                raise ValueError(f"{archive}: {member.name!r} is a link or a device")
            total += member.size
            _refuse_bomb(archive, total, limit)
            file.extract(member, folder, filter="data")


def _refuse_bomb(archive: Path, total: int, limit: int) -> None:
    if total > limit:
        raise ValueError(
            f"{archive} expands to over {total / 1e9:.1f} GB, {limit / 1e9:.1f} GB are allowed"
        )
