"""An output appears complete or not at all; an interrupted job is resumed for the same inputs."""

from pathlib import Path

import pytest

from flame.runtime.resumable import resumable, write_atomic


class Killed(BaseException):
    """Stands for whatever ends a job."""


def interrupted(output: Path, fingerprint: dict) -> list[str]:
    """Begin a job that gets killed; names of the files that it found."""
    try:
        with resumable(output, fingerprint) as folder:
            found = [path.name for path in folder.iterdir()]
            (folder / "chunk").write_text("1")
            raise Killed
    except Killed:
        return found


def test_output_appears_at_the_end_and_nothing_else_remains(tmp_path):
    output = tmp_path / "out"
    with resumable(output, {"a": 1}) as folder:
        (folder / "chunk").write_text("1")
        assert not output.exists()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/chunk"]


def test_an_older_output_is_replaced_at_the_end(tmp_path):
    output = tmp_path / "out"
    for text in ("old", "new"):
        with resumable(output, {}) as folder:
            assert list(folder.iterdir()) == []
            (folder / text).touch()
    assert [p.name for p in output.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_same_inputs_go_on_and_others_start_afresh(tmp_path, caplog):
    caplog.set_level("INFO")
    output = tmp_path / "out"
    assert interrupted(output, {"a": 1}) == []
    assert interrupted(output, {"a": 1}) == ["chunk"]
    assert "starting over" not in caplog.text
    assert interrupted(output, {"a": 2}) == []
    assert "starting over" in caplog.text


@pytest.mark.parametrize("torn", [None, "", '{"a"'])
def test_a_missing_or_torn_fingerprint_starts_afresh(tmp_path, torn):
    output = tmp_path / "out"
    interrupted(output, {"a": 1})
    record = tmp_path / "out.partial" / "fingerprint.json"
    record.unlink() if torn is None else record.write_text(torn)
    with resumable(output, {"a": 1}) as folder:
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", [".tmp-checkpoint.safetensors", "deeper/.tmpOGcJXe"])
def test_what_a_killed_writer_left_aside_is_not_published(tmp_path, name):
    """The second name is one of those that safetensors gives to what it has not written yet."""
    output = tmp_path / "out"
    interrupted(output, {"a": 1})
    torn = tmp_path / "out.partial/content" / name
    torn.parent.mkdir(exist_ok=True)
    torn.write_text("half")
    with resumable(output, {"a": 1}):
        pass
    assert [p.name for p in output.rglob("*") if p.is_file()] == ["chunk"]


def test_write_atomic_leaves_the_old_file_when_the_writer_fails(tmp_path):
    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ZeroDivisionError

    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"
    write_atomic(path, lambda temporary: temporary.write_text("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "new"
