"""Full disks: an error that names the file and says what to do."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(OSError):
    """The disk is full, or a quota or file size limit is reached."""


@contextmanager
def room(path: Path, what: str = "") -> Iterator[None]:
    """Turn any library's "disk full" into a `NoRoomError` that names the file.

    Args:
        path: file or folder that is written.
        what: download whose partial result is kept, for the message.

    Raises:
        NoRoomError: the disk is full.
    """
    try:
        yield
    except NoRoomError:
        raise
    except Exception as error:
        number = _errno(error)
        if number not in FULL:
            raise
        words = os.strerror(number)
        kept = f"no room for {what} ({words}): partial files are kept" if what else words
        raise NoRoomError(number, f"{kept}; free some space and run again", str(path)) from error


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse a download that does not fit on the disk.

    Args:
        folder: where it goes.
        needed: bytes.
        what: name of the download, for the message.

    Raises:
        NoRoomError: fewer bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        words = f"no room for {what}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        raise NoRoomError(errno.ENOSPC, f"{words}; free some space and run again", str(folder))


def _errno(error: Exception) -> int:
    """Error number of an exception, 0 if it has none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # Rust libraries and shutil.copytree set no errno but print it.
    found = re.search(r"\b(?:Errno|os error) (\d+)\b", str(error))
    return int(found[1]) if found else 0
