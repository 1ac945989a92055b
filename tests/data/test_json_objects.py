"""Objects of JSON lists and lines are streamed; a truncated or foreign file is refused by name."""

import json

import pytest

from flame.data import json_objects as module
from flame.data.json_objects import read_objects

OBJECTS = [
    {"__key__": f"{i:05d}", "minicpm": f'A "text", [of] {{many}} kinds, 北 {"x" * (i % 60)}\n'}
    for i in range(200)
]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OBJECTS),
        json.dumps(OBJECTS, indent=1, ensure_ascii=False) + "\n",
        "\n".join(map(json.dumps, OBJECTS)),
        "".join(json.dumps(found, ensure_ascii=False) + "\n\n" for found in OBJECTS),
    ],
    ids=["list", "indented list", "lines", "lines with gaps"],
)
def test_objects_of_lists_and_lines_are_read_in_blocks(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(module, "BLOCK", block)
    path = tmp_path / "captions.json"
    path.write_text(text, encoding="utf-8")
    assert [*read_objects(path)] == OBJECTS


@pytest.mark.parametrize("block", [16, 1 << 20])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(OBJECTS)[:-1],
        json.dumps(OBJECTS)[:-20],
        "\n".join(map(json.dumps, OBJECTS))[:-1],
        "<html>not found</html>",
    ],
    ids=["list without its end", "list cut in an object", "lines cut", "a page"],
)
def test_a_torn_file_is_refused_by_name(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(module, "BLOCK", block)
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"captions\.json is not a complete JSON list or lines"):
        [*read_objects(path)]


def test_what_is_no_object_or_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('[{"a": 1}, 7]')
    with pytest.raises(ValueError, match=r"captions\.json: 7 is not an object"):
        [*read_objects(path)]
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"captions\.json is not UTF-8"):
        [*read_objects(path)]


@pytest.mark.parametrize("text", ["", " \n", "[]", "\n[ ]\n"])
def test_an_empty_file_has_no_objects(tmp_path, text):
    (tmp_path / "captions.json").write_text(text)
    assert [*read_objects(tmp_path / "captions.json")] == []


def test_an_object_longer_than_a_block_is_whole_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    path = tmp_path / "captions.json"
    text = json.dumps([{"a": "x" * 1000}])
    path.write_text(text[:-10])
    with pytest.raises(ValueError, match="not a complete JSON"):
        [*read_objects(path)]
    path.write_text(text)
    assert [*read_objects(path)] == [{"a": "x" * 1000}]


@pytest.mark.parametrize("start", [b"[", b'{"a": 1}'])
def test_bytes_that_are_not_utf8_are_named_wherever_they_are(tmp_path, start):
    path = tmp_path / "captions.json"
    path.write_bytes(start + b" " * 100_000 + b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"captions\.json is not UTF-8"):
        [*read_objects(path)]


def test_numbers_of_any_size_are_read(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('{"id": 123456789012345678901234567890, "score": 0.25}')
    assert [*read_objects(path)] == [{"id": 123456789012345678901234567890, "score": 0.25}]
