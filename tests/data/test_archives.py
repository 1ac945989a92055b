"""Archives are unpacked completely and inside their folder, or refused."""

import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from flame.data import archives
from tests.data.test_hub import names


def tar_of(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return path


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.tar.xz", "set.zip"])
def test_an_archive_becomes_a_folder(tmp_path, name):
    members = [("a/one.txt", b"1"), ("two.txt", b"22")]
    mode = {".tar": "w", ".gz": "w:gz", ".xz": "w:xz"}.get(Path(name).suffix)
    make = tar_of if mode else zip_of
    archive = make(tmp_path / name, members, *([mode] if mode else []))
    folder = archives.extract(archive, tmp_path / "out")
    assert names(folder) == ["a/one.txt", "two.txt"]
    (folder / "two.txt").write_bytes(b"mine")
    archives.extract(archive, folder)
    assert (folder / "two.txt").read_bytes() == b"mine"


def test_another_archive_replaces_the_folder(tmp_path):
    archives.extract(zip_of(tmp_path / "a.zip", [("a", b"a")]), tmp_path / "out")
    archives.extract(zip_of(tmp_path / "b.zip", [("b", b"b")]), tmp_path / "out")
    assert names(tmp_path / "out") == ["b"]


EVIL = ["../evil", "/flame-evil", "a/../../evil", "a\\..\\..\\evil", "C:/evil"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("make", [tar_of, zip_of], ids=["tar", "zip"])
def test_names_that_lead_out_of_the_folder(tmp_path, make, name):
    archive = make(tmp_path / "in", [("fine", b"1"), (name, b"evil")])
    with pytest.raises(ValueError, match="leads out of its folder"):
        archives.extract(archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("*evil*"))
    assert not Path("/flame-evil").exists()
    assert not (tmp_path / "deep/out").exists()


@pytest.mark.parametrize(
    "content",
    [
        (tarfile.SYMTYPE, "/etc"),
        (tarfile.LNKTYPE, "../../etc/passwd"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
    ids=["symlink", "hardlink", "device", "fifo"],
)
def test_links_and_devices(tmp_path, content):
    archive = tar_of(tmp_path / "set.tar", [("a", content), ("a/b", b"evil")])
    with pytest.raises(ValueError, match="'a' is a link or a device"):
        archives.extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("a")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        file.writestr(info, "/etc")
    with pytest.raises(ValueError, match="'a' is a link"):
        archives.extract(tmp_path / "set.zip", tmp_path / "out")


@pytest.mark.parametrize("make", [tar_of, zip_of], ids=["tar", "zip"])
def test_a_bomb_is_not_unpacked(tmp_path, make):
    zeros = bytes(5_000_000)
    archive = make(tmp_path / "in", [("a", zeros), ("b", zeros)], *(["w:gz"] * (make is tar_of)))
    assert archive.stat().st_size < 50_000
    with pytest.raises(ValueError, match=r"expands to over 0\.0 GB, 0\.0 GB are allowed"):
        archives.extract(archive, tmp_path / "out", max_bytes=9_000_000)
    assert not (tmp_path / "out").exists()
    archives.extract(archive, tmp_path / "out", max_bytes=10_000_000)
    assert names(tmp_path / "out") == ["a", "b"]


def test_an_archive_that_breaks_off_anywhere(tmp_path):
    members = [("a", b"1" * 1000), ("b", b"2" * 3000)]
    whole = tar_of(tmp_path / "whole.tar", members).read_bytes()
    end = 512 + 1024 + 512 + 3072
    assert not any(whole[end:])
    for length in (1, 300, 511, 512, 600, 1536, 1600, 2048, 4000, end):
        archive = tmp_path / "set.tar"
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"set\.tar is not a complete archive"):
            archives.extract(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tar.xz", "set.zip"])
def test_a_packed_archive_that_breaks_off(tmp_path, name):
    noise = os.urandom(20_000)
    if name.endswith("zip"):
        archive = zip_of(tmp_path / name, [("a", noise), ("b", noise)])
    else:
        archive = tar_of(tmp_path / name, [("a", noise), ("b", noise)], f"w:{name[-2:]}")
    whole = archive.read_bytes()
    for length in (100, len(whole) // 2, len(whole) - 20):
        archive.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a complete archive"):
            archives.extract(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_damaged_zip(tmp_path):
    archive = zip_of(tmp_path / "set.zip", [("a", os.urandom(5000))])
    data = bytearray(archive.read_bytes())
    data[1000] ^= 255
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="is not a complete archive"):
        archives.extract(archive, tmp_path / "out")


def test_files_to_be_placed(tmp_path):
    folder = tmp_path / "raw"
    with pytest.raises(ValueError, match=r"place .*raw/a\.zip, .*raw/b\.json: fill in the form"):
        archives.placed(folder, ["a.zip", "b.json"], "fill in the form at example.org")
    (folder / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"place [^,]*raw/b\.json: fill"):
        archives.placed(folder, ["a.zip", "b.json"], "fill in the form at example.org")
    (folder / "b.json").write_bytes(b"")
    assert archives.placed(folder, ["a.zip", "b.json"], "") == folder
