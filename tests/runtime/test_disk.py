"""A full disk is one error, whatever library meets it, and names the file."""

import errno
import shutil
from pathlib import Path

import pytest

from flame.runtime.disk import NoRoomError, check_room
from flame.runtime.resumable import resumable, write_atomic


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EFBIG, "File too large"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    ],
)
def test_a_full_disk_names_the_file(tmp_path, error):
    """Python's own error does not, where a file is open already."""

    def write(temporary: Path) -> None:
        raise error

    with pytest.raises(NoRoomError, match=r"free some space and run again: .*/table.csv'$"):
        write_atomic(tmp_path / "table.csv", write)
    with pytest.raises(NoRoomError, match=r"/out\.partial'$"), resumable(tmp_path / "out", {}):
        raise error


def test_another_error_stays_what_it_is(tmp_path):
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output") as told, resumable(tmp_path / "out", {}):
        raise error
    assert told.value is error


def test_a_download_that_does_not_fit_is_refused_before_it_starts(tmp_path):
    check_room(tmp_path, 1, "set.zip")
    with pytest.raises(NoRoomError, match=r"no room for set\.zip: needs 1000000000\.0 GB, .* free"):
        check_room(tmp_path, 10**18, "set.zip")
