"""A large file is hashed once, and again whenever it may have changed."""

import json
import os
import shutil
import time

import pytest

from flame.runtime import checksums
from flame.runtime.checksums import SEEN, SUMS, digest, seal, sha256, verified, verify

MINUTES_AGO = time.time_ns() - 300 * 10**9


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are hashed, as they are."""
    names = []

    def counted(path):
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(checksums, "sha256", counted)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch, hashed):
    """A sealed folder with a large file that was written minutes ago, and a small one."""
    monkeypatch.setattr(checksums, "LARGE", 1000)
    (tmp_path / "large").write_bytes(b"a" * 1000)
    (tmp_path / "small").write_bytes(b"b")
    os.utime(tmp_path / "large", ns=(MINUTES_AGO, MINUTES_AGO))
    seal(tmp_path)
    hashed.clear()
    return tmp_path


def test_a_large_file_is_not_hashed_again_until_it_changes(folder, hashed):
    for _ in range(3):
        verify(folder)
        assert verified(folder / "large") == folder / "large"
        assert digest(folder / "large") == sha256(folder / "large")
    assert hashed == ["small"] * 3
    (folder / "large").write_bytes(b"a" * 1000)
    verify(folder)
    assert hashed[3:] == ["large", "small"]


@pytest.mark.parametrize("content", [b"a" * 999, b"c" * 1000])
def test_a_changed_file_is_refused_however_often_it_is_read(folder, content):
    (folder / "large").write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match="large is broken: its sha256 is"):
            verified(folder / "large")


def test_a_file_of_another_size_is_hashed_even_if_its_time_is_the_old_one(folder):
    (folder / "large").write_bytes(b"a" * 1001)
    os.utime(folder / "large", ns=(MINUTES_AGO, MINUTES_AGO))
    with pytest.raises(ValueError, match="large is broken"):
        verified(folder / "large")


def test_a_file_of_just_now_may_change_without_its_time(folder, hashed):
    """A file system's clock ticks every few milliseconds only."""
    os.utime(folder / "large")
    verified(folder / "large")
    verified(folder / "large")
    assert hashed == ["large", "large"]


def test_a_new_seal_counts_at_once(folder):
    other = sha256(folder / "small")
    (folder / SUMS).write_text(f"{other}  large\n")
    with pytest.raises(ValueError, match="large is broken"):
        verified(folder / "large")


def test_a_copy_is_hashed_once(folder, hashed, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    os.utime(copy / "large", ns=(MINUTES_AGO + 5, MINUTES_AGO + 5))
    for _ in range(2):
        verified(copy / "large")
    assert hashed == ["large"]


@pytest.mark.parametrize("torn", ["", "{", '{"large": []}'])
def test_a_torn_record_only_costs_time(folder, hashed, torn):
    (folder / SEEN).write_text(torn)
    verified(folder / "large")
    assert hashed == ["large"]
    assert json.loads((folder / SEEN).read_text())["large"][1] == 1000


def test_a_folder_that_cannot_be_written_to_is_read(folder, hashed, monkeypatch):
    (folder / SEEN).unlink()

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(checksums.os, "replace", refused)
    verified(folder / "large")
    assert hashed == ["large"]


def test_what_was_hashed_already_is_sealed_as_it_is(folder, hashed):
    seal(folder, digests={"large": sha256(folder / "large")})
    assert hashed == ["small"]
    assert SEEN not in (folder / SUMS).read_text()
    verify(folder)


def test_a_folder_without_digests_is_hashed(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    assert verified(tmp_path / "file") == tmp_path / "file"
    assert digest(tmp_path / "file") == sha256(tmp_path / "file")
